"""Train a reward model on constructed and on noisy preferences, cleaning the noisy ones in rounds.

    # The plan: trainings, pairs, steps, calls
    trl-dt2it curate --config dt2it_digits --dry_run

    # On real handwriting, in 10 minutes on 2 cores
    trl-dt2it curate --config dt2it_digits

    # The paper's rounds, 8 GPUs
    trl-dt2it curate --config dt2it_qwen3_vl_8b --num_processes 8

    # The first of four machines scores its part
    trl-dt2it curate --config dt2it_qwen3_vl_8b --shard 0/4

Run it again after a kill, and it goes on where it was: what is done is not done again, a training resumes from
its newest checkpoint if there is one, and no call to a judge is paid for twice. Several machines with a common
folder can score together: stop before the stages that score with `--stop_before round-1/flip/score`, run each
machine's part with `--shard`, and then go on.

Flags of the command line override the YAML file. A key that no option has is an error.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from accelerate import PartialState
from rich.console import Console
from trl import ModelConfig, TrlParser

from trl_dt2it import MultimodalRewardConfig
from trl_dt2it.processes import on_main_process, run_lock, wait_for_everyone
from trl_dt2it.recipe import find_base_model, loading_options, show_paths
from trl_dt2it.utils import from_json, parse_shard, write_json


@dataclass
class RoundsArguments:
    """
    Arguments of this script, besides those of [`trl_dt2it.MultimodalRewardConfig`] and TRL's [`~trl.ModelConfig`],
    which hold for every training.

    Parameters:
        base (`dict`):
            The constructed set: for each source where its rows are, as in
            [`trl_dt2it.curation.rounds.config.read_sets`], or `digits` or `digits_t2i` with the arguments of
            [`trl_dt2it.demo.digits.demo_rows`].
        pool (`dict`):
            The noisy set, likewise.
        test (`dict`, *optional*):
            A set to measure the final models on, likewise. Figures are given by the names of its sources here.
        method (`str`, *optional*, defaults to `"mixture"`):
            `"paper"` or `"mixture"`: the rounds if none are given.
        rounds (`list[dict]`, *optional*):
            The rounds, each with the keys of [`trl_dt2it.curation.rounds.config.Step`], or with `steps`, a list of
            such.
        folds (`int`, *optional*, defaults to `2`):
            Parts of the pool of which each is scored by models that are trained on the others.
        models (`list[dict]`, *optional*):
            Models that score, each with `model_name_or_path` and `seed`; by default the one of the configuration.
        judge (`dict`, *optional*):
            Judges to ask about pairs that the rules drop, or all, as in
            [`trl_dt2it.curation.judging.read_judging`].
        balance_style (`dict` or `bool`, *optional*):
            Balances the style of the constructed set before it is trained on, as in
            [`trl_dt2it.curation.rounds.config.read_balance`]; by default it is not balanced.
        final (`list[str]`, *optional*, defaults to `["curated"]`):
            Models to train at the end, on the base and: nothing (`"base"`, or `"unbalanced"`, with its style as it
            came), the pool as it is (`"uncurated"`), the curated pool (`"curated"`), or the pool with its true labels
            (`"oracle"`, where `is_flipped` tells them).
        labels (`str`, *optional*):
            What the final training makes of doubt about labels of the pool: `"hard"`: nothing; `"soft"`: its target is
            the probability that a label is right; `"weight"`: its weight falls with doubt. By default `"soft"` with
            rules that estimate this probability, as those of `mixture`, and else `"hard"`.
        rows_per_shard (`int`, *optional*, defaults to `4096`):
            Pairs that are scored and written together.
        shard (`str`, *optional*):
            `i/n`: as the i-th of n machines, score every n-th part of what is to be scored now, i from 0.
        stop_before (`str`, *optional*):
            Stops before the first stage that is not done and whose name begins like this, such as `round-1/score`.
        hub_dataset_id (`str`, *optional*):
            Repository on the Hub that the curated pool goes to at the end, with its ledger.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to show the plan only.
    """

    # Not required: the parser takes JSON for optional fields alone.
    base: dict[str, Any] | str | None = field(default=None, metadata={"help": "The constructed set."})
    pool: dict[str, Any] | str | None = field(default=None, metadata={"help": "The noisy set."})
    test: dict[str, Any] | str | None = field(default=None, metadata={"help": "A set to measure on."})
    method: str = field(default="mixture", metadata={"help": "paper or mixture."})
    rounds: list[Any] | str | None = field(default=None, metadata={"help": "The rounds, list or JSON."})
    folds: int = field(default=2, metadata={"help": "Parts of the pool for scoring out of sample."})
    models: list[Any] | str | None = field(default=None, metadata={"help": "Models that score, list or JSON."})
    judge: dict[str, Any] | str | None = field(default=None, metadata={"help": "Judges, mapping or JSON."})
    balance_style: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "How the style of the constructed set is balanced, mapping, JSON or true."}
    )
    final: list[Any] | str | None = field(default=None, metadata={"help": "Models to train at the end."})
    labels: str | None = field(
        default=None, metadata={"help": "Doubt about labels: hard (flips alone), soft or weight."}
    )
    rows_per_shard: int = field(default=4096, metadata={"help": "Pairs that are scored together."})
    shard: str | None = field(default=None, metadata={"help": "i/n: score only every n-th part."})
    stop_before: str | None = field(default=None, metadata={"help": "Stop before the stages named like this."})
    hub_dataset_id: str | None = field(default=None, metadata={"help": "Where the curated pool goes on the Hub."})
    dry_run: bool = field(default=False, metadata={"help": "Show the plan only."})


def main(args, training_args, model_args):
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    state = PartialState()
    if training_args.disable_tqdm:
        disable_progress_bar()  # those of every model that is loaded or saved
        disable_progress_bars()  # and those of checks of rows
    with nullcontext() if args.dry_run else run_lock(training_args.output_dir, parse_shard(args.shard)):
        run_or_plan(args, training_args, model_args)
    wait_for_everyone()
    state.destroy_process_group()


def run_or_plan(args, training_args, model_args):
    """Run the stages that are not done yet, or show what they would do."""
    from trl import get_peft_config, get_quantization_config

    from trl_dt2it.curation.rounds.config import read_run
    from trl_dt2it.curation.rounds.results import record_run, show_summary, summarize_run
    from trl_dt2it.curation.rounds.run import plan_rounds
    from trl_dt2it.curation.rounds.stages import run_stages, show_plan
    from trl_dt2it.curation.rounds.training import RewardTraining
    from trl_dt2it.demo.digits import DEMO_LOADERS
    from trl_dt2it.report import write_report

    state, console = PartialState(), Console()
    training = RewardTraining(
        training_args,
        loading_options(model_args),
        get_peft_config(model_args),
        get_quantization_config(model_args),
    )
    sets = {"base": from_json(args.base) or {}, "pool": from_json(args.pool) or {}}
    if (test := from_json(args.test)) is not None:
        sets["test"] = test
    run = read_run(
        training,
        **sets,
        method=args.method,
        rounds=from_json(args.rounds),
        folds=args.folds,
        models=from_json(args.models) or [{}],
        default_model=model_args.model_name_or_path,
        judge=from_json(args.judge),
        balance_style=from_json(args.balance_style),
        final=from_json(args.final) or ["curated"],
        rows_per_shard=args.rows_per_shard,
        labels=args.labels,
        shard=parse_shard(args.shard),
        find_model=partial(find_base_model, sets=sets),
        loaders=DEMO_LOADERS,
    )
    stages = plan_rounds(run)
    if args.dry_run:
        if state.is_main_process:
            show_plan(stages, run.output_dir, console)
        return
    if args.shard is None:
        on_main_process(partial(record_run, run))
    records = run_stages(
        stages,
        run.output_dir,
        only_shared=args.shard is not None,
        stop_before=args.stop_before,
        console=console,
    )
    if len(records) < len(stages):
        return
    pool = run.sets.usable("pool")  # read by all processes together, unless a stage has read it

    def finish():
        folder, summary = run.output_dir, summarize_run(run, records)
        write_json(folder / "summary.json", summary)
        show_summary(summary, console)
        paths = {"Models": folder / "final", "Ledger": folder / "ledger", "Figures": folder / "summary.json"}
        paths["Report"] = write_report(folder / "report.html", run=folder, pool=pool)
        show_paths(paths, console)
        if args.hub_dataset_id is not None:
            show_paths({"Pushed": push_pool(run, args.hub_dataset_id).repo_url}, console)

    on_main_process(finish)


def push_pool(run, repo_id):
    """Push the curated pool, as private as the model, and with images out of `image_root` alone."""
    from trl_dt2it.curation import CurationLedger, push_curated

    args = run.training.args
    return push_curated(
        run.sets.usable("pool"),
        CurationLedger(run.output_dir / "ledger"),
        repo_id,
        labels=run.labels,
        image_root=args.image_root,
        private=args.hub_private_repo,
        token=args.hub_token,
    )


def make_parser():
    return TrlParser((RoundsArguments, MultimodalRewardConfig, ModelConfig), allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
