r"""Evaluate a reward model on the benchmarks of the field, beside the published scores of others.

    # The paper's three
    trl-dt2it evaluate --model reward-model --benchmarks all

    # By name
    trl-dt2it evaluate --model reward-model --benchmarks vl-rewardbench hpdv3-test

    # Rows from a file
    trl-dt2it evaluate --model reward-model --benchmarks mm-rlhf-rewardbench \
        --rows '{"mm-rlhf-rewardbench": "mm_reward_bench.jsonl"}' --image_root images

    # Does the model look at the images?
    trl-dt2it evaluate --model reward-model --benchmarks all --controls blank swapped low_resolution

Rows come from the Hub unless `--rows` names a file or folder for a benchmark. `all` are the three of the paper;
the others of `trl_dt2it.evaluation.BENCHMARKS` go by name. Tables are printed, `evaluation.json`, the scores of
every pair and `report.html` are written to `--output_dir`, and `--model_card true` puts the numbers into the
model card. With `--controls`, all of them have the accuracy with other images too; scores of a control that a
killed run has written are not computed again. The same keys may stand in a YAML file, given with `--config`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from trl import TrlParser

from trl_dt2it.processes import on_main_process
from trl_dt2it.recipe import ScorerArguments, share_work, show_dry_run, show_paths
from trl_dt2it.utils import write_json


@dataclass
class EvaluateArguments(ScorerArguments):
    """
    Arguments of this script, besides those of [`trl_dt2it.recipe.ScorerArguments`].

    Parameters:
        benchmarks (`list[str]`, *optional*, defaults to `["all"]`):
            Names of benchmarks; `all` for the three of the paper.
        rows (`dict` or `str`, *optional*):
            By the names of benchmarks, a file, a folder or a Hub id with their rows; as a mapping, or as JSON.
        image_root (`dict` or `str`, *optional*):
            Folder that the paths of images start from; for all, or by the names of benchmarks.
        output_dir (`str`, *optional*):
            Folder of the results; by default `evaluation` under the model, or in the working directory if the model
            is on the Hub.
        min_pixels, max_pixels (`int`, *optional*):
            Smallest and largest number of pixels of an image; by default those of training.
        videos (`str`, *optional*, defaults to `"auto"`):
            Treatment of rows about a video: `auto`, `images`, `video` or `skip`.
        on_bad_row (`str`, *optional*, defaults to `"raise"`):
            `leave_out` drops rows that cannot be used, and says how many.
        round (`int`, *optional*):
            Rounds scores to so many digits, only to compare with numbers that were measured so.
        controls (`list[str]`, *optional*):
            Other images to show the model, some of `blank`, `swapped` and `low_resolution`; as in
            [`trl_dt2it.evaluation.audit_looking`].
        model_card (`bool`, *optional*, defaults to `False`):
            Whether to write the numbers into the `README.md` of the model's directory, in place of earlier ones.
    """

    benchmarks: list[str] = field(default_factory=lambda: ["all"], metadata={"help": "Names, or `all`."})
    rows: dict | str | None = field(default=None, metadata={"help": "Where the rows of each benchmark are."})
    image_root: dict | str | None = field(default=None, metadata={"help": "Folder that paths of images start from."})
    output_dir: str | None = field(default=None, metadata={"help": "Folder of the results."})
    min_pixels: int | None = field(default=None, metadata={"help": "Smallest number of pixels of an image."})
    max_pixels: int | None = field(default=None, metadata={"help": "Largest number of pixels of an image."})
    videos: str = field(default="auto", metadata={"help": "What becomes of rows about a video."})
    on_bad_row: str = field(default="raise", metadata={"help": "`raise` or `leave_out`."})
    round: int | None = field(default=None, metadata={"help": "Rounds scores to so many digits."})
    controls: list[str] | None = field(
        default=None, metadata={"help": "Other images to show: `blank`, `swapped`, `low_resolution`."}
    )
    model_card: bool = field(default=False, metadata={"help": "Whether to write the model card."})


def resolve(args):
    """Return rows and the folder of images of each benchmark, by name; wrong names fail here."""
    from trl_dt2it.evaluation.benchmarks import PAPER_BENCHMARKS, find_benchmark
    from trl_dt2it.evaluation.looking import shown_by

    shown_by(args.controls or ())
    names = dict.fromkeys(n for name in args.benchmarks for n in (PAPER_BENCHMARKS if name == "all" else [name]))
    for name in names:
        find_benchmark(name)
    rows, roots = mapping("rows", args.rows), args.image_root
    is_for_all = isinstance(roots, str) and not roots.lstrip().startswith("{")
    roots = dict.fromkeys(names, roots) if is_for_all else mapping("image_root", roots)
    for field_name, given in (("rows", rows), ("image_root", roots)):
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"`{field_name}` names {unknown[0]}, which is not among {', '.join(names)}.")
    for name, root in roots.items():
        if not Path(root).is_dir():
            raise ValueError(f"`image_root` of {name} is {root}, but there is no such folder.")
    return {name: (rows.get(name), roots.get(name)) for name in names}


def mapping(name, value):
    """Read a setting by benchmark, as a mapping or as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    if not isinstance(value or {}, dict):
        raise ValueError(f'`{name}` has to be a mapping from names of benchmarks, such as {{"vl-rewardbench": ...}}.')
    return dict(value or {})


