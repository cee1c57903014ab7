"""Rows as they are published: every image within them, read from nowhere but where the user says."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, Value

from .encoded import has_images, leave_images_encoded
from .errors import RowError
from .locations import ImageOptions, open_encoded
from .rows import row_name


# Rows of a row group, the least that a reader of the file holds at once. Each may have images of some megabytes.
_ROW_GROUP = 100


def published_features(features: Features) -> Features:
    """
    Features of rows whose images were paths or undecoded, as those have them who load what is published.

    Args:
        features ([`~datasets.Features`]):
            Features of the rows.

    Returns:
        [`~datasets.Features`]: images decode, and paths in `image` and `images` have become images.

    Raises:
        `ValueError`: if videos are paths.
    """
    found = {}
    for name, feature in features.items():
        if name in ("image", "images"):
            feature = _with_images(feature)
        elif name == "videos" and _is_text(feature.feature if isinstance(feature, List) else feature):
            raise ValueError("The column `videos` holds paths, which nobody else has; give their frames as images.")
        found[name] = _decoding(feature)
    return Features(found)


def parquet_shards(dataset: Dataset, options: ImageOptions, max_bytes: int) -> Iterator[bytes]:
    """
    Rows as Parquet files, with their images in them, undecoded.

    Args:
        dataset (`Dataset`):
            The rows.
        options ([`ImageOptions`]):
            Where images may come from. What is not within the rows has to be inside `image_root`, or on an allowed
            host.
        max_bytes (`int`):
            A file ends with the row group of 100 rows with which it has reached this size.

    Yields:
        `bytes`: a whole file; one without rows, if there are none.

    Raises:
        [`RowError`]: if an image may not be read or is not there; the message names the row.
    """
    features = published_features(dataset.features)
    schema, encoded = features.arrow_schema, leave_images_encoded(dataset)
    pictured = [name for name, feature in features.items() if has_images(feature)]
    sink, writer, start = BytesIO(), None, 0
    for table in encoded.with_format("arrow").iter(_ROW_GROUP):
        rows = table.select([name for name in table.column_names if name in (*pictured, "pair_id")]).to_pylist()
        for name in pictured:
            values = [_embedded(row[name], features[name], options, row, start + at) for at, row in enumerate(rows)]
            place = table.column_names.index(name)
            table = table.set_column(place, name, pa.array(values, schema.field(name).type))
        writer = writer or pq.ParquetWriter(sink, schema)
        writer.write_table(table.cast(schema))
        start += len(table)
        if sink.tell() >= max_bytes:
            writer.close()
            yield sink.getvalue()
            sink, writer = BytesIO(), None
    if writer is not None or start == 0:
        (writer or pq.ParquetWriter(sink, schema)).close()
        yield sink.getvalue()


def _embedded(value: Any, feature: Any, options: ImageOptions, row: dict[str, Any], index: int) -> Any:
    """A value with the bytes of its images."""
    if value is None:
        return None
    if isinstance(feature, List):
        return [_embedded(one, feature.feature, options, row, index) for one in value]
    if isinstance(feature, dict):
        return {name: _embedded(value[name], part, options, row, index) for name, part in feature.items()}
    if not isinstance(feature, Image):
        return value
    given = {"bytes": None, "path": value} if isinstance(value, str) else value
    name = None if given["path"] is None else Path(given["path"]).name
    if given["bytes"] is not None:
        return {"bytes": given["bytes"], "path": name}
    if options.image_root is None and not options.allowed_hosts:
        # A row of somebody else's may name any file of this machine, which would go out with it.
        raise RowError(
            "image_outside_root",
            f"{row_name(row, index)}: the image {given['path']!r:.300} is a file; say by `image_root` out of which "
            "folder files may be published.",
        )
    try:
        with open_encoded(given["path"], options) as (stream, _):
            return {"bytes": stream.read(), "path": name}
    except RowError as error:
        raise RowError(error.reason, f"{row_name(row, index)}: {error}") from error


def _decoding(feature: Any) -> Any:
    if isinstance(feature, Image):
        return Image()
    if isinstance(feature, List):
        return List(_decoding(feature.feature), length=feature.length)
    if isinstance(feature, dict):
        return {name: _decoding(part) for name, part in feature.items()}
    return feature


def _with_images(feature: Any) -> Any:
    if isinstance(feature, List):
        return List(_with_images(feature.feature), length=feature.length)
    return Image() if _is_text(feature) else feature


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")
