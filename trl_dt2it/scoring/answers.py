"""Answers sampled from a policy and scored: best-of-n, and pairs for DPO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import release_memory
from datasets import Dataset, Features, Value
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from ..data.images import ImageOptions
from ..data.messages import FEATURES, Prompt, read_prompt, with_images
from ..data.rows import SIDES, RowError, check_row, named_errors, text_message
from ..models.modeling import load_processing_class
from ..models.rendering import ProcessingClass, get_tokenizer, lacks_special_tokens, render_conversation
from ..processes import whole_weights
from ..utils import digest_of
from .scorer import RewardScorer, open_images
from .shards import REWARD_COLUMNS, make_records


# Canonical columns and the rewards; `strength` is their difference.
GAP_FEATURES = Features({**FEATURES, **dict.fromkeys(REWARD_COLUMNS, Value("float64"))})


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling."""

    num_answers: int = 8  # to each prompt
    max_new_tokens: int = 512  # of an answer, which is cut there
    temperature: float = 1.0  # 0 takes the likeliest token each time, so that all answers are equal
    top_p: float = 1.0  # share of the probability that tokens are drawn from
    seed: int = 42

    def __post_init__(self) -> None:
        for name, least in (("num_answers", 1), ("max_new_tokens", 1), ("temperature", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least {least}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}; it must be above 0 and at most 1.")


@dataclass(frozen=True)
class Answer:
    """A sampled answer, and whether the model ended it before `max_new_tokens`."""

    text: str
    is_finished: bool


@dataclass(frozen=True)
class Answering:
    """The model that answers, the reward model that scores, and the settings of both."""

    model: str | None  # directory or Hub id; not needed where the rows have answers
    reward_model: str
    sampling: Sampling
    prompts_per_batch: int
    image_options: ImageOptions
    model_kwargs: dict[str, Any]  # of [`load_generator`]
    reward_model_kwargs: dict[str, Any]  # of [`RewardScorer.from_pretrained`]
    lower_confidence: float = 0.0  # standard deviations by which each reward is lowered


@dataclass(frozen=True)
class ScoredAnswers:
    """The answers to a prompt, in lists of one length."""

    prompt: Prompt  # with the paths of its images alone, `None` for an image without one
    answers: list[str]
    is_finished: list[bool]  # by the model itself; given answers count as finished
    rewards: list[float | None]  # `None` for an answer that spells a special token of the reward model


@dataclass
class GapReport:
    """Counts of a set of pairs."""

    prompts: int = 0
    answers: int = 0
    pairs: int = 0
    prompts_without_pair: int = 0  # their answers lie too close together, or are too few
    # Answers dropped before pairing, by reason: `empty`, `unfinished`, `unscored` or `equal`; and `unusable`, pairs
    # that `check_row` refuses
    left_out: dict[str, int] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)  # reward margin of each pair