def main(args):
    from trl_dt2it.data.cards import run_command
    from trl_dt2it.evaluation import evaluate, pooled, show_published
    from trl_dt2it.evaluation.benchmarks import PAPER_BENCHMARKS
    from trl_dt2it.evaluation.results import update_card
    from trl_dt2it.report import write_report

    args.named_model()
    is_local = Path(args.model).is_dir()
    if args.model_card and not (is_local and (Path(args.model) / "README.md").is_file()):
        raise ValueError(f"`model_card` is true, but {args.model} is no directory with a README.md.")
    sources = resolve(args)
    state, console = share_work(), Console()
    folder = Path(args.output_dir or (Path(args.model) / "evaluation" if is_local else "evaluation"))
    if args.dry_run:
        if state.is_main_process:  # which alone has to read for it
            plan(args, sources, folder)
        return
    scorer = args.load(min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(args.model).name
    results = []
    for benchmark, (rows, image_root) in sources.items():
        result = evaluate(
            scorer,
            benchmark,
            rows,
            image_root=image_root,
            model=args.model,
            scores_file=folder / f"{benchmark}.parquet" if state.is_main_process else None,
            round=args.round,
            controls=args.controls or (),
            videos=args.videos,
            on_bad_row=args.on_bad_row,
        )
        results.append(result)
        if state.is_main_process:
            result.show(console)

    def finish():
        total = None
        if len(results) > 1:
            total = pooled(results)
            show_published(results, console, model=name)
            if set(total.names) == set(PAPER_BENCHMARKS):
                share = f"the paper's mean overall accuracy: {total.micro:.2%}"
                console.print(f"{total.correct:,} of {total.n:,} pairs, {share}")
        content = {
            "model": args.model,
            "dtype": str(next(scorer.model.parameters()).dtype),
            "results": [result.to_dict() for result in results],
            "pooled": None if total is None else {"micro": total.micro, "mean": total.mean, "n": total.n},
        }
        file = folder / "evaluation.json"
        write_json(file, content, ensure_ascii=False)
        if args.model_card:
            command = run_command(state.num_processes)
            update_card(Path(args.model) / "README.md", results, model_name=name, command=command)
        show_paths({"Results": file, "Report": write_report(folder / "report.html", evaluations=[file])}, console)

    on_main_process(finish)
    state.destroy_process_group()


def plan(args, sources, folder):
    """Show what would be done; rows on the Hub are not downloaded, and counted as in the current release."""
    from trl_dt2it.evaluation import BENCHMARKS, read_benchmark
    from trl_dt2it.evaluation.looking import shown_by

    reads = []
    for name, (rows, image_root) in sources.items():
        if rows is not None and Path(rows).exists():
            count = len(read_benchmark(name, rows, image_root=image_root))
        else:
            count = next(iter(BENCHMARKS[name].sizes), None)
        number = "as many pairs as there are" if count is None else f"{count:,} pairs"
        reads.append((name, f"{rows or BENCHMARKS[name].source.hub_id}, {number}"))
    if args.controls:
        reads.append(("controls", f"{', '.join(args.controls)}: {1 + len(shown_by(args.controls))} times the scoring"))
    card = f", and the model card {Path(args.model) / 'README.md'}" if args.model_card else ""
    writes = f"{folder / 'evaluation.json'}, and scores beside it{card}"
    show_dry_run([("model", args.model), *reads, ("writes", writes)])


def make_parser():
    return TrlParser(EvaluateArguments, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
