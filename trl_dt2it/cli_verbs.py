"""The verbs of `trl-dt2it`: for each its recipe, what it does, and examples of it, which the tests parse."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """
    A verb.

    Parameters:
        recipe (`str`):
            The file of `recipes/` that does it, without `.py`.
        summary (`str`):
            What it does, in one line.
        examples (`tuple[tuple[str, str], ...]`):
            What is wanted, and the command.
        flags (`tuple[str, ...]`, *optional*):
            The flags that `--help` shows; by default those of the recipe's own arguments.
        is_launched (`bool`, *optional*, defaults to `False`):
            Whether it may run on several processes.
    """

    recipe: str
    summary: str
    examples: tuple[tuple[str, str], ...]
    flags: tuple[str, ...] | None = None
    is_launched: bool = False


# What the two verbs that sample answers are told first.
_SAMPLING = (
    *("model_name_or_path", "reward_model", "dataset_name", "image_root", "max_rows", "output_dir", "num_answers"),
    *("max_new_tokens", "temperature", "top_p", "prompts_per_batch", "normalize", "dtype", "reward_dtype", "dry_run"),
)

VERBS = {
    "prepare": Verb(
        "prepare_data",
        "Build a training set out of public preference sets, without the rows of the benchmarks.",
        (
            ("What would be read and written", "trl-dt2it prepare --config data_dt2it --dry_run"),
            ("The paper's public mixture", "trl-dt2it prepare --config data_dt2it"),
            (
                "One set, checked, of which a hundredth is held out",
                """trl-dt2it prepare --sources '{"rlaif_v": {}}' --output_dir outputs/rlaif_v""",
            ),
        ),
    ),
    "audit": Verb(
        "audit_data",
        "Count the rows that can be used, and measure how far style alone tells the chosen answer.",
        (
            ("Your own pairs", "trl-dt2it audit --dataset_name pairs.jsonl --image_root photos"),
            ("A public set, its first rows", "trl-dt2it audit --preferences rlaif_v --max_rows 5000"),
            (
                "A file of LLaMA-Factory as it is",
                "trl-dt2it audit --preferences llamafactory --dataset_name dpo.json --image_root images",
            ),
            (
                "What a model makes of style",
                "trl-dt2it audit --dataset_name outputs/scores/scored.parquet --image_root photos",
            ),
        ),
    ),
    "construct": Verb(
        "construct_preferences",
        "Build pairs out of prompts with images: both answers by one model, judged twice over.",
        (
            ("Calls and cost at most, without a call", "trl-dt2it construct --config construct_preferences --dry_run"),
            ("The first prompts only", "trl-dt2it construct --config construct_preferences --max_prompts 50"),
            ("All; what was paid for is not asked again", "trl-dt2it construct --config construct_preferences"),
        ),
    ),
    "train": Verb(
        "train_reward_model",
        "Train a reward model.",
        (
            ("Real handwriting, in two minutes on 2 cores", "trl-dt2it train --config digits"),
            (
                "Your own pairs",
                "trl-dt2it train --model_name_or_path Qwen/Qwen3-VL-2B-Instruct --dataset_name pairs.jsonl "
                "--image_root photos --output_dir reward-model",
            ),
            (
                "What that would do",
                "trl-dt2it train --model_name_or_path Qwen/Qwen3-VL-2B-Instruct --dataset_name pairs.jsonl "
                "--image_root photos --output_dir reward-model --dry_run",
            ),
            ("LoRA on one GPU", "trl-dt2it train --config qwen3_vl_8b_lora"),
            ("8 GPUs", "trl-dt2it train --config qwen3_vl_8b --accelerate_config deepspeed_zero2"),
        ),
        flags=(
            *("model_name_or_path", "dataset_name", "dataset_train_split", "dataset_test_split", "image_root"),
            *("output_dir", "learning_rate", "num_train_epochs", "per_device_train_batch_size"),
            *("gradient_accumulation_steps", "loss_type", "max_length", "max_pixels", "on_bad_row"),
            *("freeze_vision_tower", "use_peft", "resume_from_checkpoint", "max_train_pairs", "dry_run"),
        ),
        is_launched=True,
    ),
    "curate": Verb(
        "dt2it",
        "Find wrong labels in rounds, and train with and without them.",
        (
            ("The plan: trainings, pairs, steps, calls", "trl-dt2it curate --config dt2it_digits --dry_run"),
            ("On real handwriting, in 10 minutes on 2 cores", "trl-dt2it curate --config dt2it_digits"),
            ("The paper's rounds, 8 GPUs", "trl-dt2it curate --config dt2it_qwen3_vl_8b --num_processes 8"),
            (
                "The first of four machines scores its part",
                "trl-dt2it curate --config dt2it_qwen3_vl_8b --shard 0/4",
            ),
        ),
        is_launched=True,
    ),
    "score": Verb(
        "score_data",
        "Add the rewards of a trained model to a data set.",
        (
            (
                "Your own pairs",
                "trl-dt2it score --model reward-model --dataset_name pairs.jsonl --image_root photos",
            ),
            (
                "On 8 GPUs, into another folder",
                "trl-dt2it score --model reward-model --preferences rlaif_v --output_dir outputs/rlaif_v "
                "--num_processes 8",
            ),
        ),
        is_launched=True,
    ),
    "evaluate": Verb(
        "evaluate",
        "Measure a reward model on public benchmarks, beside published scores.",
        (
            ("The paper's three", "trl-dt2it evaluate --model reward-model --benchmarks all"),
            ("By name", "trl-dt2it evaluate --model reward-model --benchmarks vl-rewardbench hpdv3-test"),
            (
                "Rows from a file",
                """trl-dt2it evaluate --model reward-model --benchmarks mm-rlhf-rewardbench """
                """--rows '{"mm-rlhf-rewardbench": "mm_reward_bench.jsonl"}' --image_root images""",
            ),
        ),
        is_launched=True,
    ),
    "best-of-n": Verb(
        "best_of_n",
        "Take the best of n answers to prompts with images: one model samples, a reward model picks.",
        (
            ("What would be sampled and scored", "trl-dt2it best-of-n --config best_of_n --dry_run"),
            (
                "Your own prompts",
                "trl-dt2it best-of-n --model_name_or_path Qwen/Qwen3-VL-8B-Instruct --reward_model reward-model "
                "--dataset_name prompts.jsonl --image_root photos --output_dir outputs/best",
            ),
            (
                "Answers that a server gave, in a column `answers`",
                "trl-dt2it best-of-n --reward_model reward-model --dataset_name answered.jsonl --image_root photos",
            ),
        ),
        flags=_SAMPLING,
        is_launched=True,
    ),
    "dpo-pairs": Verb(
        "build_dpo_pairs",
        "Build preference pairs for DPO out of a model's own answers, by the gap of their rewards.",
        (
            ("What would be sampled and scored", "trl-dt2it dpo-pairs --config build_dpo_pairs --dry_run"),
            (
                "Your own prompts, on 8 GPUs",
                "trl-dt2it dpo-pairs --model_name_or_path Qwen/Qwen3-VL-8B-Instruct --reward_model reward-model "
                "--dataset_name prompts.jsonl --image_root photos --min_gap 0.8 --num_processes 8",
            ),
        ),
        flags=(*_SAMPLING, "min_gap", "pairs_per_prompt", "drop_unfinished", "output_format"),
        is_launched=True,
    ),
    "report": Verb(
        "report",
        "Write one HTML page about a run of rounds and about evaluations.",
        (
            ("A run of rounds", "trl-dt2it report --run outputs/dt2it_digits"),
            ("An evaluation", "trl-dt2it report --evaluation reward-model/evaluation/evaluation.json"),
            (
                "Corrections that were exported from the page's gallery, into the ledger",
                "trl-dt2it report --run outputs/dt2it_digits --corrections corrections.json",
            ),
        ),
    ),
}
