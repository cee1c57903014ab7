"""Write one HTML file about a run of rounds and about evaluations, to read, to share, and to judge pairs in.

    # A run of rounds
    trl-dt2it report --run outputs/dt2it_digits

    # An evaluation
    trl-dt2it report --evaluation reward-model/evaluation/evaluation.json

    # Corrections that were exported from the page's gallery, into the ledger
    trl-dt2it report --run outputs/dt2it_digits --corrections corrections.json

`recipes/dt2it.py` and `recipes/evaluate.py` write their own. Corrections that people have exported from the
gallery go into the ledger of the run, where they override all rounds; the report is then written anew.
"""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from trl import TrlParser


@dataclass
class ReportArguments:
    """
    Arguments of this script.

    Parameters:
        run (`str`, *optional*):
            Folder of a run of `recipes/dt2it.py`; it need not have ended.
        evaluation (`list[str]`, *optional*):
            Files `evaluation.json` of `recipes/evaluate.py`.
        style_before, style_after (`str`, *optional*):
            Audits of style before and after curation, from `StyleReport.to_json`; by default of the run's pool.
        blind (`str`, *optional*):
            What text tells without the image: the `--output_file` of `trl-dt2it audit --blind`, or
            `BlindReport.to_json`.
        corrections (`str`, *optional*):
            A file that a report has exported; it is written into the run's ledger first.
        output (`str`, *optional*):
            The file to write; by default `report.html` in the folder of the run, or beside the first evaluation.
        gallery (`int`, *optional*, defaults to `300`):
            Most pairs in the gallery.
        title (`str`, *optional*):
            Title of the page.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to say only what would be read and written.
    """

    run: str | None = field(default=None, metadata={"help": "Folder of a run of rounds."})
    evaluation: list[str] | None = field(default=None, metadata={"help": "Files evaluation.json."})
    style_before: str | None = field(default=None, metadata={"help": "Audit of style before curation, JSON."})
    style_after: str | None = field(default=None, metadata={"help": "Audit of style after curation, JSON."})
    blind: str | None = field(default=None, metadata={"help": "Audit without images, JSON."})
    corrections: str | None = field(default=None, metadata={"help": "Corrections that a report has exported."})
    output: str | None = field(default=None, metadata={"help": "The file to write."})
    gallery: int = field(default=300, metadata={"help": "Most pairs in the gallery."})
    title: str | None = field(default=None, metadata={"help": "Title of the page."})
    dry_run: bool = field(default=False, metadata={"help": "Say only what would be read and written."})


def main(args):
    from trl_dt2it.curation import CurationLedger
    from trl_dt2it.demo.digits import DEMO_LOADERS
    from trl_dt2it.processes import run_lock
    from trl_dt2it.recipe import show_dry_run, show_paths
    from trl_dt2it.report import write_report

    evaluations = args.evaluation or []
    for name, paths in (("run", [args.run]), ("corrections", [args.corrections]), ("evaluation", evaluations)):
        for path in paths:
            if path is not None and not Path(path).exists():
                raise ValueError(f"`{name}` is {path}, but there is no such file or folder.")
    console = Console()
    beside = args.run or (Path(evaluations[0]).parent if evaluations else ".")
    output = Path(args.output or Path(beside) / "report.html")
    ledger = None if args.run is None else Path(args.run) / "ledger"
    has_ledger = ledger is not None and (ledger / "ledger.json").is_file()
    if args.corrections is not None and not has_ledger:
        raise ValueError("`corrections` need the ledger of a run; give `run`, the folder of one that has decided.")
    if args.dry_run:
        show_dry_run(
            [
                ("run", args.run),
                ("pairs in its ledger", len(CurationLedger(ledger).state()) if has_ledger else None),
                *(("evaluation", path) for path in evaluations),
                ("corrections, into the ledger", args.corrections),
                ("writes", output),
            ]
        )
        return
    if args.corrections is not None:
        with run_lock(args.run):  # a ledger has one writer
            counts = CurationLedger(ledger).correct_from(args.corrections)
        shown = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        console.print(f"Corrections: {shown or 'none'}", highlight=False)
    path = write_report(
        output,
        run=args.run,
        evaluations=evaluations,
        style_before=args.style_before,
        style_after=args.style_after,
        blind=args.blind,
        loaders=DEMO_LOADERS,
        gallery=args.gallery,
        title=args.title,
    )
    show_paths({"Report": path}, console)


def make_parser():
    return TrlParser(ReportArguments, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
