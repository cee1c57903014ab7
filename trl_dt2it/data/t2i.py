"""Text-to-image preferences rewritten as two-image questions with short verdicts; the wordings of the questions."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from PIL import Image
from transformers.utils import logging

from ..utils import digest, read_packaged
from .columns import AnyDataset, batch_rows, column_of, leave_images_encoded, rows_at_once, uncached
from .images import ImageOptions, as_image, placed_image, with_image_root
from .messages import PROVENANCE, REFORMULATED_FEATURES
from .rows import (
    RowError,
    check_amount,
    check_unicode,
    content_group,
    encoded_content,
    image_identity,
    named_errors,
    summarize,
    text_message,
)


logger = logging.get_logger(__name__)

IMAGES, CAPTION = "{images}", "{caption}"
_PLACEHOLDERS = re.compile(f"({re.escape(IMAGES)}|{re.escape(CAPTION)})")
# Blocks of Han characters: radicals, iteration marks, ideographs and the planes of their extensions.
_HAN = re.compile(
    "[\u2e80-\u2fd5\u3005\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# Wordings of others, white space collapsed: DT2IT-MRM's own script and UnifiedReward put the caption into brackets.
_BRACKETED = re.compile(
    r"(?:image [12]: ?){0,2}(?:you are )?given a (?:text )?caption\b.*?\bcaption ?: ?\[(.*)\]", re.IGNORECASE
)
_BETTER = re.compile(r"image ([12]) is better(?: than image (?!\1)[12])?", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)


@dataclass(frozen=True)
class T2ITemplate:
    """
    Wording of a two-image question.

    Parameters:
        prompt (`str`):
            Question with `{images}` and `{caption}` once each, in either order. `{images}` becomes the two images,
            each after its label, and `{caption}` the caption as it is. All else is literal, further braces and
            `<image>` included.
        first_is_better, second_is_better (`str`, *optional*):
            Answers that prefer the image shown first, and second.
        labels (`tuple[str, str]`, *optional*, defaults to `("Image 1: ", "\\nImage 2: ")`):
            Text ahead of the first and of the second image.

    Raises:
        `ValueError`: if a placeholder is not there exactly once, or if the two answers are empty or equal.
    """

    prompt: str
    first_is_better: str = "Image 1 is better than Image 2."
    second_is_better: str = "Image 2 is better than Image 1."
    labels: tuple[str, str] = ("Image 1: ", "\nImage 2: ")

    def __post_init__(self) -> None:
        counts = self.prompt.count(IMAGES), self.prompt.count(CAPTION)
        if counts != (1, 1):
            held = f"{self.prompt!r:.200} holds {IMAGES} {counts[0]} times and {CAPTION} {counts[1]} times"
            raise ValueError(f"A template must hold {IMAGES} once and {CAPTION} once; {held}.")
        first, second = self.first_is_better.strip(), self.second_is_better.strip()
        if not first or not second or first == second:
            raise ValueError(f"The answers of a template must be two different texts, got {first!r} and {second!r}.")

    def question(self, caption: str) -> list[dict[str, Any]]:
        """Write the content of the question: text blocks and two image blocks, the caption whole in one text block."""
        blocks: list[dict[str, Any]] = []
        text = ""
        for piece in _PLACEHOLDERS.split(self.prompt):
            if piece == IMAGES:
                for label in self.labels:
                    blocks += [{"type": "text", "text": text + label}, {"type": "image", "text": None}]
                    text = ""
            else:
                text += caption if piece == CAPTION else piece
        blocks.append({"type": "text", "text": text})
        return [block for block in blocks if block["text"] != ""]


_WORDINGS = read_packaged("data/t2i_wordings.yaml")
ENGLISH = tuple(T2ITemplate(**wording) for wording in _WORDINGS["english"])
CHINESE = tuple(T2ITemplate(**wording, labels=("图1:", "\n图2:")) for wording in _WORDINGS["chinese"])


def is_chinese(caption: str) -> bool:
    """Tell whether to ask about a caption in Chinese: it has a Han character."""
    return _HAN.search(caption) is not None


def as_templates(template: str | T2ITemplate | Sequence[str | T2ITemplate] | None) -> tuple[T2ITemplate, ...] | None:
    """Read the `template` argument; `None` stands for the built-in wordings."""
    if template is None:
        return None
    if not (given := (template,) if isinstance(template, (str, T2ITemplate)) else tuple(template)):
        raise ValueError("`template` is empty; pass at least one wording, or None for the built-in wordings.")
    return tuple(T2ITemplate(item) if isinstance(item, str) else item for item in given)


def collapse(text: str) -> str:
    """Collapse white space, so that texts are equal that differ in nothing else."""
    return " ".join(text.split())


def find_caption(text: str, clean: Callable[[str], str] = collapse, cleaned: str | None = None) -> str | None:
    """Find the caption in a question of a built-in wording, with or without the labels of its images, or in one of
    DT2IT-MRM's script or of UnifiedReward. `cleaned` is `clean(text)`, where the caller has it."""
    cleaned = clean(text) if cleaned is None else cleaned
    for before, after in _edges(clean):
        if cleaned.startswith(before) and cleaned.endswith(after) and len(before) + len(after) <= len(cleaned):
            return cleaned[len(before) : len(cleaned) - len(after)].strip()
    # The last character first: without it, the pattern would try every bracket of a text of any length.
    bracketed = _BRACKETED.fullmatch(collapse(text)) if text.rstrip().endswith("]") else None
    return bracketed and clean(bracketed[1])


