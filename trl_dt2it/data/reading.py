"""Raw rows of a source, from the Hub or from local files, without decoding an image and without running its code.

JSON is kept as text, one row a string, and parsed row by row: in several sets a key has another type from row to row
(MMPR's `image`), or keys that are free (EvalMuse's `element_score`), which no Arrow table of one schema holds.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ijson
import pandas as pd
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import snapshot_download

from .encoded import AnyDataset, leave_images_encoded
from .sources.source import FOLDER_COLUMN, JSON_COLUMN, Source


_JSON_ROWS = Features({JSON_COLUMN: Value("string")})
_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
# Where an object holds its rows, as in `{"data": [...]}`.
_LISTS = ("data", "rows", "pairs", "examples", "train")
_BYTE_ORDERS = (b"\xff\xfe", b"\xfe\xff")
_LOOKED_AT = 1 << 20  # bytes at the beginning of a file that tell what it is


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
            A file (Parquet, JSON lines, a JSON list, a JSON object with a list of rows, CSV, TSV, or MMPR's
            `meta.json`), a folder of such files, a folder that `datasets` saved, or a Hub id; by default the source's
            own Hub id.
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
    if suffix not in _SUFFIXES:
        raise ValueError(f"{files[0]} is none of {', '.join(_SUFFIXES)}; unpack it if it is an archive.")
    read = _json_parts if suffix in (".json", ".jsonl") else _table
    parts = [part for file in files for part in read(file, streaming)]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _table(file: Path, streaming: bool) -> list[AnyDataset]:
    """A table with a header. All is text: an answer may be a number, or `NA`."""
    separator = "\t" if file.suffix == ".tsv" else ","
    try:
        frame = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as a table ({_in_one_line(error)}); fix the file.") from error
    return [_as_asked(Dataset.from_pandas(frame, preserve_index=False), streaming)]


def _as_asked(rows: Dataset, streaming: bool) -> AnyDataset:
    return rows.to_iterable_dataset() if streaming else rows


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _json_parts(file: Path, streaming: bool) -> list[AnyDataset]:
    with file.open("rb") as stream:
        start = stream.read(_LOOKED_AT)
    if start.startswith(_BYTE_ORDERS):
        raise ValueError(f"{file} is in UTF-16 and not in UTF-8; save it as UTF-8.")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)  # which a character that is cut at the end passes
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from error
    start = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start and not file.read_bytes().strip():
        raise ValueError(f"{file} is empty; there is no row in it.")
    if start.startswith(b"["):
        state = file.stat()
        # Size and time are there for the cache of `datasets`, which would otherwise know the file by its name alone.
        kwargs = {"file": str(file), "state": f"{state.st_size} {state.st_mtime_ns}"}
        make = IterableDataset.from_generator if streaming else Dataset.from_generator
        return [_built(file, lambda: make(_json_list, gen_kwargs=kwargs, features=_JSON_ROWS))]
    # A line with nothing but a brace begins an object over several lines.
    is_object = start.split(b"\n", 1)[0].strip() == b"{"
    if (is_object or file.suffix == ".json") and (content := _json_object(file, must_be=is_object)) is not None:
        if annotations := _mmpr_annotations(file, content):
            return [
                part.map(_with_folder, fn_kwargs={"folder": folder})
                for annotation, folder in annotations
                for part in _json_parts(annotation, streaming)
            ]
        rows = [json.dumps(row, ensure_ascii=False) for row in _rows_of(file, content)]
        return [_as_asked(Dataset.from_dict({JSON_COLUMN: rows}, features=_JSON_ROWS), streaming)]
    lines = _built(
        file,
        lambda: load_dataset("text", data_files=str(file), split="train", streaming=streaming, encoding="utf-8-sig"),
    )
    return [lines.rename_column("text", JSON_COLUMN)]


def _built(file: Path, build: Callable[[], AnyDataset]) -> AnyDataset:
    """What `datasets` builds, with the sentence of what is wrong with the file in place of its own."""
    try:
        return build()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise _not_utf8(file, error.__cause__) from error
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def _not_utf8(file: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{file} is not UTF-8 ({_in_one_line(error)}); save it as UTF-8.")


def _json_object(file: Path, *, must_be: bool) -> dict[str, Any] | None:
    """The one object that a file holds; `None` if it holds several, in lines."""
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        if must_be:
            raise ValueError(f"{file} is not JSON ({_in_one_line(error)}); fix the file.") from error
        return None
    return content if isinstance(content, dict) else None


def _rows_of(file: Path, content: dict[str, Any]) -> list[Any]:
    """The list of rows in an object, also as the data viewer of the Hub gives it, or else the object as a row."""
    names = [name for name in _LISTS if isinstance(content.get(name), list)]
    if len(names) > 1:
        shown = ", ".join(f"`{name}`" for name in names)
        raise ValueError(f"{file} has several lists of rows: {shown}; give a file of one of them.")
    rows = content[names[0]] if names else [content]
    return [row["row"] if isinstance(row, dict) and isinstance(row.get("row"), dict) else row for row in rows]


def _with_folder(row: dict[str, Any], folder: str) -> dict[str, Any]:
    return {FOLDER_COLUMN: folder}


def _json_list(file: str, state: str) -> Iterator[dict[str, str]]:
    count = 0
    try:
        with open(file, "rb") as stream:
            for row in ijson.items(stream, "item", use_float=True):
                yield {JSON_COLUMN: json.dumps(row, ensure_ascii=False)}
                count += 1
    except ijson.JSONError:
        # `json` reads what Python writes, NaN among it, and says in which line a file is damaged.
        try:
            content = json.loads(Path(file).read_bytes().decode("utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({_in_one_line(error)}); fix the file.") from error
        for row in content[count:]:
            yield {JSON_COLUMN: json.dumps(row, ensure_ascii=False)}


def _mmpr_annotations(file: Path, meta: dict[str, Any]) -> list[tuple[Path, str]]:
    """Annotation files and image folders of a `meta.json`: paths in it start from its own folder or the one above."""
    entries = list(meta.values())
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
