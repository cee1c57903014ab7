"""Rows as they are published: every image within them, read from nowhere but where the user says."""

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

from .encoded import column_of, has_images, leave_images_encoded
from .errors import RowError
from .images import check_image
from .locations import ImageOptions, allowed_path, check_address, is_address, open_encoded
from .rows import row_name


# Rows of a row group, the least that a reader of the file holds at once. Each may have images of some megabytes.
_ROW_GROUP = 100


def published_features(features: Features) -> Features:
    """Features of rows as those have them who load what is published: images decode, and paths in `image` and `images`
    have become images. A `ValueError` if videos are paths."""
    found = {}
    for name, feature in with_image_columns(features).items():
        if name == "videos" and _is_text(feature.feature if isinstance(feature, List) else feature):
            raise ValueError("The column `videos` holds paths, which nobody else has; give their frames as images.")
        found[name] = _decoding(feature)
    return Features(found)


def with_image_columns(features: Features) -> Features:
    """Features in which paths in `image` and `images` are images."""
    return Features(
        {name: _with_images(one) if name in ("image", "images") else one for name, one in features.items()}
    )


def parquet_shards(dataset: Dataset, options: ImageOptions, max_bytes: int) -> Iterator[bytes]:
    """
    Rows as Parquet files, with their images in them, undecoded.

    Args:
        dataset (`Dataset`):
            The rows.
        options ([`ImageOptions`]):
            Where images may come from, as in [`embedded_tables`].
        max_bytes (`int`):
            A file ends with the row group of 100 rows with which it has reached this size.

    Yields:
        `bytes`: a whole file; one without rows, if there are none.

    Raises:
        [`RowError`]: if an image may not be read or is not there; the message names the row.
    """
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
    """
    Rows with the bytes of all images in them, undecoded, a row group at a time.

    All that writes rows for others goes through here.

    Args:
        dataset (`Dataset`):
            The rows.
        features ([`~datasets.Features`]):
            Their features as they are written; a column of paths that is one of images there gets their bytes.
        options ([`ImageOptions`]):
            Where images may come from. What is not within the rows has to be inside `image_root`, or on an allowed
            host.

    Yields:
        `pa.Table`: at most 100 rows, with the schema of `features`.

    Raises:
        [`RowError`]: if an image may not be read, is not there or is none; the message names the row.
    """
    schema, start = features.arrow_schema, 0
    pictured = [name for name, feature in features.items() if has_images(feature)]
    for table in leave_images_encoded(dataset).with_format("arrow").iter(_ROW_GROUP):
        rows = table.select([name for name in table.column_names if name in (*pictured, "pair_id")]).to_pylist()
        for name in pictured:
            values = [_embedded(row[name], features[name], options, row, start + at) for at, row in enumerate(rows)]
            index = table.column_names.index(name)
            table = table.set_column(index, name, pa.array(values, schema.field(name).type))
        yield table.cast(schema)
        start += len(table)


def check_publishable(image: Any, options: ImageOptions) -> None:
    """
    Refuse an image whose bytes must not get into what others will read: Parquet files, reports, what is pushed.

    A row of somebody else's may name any file of this machine. In a training its content stays here, so that without
    `image_root` paths are read as they are; it must not go out.

    Args:
        image (`Any`):
            An image as a row holds it.
        options ([`ImageOptions`]):
            Where images may come from.

    Raises:
        [`RowError`]: `image_outside_root` for a path without `image_root` or out of it, `image_url` for an address
            that is not on an allowed host. Nothing is opened.
    """
    if isinstance(image, Mapping):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if not isinstance(image, (str, os.PathLike)):
        return
    text = os.fsdecode(image)
    if is_address(text):
        check_address(text, options)
        return
    if options.image_root is None:
        raise RowError(
            "image_outside_root",
            f"the image {text!r:.300} is a file; say by `image_root` out of which folder files may be published.",
        )
    allowed_path(text, options)