def prefers_first(answer: str) -> bool | None:
    """Read the verdict in an answer to a two-image question."""
    verdict = _plain(_ANSWER_TAG.sub(" ", answer.rpartition("</think>")[2]))
    if verdict in _VERDICTS:
        return _VERDICTS[verdict]
    match = _BETTER.fullmatch(verdict)
    return None if match is None else match[1] == "1"


def _plain(verdict: str) -> str:
    return collapse(verdict).rstrip(".。").casefold()


_VERDICTS = {
    _plain(text): is_first
    for template in (*ENGLISH, *CHINESE)
    for text, is_first in ((template.first_is_better, True), (template.second_is_better, False))
}


@lru_cache
def _edges(clean: Callable[[str], str]) -> list[tuple[str, str]]:
    """List the texts before and after the caption in each built-in wording."""
    templates, edges = (*ENGLISH, *CHINESE), []
    for template in templates:
        for labels in {("", ""), *(other.labels for other in templates)}:
            before, after = template.prompt.replace(IMAGES, " ".join((*labels, ""))).split(CAPTION)
            edges.append((clean(before), clean(after)))
    return edges


_BYTES = (bytes, bytearray, memoryview)
_VERDICT = Features({"reason": Value("string"), "message": Value("string")})

# Columns that mean something else in a canonical row.
_RESERVED = {"image", "videos", "tools", "chat_template_kwargs", "chosen_ids", "rejected_ids", "row_index", *_VERDICT}
_BATCH_SIZE = 100  # rows of a stream at a time: two photographs each, held three times over


class Columns(NamedTuple):
    """Names of the columns that hold the pairs of a set."""

    caption: str = "caption"
    chosen_image: str = "chosen_image"
    rejected_image: str = "rejected_image"
    strength: str | None = "strength"


@dataclass(frozen=True)
class Plan:
    """Settings by which pairs become rows."""

    columns: Columns
    seed: int
    templates: tuple[T2ITemplate, ...] | None
    both_orders: bool
    extras: tuple[str, ...]  # columns kept besides the canonical ones
    options: ImageOptions


