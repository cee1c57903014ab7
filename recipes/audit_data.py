"""Check a data set before training on it: which rows can be used, and does style, or text, tell the chosen answer?

    # Your own pairs
    trl-dt2it audit --dataset_name pairs.jsonl --image_root photos

    # A public set, its first rows
    trl-dt2it audit --preferences rlaif_v --max_rows 5000

    # A file of LLaMA-Factory as it is
    trl-dt2it audit --preferences llamafactory --dataset_name dpo.json --image_root images

    # Also how far question and answers tell it without the image
    trl-dt2it audit --dataset_name pairs.jsonl --image_root photos --blind

    # How far a model follows style
    trl-dt2it audit --dataset_name outputs/scores/scored.parquet --image_root photos

The first table counts the rows that can be used and those that cannot, by reason. The second says how well a
probe that sees style alone names the chosen answer: 0.5 means that style tells nothing. Where the rows have the
columns `chosen_reward` and `rejected_reward`, as recipes/score_data.py writes them, a third says how far the
model follows style. `--blind` adds how well a probe that sees all of the text, and no image, names the chosen
answer, and the words that it goes by. The same keys may stand in a YAML file, given with `--config`.
"""

import json
from dataclasses import dataclass, field

from rich.console import Console
from trl import TrlParser

from trl_dt2it.recipe import EngineArguments, RowArguments, show_dry_run, show_paths
from trl_dt2it.utils import whole_file


@dataclass
class AuditArguments(RowArguments, EngineArguments):
    """
    Arguments of this script, besides those of [`trl_dt2it.recipe.RowArguments`] and of
    [`trl_dt2it.recipe.EngineArguments`].

    Parameters:
        by (`str`, *optional*, defaults to `"source"`):
            A column whose values are measured each on its own, besides the whole.
        blind (`bool`, *optional*, defaults to `False`):
            Whether to measure also what question and answers tell without the image.
        image_check (`str`, *optional*, defaults to `"header"`):
            `"full"` decodes every image, `"header"` reads its header, `"none"` does not look at images.
        num_folds (`int`, *optional*, defaults to `10`):
            Most folds of the cross-validation: fewer where there are less than two groups for each.
        min_pairs (`int`, *optional*, defaults to `200`):
            Fewest pairs that get a number.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the folds.
        output_file (`str`, *optional*):
            JSON file for all numbers.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to say only what would be read and written.
    """

    by: str = field(default="source", metadata={"help": "A column whose values are measured each on its own."})
    blind: bool = field(default=False, metadata={"help": "Measure also what text tells without the image."})
    image_check: str = field(default="header", metadata={"help": "full, header or none."})
    num_folds: int = field(default=10, metadata={"help": "Most folds of the cross-validation."})
    min_pairs: int = field(default=200, metadata={"help": "Fewest pairs that get a number."})
    seed: int = field(default=42, metadata={"help": "Seed of the folds."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for all numbers."})
    dry_run: bool = field(default=False, metadata={"help": "Say only what would be read and written."})


def main(args):
    from trl_dt2it.data import validate
    from trl_dt2it.debias import audit_blind, audit_style
    from trl_dt2it.scoring.shards import REWARD_COLUMNS

    console, rows = Console(), args.read()
    is_scored = set(REWARD_COLUMNS) <= set(rows.column_names)
    if args.dry_run:
        measured = "style of the answers" + (", what text tells without the image" if args.blind else "")
        show_dry_run(
            [
                ("reads", args.dataset_name or args.preferences),
                ("rows", len(rows)),
                ("columns", ", ".join(rows.column_names)),
                ("looks at images", args.image_check),
                ("measures", measured + (", and how far rewards follow it" if is_scored else "")),
                ("writes", args.output_file or "nothing"),
            ]
        )
        return
    with args.in_use():
        clean, _ = validate(rows, image_options=args.image_options, image_check=args.image_check)
    if len(clean) == 0:
        raise ValueError("No row can be used, for the reasons above.")
    report = audit_style(
        clean,
        by=args.by,
        scorer=REWARD_COLUMNS if is_scored else None,
        num_folds=args.num_folds,
        min_pairs=args.min_pairs,
        seed=args.seed,
    )
    report.show(console)
    found = json.loads(report.to_json())
    if args.blind:
        blind = audit_blind(clean, by=args.by, num_folds=args.num_folds, min_pairs=args.min_pairs, seed=args.seed)
        blind.show(console)
        found["blind"] = json.loads(blind.to_json())
    if args.output_file is not None:
        with whole_file(args.output_file) as part:
            part.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        show_paths({"Figures": args.output_file}, console)


def make_parser():
    return TrlParser(AuditArguments, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
