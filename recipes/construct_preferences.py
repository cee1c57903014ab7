"""Build preference pairs from prompts with images: both answers by one model, judged twice over.

    # Calls and cost at most, without a call
    trl-dt2it construct --config construct_preferences --dry_run

    # The first prompts only
    trl-dt2it construct --config construct_preferences --max_prompts 50

    # All; what was paid for is not asked again
    trl-dt2it construct --config construct_preferences

Run it again after a kill: replies are kept in OUTPUT_DIR/judge.jsonl and generator.jsonl, and none is paid for
twice. Train on the result with `--dataset_name OUTPUT_DIR/pairs`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from trl import TrlParser

from trl_dt2it.utils import whole_file


@dataclass
class ConstructArguments:
    """
    Arguments of this script; those that are not listed are arguments of [`trl_dt2it.debias.distill`].

    Parameters:
        dataset_name (`str`):
            Prompts: a Parquet, JSON or JSON lines file, a folder of Parquet files, or a Hub id. Rows have `question`
            or `prompt`, `images`, and optionally `reference` and `candidates`.
        output_dir (`str`):
            Folder of pairs, report and replies.
        judge (`dict`):
            The judge: the arguments of [`trl_dt2it.judge.Endpoint`] and [`trl_dt2it.judge.Budget`], and
            `max_concurrency` and `max_retries`.
        generator (`dict`, *optional*):
            The model that writes candidates, likewise.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Split, on the Hub.
        max_prompts (`int`, *optional*):
            Takes the first so many prompts only.
        image_root (`str`, *optional*):
            Folder that the paths of images start from, and that none may leave.
        max_image_pixels (`int`, *optional*):
            Largest image.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to show calls and cost only, both at most.
    """

    dataset_name: str = field(metadata={"help": "Prompts: a file, a folder or a Hub id."})
    output_dir: str = field(metadata={"help": "Folder of pairs, report and replies."})
    # Not required: the parser takes JSON for optional fields alone.
    judge: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Endpoint and budget of the judge, mapping or JSON."}
    )
    generator: dict[str, Any] | str | None = field(default=None, metadata={"help": "The same of the generator."})
    dataset_split: str = field(default="train", metadata={"help": "Split, on the Hub."})
    max_prompts: int | None = field(default=None, metadata={"help": "Take only so many prompts."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that paths of images start from."})
    max_image_pixels: int | None = field(default=None, metadata={"help": "Largest image."})
    num_candidates: int = field(default=4, metadata={"help": "Candidates to generate for a prompt."})
    num_shuffles: int = field(default=4, metadata={"help": "Orders in which the judge sees the candidates."})
    min_gap: float = field(default=1.0, metadata={"help": "Smallest gap of both scores, in points."})
    min_spread: float = field(default=2.0, metadata={"help": "Below it, candidates are alike, in points."})
    num_bins: int = field(default=5, metadata={"help": "Bins of strength."})
    pairs_per_prompt: int | None = field(default=2, metadata={"help": "Most pairs of one prompt."})
    max_pairs: int | None = field(default=None, metadata={"help": "Most pairs in all."})
    language: str | None = field(default=None, metadata={"help": "en or zh; that of the question by default."})
    source: str = field(default="distilled", metadata={"help": "What the column `source` says."})
    prompts_at_once: int = field(default=32, metadata={"help": "Prompts that are asked about together."})
    seed: int = field(default=42, metadata={"help": "Seed of orders and draw."})
    dry_run: bool = field(default=False, metadata={"help": "Show calls and cost only."})


PASSED_ON = ("num_candidates", "num_shuffles", "min_spread", "language")
PASSED_ON_TO_DISTILL = (
    *PASSED_ON,
    *("min_gap", "num_bins", "pairs_per_prompt", "max_pairs", "source", "prompts_at_once", "seed"),
)


def main(args):
    from trl_dt2it.data import ImageOptions, write_parquet
    from trl_dt2it.data.export import refuse_unpublishable
    from trl_dt2it.debias import distill, plan_distill
    from trl_dt2it.judge import JudgeClient
    from trl_dt2it.judge.store import read_endpoint
    from trl_dt2it.processes import run_lock

    if not args.judge:
        raise ValueError("Give `judge`, the endpoint of the judge.")
    console, output = Console(), Path(args.output_dir)
    roles = [name for name in ("judge", "generator") if getattr(args, name)]
    given = {name: read_endpoint(name, getattr(args, name)) for name in roles}
    prompts = read_prompts(args.dataset_name, args.dataset_split)
    if args.max_prompts is not None:
        prompts = prompts.select(range(min(args.max_prompts, len(prompts))))
    sizes = {} if args.max_image_pixels is None else {"max_image_pixels": args.max_image_pixels}
    options = ImageOptions(image_root=args.image_root, **sizes)
    if args.dry_run:
        endpoints = {name: endpoint for name, (endpoint, _) in given.items()}
        settings = {name: getattr(args, name) for name in PASSED_ON}
        plan_distill(prompts, **endpoints, **settings, image_options=options).show(console)
        return
    with run_lock(output):
        refuse_unpublishable(prompts, options, paths_are_images=True)  # before anything is paid for
        # `distill` shows how far it is.
        clients = {
            name: JudgeClient(endpoint, output / f"{name}.jsonl", **{"show_progress": False, **others})
            for name, (endpoint, others) in given.items()
        }
        settings = {name: getattr(args, name) for name in PASSED_ON_TO_DISTILL}
        pairs, report = distill(prompts, **clients, **settings, image_options=options)
        write_parquet(pairs, output / "pairs" / "train.parquet", image_options=options)
        with whole_file(output / "report.json") as part:
            part.write_text(report.to_json() + "\n", encoding="utf-8")
        report.show(console)
        console.print(f"Train on it with --dataset_name {output / 'pairs'}", soft_wrap=True, highlight=False)


def read_prompts(name, split):
    """Read rows of a file, of a folder or of the Hub."""
    from datasets import load_dataset

    path = Path(name).expanduser()
    kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
    if path.is_file():
        if path.suffix not in kinds:
            raise ValueError(f"{path} is none of {', '.join(kinds)}.")
        return load_dataset(kinds[path.suffix], data_files=str(path), split="train")
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*.parquet"))
        if not files:
            raise ValueError(f"{path} holds no Parquet file.")
        return load_dataset("parquet", data_files=files, split="train")
    if path.is_absolute() or path.suffix in kinds:
        raise ValueError(f"There is no file or folder {name} to read prompts from.")
    return load_dataset(name, split=split)


def make_parser():
    return TrlParser(ConstructArguments, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
