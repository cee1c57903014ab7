r"""Take the best of n answers to prompts with images: a vision-language model samples them, a reward model picks.

    # What would be sampled and scored
    trl-dt2it best-of-n --config best_of_n --dry_run

    # Your own prompts
    trl-dt2it best-of-n --model_name_or_path Qwen/Qwen3-VL-8B-Instruct --reward_model reward-model \
        --dataset_name prompts.jsonl --image_root photos --output_dir outputs/best

    # Answers that a server gave, in a column `answers`
    trl-dt2it best-of-n --reward_model reward-model --dataset_name answered.jsonl --image_root photos

It writes OUTPUT_DIR/best_of_n.jsonl: a line for each prompt with all answers, their rewards and the best one.
Rows that have a column `answers`, a list of texts, are scored as they are, so that any server may have sampled.
Run it again after a kill: what is sampled and scored stays. The processes of `accelerate launch` share the
prompts out.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from trl import TrlParser

from trl_dt2it.processes import on_main_process, run_lock
from trl_dt2it.recipe import SAMPLING_FLAGS, AnswerArguments, share_work, show_paths
from trl_dt2it.utils import whole_file


MAIN_FLAGS = (*SAMPLING_FLAGS, "lower_confidence")


@dataclass
class BestOfNArguments(AnswerArguments):
    """
    Arguments of this script, besides those of [`trl_dt2it.recipe.AnswerArguments`].

    Parameters:
        lower_confidence (`float`, *optional*, defaults to `0.0`):
            Standard deviations to lower each reward by; the reward model was trained with `reward_posterior`.
    """

    lower_confidence: float = field(default=0.0, metadata={"help": "Standard deviations to lower each reward by."})


def main(args):
    state, output, rows = share_work(), Path(args.output_dir) / "best_of_n.jsonl", args.read()
    if args.dry_run:
        args.show_plan(rows, output)
        return
    with run_lock(args.output_dir):
        answered = args.answer(rows, source="prompts", lower_confidence=args.lower_confidence)
        lines = [best_of(scored) for scored in answered]

        def finish():
            with whole_file(output) as part, part.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            show(lines, Console())
            show_paths({"Best answers": output}, Console())

        on_main_process(finish)
    state.destroy_process_group()


def best_of(scored):
    """Make a line of the output. Of equal rewards the first answer is the best; without any reward there is none."""
    rewards = scored.rewards
    ranked = [(-reward, index) for index, reward in enumerate(rewards) if reward is not None]
    best = min(ranked)[1] if ranked else None
    return {
        "row": scored.prompt.row,
        "group_id": scored.prompt.group_id,
        "source_id": scored.prompt.source_id,
        "prompt": scored.prompt.messages,
        "images": scored.prompt.images,
        "answers": scored.answers,
        "is_finished": scored.is_finished,
        "rewards": rewards,
        "best": best,
        "answer": None if best is None else scored.answers[best],
        "reward": None if best is None else rewards[best],
    }


def show(lines, console):
    """Compare the best answers with answers drawn at random."""
    from statistics import fmean

    picked = [line for line in lines if line["best"] is not None]
    console.print(f"{len(lines):,} prompts, {sum(len(line['answers']) for line in lines):,} answers.")
    if picked:
        mean = fmean(fmean(reward for reward in line["rewards"] if reward is not None) for line in picked)
        best = fmean(line["reward"] for line in picked)
        console.print(f"Mean reward {mean:+.3f}, of the best answers {best:+.3f}.")


def make_parser():
    return TrlParser(BestOfNArguments, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
