"""Preference rows as TRL's DPO trainer takes them for vision-language models.

Its collator wants an explicit prompt, as many image blocks in it as the row has images, and a list of images in every
row, empty or not. Where `datasets` opens the images itself, nothing checks their paths, so that this is done here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, Image, LargeList, List, Value
from datasets.fingerprint import generate_random_fingerprint
from trl import extract_prompt

from .canonical import MESSAGES, as_image
from .encoded import leave_images_encoded
from .errors import RowError
from .images import check_image
from .locations import ImageOptions, embedded_url, placed_image, with_image_root
from .prompts import with_image_blocks
from .rows import SIDES, blocks, row_images, row_name, row_videos
from .schema import check_row
from .swapping import with_columns


_TEXTS = ("prompt", *SIDES)
_PASSED_ON = ("tools", "chat_template_kwargs")


def to_dpo(
    dataset: Dataset,
    *,
    image_root: str | os.PathLike | None = None,
    image_options: ImageOptions | None = None,
) -> Dataset:
    """
    Turns preference rows into those that [`~trl.DPOTrainer`] takes.

    What the model reads stays the same: messages, texts, and images, whose bytes are kept.

    Example:

    ```python
    >>> from trl import DPOConfig, DPOTrainer
    >>> from trl_dt2it.data import to_dpo

    >>> args = DPOConfig("dpo", max_length=None)  # a truncated image would be an error
    >>> trainer = DPOTrainer("Qwen/Qwen3-VL-2B-Instruct", args=args, train_dataset=to_dpo(pairs))
    ```

    Args:
        dataset (`Dataset`):
            Rows as [`MultimodalRewardTrainer`] takes them, without videos.
        image_root (`str` or `os.PathLike`, *optional*):
            Folder that relative paths of images start from and that no path may leave, as in [`ImageOptions`]; they
            become absolute.
        image_options ([`ImageOptions`], *optional*):
            Where else images may come from, and how large they may be. Images of allowed hosts are fetched.

    Returns:
        `Dataset`: the same rows in their order, with the columns `prompt`, `chosen` and `rejected`: messages whose
        contents are blocks; `images`, a list in every row, decoded as RGB; and `tools` and `chat_template_kwargs` if
        they were there. Without a column of images, contents are strings and there is no `images`; plain strings stay
        as they are.

    Raises:
        `ValueError`: if a column is missing.
        [`RowError`]: for the first row that cannot be used, named in the message.
    """
    names = dataset.column_names
    if missing := [side for side in SIDES if side not in names]:
        raise ValueError(f"The data set has no column `{missing[0]}`; it has {', '.join(names)}.")
    options = with_image_root(image_options, image_root)
    dataset = leave_images_encoded(dataset)
    features = _text_features(dataset)
    has_images = bool({"image", "images"} & set(names)) and not isinstance(features["chosen"], Value)
    writes_images = has_images and not _can_stay(dataset, options)
    kept = [name for name in _PASSED_ON if name in names]
    if has_images and not writes_images:
        kept.append("images")
    final = {**features, **({"images": List(Image(mode="RGB"))} if has_images else {})}
    final |= {name: dataset.features[name] for name in kept if name != "images"}
    if len(dataset) == 0:
        return Dataset.from_dict({name: [] for name in final}, features=Features(final))
    if writes_images:
        features["images"] = List(Image(decode=False))
    result = dataset.map(
        _converted,
        with_indices=True,
        fn_kwargs={"options": options, "as_blocks": has_images, "columns": list(features)},
        features=Features(features),
        remove_columns=names,
        load_from_cache_file=False,
        new_fingerprint=generate_random_fingerprint(),
        writer_batch_size=100,
        desc="Converting pairs",
    )
    if kept:
        columns = {name: result.data.column(name).combine_chunks() for name in features}
        result = with_columns(dataset.select_columns(kept), columns)
    result = copy.deepcopy(result.select_columns(list(final)))
    result.info.features = Features(final)  # the storage is the same
    return result


def _text_features(dataset: Dataset) -> dict[str, Any]:
    """Features of prompt and answers: those that they have, but with contents as strings or as blocks."""
    found: dict[str, Any] = {}
    for name in _TEXTS:
        feature = dataset.features.get(name, dataset.features["chosen"])
        if isinstance(feature, (List, LargeList)) and isinstance(feature.feature, dict):
            has_images = bool({"image", "images"} & set(dataset.column_names))
            content = MESSAGES.feature["content"] if has_images else Value("string")
            feature = List({**feature.feature, "content": content})
        found[name] = feature  # otherwise plain strings, or JSON, which holds anything
    return found


def _can_stay(dataset: Dataset, options: ImageOptions) -> bool:
    """Whether the column of images can be used as it is, without a copy: lists in every row, with nothing to place."""
    if options.image_root is not None or options.allowed_hosts or "image" in dataset.column_names:
        return False
    return dataset.features["images"] == List(Image(decode=False)) and not dataset.data.column("images").null_count


def _converted(
    row: Mapping[str, Any], index: int, options: ImageOptions, as_blocks: bool, columns: list[str]
) -> dict[str, Any]:
    try:
        check_row(row)
        images = row_images(row)
        for image in images:
            check_image(image, options)
        if row_videos(row):
            raise RowError("video_type", "there is a video, which TRL's DPO trainer cannot read; leave the row out.")
        texts: dict[str, Any] = {name: row.get(name) for name in _TEXTS}
        if texts["prompt"] is None:
            sides = {side: row[side] for side in SIDES}
            texts = dict(extract_prompt(sides))
            # Both may begin with other prompts, and then images would stand in an answer.
            check_row({**texts, "images": images})
        if not isinstance(texts["chosen"], str):
            texts = {name: with_image_blocks(texts[name], len(images) if name == "prompt" else 0) for name in _TEXTS}
        if not as_blocks and not isinstance(texts["chosen"], str):
            texts = {name: [_flat(message) for message in texts[name]] for name in _TEXTS}
        if "images" in columns:
            texts["images"] = [embedded_url(placed_image(as_image(image), options), options) for image in images]
    except RowError as error:
        raise RowError(error.reason, f"{row_name(row, index)}: {error}") from error
    return {name: texts[name] for name in columns}


def _flat(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, "content": "".join(block["text"] for block in blocks(message))}