def reformulate_t2i(
    dataset: AnyDataset,
    *,
    caption: str = "caption",
    chosen_image: str = "chosen_image",
    rejected_image: str = "rejected_image",
    strength: str | None = "strength",
    seed: int = 42,
    template: str | T2ITemplate | Sequence[str | T2ITemplate] | None = None,
    both_orders: bool = False,
    on_bad_row: str = "quarantine",
    image_root: str | os.PathLike | None = None,
    num_proc: int | None = None,
) -> AnyDataset:
    """
    Turn text-to-image preferences into canonical rows: a question about a caption and two images, and two verdicts.

    Of the good rows with the same `source`, half show the better image first; of an odd number, the seed decides which
    half is larger by one. The wording is drawn from the seed and the row's `pair_id`, apart from the position.
    Captions arrive unchanged in one text block, `{braces}` and `<image>` included. No image is decoded.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Pairs. Images are bytes, paths or `datasets` images. `pair_id`, `group_id`, `source` and `source_id` are
            kept; a missing `pair_id` or `group_id` is a hash of the pair or of the caption. Other columns without
            images or bytes are kept too, of a stream only if it knows its features; a warning names the others.
        caption, chosen_image, rejected_image (`str`, *optional*):
            Columns of the caption that both images were to show, of the better and of the worse image.
        strength (`str`, *optional*, defaults to `"strength"`):
            Column of how much better the chosen image is, >= 0, in the source's own unit; may be absent. `None` reads
            none.
        template (`str`, [`T2ITemplate`] or a sequence of them, *optional*):
            Question with `{images}` and `{caption}` once each; all else is literal. Each row draws one of several. By
            default one of three English wordings, or of three Chinese ones if the caption has a Han character.
        both_orders (`bool`, *optional*, defaults to `False`):
            Whether every pair gives two rows in the same wording: the better image first (`pair_id` ends with `-ab`)
            and second (`-ba`).
        on_bad_row (`str`, *optional*, defaults to `"quarantine"`):
            `"quarantine"` drops bad rows and counts them on screen by reason, of a stream when it ends; `"raise"`
            raises an error for the first.
        seed, image_root, num_proc (*optional*):
            Seed of positions and wordings, 42 by default, folder of the images, as in [`ImageOptions`], and number of
            processes, for a set in memory.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: canonical rows in the order of the pairs, with the
        columns of [`~trl_dt2it.data.messages.REFORMULATED_FEATURES`] and those kept. `t2i_caption`, `t2i_first` and
        `t2i_order` tell [`validate`], [`decontaminate`] and ledgers which pair a row is about. A stream that resumes
        from its `state_dict` reads the rows before it again.

    Raises:
        `ValueError`: if a column is missing, or if a template is wrong.
        [`RowError`]: for the first bad row, with `on_bad_row="raise"`; a stream raises it when it gets there.
    """
    if on_bad_row not in ("quarantine", "raise"):
        raise ValueError(f'`on_bad_row` is {on_bad_row!r}; choose "quarantine" or "raise".')
    columns = Columns(caption, chosen_image, rejected_image, strength)
    options = with_image_root(None, image_root)
    _check_columns(dataset, columns)
    extras = _extra_features(dataset.features, columns)
    features = Features({**REFORMULATED_FEATURES, **extras})
    plan = Plan(columns, int(seed), as_templates(template), both_orders, tuple(extras), options)
    if isinstance(dataset, IterableDataset):
        kwargs = {"dataset": leave_images_encoded(dataset).with_format(None), "plan": plan, "on_bad_row": on_bad_row}
        return IterableDataset.from_generator(_stream_rows, features=features, gen_kwargs=kwargs)

    faults, is_good = _find_faults(dataset, columns, options, num_proc)
    if not is_good.all():
        if on_bad_row == "raise":
            index = int(np.argmin(is_good))
            row = dataset.select_columns("pair_id")[index] if "pair_id" in dataset.column_names else {}
            with named_errors(row, index):
                raise RowError(**faults[index])
        _warn(Counter(pc.drop_null(faults.data.column("reason")).to_pylist()), len(dataset))
        dataset = dataset.select(np.flatnonzero(is_good))
    if len(dataset) == 0:
        return Dataset.from_dict({name: [] for name in features}, features=features)
    sources = column_of(dataset, "source") if "source" in dataset.column_names else pa.nulls(len(dataset))
    seen: Counter[str | None] = Counter()
    drawn = (not both_orders and _next_position(plan.seed, source.as_py(), seen) for source in sources)
    positions = np.fromiter(drawn, dtype=bool)  # an array, because `map` hashes and pickles it

    def make(table: pa.Table, indices: list[int]) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for row, index in zip(table.to_pylist(), indices, strict=True):
            rows += canonical_rows(row, plan, bool(positions[index]))
        return pa.Table.from_pylist(rows, schema=features.arrow_schema)

    shared = {"features": features, "num_proc": num_proc, "desc": "Reformulating pairs", "with_indices": True}
    return _mapped(dataset, make, (*columns, *PROVENANCE, *extras), options, **shared)


