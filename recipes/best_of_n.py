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
from dataclasses import dataclass
from pathlib import Path

from trl import TrlParser

from trl_dt2it.recipe import SAMPLING_FLAGS, AnswerArguments


MAIN_FLAGS = SAMPLING_FLAGS


@dataclass
class BestOfNArguments(AnswerArguments):
    """Arguments of this script: those of [`trl_dt2it.recipe.AnswerArguments`]."""


def main(args):
    from rich.console import Console

    from trl_dt2it.recipe import share_work
    from trl_dt2it.utils import on_main_process, run_lock, whole_file

    state, output, rows = share_work(), Path(args.output_dir) / "best_of_n.jsonl", args.read()
    if args.dry_run:
        if state.is_main_process:
            args.show_plan(rows, output)
        return
    with run_lock(args.output_dir):
        scored = args.answer(rows, source="prompts")
        lines = [best_of(one) for one in scored]

        def finish():
            with whole_file(output) as part:
                part.write_text(
                    "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
                )
            show(lines, output, Console())

        on_main_process(finish)
    state.destroy_process_group()


def best_of(one):
    """A line of the output. Of equal rewards the first answer is the best; without any reward there is none."""
    found = [(-reward, place) for place, reward in enumerate(one.rewards) if reward is not None]
    best = min(found)[1] if found else None
    return {
        "row": one.prompt.row,
        "group_id": one.prompt.group_id,
        "source_id": one.prompt.source_id,
        "prompt": one.prompt.messages,
        "images": one.prompt.images,
        "answers": one.answers,
        "is_finished": one.is_finished,
        "rewards": one.rewards,
        "best": best,
        "answer": None if best is None else one.answers[best],
        "reward": None if best is None else one.rewards[best],
    }


def show(lines, output, console):
    """How much the best answer is better than an answer drawn at random."""
    from statistics import fmean

    picked = [line for line in lines if line["best"] is not None]
    console.print(f"{len(lines):,} prompts, {sum(len(line['answers']) for line in lines):,} answers.")
    if picked:
        mean = fmean(fmean(reward for reward in line["rewards"] if reward is not None) for line in picked)
        best = fmean(line["reward"] for line in picked)
        console.print(f"Mean reward {mean:+.3f}, of the best answers {best:+.3f}.")
    console.print(f"Best answers: {output}", soft_wrap=True, highlight=False)


def make_parser():
    return TrlParser(BestOfNArguments, allow_abbrev=False)


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
