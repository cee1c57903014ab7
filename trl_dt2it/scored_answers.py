"""Answers to many prompts and their rewards, in files that a killed run goes on from.

Sampling comes first, for all prompts, and scoring after it, so that only one of the two models is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from accelerate.utils import release_memory
from datasets import Dataset

from .data.images import ImageOptions
from .data.messages import Prompt, read_prompt
from .data.rows import RowError, row_name
from .dataset_scoring import make_records, model_fingerprint, processor_settings
from .models.modeling import load_processing_class
from .sampling import Sampling, load_generator, sample_answers
from .scoring import RewardScorer
from .utils import digest_of


@dataclass(frozen=True)
class Answering:
    """The model that answers, the reward model that scores, and how both do it."""

    model: str | None  # directory or Hub id; not needed where the rows have answers
    reward_model: str
    sampling: Sampling
    prompts_per_batch: int
    image_options: ImageOptions
    model_kwargs: dict[str, Any]  # of [`load_generator`]
    reward_model_kwargs: dict[str, Any]  # of [`RewardScorer.from_pretrained`]


@dataclass(frozen=True)
class ScoredAnswers:
    """The answers to a prompt, in lists of one length."""

    prompt: Prompt  # with the paths of its images alone, `None` for one that has none
    answers: list[str]
    is_finished: list[bool]  # by the model itself; given answers count as such
    rewards: list[float | None]  # `None` for an answer that spells a special token of the reward model


def answer_and_score(how: Answering, rows: Dataset, output_dir: Path, *, source: str) -> list[ScoredAnswers]:
    """Answer all prompts, unless the rows have answers, and score them, resuming from `answers.jsonl` and
    `rewards.jsonl` in `output_dir`. Every process has to call it, and gets the answers to all rows, in order; a
    `group_id` that a row does not have begins with `source`."""
    read = partial(_read, rows, source=source)
    prompts = []
    for row in range(len(rows)):
        prompt = read(row)
        prompts.append(replace(prompt, images=[image["path"] for image in prompt.images]))
    if "answers" in rows.column_names:
        texts = [_given(answers, prompt) for answers, prompt in zip(rows["answers"], prompts, strict=True)]
        answered: list[dict[str, Any]] = [{"answers": some, "is_finished": [True] * len(some)} for some in texts]
    else:
        answered = _sample(how, prompts, read, output_dir / "answers.jsonl")
    rewards = _score(how, prompts, [one["answers"] for one in answered], read, output_dir / "rewards.jsonl")
    return [
        ScoredAnswers(prompt, one["answers"], one["is_finished"], found)
        for prompt, one, found in zip(prompts, answered, rewards, strict=True)
    ]


def _read(rows: Dataset, index: int, *, source: str) -> Prompt:
    row = rows[index]
    try:
        return read_prompt(row, index, source=source)
    except RowError as error:
        raise RowError(error.reason, f"{row_name(row, index)}: {error}") from error


def _given(answers: Any, prompt: Prompt) -> list[str]:
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) for one in answers):
        raise ValueError(f"{prompt.name} has no list of texts in `answers`; give it, or leave the column out.")
    return answers


def _sample(how: Answering, prompts: Sequence[Prompt], read: Any, path: Path) -> list[dict[str, Any]]:
    if how.model is None:
        raise ValueError("No model is named that answers, and the rows have no column `answers`.")
    name, kwargs = how.model, how.model_kwargs

    @cache
    def loaded() -> tuple[Any, Any]:
        trust = kwargs.get("trust_remote_code", False)
        return load_generator(name, **kwargs), load_processing_class(name, trust_remote_code=trust)

    def make(batch: list[int]) -> list[dict[str, Any]]:
        some = [read(row) for row in batch]
        found = sample_answers(*loaded(), some, how.sampling, image_options=how.image_options)
        return [
            {"answers": [one.text for one in some], "is_finished": [one.is_finished for one in some]} for some in found
        ]

    # Another batch size would give other answers: the draws of a batch are one stream.
    about = [name, _files(name), kwargs.get("dtype"), asdict(how.sampling), how.prompts_per_batch]
    keys = [digest_of([prompt.content, *about]) for prompt in prompts]
    with _freed(loaded):
        return make_records(path, keys, make, batch_size=how.prompts_per_batch, desc="Sampling answers")


def _score(
    how: Answering, prompts: Sequence[Prompt], answers: Sequence[list[str]], read: Any, path: Path
) -> list[list[float | None]]:
    @cache
    def loaded() -> RewardScorer:
        kwargs = how.reward_model_kwargs
        return RewardScorer.from_pretrained(how.reward_model, image_options=how.image_options, **kwargs)

    def make(batch: list[int]) -> list[dict[str, Any]]:
        some = [(read(row), answers[row]) for row in batch]
        return [{"rewards": rewards} for rewards in _rewards(loaded(), some)]

    with _freed(loaded):
        scorer = loaded()
        processor = processor_settings(scorer.collator.processing_class)
        about = [model_fingerprint(scorer.model), processor, scorer.normalization]
        keys = [digest_of([one.content, texts, *about]) for one, texts in zip(prompts, answers, strict=True)]
        found = make_records(path, keys, make, batch_size=how.prompts_per_batch, desc="Scoring answers")
    return [record["rewards"] for record in found]


def _rewards(scorer: RewardScorer, some: Sequence[tuple[Prompt, list[str]]]) -> list[list[float | None]]:
    """Score the answers to each prompt; the function for TRL knows what to do with those that it cannot read."""
    function = scorer.as_reward_func()
    flat = [(prompt, text) for prompt, texts in some for text in texts]
    try:
        found = iter(
            function(
                [prompt.messages for prompt, _ in flat],
                [text for _, text in flat],
                images=[prompt.images for prompt, _ in flat],
            )
        )
    except RowError as error:
        if len(some) == 1:
            text = str(error).removeprefix("prompt 0: ")
            raise RowError(error.reason, f"{some[0][0].name}: {text}") from error
        return [rewards for one in some for rewards in _rewards(scorer, [one])]  # to find out which it is
    return [[next(found) for _ in texts] for _, texts in some]


@contextmanager
def _freed(loaded: Any) -> Iterator[None]:
    """Free the memory of a model that was loaded, if it was, for the next one."""
    try:
        yield
    finally:
        loaded.cache_clear()
        release_memory()


def _files(name_or_path: str) -> list[Any]:
    """List what tells a model on disk from another in its place."""
    folder = Path(name_or_path)
    files = sorted(folder.glob("*.*")) if folder.is_dir() else []
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