def split_t2i(
    dataset: AnyDataset,
    *,
    caption: str = "caption",
    chosen_image: str = "chosen_image",
    rejected_image: str = "rejected_image",
    strength: str | None = "strength",
    image_root: str | os.PathLike | None = None,
    num_proc: int | None = None,
) -> tuple[AnyDataset, AnyDataset]:
    """
    Split pairs into those that [`reformulate_t2i`] uses and those that it drops.

    To use a bad pair after all, fix it, remove the columns `reason` and `message`, and put it back with
    [`~datasets.concatenate_datasets`].

    Args:
        dataset, caption, chosen_image, rejected_image, strength, image_root, num_proc:
            As in [`reformulate_t2i`].

    Returns:
        `tuple`: the good pairs as they are, and the bad pairs with the columns `reason` (one of
        [`~trl_dt2it.data.REASONS`]) and `message` besides.

    Raises:
        `ValueError`: if a column is missing.
    """
    columns, options = Columns(caption, chosen_image, rejected_image, strength), with_image_root(None, image_root)
    _check_columns(dataset, columns)
    if isinstance(dataset, IterableDataset):
        stream, checks = leave_images_encoded(dataset).with_format(None), {"columns": columns, "options": options}
        good = stream.filter(_is_good, fn_kwargs=checks).map(dict)  # else `cast` would leave images undecoded
        bad = stream.map(_verdict, fn_kwargs=checks).filter(bool, input_columns="reason")
        if (features := dataset.features) is None:
            return good, bad
        return good.cast(features), bad.cast(Features({**features, **_VERDICT}))
    faults, is_good = _find_faults(dataset, columns, options, num_proc)
    rows = np.flatnonzero(~is_good)
    before = dataset.remove_columns([name for name in _VERDICT if name in dataset.column_names])
    quarantine = concatenate_datasets([before.select(rows), faults.select(rows)], axis=1)
    return dataset.select(np.flatnonzero(is_good)), quarantine


def find_bad_pair(row: Mapping[str, Any], columns: Columns, options: ImageOptions) -> RowError | None:
    """Find the reason why a pair cannot be used, if there is one."""
    try:
        name, caption = columns.caption, row.get(columns.caption)
        if caption is not None and not isinstance(caption, str):
            raise RowError("not_conversational", f"`{name}` is of type {type(caption).__name__}; give a string.")
        if caption is None or not caption.strip():
            raise RowError("empty_caption", f"`{name}` is empty; give the caption or drop the row.")
        check_unicode(f"`{name}`", caption)
        names = (columns.chosen_image, columns.rejected_image)
        images = [_image(row, name, options) for name in names]
        are_encoded = all(isinstance(image, Mapping) for image in images)
        chosen, rejected = images if are_encoded else map(image_identity, images)
        if chosen == rejected:
            message = f"`{names[0]}` and `{names[1]}` are one image; drop the row, there is nothing to prefer."
            raise RowError("equal_images", message)
        if (strength := columns.strength) is not None:
            # Of any size that a float may have: `check_row` knows what is too large to train with.
            check_amount(strength, row.get(strength), "bad_strength", sys.float_info.max)
    except RowError as error:
        return error
    return None


