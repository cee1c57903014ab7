"""Raw rows of a source, from the Hub or from local files, without decoding an image and without running its code.

JSON is kept as text, one row a string, and parsed row by row: in several sets a key has another type from row to row
(MMPR's `image`), or keys that are free (EvalMuse's `element_score`), which no Arrow table of one schema holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset, load_from_disk
from huggingface_hub import snapshot_download

from .encoded import AnyDataset, leave_images_encoded
from .sources.source import Source


# The column that holds a row as JSON, and the one that holds the folder that its image paths start from.
JSON_COLUMN = "_json"
FOLDER_COLUMN = "_folder"
_SUFFIXES = (".parquet", ".jsonl", ".json")


def read_raw(
    source: Source,
    path_or_id: str | os.PathLike | None = None,
    *,
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
) -> AnyDataset:
    """
    The rows of a source as it has them.

    Args:
        source ([`Source`]):
            Says where it is and which of its files hold rows.
        path_or_id (`str` or `os.PathLike`, *optional*):
            A file (Parquet, JSON lines, a JSON list, or MMPR's `meta.json`), a folder of such files, a folder that
            `datasets` saved, or a Hub id; by default the source's own Hub id.
        split (`str`, *optional*, defaults to `"train"`):
            Split, on the Hub or in the name of a file.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read while iterating.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.

    Returns:
        `Dataset` or `IterableDataset`: its rows as they are, or with one column `_json` each, images encoded.

    Raises:
        `ValueError`: if there is nothing to read, or something that has to be unpacked first.
    """
    if path_or_id is None and source.hub_id is None:
        raise ValueError("This is a format and not a data set; give `path_or_id`.")
    path_or_id = os.fspath(path_or_id or str(source.hub_id))
    path = Path(path_or_id).expanduser()
    patterns = [pattern.format(split=split) for pattern in source.files]
    if path.is_file():
        return leave_images_encoded(_read_files([path], streaming))
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return leave_images_encoded(_from_disk(path, split, streaming))
        return leave_images_encoded(_read_files(_files_of(path, patterns, split), streaming))
    if path.is_absolute() or path_or_id.startswith((".", "~")) or path.suffix in (*_SUFFIXES, ".zip"):
        raise ValueError(f"There is no file or folder {path_or_id} to read preferences from.")
    if patterns:
        # The repository has a loading script, which `datasets` no longer runs, or holds more than its rows.
        folder = snapshot_download(path_or_id, repo_type="dataset", revision=revision, allow_patterns=patterns)
        return leave_images_encoded(_read_files(_files_of(Path(folder), patterns, split), streaming))
    return leave_images_encoded(
        load_dataset(path_or_id, source.config, split=split, streaming=streaming, revision=revision)
    )


def raw_rows(raw: AnyDataset) -> Iterator[dict[str, Any]]:
    """Rows as the source has them, those that are kept as JSON parsed, without blank lines."""
    for row in raw:
        if JSON_COLUMN not in row:
            yield row
        elif row[JSON_COLUMN].strip():
            yield json.loads(row[JSON_COLUMN])


def _from_disk(path: Path, split: str, streaming: bool) -> AnyDataset:
    loaded = load_from_disk(path)
    if not isinstance(loaded, Dataset):
        if split not in loaded:
            raise ValueError(f"{path} has the splits {', '.join(loaded)}, and not {split!r}.")
        loaded = loaded[split]
    return loaded.to_iterable_dataset() if streaming else loaded


def _files_of(folder: Path, patterns: list[str], split: str) -> list[Path]:
    """The files that a source's patterns name, or else all of the first kind that is there; of the split, if the
    names of files tell splits."""
    if not patterns and (folder / "dataset_info.json").is_file():  # LLaMA-Factory's
        raise ValueError(f"dataset_info.json tells which files of {folder} hold rows; give one of them.")
    files = sorted({file for pattern in patterns for file in folder.rglob(pattern) if file.suffix in _SUFFIXES})
    for suffix in () if files else _SUFFIXES:
        files = sorted(folder.rglob(f"*{suffix}"))
        if files:
            break
    of_split = [file for file in files if split in file.relative_to(folder).as_posix()]
    if not files:
        archives = sorted(file.name for file in folder.rglob("*") if ".zip" in file.name or ".tar" in file.name)
        hint = f" Unpack {archives[0]} first." if archives else ""
        raise ValueError(f"{folder} holds no {', '.join(_SUFFIXES)} file to read preferences from.{hint}")
    return of_split or files


def _read_files(files: list[Path], streaming: bool) -> AnyDataset:
    suffix = files[0].suffix
    if suffix == ".parquet":
        return load_dataset("parquet", data_files=list(map(str, files)), split="train", streaming=streaming)
    if suffix not in (".json", ".jsonl"):
        raise ValueError(f"{files[0]} is none of {', '.join(_SUFFIXES)}; unpack it if it is an archive.")
    parts = [part for file in files for part in _json_parts(file, streaming)]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _json_parts(file: Path, streaming: bool) -> list[AnyDataset]:
    with file.open("rb") as stream:
        start = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"["):
        state = file.stat()
        # Size and time are there for the cache of `datasets`, which would otherwise know the file by its name alone.
        kwargs = {"file": str(file), "state": f"{state.st_size} {state.st_mtime_ns}"}
        make = IterableDataset.from_generator if streaming else Dataset.from_generator
        return [make(_json_list, gen_kwargs=kwargs)]
    if file.suffix == ".json" and (annotations := _mmpr_annotations(file)):
        return [
            part.map(_with_folder, fn_kwargs={"folder": folder})
            for annotation, folder in annotations
            for part in _json_parts(annotation, streaming)
        ]
    lines = load_dataset("text", data_files=str(file), split="train", streaming=streaming)
    return [lines.rename_column("text", JSON_COLUMN)]


def _with_folder(row: dict[str, Any], folder: str) -> dict[str, Any]:
    return {FOLDER_COLUMN: folder}


def _json_list(file: str, state: str) -> Iterator[dict[str, str]]:
    with open(file, "rb") as stream:
        for row in ijson.items(stream, "item", use_float=True):
            yield {JSON_COLUMN: json.dumps(row, ensure_ascii=False)}


def _mmpr_annotations(file: Path) -> list[tuple[Path, str]]:
    """Annotation files and image folders of a `meta.json`: paths in it start from its own folder or the one above."""
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return []
    entries = list(meta.values()) if isinstance(meta, dict) else []
    if not entries or not all(isinstance(entry, dict) and "annotation" in entry for entry in entries):
        return []
    found = []
    for entry in entries:
        places = [base / entry["annotation"] for base in (file.parent, file.parent.parent)]
        annotation = next((place for place in places if place.is_file()), None)
        if annotation is None:
            raise ValueError(f"{file} names the annotations {entry['annotation']}, but there is no file {places[0]}.")
        found.append((annotation, entry.get("root", "")))
    return found


def raw_files(
    source: Source, path_or_id: str | os.PathLike | None, *, split: str = "train"
) -> list[tuple[str, int, int]]:
    """
    What tells whether the files of a set were changed since they were read.

    Args:
        source, path_or_id, split:
            As in [`read_raw`].

    Returns:
        `list[tuple[str, int, int]]`: of each file that is read its path, its size in bytes, and when it was changed
        last, in ns; empty for a Hub id and where there is nothing to read.
    """
    if path_or_id is None or not (path := Path(path_or_id).expanduser()).exists():
        return []
    if path.is_file():
        files = [path]
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        files = sorted(path.rglob("*.arrow"))
    else:
        files = _files_of(path, [pattern.format(split=split) for pattern in source.files], split)
    return [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
