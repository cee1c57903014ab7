"""A reward model as a reward function of TRL's GRPO and RLOO trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .candidates import Candidates, as_candidates, check_prompt, check_response
from .data.rows import RowError
from .training.collator import MultimodalPreferenceCollator


def make_reward_func(
    score: Callable[[list[Candidates]], list[list[float]]],
    collator: MultimodalPreferenceCollator,
    *,
    name: str,
    invalid_reward: float | None,
) -> Callable[..., list[float | None]]:
    """
    Makes the function that [`RewardScorer.as_reward_func`] gives.

    Args:
        score (`Callable`):
            Gives for each of several prompts the rewards of its candidates.
        collator ([`~trl_dt2it.training.collator.MultimodalPreferenceCollator`]):
            Knows the processor.
        name (`str`):
            Name of the function.
        invalid_reward (`float`, *optional*):
            Reward of a completion that cannot be scored.

    Returns:
        `Callable`: takes `prompts`, `completions` and the columns of the data set.
    """

    def reward_func(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
        images = kwargs.get("images")
        if images is None and kwargs.get("image") is not None:
            images = [None if image is None else [image] for image in kwargs["image"]]
        groups: list[Candidates] = []
        members: list[list[int]] = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            shown = None if images is None else images[index]
            one = as_candidates(prompt, [completion], shown, collator.processing_class, f"prompt {index}")
            # A trainer gives the completions of a prompt one after the other.
            if not groups or (groups[-1].prompt, groups[-1].images) != (one.prompt, one.images):
                check_prompt(one, collator.special_tokens)
                groups.append(Candidates(one.prompt, [], one.images, one.name))
                members.append([])
            if _is_usable(one, collator):
                groups[-1].responses += one.responses
                members[-1].append(index)
        rewards = [invalid_reward] * len(prompts)
        for indices, found in zip(members, score(groups), strict=True):
            for index, reward in zip(indices, found, strict=True):
                rewards[index] = reward
        return rewards

    reward_func.__name__ = name
    return reward_func


def _is_usable(candidates: Candidates, collator: MultimodalPreferenceCollator) -> bool:
    try:
        check_response(candidates, 0, collator.special_tokens)
    except RowError:
        return False
    return True
