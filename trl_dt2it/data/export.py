"""Pairs for others: Parquet files with images inside for the Hub, and rows for DPO."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, LargeList, List, Value

from .columns import column_of, holds, leave_images_encoded, retype_images, uncached
from .images import (
    ImageOptions,
    allowed_path,
    as_image,
    check_address,
    check_image,
    is_address,
    open_encoded,
    placed_image,
    with_image_root,
)
from .messages import MESSAGES, with_image_blocks
from .mixing import TEXTS, beside
from .rows import SIDES, RowError, check_row, encoded_content, message_text, named_errors, row_images, row_name
from .validation import ROW_GROUP


_PASSED_ON = ("tools", "chat_template_kwargs")  # to DPO


def published_features(features: Features) -> Features:
    """Features of published rows: images decode, and paths in `image` and `images` have become images."""
    features = with_image_columns(features)
    videos = features.get("videos")
    if _is_text(videos.feature if isinstance(videos, List) else videos):
        raise ValueError("The column `videos` holds paths, which nobody else has; give their frames as images.")
    return Features({name: retype_images(feature, decode=True) for name, feature in features.items()})


def with_image_columns(features: Features) -> Features:
    """Turn paths in `image` and `images` into images."""
    columns = {name: _with_images(features[name]) for name in ("image", "images") if name in features}
    return Features({**features, **columns})


def parquet_shards(dataset: Dataset, options: ImageOptions, max_bytes: int) -> Iterator[bytes]:
    """Yield rows as Parquet files of some `max_bytes`, with their images inside, undecoded."""
    features = published_features(dataset.features)
    schema, sink, writer, is_empty = features.arrow_schema, BytesIO(), None, True
    for table in embedded_tables(dataset, features, options):
        writer, is_empty = writer or pq.ParquetWriter(sink, schema), False
        writer.write_table(table)
        if sink.tell() >= max_bytes:
            writer.close()
            yield sink.getvalue()
            sink, writer = BytesIO(), None
    if writer is not None or is_empty:
        (writer or pq.ParquetWriter(sink, schema)).close()
        yield sink.getvalue()


def embedded_tables(dataset: Dataset, features: Features, options: ImageOptions) -> Iterator[pa.Table]:
    """Yield rows with the bytes of all images, undecoded, a row group at a time, for whatever others will read."""
    schema, start = features.arrow_schema, 0
    pictured = [name for name, feature in features.items() if holds(feature, Image)]
    for table in leave_images_encoded(dataset).with_format("arrow").iter(ROW_GROUP):
        rows = table.select([name for name in table.column_names if name in (*pictured, "pair_id")]).to_pylist()
        for name in pictured:
            values = []
            for index, row in enumerate(rows, start):
                with named_errors(row, index):
                    values.append(_embedded(row[name], features[name], options))
            position = table.column_names.index(name)
            table = table.set_column(position, name, pa.array(values, schema.field(name).type))
        yield table.cast(schema)
        start += len(table)


def check_publishable(image: Any, options: ImageOptions) -> None:
    """Refuse an image whose bytes must not get into Parquet files, reports and whatever else others will read.

    Somebody else's row may name any file of this machine. Its content stays here in training, which reads any path
    without an `image_root`, but must not go out.
    """
    image = encoded_content(image)
    text = os.fsdecode(image) if isinstance(image, (str, os.PathLike)) else None
    if text is not None and is_address(text):
        check_address(text, options)
    elif text is not None and options.image_root is None:
        message = f"the image {text!r:.300} is a file; say by `image_root` out of which folder files may be published."
        raise RowError("image_outside_root", message)
    elif text is not None:
        allowed_path(text, options)


def find_unpublishable(
    dataset: Dataset, options: ImageOptions, *, paths_are_images: bool = False
) -> dict[int, RowError]:
    """Find the images that [`embedded_tables`] would refuse by their path, by row, without opening one."""
    features = with_image_columns(dataset.features) if paths_are_images else dataset.features
    pictured = [name for name, feature in features.items() if holds(feature, Image)]
    errors, encoded = dict[int, RowError](), leave_images_encoded(dataset).with_format(None)
    for name in pictured:
        first = 0
        for table in encoded.select_columns([name]).with_format("arrow").iter(1000):
            for chunk in table.column(name).chunks:  # joined, their bytes would be copied
                for index, path in _paths(chunk, features[name], np.arange(first, first + len(chunk))):
                    try:
                        check_publishable(path, options)
                    except RowError as error:
                        errors.setdefault(index, error)
                first += len(chunk)
    return dict(sorted(errors.items()))


def refuse_unpublishable(dataset: Dataset, options: ImageOptions, *, paths_are_images: bool = False) -> None:
    """Raise the first error of [`find_unpublishable`], before hours of work whose result could not be written."""
    if errors := find_unpublishable(dataset, options, paths_are_images=paths_are_images):
        index, error = next(iter(errors.items()))
        has_ids = "pair_id" in dataset.column_names
        row = {"pair_id": column_of(dataset.select([index]), "pair_id")[0].as_py()} if has_ids else {}
        message = f"{len(errors)} of {len(dataset)} rows have an image that must not be written; the first, "
        raise RowError(error.reason, f"{message}{row_name(row, index)}: {error}")


def _paths(array: pa.Array, feature: Any, rows: np.ndarray) -> Iterator[tuple[int, str]]:
    """Yield the paths among the images of a column, each with its row, without touching bytes."""
    if isinstance(feature, (List, LargeList)):
        parents = pc.list_parent_indices(array).to_numpy()
        yield from _paths(pc.list_flatten(array), feature.feature, rows[parents])
    elif isinstance(feature, dict):
        for name, part in feature.items():
            yield from _paths(pc.struct_field(array, name), part, rows)
    elif isinstance(feature, Image):
        if pa.types.is_struct(array.type):
            is_path = pc.is_null(pc.struct_field(array, "bytes"))
            array = pc.if_else(is_path, pc.struct_field(array, "path"), None)
        is_path = array.is_valid().to_numpy(zero_copy_only=False)
        yield from zip(rows[is_path].tolist(), array.drop_null().to_pylist(), strict=True)


def _embedded(value: Any, feature: Any, options: ImageOptions) -> Any:
    """Read the bytes of the images in a value."""
    if value is None:
        return None
    if isinstance(feature, (List, LargeList)):
        return [_embedded(item, feature.feature, options) for item in value]
    if isinstance(feature, dict):
        return {name: _embedded(value[name], part, options) for name, part in feature.items()}
    if not isinstance(feature, Image):
        return value
    image = as_image(value)
    content, name = image["bytes"], None if image["path"] is None else Path(image["path"]).name
    if content is None:
        check_publishable(image, options)
        with open_encoded(image, options) as (stream, shown):
            content = stream.read()
        try:
            check_image(content, options)
        except RowError as error:
            if error.reason == "image_corrupt":  # of any size: that is for whoever reads it to limit
                message = f"{shown} is not an image, and is not published; replace it."
                raise RowError("image_corrupt", message) from error
    return {"bytes": content, "path": name}


def _with_images(feature: Any) -> Any:
    if isinstance(feature, List):
        return List(_with_images(feature.feature), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(_with_images(feature.feature))
    return Image() if _is_text(feature) else feature


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def to_dpo(
    dataset: Dataset, *, image_root: str | os.PathLike | None = None, image_options: ImageOptions | None = None
) -> Dataset:
    """
    Turn preference rows into rows for [`~trl.DPOTrainer`].

    The model reads the same messages, texts and images, whose bytes are kept.

    Args:
        dataset (`Dataset`):
            Preference rows as for [`MultimodalRewardTrainer`], without videos.
        image_root, image_options (*optional*):
            Folder of the images, of which relative paths become absolute, and other limits on them, as in
            [`ImageOptions`]. Images of allowed hosts are fetched.

    Returns:
        `Dataset`: the same rows in their order, with the columns `prompt`, `chosen` and `rejected`: messages whose
        contents are blocks; `images`, a list in every row, decoded as RGB; and `tools` and `chat_template_kwargs` if
        they were there. Without a column of images, contents are strings and there is no `images`; plain strings stay
        as they are.

    Raises:
        `ValueError`: if a column is missing.
        [`RowError`]: for the first row that cannot be used, named in the message.

    Example:

    ```python
    >>> from trl import DPOConfig, DPOTrainer
    >>> from trl_dt2it.data import to_dpo

    >>> args = DPOConfig("dpo", max_length=None)  # a truncated image would be an error
    >>> trainer = DPOTrainer("Qwen/Qwen3-VL-2B-Instruct", args=args, train_dataset=to_dpo(pairs))
    ```
    """
    names = dataset.column_names
    if missing := [side for side in SIDES if side not in names]:
        raise ValueError(f"The data set has no column `{missing[0]}`; it has {', '.join(names)}.")
    options = with_image_root(image_options, image_root)
    dataset = leave_images_encoded(dataset)
    has_images = bool({"image", "images"} & set(names))
    content = MESSAGES.feature["content"] if has_images else Value("string")
    features: dict[str, Any] = {}
    for name in TEXTS:
        feature = dataset.features.get(name, dataset.features["chosen"])
        if isinstance(feature, (List, LargeList)) and isinstance(feature.feature, dict):
            feature = List({**feature.feature, "content": content})
        features[name] = feature  # otherwise plain strings, or JSON, which holds anything
    has_images = has_images and not isinstance(features["chosen"], Value)
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
        writer_batch_size=100,
        desc="Converting pairs",
        **uncached(),
    )
    return beside(dataset.select_columns(kept), result, Features(final))


def _can_stay(dataset: Dataset, options: ImageOptions) -> bool:
    """Tell whether the column of images needs no copy: lists in every row, and no path or address to resolve."""
    if options.image_root is not None or options.allowed_hosts or "image" in dataset.column_names:
        return False
    feature = retype_images(dataset.features["images"], decode=False, keeps_mode=False)
    return feature == List(Image(decode=False)) and not dataset.data.column("images").null_count


def _converted(
    row: Mapping[str, Any], index: int, options: ImageOptions, as_blocks: bool, columns: list[str]
) -> dict[str, Any]:
    with named_errors(row, index):
        check_row(row)
        images = row_images(row)
        for image in images:
            check_image(image, options)
        if row.get("videos"):
            raise RowError("video_type", "there is a video, which TRL's DPO trainer cannot read; drop the row.")
        texts: dict[str, Any] = {name: row.get(name) for name in TEXTS}
        if texts["prompt"] is None:
            from trl import extract_prompt  # takes its time, and few need it

            texts = dict(extract_prompt({side: row[side] for side in SIDES}))
            # Both may begin with other prompts, and then images would stand in an answer.
            check_row({**texts, "images": images})
        if not isinstance(texts["chosen"], str):
            texts = {name: with_image_blocks(texts[name], len(images) if name == "prompt" else 0) for name in TEXTS}
            for message in () if as_blocks else (message for name in TEXTS for message in texts[name]):
                message["content"] = message_text(message)
        if "images" in columns:
            texts["images"] = [_fetched(placed_image(image, options), options) for image in images]
    return {name: texts[name] for name in columns}


def _fetched(image: Any, options: ImageOptions) -> Any:
    if image["bytes"] is not None or not is_address(image["path"]):
        return image
    with open_encoded(image, options) as (stream, _):
        return {"bytes": stream.read(), "path": None}
