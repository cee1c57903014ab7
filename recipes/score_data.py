"""Score a data set of pairs with a trained reward model.

    # Your own pairs
    trl-dt2it score --model reward-model --dataset_name pairs.jsonl --image_root photos

    # On 8 GPUs, into another folder
    trl-dt2it score --model reward-model --preferences rlaif_v --output_dir outputs/rlaif_v --num_processes 8

    # Does a vLLM server give the rewards of this model, and look at the images? Exit code 1 if not
    trl-dt2it score --model reward-model --dataset_name pairs.jsonl --server http://localhost:8000

It writes OUTPUT_DIR/scored.parquet, the rows with the columns `chosen_reward` and `rejected_reward`, and
OUTPUT_DIR/summary.json, or nothing with `--server`. Run it again after a kill: what is scored is not scored
again. The processes of `accelerate launch` share the rows out. The same keys may stand in a YAML file, given
with `--config`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from trl import TrlParser

from trl_dt2it.processes import on_main_process, run_lock
from trl_dt2it.recipe import EngineArguments, RowArguments, ScorerArguments, share_work, show_dry_run, show_paths
from trl_dt2it.utils import write_json


@dataclass
class ScoreArguments(RowArguments, ScorerArguments, EngineArguments):
    """
    Arguments of this script, besides those of [`trl_dt2it.recipe.ScorerArguments`], of
    [`trl_dt2it.recipe.RowArguments`] and of [`trl_dt2it.recipe.EngineArguments`].

    Parameters:
        output_dir (`str`, *optional*, defaults to `"outputs/scores"`):
            Folder of the results.
        rows_per_shard (`int`, *optional*, defaults to `512`):
            Pairs of a file: what a kill may cost at most.
        normalize (`bool`, *optional*, defaults to `False`):
            Whether rewards are those of [`trl_dt2it.RewardScorer`] with `normalize`.
        server (`str`, *optional*):
            Address of a server whose rewards are compared with those of the model, instead of scoring the rows; see
            [`trl_dt2it.scoring.check_server`], as for the following.
        server_pairs, server_tolerance (*optional*, default to `8` and `0.1`):
            Rows that are compared, and largest difference of rewards that is none.
        server_model, server_key_env (`str`, *optional*):
            Name of the model on the server, and of the environment variable that holds its key.
    """

    output_dir: str = field(default="outputs/scores", metadata={"help": "Folder of the results."})
    rows_per_shard: int = field(default=512, metadata={"help": "Pairs of a file: what a kill may cost."})
    normalize: bool = field(default=False, metadata={"help": "Whether rewards are normalized."})
    server: str | None = field(default=None, metadata={"help": "Compare with a server at this address instead."})
    server_pairs: int = field(default=8, metadata={"help": "Rows that are compared with the server."})
    server_tolerance: float = field(default=0.1, metadata={"help": "Largest difference of rewards that is none."})
    server_model: str | None = field(default=None, metadata={"help": "Name of the model on the server."})
    server_key_env: str | None = field(default=None, metadata={"help": "Environment variable with the server's key."})


def main(args):
    from trl_dt2it.data import write_parquet
    from trl_dt2it.data.export import refuse_unpublishable

    args.named_model()
    state, folder, rows = share_work(), Path(args.output_dir), args.read()
    output = folder / "scored.parquet"
    if args.dry_run:
        show_dry_run(
            [
                ("model", args.model),
                ("reads", args.dataset_name or args.preferences),
                ("rows", len(rows)),
                ("columns", ", ".join(rows.column_names)),
                ("processes", state.num_processes),
                ("asks", args.server),
                ("writes", None if args.server else output),
            ]
        )
        return
    if args.server is not None:
        compare_with_server(args, rows, state.num_processes)
        return
    with run_lock(args.output_dir):
        refuse_unpublishable(rows, args.published_images)  # before hours of scoring
        options = {"image_options": args.image_options, "normalize": args.normalize}
        where = {"output_dir": folder / "rewards", "rows_per_shard": args.rows_per_shard}
        with args.in_use():
            if args.engine is None:
                scored = args.load(**options).score_dataset(rows, **where)
            else:  # each worker loads the model
                from trl_dt2it.scale import score_dataset

                scored = score_dataset(args.model, rows, **where, **args.loading(), **options)

        def finish():
            write_parquet(scored, output, image_options=args.published_images)
            parts = summarize(scored)
            write_json(folder / "summary.json", {"model": args.model, "parts": parts})
            show(parts, Console())
            show_paths({"Rows": output, "Figures": folder / "summary.json"}, Console())

        on_main_process(finish)
    state.destroy_process_group()


def compare_with_server(args, rows, num_processes):
    """Compare a few rewards with those of a server, and exit with a sentence if they are not the same."""
    from trl_dt2it.data import to_pairs
    from trl_dt2it.data.columns import is_ranked
    from trl_dt2it.scoring.server import Server, check_server

    rows = to_pairs(rows) if is_ranked(rows) else rows
    if num_processes > 1:
        raise ValueError("`server` is compared with in one process; leave `--num_processes` out.")
    Server(args.server, args.server_model, args.server_key_env)  # refuses a wrong one before the model is loaded
    check = check_server(
        args.load(image_options=args.image_options),
        rows,
        args.server,
        num_pairs=args.server_pairs,
        tolerance=args.server_tolerance,
        model=args.server_model,
        api_key_env=args.server_key_env,
    )
    Console().print(check.table())
    if check.problem is not None:
        sys.exit(f"trl-dt2it score: {check.problem}")
    looks = "" if check.looks else " The image changes neither: whether the server reads it is not known."
    Console().print(f"The server gives the rewards of this model, to {check.tolerance:g}.{looks}")


def summarize(scored):
    """Accuracy and mean reward gap of all pairs, and of each source; of ranked prompts, of all pairs of answers whose
    scores differ."""
    import numpy as np

    from trl_dt2it.data.ranked import compare_answers
    from trl_dt2it.scoring.shards import RANKED_REWARDS, REWARD_COLUMNS

    if RANKED_REWARDS in scored.column_names:
        rows, gap = compare_answers(scored, RANKED_REWARDS)
        scored = scored.select_columns([name for name in scored.column_names if name == "source"] or [RANKED_REWARDS])
        scored = scored.select(rows)
    else:
        chosen, rejected = (np.array(scored[name][:]) for name in REWARD_COLUMNS)
        gap = chosen - rejected
    parts = {"all pairs": np.ones(len(gap), dtype=bool)}
    if "source" in scored.column_names:
        source = np.array(scored["source"][:], dtype=object)
        names = sorted({name for name in source if name is not None})
        parts |= {name: source == name for name in names if len(names) > 1}
    return {
        name: {
            "pairs": int(part.sum()),
            "accuracy": float((gap[part] > 0).mean()),
            "ties": int((gap[part] == 0).sum()),
            "mean_gap": float(gap[part].mean()),
        }
        for name, part in parts.items()
        if part.any()
    }


def show(parts, console):
    """Print the figures of every part as a table."""
    if not parts:
        console.print("The answers have no scores to compare their rewards with.")
        return
    table = Table("", "pairs", "chosen above rejected", "ties", "mean gap", title="Rewards")
    for name, part in parts.items():
        figures = (f"{part['pairs']:,}", f"{part['accuracy']:.1%}", str(part["ties"]), f"{part['mean_gap']:+.3f}")
        table.add_row(name, *figures)
    console.print(table)


def make_parser():
    return TrlParser(ScoreArguments, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
