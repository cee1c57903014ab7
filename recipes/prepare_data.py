"""Build a training set from public preference sets, without the rows of the benchmarks.

    # What would be read and written
    trl-dt2it prepare --config data_dt2it --dry_run

    # The paper's public mixture
    trl-dt2it prepare --config data_dt2it

    # One set, checked, of which a hundredth is held out
    trl-dt2it prepare --sources '{"rlaif_v": {}}' --output_dir outputs/rlaif_v

Every source is loaded, validated and written in shards; run it again after a kill and it goes on where it was.
Several machines with a common folder take shards each, with `--shard 0/4` and so on, and the last run, without
`--shard`, puts the mixture together. Train on the result with `--dataset_name OUTPUT_DIR/mixture`.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from trl import TrlParser

from trl_dt2it.recipe import EngineArguments
from trl_dt2it.utils import from_json, parse_shard, run_parts


@dataclass
class PrepareArguments(EngineArguments):
    """
    Arguments of this script, besides those of [`trl_dt2it.recipe.EngineArguments`].

    Parameters:
        sources (`dict`):
            Preference sets by name, each with the arguments of [`trl_dt2it.data.load_preferences`] and its `weight`,
            `max_rows` and `num_shards`.
        output_dir (`str`):
            Folder of shards, mixture and reports.
        benchmarks (`dict`, *optional*):
            Benchmarks to keep out of the training set, by name: `path_or_id`, `split`, `image_root`, and the names of
            the columns `question` and `image` (one or a list), or `name`, as in [`trl_dt2it.data.read_benchmarks`].
        image_check (`str`, *optional*, defaults to `"header"`):
            `"full"` decodes every image, `"header"` reads its header, `"none"` trusts it.
        max_image_pixels (`int`, *optional*):
            Largest image.
        processing_class (`str`, *optional*):
            Hub id or directory of the model to train, for special tokens and `max_length`.
        max_length (`int`, *optional*):
            Most tokens of a conversation, image tokens included.
        max_per_group (`int`, *optional*):
            Most rows about one prompt.
        size (`int`, *optional*):
            Rows of the mixture.
        test_size (`float`, *optional*, defaults to `0.01`):
            Share of the mixture that is held out, groups whole; 0 holds out none.
        rows_per_file (`int`, *optional*, defaults to `20000`):
            Rows of a Parquet file of the mixture.
        counterfactuals (`float`, *optional*):
            Most counterfactual pairs to add to the training rows of a source, as a share of them in (0, 1]; see
            [`trl_dt2it.debias.counterfactual_pairs`].
        seed (`int`, *optional*, defaults to `42`):
            Seed of draw, order and split.
        shard (`str`, *optional*):
            `i/n`: prepare the i-th of every n shards, i from 0, and leave the mixture to a later run.
        num_proc (`int`, *optional*):
            Number of processes.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to show the plan only.
    """

    output_dir: str = field(kw_only=True, metadata={"help": "Folder of shards, mixture and reports."})
    # Not required: the parser takes JSON for optional fields alone.
    sources: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Preference sets with their settings, mapping or JSON."}
    )
    benchmarks: dict[str, Any] | str | None = field(default=None, metadata={"help": "Benchmarks to keep out."})
    image_check: str = field(default="header", metadata={"help": "full, header or none."})
    max_image_pixels: int | None = field(default=None, metadata={"help": "Largest image."})
    processing_class: str | None = field(default=None, metadata={"help": "Model whose tokens and lengths count."})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of a conversation."})
    max_per_group: int | None = field(default=None, metadata={"help": "Most rows about one prompt."})
    size: int | None = field(default=None, metadata={"help": "Rows of the mixture."})
    test_size: float = field(default=0.01, metadata={"help": "Share that is held out."})
    rows_per_file: int = field(default=20_000, metadata={"help": "Rows of a Parquet file."})
    counterfactuals: float | None = field(
        default=None, metadata={"help": "Share of counterfactual pairs to add to the training rows."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of draw, order and split."})
    shard: str | None = field(default=None, metadata={"help": "i/n: prepare only the i-th of every n shards."})
    num_proc: int | None = field(default=None, metadata={"help": "Number of processes."})
    dry_run: bool = field(default=False, metadata={"help": "Show the plan only."})


def main(args):
    from transformers import AutoProcessor

    from trl_dt2it import token_counter
    from trl_dt2it.data import ImageOptions, build_mixture, read_benchmarks, read_settings
    from trl_dt2it.data.prepare import prepare_part
    from trl_dt2it.processes import run_lock

    console = Console()
    if not args.sources:
        raise ValueError("Give `sources`, the preference sets by name.")
    if args.counterfactuals is not None and not 0 < args.counterfactuals <= 1:
        raise ValueError(f"`counterfactuals` is {args.counterfactuals}; give a share of the rows in (0, 1].")
    settings = read_settings(from_json(args.sources))
    part, parts = parse_shard(args.shard)
    todo = [(key, shard) for key, setting in settings.items() for shard in range(setting.num_shards)][part::parts]
    if args.dry_run:
        console.print(plan(settings, todo, args))
        return
    options = ImageOptions() if args.max_image_pixels is None else ImageOptions(max_image_pixels=args.max_image_pixels)
    counter = None
    if args.processing_class is not None:
        counter = token_counter(AutoProcessor.from_pretrained(args.processing_class))
    prepare = partial(
        prepare_part,
        args.output_dir,
        settings,
        image_options=options,
        image_check=args.image_check,
        token_counter=counter,
        max_length=args.max_length,
        num_proc=args.num_proc,
    )
    with run_lock(args.output_dir, (part, parts)), args.in_use():
        with console.status(f"Preparing {len(todo)} shards") if args.engine is None else nullcontext():
            for number, (record, is_new) in run_parts(prepare, todo, "Preparing"):
                key, shard = todo[number]
                name = f"{number + 1}/{len(todo)} {key}, shard {shard} of {settings[key].num_shards}"
                clean = f"{name}: {record['clean']} of {record['pairs']} pairs"
                console.print(clean + ("" if is_new else ", there already"))
        if args.shard is not None:
            console.print("Run it without `--shard` when all shards are there, to put the mixture together.")
            return
        extend = None
        if args.counterfactuals is not None:
            from trl_dt2it.debias import counterfactual_pairs

            # A share also where YAML has 1, which would be a number of pairs.
            share = float(args.counterfactuals)
            extend = partial(counterfactual_pairs, share=share, with_originals=True, seed=args.seed)
        with console.status("Putting the mixture together"):
            report = build_mixture(
                args.output_dir,
                settings,
                benchmarks=read_benchmarks(from_json(args.benchmarks) or {}),
                max_per_group=args.max_per_group,
                size=args.size,
                test_size=args.test_size,
                rows_per_file=args.rows_per_file,
                extend=extend,
                seed=args.seed,
                num_proc=args.num_proc,
            )
        console.print(summary(report))
        console.print(f"Train on it with --dataset_name {Path(args.output_dir) / 'mixture'}", soft_wrap=True)


def plan(settings, todo, args):
    """Make a table of the sources and of the shards that this run would write."""
    from trl_dt2it.data import SOURCES

    names, title = ("source", "from", "licence", "shards here", "weight"), f"Would be written to {args.output_dir}"
    table, notes = Table(*names, title=title, caption_justify="left"), []
    for key, setting in settings.items():
        source, here = SOURCES[setting.name], sum(other == key for other, _ in todo)
        origin = str(setting.load.get("path_or_id") or source.hub_id)
        weight = "" if setting.weight is None else f"{setting.weight:g}"
        table.add_row(key, origin, source.licence, f"{here} of {setting.num_shards}", weight)
        notes += [f"{key}: {source.note}"] if source.note else []
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def summary(report):
    """Make a table of the pairs of every source, and of why pairs were dropped."""
    names = ("pairs", "clean", "duplicates", "contaminated", "mixed", "train", "test")
    table = Table("source", *names, caption_justify="left")
    notes = []
    for key, source in report["sources"].items():
        table.add_row(Text(key), *(f"{source[name]:,}" for name in names))
        if source.get("added"):
            notes.append(f"Counterfactual pairs added to {key}: {source['added']:,}")
        if source["reasons"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in source["reasons"].items())
            notes.append(f"Dropped from {key}: {reasons}")
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def make_parser():
    return TrlParser(PrepareArguments, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