def _image(row: Mapping[str, Any], name: str, options: ImageOptions) -> Any:
    """Read an image of a pair: encoded, as `{"bytes": ..., "path": ...}` with one of the two, or as Pillow has it."""
    image = row.get(name)
    if isinstance(image, Mapping) and isinstance(image.get("bytes"), _BYTES) and not len(image["bytes"]):
        image = image.get("path")
    # A path beside bytes goes: `datasets` would read a file of that name in the working directory instead.
    image = encoded_content(image)
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    if image is None or (isinstance(image, (*_BYTES, str)) and not len(image)):
        raise RowError("image_missing", f"`{name}` is missing or empty; give the image or drop the row.")
    if not isinstance(image, (*_BYTES, str, Image.Image)):
        raise RowError("image_type", f"`{name}` is of type {type(image).__name__}; give bytes, a path or a PIL image.")
    return placed_image(image, options)


def canonical_rows(row: Mapping[str, Any], plan: Plan, chosen_first: bool) -> list[dict[str, Any]]:
    """Make the row of a good pair, or its two rows with `both_orders`."""
    columns = plan.columns
    caption = row[columns.caption]
    chosen, rejected = (_image(row, name, plan.options) for name in (columns.chosen_image, columns.rejected_image))
    strength = None if columns.strength is None else row.get(columns.strength)
    names = {name: _name(row.get(name)) for name in PROVENANCE}
    pair_id = names["pair_id"] or content_group(caption, [chosen, rejected], [])
    templates = plan.templates or (CHINESE if is_chinese(caption) else ENGLISH)
    template = templates[_draw(plan.seed, "wording", pair_id) % len(templates)]
    common = {
        "prompt": [{"role": "user", "content": template.question(caption)}],
        "strength": None if strength is None else float(strength),
        **names,
        "group_id": names["group_id"] or content_group(caption, [], []),
        "t2i_caption": caption,
        "t2i_first": template.first_is_better,
        **{name: row.get(name) for name in plan.extras},
    }
    verdicts = [[text_message("assistant", text)] for text in (template.first_is_better, template.second_is_better)]
    return [
        {
            **common,
            "chosen": verdicts[0 if is_first else 1],
            "rejected": verdicts[1 if is_first else 0],
            "images": [chosen, rejected] if is_first else [rejected, chosen],
            "pair_id": f"{pair_id}-{'ab' if is_first else 'ba'}" if plan.both_orders else pair_id,
            "t2i_order": ("ab" if is_first else "ba") if plan.both_orders else None,
        }
        for is_first in ((True, False) if plan.both_orders else (chosen_first,))
    ]


def _next_position(seed: int, source: Any, seen: Counter[str | None]) -> bool:
    """Draw whether the next good row shows the better image first; `seen` counts the rows of each source."""
    # Rows 2k and 2k + 1 of a source show it in different positions, and a coin decides which row shows it first.
    name = _name(source)
    block, second = divmod(seen[name], 2)
    seen[name] += 1
    return (_draw(seed, "position", name, block) + second) % 2 == 0


def _draw(*parts: Any) -> int:
    """Draw an integer of 64 bits that depends on nothing but `parts`."""
    return int(digest(repr(parts))[:16], 16)


def _name(value: Any) -> str | None:
    return None if value is None or value == "" else str(value)


def _check_columns(dataset: AnyDataset, columns: Columns) -> None:
    names = dataset.column_names
    needed = [name for name in columns if name not in (None, "strength")]
    if missing := [f"`{name}`" for name in needed if names is not None and name not in names]:
        message = f"The set has no column {', '.join(missing)}, only {', '.join(names)}"
        raise ValueError(f"{message}; say which columns hold the pairs.")


def _extra_features(features: Features | None, columns: Columns) -> dict[str, Any]:
    """Select the columns to keep besides the canonical ones: numbers, strings, and lists and objects of them."""
    read, taken = {*columns, *PROVENANCE, "strength"}, {*REFORMULATED_FEATURES, *_RESERVED}
    others = {name: feature for name, feature in (features or {}).items() if name not in read}
    kept = {name: feature for name, feature in others.items() if name not in taken and _is_plain(feature)}
    if dropped := [f"`{name}`" for name in others if name not in kept]:
        logger.warning(
            f"Columns that questions about two images cannot have are dropped: {', '.join(dropped)}; to keep one that "
            "holds no images, rename it."
        )
    return kept