def load_generator(
    name_or_path: str, *, dtype: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """Load a vision-language or language model for generation onto this process's device."""
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    is_vlm = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto_class = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
    kwargs |= {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code, "use_safetensors": True}
    with whole_weights():
        model = auto_class.from_pretrained(name_or_path, **kwargs)
    return model.to(PartialState().device).eval()


def sample_answers(
    model: PreTrainedModel,
    processing_class: ProcessingClass,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    image_options: ImageOptions,
) -> list[list[Answer]]:
    """Sample answers to several prompts in one batch, reproducibly, without touching torch's global generators."""
    tokenizer = get_tokenizer(processing_class)
    encoded = _encode(prompts, processing_class, sampling.num_answers, image_options)
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in encoded.items()
    }
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        # `top_k=0` overrides that of the model's generation config, which nobody asked for.
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"), torch.no_grad():
        torch.manual_seed(sampling.seed * 1_000_003 + prompts[0].row)
        drawn |= {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
        output = cast(Any, model).generate(**inputs, max_new_tokens=sampling.max_new_tokens, **drawn)
    new = output[:, inputs["input_ids"].shape[1] :]
    is_end = torch.isin(new, torch.tensor([ends] if isinstance(ends, int) else ends, device=new.device))
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    answers = [Answer(text.strip(), done) for text, done in zip(texts, is_end.any(1).tolist(), strict=True)]
    count = sampling.num_answers
    return [answers[first : first + count] for first in range(0, len(answers), count)]


def _encode(prompts: Sequence[Prompt], processing_class: ProcessingClass, times: int, options: ImageOptions) -> Any:
    """Encode all prompts, each so many times in a row: `num_return_sequences` would mix up the images of prompts that
    have several, in families whose `generate` does not know which image belongs to which row."""
    texts: list[str] = []
    images: list[list[Any]] = []
    for prompt in prompts:
        shown = open_images(prompt.images, options, processing_class, prompt.name)
        text = render_conversation(prompt.messages, shown, processing_class, add_generation_prompt=True)
        texts += [text] * times
        images += [shown] * times
    return processing_class(
        text=texts,
        # Processors take rows without images among others, but no batch without any.
        **({"images": images} if any(images) else {}),
        padding=True,
        padding_side="left",
        add_special_tokens=lacks_special_tokens(texts[0], processing_class),
        return_tensors="pt",
    )


def answer_and_score(how: Answering, rows: Dataset, output_dir: Path, *, source: str) -> list[ScoredAnswers]:
    """Answer all prompts, unless the rows have answers, and score them, resuming from `answers.jsonl` and
    `rewards.jsonl` in `output_dir`. Every process has to call it, and gets all rows; `source` begins new `group_id`s.
    """

    def read(index: int) -> Prompt:
        with named_errors(row := rows[index], index):
            return read_prompt(row, index, source=source)

    prompts = [
        replace(prompt, images=[image["path"] for image in prompt.images]) for prompt in map(read, range(len(rows)))
    ]
    if "answers" in rows.column_names:
        answered: list[dict[str, Any]] = []
        for prompt, texts in zip(prompts, rows["answers"], strict=True):
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{prompt.name} has no list of texts in `answers`; fill it, or drop the column.")
            answered.append({"answers": texts, "is_finished": [True] * len(texts)})
    else:
        answered = _sample(how, prompts, read, output_dir / "answers.jsonl")
    rewards = _score(how, prompts, [one["answers"] for one in answered], read, output_dir / "rewards.jsonl")
    return [
        ScoredAnswers(prompt, one["answers"], one["is_finished"], some)
        for prompt, one, some in zip(prompts, answered, rewards, strict=True)
    ]


@contextmanager
def _released() -> Iterator[None]:
    """Release the memory of the model that was used, after an error too."""
    try:
        yield
    finally:
        release_memory()


@_released()
def _sample(
    how: Answering, prompts: Sequence[Prompt], read: Callable[[int], Prompt], path: Path
) -> list[dict[str, Any]]:
    if how.model is None:
        raise ValueError("No model is named that answers, and the rows have no column `answers`.")
    name, kwargs = how.model, how.model_kwargs

    @cache
    def loaded() -> tuple[Any, Any]:
        trust = kwargs.get("trust_remote_code", False)
        return load_generator(name, **kwargs), load_processing_class(name, trust_remote_code=trust)

    def make(batch: list[int]) -> list[dict[str, Any]]:
        sampled = sample_answers(*loaded(), list(map(read, batch)), how.sampling, image_options=how.image_options)
        return [{"answers": [a.text for a in some], "is_finished": [a.is_finished for a in some]} for some in sampled]

    # They tell a model on disk from another in the same folder.
    folder = Path(name)
    files = sorted(folder.glob("*.*")) if folder.is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    # The draws of a batch are one stream, so that another batch size would give other answers.
    about = [name, stats, kwargs.get("dtype"), asdict(how.sampling), how.prompts_per_batch]
    keys = [digest_of([prompt.content, *about]) for prompt in prompts]
    return make_records(path, keys, make, batch_size=how.prompts_per_batch, desc="Sampling answers")


@_released()
def _score(
    how: Answering, prompts: Sequence[Prompt], answers: Sequence[list[str]], read: Callable[[int], Prompt], path: Path
) -> list[list[float | None]]:
    kwargs = how.reward_model_kwargs
    scorer = RewardScorer.from_pretrained(how.reward_model, image_options=how.image_options, **kwargs)
    scorer._lower([], how.lower_confidence)  # refuses what it cannot do, before any work
    complete = partial(scorer._complete, lower_confidence=how.lower_confidence)

    def make(batch: list[int]) -> list[dict[str, Any]]:
        some = [(read(row), answers[row]) for row in batch]
        return [{"rewards": rewards} for rewards in _rewards(complete, some)]

    about = [*scorer.settings.values()]
    if how.lower_confidence:
        about += [how.lower_confidence, scorer.posterior.about]
    keys = [digest_of([one.content, texts, *about]) for one, texts in zip(prompts, answers, strict=True)]
    records = make_records(path, keys, make, batch_size=how.prompts_per_batch, desc="Scoring answers")
    return [record["rewards"] for record in records]


def _rewards(
    complete: Callable[..., list[float | None]], some: Sequence[tuple[Prompt, list[str]]]
) -> list[list[float | None]]:
    """Score the answers to each prompt, with `None` for those that cannot be scored."""
    flat = [(prompt, text) for prompt, texts in some for text in texts]
    try:
        rewards = complete(
            [prompt.messages for prompt, _ in flat],
            [text for _, text in flat],
            [prompt.images for prompt, _ in flat],
            # A row is a group, whatever its neighbors ask: what lowers a reward may not depend on the batch.
            keys=[prompt.row for prompt, _ in flat],
        )
    except RowError as error:
        if len(some) == 1:
            text = str(error).removeprefix("prompt 0: ")
            raise RowError(error.reason, f"{some[0][0].name}: {text}") from error
        return [rewards for one in some for rewards in _rewards(complete, [one])]  # to find out which it is
    following = iter(rewards)
    return [[next(following) for _ in texts] for _, texts in some]


def gap_pairs(rewards: Sequence[float], *, min_gap: float, max_pairs: int | None) -> list[tuple[int, int]]:
    """Pair the indices of best and worst, second best and second worst, and so on, with a reward margin between."""
    order = sorted(range(len(rewards)), key=lambda index: -rewards[index])
    pairs = list(zip(order, reversed(order), strict=True))[: len(order) // 2]
    return [(a, b) for a, b in pairs if rewards[a] - rewards[b] >= min_gap and rewards[a] > rewards[b]][:max_pairs]


def build_gap_pairs(
    rows: Dataset,
    scored: Sequence[ScoredAnswers],
    *,
    min_gap: float,
    pairs_per_prompt: int | None,
    source: str,
    image_options: ImageOptions,
    drop_unfinished: bool = True,
) -> tuple[Dataset, GapReport]:
    """Build preference rows from the scored answers of a data set of prompts."""
    report, left_out = GapReport(prompts=len(scored)), Counter[str]()
    positions: list[int] = []
    pairs: list[dict[str, Any]] = []
    for one in scored:
        report.answers += len(one.answers)
        kept = _usable(one, drop_unfinished, left_out)
        rewards = [cast(float, one.rewards[index]) for index in kept]
        count = len(pairs)
        for better, worse in gap_pairs(rewards, min_gap=min_gap, max_pairs=pairs_per_prompt):
            row = _row(one, kept[better], kept[worse], source)
            try:
                check_row({**row, "images": ["-"] * len(one.prompt.images)})
            except RowError:
                left_out["unusable"] += 1
                continue
            positions.append(one.prompt.row)
            pairs.append(row)
            report.gaps.append(row["strength"])
        report.prompts_without_pair += len(pairs) == count
    report.pairs, report.left_out = len(pairs), dict(left_out)
    return with_images(rows, positions, pairs, image_options, GAP_FEATURES), report


def _usable(one: ScoredAnswers, drop_unfinished: bool, left_out: Counter[str]) -> list[int]:
    """Select the answers that may stand in a pair, without duplicates up to white space, and count the others."""
    kept, seen = [], set()
    for index, (text, is_finished, reward) in enumerate(zip(one.answers, one.is_finished, one.rewards, strict=True)):
        words = tuple(text.split())
        if not words:
            left_out["empty"] += 1
        elif not is_finished and drop_unfinished:
            left_out["unfinished"] += 1
        elif reward is None:
            left_out["unscored"] += 1
        elif words in seen:
            left_out["equal"] += 1
        else:
            seen.add(words)
            kept.append(index)
    return kept


def _row(one: ScoredAnswers, better: int, worse: int, source: str) -> dict[str, Any]:
    prompt = one.prompt
    texts = [[text_message("assistant", one.answers[index])] for index in (better, worse)]
    rewards = [cast(float, one.rewards[index]) for index in (better, worse)]
    return {
        "prompt": prompt.messages,
        **dict(zip(SIDES, texts, strict=True)),
        **dict(zip(REWARD_COLUMNS, rewards, strict=True)),
        "strength": rewards[0] - rewards[1],
        "pair_id": f"{source}-{prompt.row:06d}-{better}-{worse}",
        "group_id": prompt.group_id,
        "source": source,
        "source_id": prompt.source_id,
    }
