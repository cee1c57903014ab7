"""What is known about a public preference set, besides how its rows are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..errors import RowError


# The column that holds a raw row as JSON, and the one that holds the folder that its image paths start from.
JSON_COLUMN = "_json"
FOLDER_COLUMN = "_folder"

# An adapter takes a row as the source has it (of a grouped source, all rows of a group) and its options as keywords.
# It gives canonical rows, and a `RowError` for each pair that the source holds and that cannot be used.
Adapter: TypeAlias = Callable[..., Iterator[dict[str, Any] | RowError]]
# Of the fields that a set has, and with these options, those that its adapter reads or refuses.
Reads: TypeAlias = Callable[[Collection[str], Mapping[str, Any]], set[str]]


@dataclass(frozen=True)
class Source:
    """
    A public preference set.

    Parameters:
        convert (`Callable`):
            Its adapter.
        licence (`str`):
            SPDX identifier as the publisher gives it, or `"unknown"`.
        hub_id (`str`, *optional*):
            Where it is on the Hub. A format has none.
        is_non_commercial (`bool`, *optional*, defaults to `False`):
            Whether the licence forbids commercial use.
        is_t2i (`bool`, *optional*, defaults to `False`):
            Whether the adapter gives text-to-image pairs.
        group_by (`str`, *optional*):
            Column whose equal values make a group, where pairs are formed from several rows.
        has_videos (`bool`, *optional*, defaults to `False`):
            Whether some rows have videos.
        has_weights (`bool`, *optional*, defaults to `False`):
            Whether rows may have a `weight`.
        reads (`tuple[str, ...]` or `Callable`, *optional*, defaults to `()`):
            Fields that the adapter reads or refuses, `"a.b"` for the field `b` of the field `a`; or a function of the
            fields that a set has, and of the options. All other fields stay columns.
        is_checked (`bool`, *optional*, defaults to `False`):
            Whether the adapter calls [`check_row`], which others leave to the loader.
        has_parts (`bool`, *optional*, defaults to `False`):
            Whether the published rows have a `source`, which names the part of the set that a row is from. The set
            itself, by whose name licences and rows of benchmarks are found, stays the source.
        config (`str`, *optional*):
            Configuration to load.
        files (`tuple[str, ...]`, *optional*, defaults to `()`):
            Patterns of the files that hold the rows, in a repository that needs a loading script or holds other files
            too. `{split}` stands for the split.
        note (`str`, *optional*, defaults to `""`):
            What a user has to know: images that are not shipped, unclear terms.
    """

    convert: Adapter
    licence: str
    hub_id: str | None = None
    is_non_commercial: bool = False
    is_t2i: bool = False
    group_by: str | None = None
    has_videos: bool = False
    has_weights: bool = False
    reads: tuple[str, ...] | Reads = ()
    is_checked: bool = False
    has_parts: bool = False
    config: str | None = None
    files: tuple[str, ...] = ()
    note: str = ""
