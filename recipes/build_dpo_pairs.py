r"""Build preference pairs for DPO out of a model's own answers: sample, score, and pair by the gap of the rewards.

    # What would be sampled and scored
    trl-dt2it dpo-pairs --config build_dpo_pairs --dry_run

    # Your own prompts, on 8 GPUs
    trl-dt2it dpo-pairs --model_name_or_path Qwen/Qwen3-VL-8B-Instruct --reward_model reward-model \
        --dataset_name prompts.jsonl --image_root photos --min_gap 0.8 --num_processes 8

It writes OUTPUT_DIR/pairs/train.parquet with the images inside, or train.jsonl with their paths, and
OUTPUT_DIR/report.json. `trl_dt2it.data.to_dpo` makes rows for TRL's `DPOTrainer` of them, and
`recipes/train_reward_model.py --dataset_name OUTPUT_DIR/pairs` trains on them. Rows that have a column
`answers`, a list of texts, are not sampled. Run it again after a kill: what is sampled and scored stays.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from trl import TrlParser

from trl_dt2it.processes import on_main_process, run_lock
from trl_dt2it.recipe import SAMPLING_FLAGS, AnswerArguments, share_work, show_paths
from trl_dt2it.utils import whole_file, write_json


MAIN_FLAGS = (*SAMPLING_FLAGS, "min_gap", "pairs_per_prompt", "drop_unfinished", "output_format")


@dataclass
class GapPairArguments(AnswerArguments):
    """
    Arguments of this script, besides those of [`trl_dt2it.recipe.AnswerArguments`].

    Parameters:
        min_gap (`float`, *optional*, defaults to `0.5`):
            Smallest difference of the rewards of a pair; with `normalize` in standard deviations.
        pairs_per_prompt (`int`, *optional*, defaults to `1`):
            Most pairs of a prompt: the best answer with the worst, then the second best with the second worst.
        drop_unfinished (`bool`, *optional*, defaults to `True`):
            Whether to drop answers that `max_new_tokens` cut.
        output_format (`str`, *optional*, defaults to `"parquet"`):
            `parquet`, with the images inside, or `jsonl`, with their paths.
        source (`str`, *optional*, defaults to `"sampled"`):
            What the column `source` says.
    """

    min_gap: float = field(default=0.5, metadata={"help": "Smallest difference of the rewards of a pair."})
    pairs_per_prompt: int | None = field(default=1, metadata={"help": "Most pairs of a prompt."})
    drop_unfinished: bool = field(default=True, metadata={"help": "Drop answers that were cut."})
    output_format: str = field(default="parquet", metadata={"help": "`parquet` or `jsonl`."})
    source: str = field(default="sampled", metadata={"help": "What the column `source` says."})

    def __post_init__(self):
        if self.output_format not in ("parquet", "jsonl"):
            raise ValueError(f"`output_format` is {self.output_format!r}; choose parquet or jsonl.")
        if self.min_gap < 0:
            raise ValueError(f"`min_gap` is {self.min_gap}; it must be at least 0.")


def main(args):
    from trl_dt2it.data import write_parquet
    from trl_dt2it.data.export import refuse_unpublishable
    from trl_dt2it.scoring.answers import build_gap_pairs

    state, folder, rows = share_work(), Path(args.output_dir), args.read()
    output = folder / "pairs" / f"train.{args.output_format}"
    if args.dry_run:
        args.show_plan(rows, output)
        return
    with run_lock(args.output_dir):
        if args.output_format == "jsonl":
            check_paths(rows)
        else:
            refuse_unpublishable(rows, args.published_images, paths_are_images=True)  # before hours of sampling
        scored = args.answer(rows, source=args.source)

        def finish():
            pairs, report = build_gap_pairs(
                rows,
                scored,
                min_gap=args.min_gap,
                pairs_per_prompt=args.pairs_per_prompt,
                source=args.source,
                image_options=args.image_options,
                drop_unfinished=args.drop_unfinished,
            )
            if args.output_format == "parquet":
                write_parquet(pairs, output, image_options=args.published_images)
            else:
                write_lines(pairs, output)
            write_json(folder / "report.json", asdict(report))
            show(report, Console())
            show_paths({"Pairs": output}, Console())

        on_main_process(finish)
    state.destroy_process_group()


def check_paths(rows):
    """Refuse images without a file, which JSON cannot hold."""
    from trl_dt2it.data.images import as_image
    from trl_dt2it.data.rows import row_images, row_name

    for index, row in enumerate(rows):
        if any(as_image(image)["bytes"] is not None for image in row_images(row)):
            raise ValueError(f"{row_name(row, index)} has an image without a file; set `output_format: parquet`.")


def write_lines(pairs, path):
    """Write pairs as JSON lines, their images as paths."""
    from trl_dt2it.data.columns import leave_images_encoded

    with whole_file(path) as part, part.open("w", encoding="utf-8") as file:
        for row in leave_images_encoded(pairs):
            row = {**row, "images": [image["path"] for image in row["images"]]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def show(report, console):
    """Count answers, pairs, and why answers were dropped."""
    from statistics import fmean

    from trl_dt2it.data.rows import summarize

    console.print(
        f"{report.pairs:,} pairs out of {report.answers:,} answers to {report.prompts:,} prompts; "
        f"{report.prompts_without_pair:,} prompts gave none."
    )
    if report.left_out:
        console.print(f"Dropped: {summarize(report.left_out)}.")
    if report.gaps:
        console.print(
            f"Gap of the rewards: {min(report.gaps):.3f} to {max(report.gaps):.3f}, mean {fmean(report.gaps):.3f}."
        )


def make_parser():
    return TrlParser(GapPairArguments, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
