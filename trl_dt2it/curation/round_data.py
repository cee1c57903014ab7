"""The sets of a curation run: where they come from, what tells them from others, and their folds.

No image is decoded, and a set stays on disk, memory-mapped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from ..data.columns import column_of, leave_images_encoded, rows_at_once
from ..data.contents import pair_contents, source_fingerprint
from ..data.load import load_preferences
from ..data.mixing import concatenate, with_canonical_columns, with_columns
from ..models.modeling import load_processing_class, set_pixel_limits
from ..training.collator import MultimodalPreferenceCollator
from ..training.config import MultimodalRewardConfig
from ..training.setup import image_options, prepare_dataset
from ..utils import digest, digest_of, main_process_first, on_main_process


# Rows of further kinds of sources: a function of the `source` and of what stands under the key that names the kind.
Loaders = Mapping[str, Callable[[str, Mapping[str, Any]], Dataset]]
SET_KINDS = ("dataset_name", "preferences")
_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read_sets(name: str, specs: Mapping[str, Mapping[str, Any]], loaders: Loaders | None = None) -> Dataset:
    """
    One set out of several sources.

    Args:
        name (`str`):
            What the configuration calls it, for messages.
        specs (`Mapping[str, Mapping]`):
            For each source where its rows are: `dataset_name` (a Parquet or JSON file, a folder or a Hub id, with
            `dataset_config`, `dataset_split` and `image_root`), or `preferences` (a name of [`load_preferences`], with
            its arguments), or a key of `loaders`; and `max_rows`. The key is the `source` of rows that do not say
            theirs, and of all rows of the set `test`, whose figures it names.
        loaders (`Mapping[str, Callable]`, *optional*):
            Functions that load further kinds of sources, such as [`trl_dt2it.demo.sets.DEMO_LOADERS`].

    Returns:
        `Dataset`: all rows, in order, with the columns of all sources; canonical rows, if sources have different ones.

    Raises:
        `ValueError`: if a key is not known, or there is nothing to read.
    """
    if not specs:
        raise ValueError(f"`{name}` is empty; name at least one source.")
    parts = {}
    with main_process_first():  # the others find what it has downloaded and converted
        for source, spec in specs.items():
            rows = read_set(f"{name}.{source}", source, spec or {}, loaders)
            if "source" not in rows.column_names or name == "test":
                rows = with_columns(rows, {"source": pa.repeat(source, len(rows))})
            parts[source] = leave_images_encoded(rows)
    return concatenate(parts)


def read_set(where: str, source: str, spec: Mapping[str, Any], loaders: Loaders | None = None) -> Dataset:
    """The rows of one source; `where` names the setting in messages, the rest is as in [`read_sets`]."""
    spec, loaders = dict(spec), loaders or {}
    known = (*SET_KINDS, *loaders)
    kinds = [kind for kind in known if kind in spec]
    if len(kinds) != 1:
        raise ValueError(f"`{where}` has to have one of the keys {', '.join(known)}.")
    kind, value, most = kinds[0], spec.pop(kinds[0]), spec.pop("max_rows", None)
    if kind == "preferences":
        rows = load_preferences(value, **{"source": source, **spec})
    elif kind == "dataset_name":
        config, split = spec.pop("dataset_config", None), spec.pop("dataset_split", "train")
        rows, root = _load(where, str(value), config, split), spec.pop("image_root", None)
        rows = rows if root is None else with_canonical_columns(rows, image_root=root)
    else:
        rows = loaders[kind](source, json.loads(value) if isinstance(value, str) else value)
    if kind != "preferences" and spec:
        raise ValueError(f"`{where}` has the unknown key `{next(iter(spec))}`.")
    return rows if most is None or most >= len(rows) else rows.select(range(most))


def _load(where: str, name: str, config: str | None, split: str) -> Dataset:
    path = Path(name).expanduser()
    if path.suffix in _FILES:
        if not path.is_file():
            raise ValueError(f"`{where}` is {name}, but there is no such file.")
        return load_dataset(_FILES[path.suffix], data_files=str(path), split=split)
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~"))):
        raise ValueError(f"`{where}` is {name}, but there is no such folder.")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        found = load_from_disk(str(path))
        return found[split] if isinstance(found, DatasetDict) else found
    return load_dataset(str(path) if path.is_dir() else name, config, split=split)


def set_digest(dataset: Dataset, pair_ids: pa.Array, contents: pa.Table | None = None) -> str:
    """
    What tells a set from others, also on another machine.

    Args:
        dataset (`Dataset`):
            The rows; images count by the other arguments alone.
        pair_ids (`pa.Array`):
            Names of the rows.
        contents (`pa.Table`, *optional*):
            What is in them, from [`pair_contents`].

    Returns:
        `str`: a SHA-256 of all other columns, 64 hexadecimal digits.
    """
    names = [name for name in dataset.column_names if name not in ("image", "images", "videos")]
    tables = dataset.select_columns(names).with_format("arrow").iter(rows_at_once(dataset))
    return digest(
        (f"{name}\n" for name in pair_ids.to_pylist()),
        (f"{content}\n" for content in ([] if contents is None else contents["content"].to_pylist())),
        (json.dumps(row, sort_keys=True, default=str) for table in tables for row in table.to_pylist()),
    )


def folds_of(dataset: Dataset, pair_ids: pa.Array, number: int, seed: int = 42) -> np.ndarray:
    """
    Parts of a set that share no prompt.

    Args:
        dataset (`Dataset`):
            Rows with `group_id`; a row without one is a group of its own.
        pair_ids (`pa.Array`):
            Names of the rows. Rows that differ by the number behind their name alone are copies, and stay together.
        number (`int`):
            Number of parts.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the split.

    Returns:
        `np.ndarray` of shape `(N,)`: the part of each row, from 0; parts differ in size by little more than a group.
    """
    # Without its number, the name of a copy is that of the first.
    names = pa.array([re.sub(r"#\d+$", "", name) for name in pair_ids.to_pylist()]).dictionary_encode()
    copies = names.indices.to_numpy()
    groups = copies
    if "group_id" in dataset.column_names:
        own = column_of(dataset, "group_id").dictionary_encode()
        given = own.indices.fill_null(-1).to_numpy().astype(np.int64)
        first = np.zeros(len(names.dictionary), dtype=np.int64)
        first[copies[::-1]] = np.arange(len(copies))[::-1]
        groups = np.where(given >= 0, given, len(own.dictionary) + copies)[first[copies]]
    _, groups, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    middles = np.cumsum(sizes[order]) - sizes[order] / 2
    part = np.empty(len(sizes), dtype=np.int64)
    part[order] = (middles * number / len(copies)).astype(np.int64)
    return part[groups]


@dataclass
class SourceSets:
    """
    The sets of a run, read when they are first needed.

    Parameters:
        specs (`dict[str, Mapping]`):
            For each of the sets `base`, `pool` and `test` its sources, as in [`read_sets`].
        args ([`MultimodalRewardConfig`]):
            `on_bad_row`, `image_check` and `max_length` say which rows can be used.
        model_dir (`Callable`):
            Gives the directory or Hub id of a model whose processor counts tokens and knows special ones.
        loaders (`Mapping[str, Callable]`, *optional*):
            As in [`read_sets`].
    """

    specs: Mapping[str, Mapping[str, Mapping[str, Any]]]
    args: MultimodalRewardConfig
    model_dir: Callable[[], str]
    loaders: Loaders | None = None
    _raw: dict[str, Dataset] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)
    _usable: dict[str, Dataset] = field(default_factory=dict)
    _contents: dict[str, pa.Table] = field(default_factory=dict)

    def raw(self, name: str) -> Dataset:
        """All rows of a set."""
        if name not in self._raw:
            self._raw[name] = read_sets(name, self.specs[name], self.loaders)
        return self._raw[name]

    def digest(self, name: str) -> str:
        """What a set depends on, and what decides which of its rows can be used."""
        if name not in self._digests:
            args, rows = self.args, self.raw(name)
            limits = {"max_length": args.max_length, "min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
            contents = self.contents(name)
            content = on_main_process(lambda: set_digest(rows, contents["pair_id"].combine_chunks(), contents))
            self._digests[name] = digest_of([content, args.on_bad_row, args.image_check, limits])
        return self._digests[name]

    def contents(self, name: str) -> pa.Table:
        """What is in all rows of a set, and their names, as [`pair_contents`] gives it; images are read once."""
        if name not in self._contents:
            rows, root = self.raw(name), self.args.image_root
            self._contents[name] = on_main_process(
                lambda: pair_contents(rows, image_root=root, num_proc=self.args.dataset_num_proc)
            )
        return self._contents[name]

    def fingerprint(self, name: str) -> str:
        """What a ledger knows a set by: the names of all its rows, whichever of them can be used."""
        return source_fingerprint(self.contents(name)["pair_id"].combine_chunks())

    def usable(self, name: str) -> Dataset:
        """Rows of a set that can be trained on and scored; others are quarantined as in a training, once for all."""
        if name not in self._usable:
            model_dir, args = self.model_dir(), self.args
            processing_class = load_processing_class(model_dir, trust_remote_code=args.trust_remote_code)
            set_pixel_limits(processing_class, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
            collator = MultimodalPreferenceCollator(processing_class, image_options=image_options(args))
            # Named first, so that copies are numbered the same way whatever rows are left out.
            rows = self.raw(name)
            rows = with_columns(rows, {"pair_id": self.contents(name)["pair_id"].combine_chunks()})
            self._usable[name], _ = prepare_dataset(rows, name=name, collator=collator, args=args)
        return self._usable[name]

    def names(self, name: str) -> pa.Array:
        """Names of the usable rows of a set."""
        return column_of(self.usable(name), "pair_id")