def find_unpublishable(
    dataset: Dataset, options: ImageOptions, *, paths_are_images: bool = False
) -> dict[int, RowError]:
    """
    Look at all paths of images, without opening one: what [`embedded_tables`] would refuse by where it is.

    Args:
        dataset (`Dataset`):
            The rows.
        options ([`ImageOptions`]):
            Where images may come from.
        paths_are_images (`bool`, *optional*, defaults to `False`):
            Whether texts in `image` and `images` will be images where they are written, as in [`published_features`].

    Returns:
        `dict[int, RowError]`: the first error of each row that has one, by its index.
    """
    features = with_image_columns(dataset.features) if paths_are_images else dataset.features
    pictured = [name for name, feature in features.items() if has_images(feature)]
    if not pictured:
        return {}
    errors, start = dict[int, RowError](), 0
    rows = leave_images_encoded(dataset).with_format(None).select_columns(pictured).with_format("arrow")
    for table in rows.iter(1000):
        for name in pictured:
            first = start
            for chunk in table.column(name).chunks:  # joined, their bytes would be copied
                for index, path in _paths(chunk, features[name], np.arange(first, first + len(chunk))):
                    try:
                        check_publishable(path, options)
                    except RowError as error:
                        errors.setdefault(index, error)
                first += len(chunk)
        start += len(table)
    return dict(sorted(errors.items()))


def refuse_unpublishable(dataset: Dataset, options: ImageOptions, *, paths_are_images: bool = False) -> None:
    """
    Raise what [`find_unpublishable`] finds, before hours of work whose result could not be written.

    Raises:
        [`RowError`]: of the first row, which it names, with the number of such rows.
    """
    errors = find_unpublishable(dataset, options, paths_are_images=paths_are_images)
    if errors:
        index, error = next(iter(errors.items()))
        row = {}
        if "pair_id" in dataset.column_names:
            row = {"pair_id": column_of(dataset.select([index]), "pair_id")[0].as_py()}
        message = f"{len(errors)} of {len(dataset)} rows have an image that must not be written; the first, "
        raise RowError(error.reason, f"{message}{row_name(row, index)}: {error}")


def _paths(array: pa.Array, feature: Any, rows: np.ndarray) -> Iterator[tuple[int, str]]:
    """The images of a column that are paths, each with its row. Bytes are not touched."""
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
        places = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
        yield from zip(rows[places].tolist(), array.drop_null().to_pylist(), strict=True)


def _embedded(value: Any, feature: Any, options: ImageOptions, row: Mapping[str, Any], index: int) -> Any:
    """A value with the bytes of its images."""
    if value is None:
        return None
    if isinstance(feature, (List, LargeList)):
        return [_embedded(one, feature.feature, options, row, index) for one in value]
    if isinstance(feature, dict):
        return {name: _embedded(value[name], part, options, row, index) for name, part in feature.items()}
    if not isinstance(feature, Image):
        return value
    given = {"bytes": None, "path": value} if isinstance(value, str) else value
    name = None if given["path"] is None else Path(given["path"]).name
    if given["bytes"] is not None:
        return {"bytes": given["bytes"], "path": name}
    try:
        check_publishable(given, options)
        with open_encoded(given, options) as (stream, shown):
            content = stream.read()
        _check_is_image(content, shown, options)
    except RowError as error:
        raise RowError(error.reason, f"{row_name(row, index)}: {error}") from error
    return {"bytes": content, "path": name}


def _check_is_image(content: bytes, name: str, options: ImageOptions) -> None:
    """Of any size: how large images may be is for whoever reads them."""
    try:
        check_image(content, options)
    except RowError as error:
        if error.reason == "image_corrupt":
            raise RowError("image_corrupt", f"{name} is not an image, and is not published; replace it.") from error


def _decoding(feature: Any) -> Any:
    if isinstance(feature, Image):
        return Image()
    if isinstance(feature, List):
        return List(_decoding(feature.feature), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(_decoding(feature.feature))
    if isinstance(feature, dict):
        return {name: _decoding(part) for name, part in feature.items()}
    return feature


def _with_images(feature: Any) -> Any:
    if isinstance(feature, List):
        return List(_with_images(feature.feature), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(_with_images(feature.feature))
    return Image() if _is_text(feature) else feature


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")