def _is_plain(feature: Any) -> bool:
    """Tell numbers and strings, in lists and objects or not, from images and bytes."""
    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    if isinstance(feature, List):
        return _is_plain(feature.feature)
    return isinstance(feature, (Value, ClassLabel)) and "binary" not in feature.dtype


def _find_faults(
    dataset: Dataset, columns: Columns, options: ImageOptions, num_proc: int | None
) -> tuple[Dataset, np.ndarray]:
    """Find the reason and message of every bad pair, both `None` for good pairs, and a mask `(N,)` of these."""
    if len(dataset) == 0:
        return Dataset.from_dict({"reason": [], "message": []}, features=_VERDICT), np.zeros(0, dtype=bool)

    def check(table: pa.Table) -> pa.Table:
        verdicts = [_verdict(row, columns, options) for row in table.to_pylist()]
        return pa.Table.from_pylist(verdicts, schema=_VERDICT.arrow_schema)

    shared = {"features": _VERDICT, "num_proc": num_proc, "desc": "Checking pairs"}
    faults = _mapped(dataset, check, columns, options, **shared)
    return faults, pc.is_null(faults.data.column("reason")).to_numpy()


def _verdict(row: Mapping[str, Any], columns: Columns, options: ImageOptions) -> dict[str, Any]:
    error = find_bad_pair(row, columns, options)
    return {"reason": error and error.reason, "message": error and str(error)}


def _mapped(dataset: Dataset, function: Callable, names: Iterable, options: ImageOptions, **kwargs: Any) -> Dataset:
    """Map a function of Arrow tables, in which `map` neither decodes an image nor encodes one, over some columns."""
    read = dataset.select_columns([name for name in dict.fromkeys(names) if name in dataset.column_names])
    kwargs |= {} if options.image_root is None else uncached()
    made = read.with_format("arrow").map(function, batched=True, batch_size=rows_at_once(dataset), **kwargs)
    return made.with_format(None)


def _stream_rows(dataset: IterableDataset, plan: Plan, on_bad_row: str) -> Iterator[dict[str, Any]]:
    seen: Counter[str | None] = Counter()
    dropped: Counter[str] = Counter()
    index = -1
    # Not `iter(dataset)`: in a worker process of a DataLoader, it would give the worker its share of the shards only,
    # though the generator around it is the one that reads them all.
    rows = (row for batch in dataset.iter(batch_size=_BATCH_SIZE) for row in batch_rows(batch))
    for index, row in enumerate(rows):
        error = find_bad_pair(row, plan.columns, plan.options)
        if error is None:
            is_first = not plan.both_orders and _next_position(plan.seed, row.get("source"), seen)
            yield from canonical_rows(row, plan, is_first)
        elif on_bad_row == "raise":
            with named_errors(row, index):
                raise error
        else:
            dropped[error.reason] += 1
    if dropped:
        _warn(dropped, index + 1)


def _is_good(row: Mapping[str, Any], columns: Columns, options: ImageOptions) -> bool:
    return find_bad_pair(row, columns, options) is None


def _warn(dropped: Counter[str], total: int) -> None:
    counts = f"{dropped.total()} of {total} pairs ({summarize(dropped)})"
    logger.warning(f"Dropped {counts}; `split_t2i` gives them for repair.")


def t2i_pair(
    caption: str, chosen_image: Any, rejected_image: Any, *, strength: float | None = None, source_id: Any = None
) -> dict[str, Any]:
    """Make a text-to-image pair of a caption and two images."""
    if not isinstance(caption, str):
        raise RowError("not_conversational", f"the caption is of type {type(caption).__name__}; give a string.")
    return {
        "caption": caption,
        "chosen_image": as_image(chosen_image),
        "rejected_image": as_image(rejected_image),
        "strength": strength,
        "group_id": content_group(caption, [], []),
        "source_id": None if source_id is None else str(source_id),
    }
