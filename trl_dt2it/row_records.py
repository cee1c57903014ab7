"""Records of rows, one JSON line each, from which a killed run goes on.

Rows are worked on in batches that depend on their places alone, so that a run that was killed makes what an
undisturbed one would have. Each process appends to a file of its own; at the end they become one, in order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from .data.whole_file import whole_file
from .processes import check_shared_folder, on_main_process, raise_together, wait_for_everyone


def make_records(
    path: Path,
    keys: Sequence[str],
    make: Callable[[list[int]], list[dict[str, Any]]],
    *,
    batch_size: int,
    desc: str,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """
    Makes a record of every row that has none in a file yet.

    Every process has to call it; they take turns with the batches.

    Args:
        path (`Path`):
            The file, such as `answers.jsonl`. Beside it lie `answers.jsonl.0`, ..., one of each process, until all
            rows are done.
        keys (`Sequence[str]` of length N):
            For each row what its record depends on, as a hash.
        make (`Callable`):
            Gets the places of the rows of a batch and gives their records.
        batch_size (`int`):
            Rows of a batch: what a kill may cost at most.
        desc (`str`):
            What the progress bar says.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether the first process shows one.

    Returns:
        `list[dict]` of length N: the records in the order of the rows, on every process, each with `row` and `key`.

    Raises:
        `ValueError`: if the file holds records of other rows, or that were made with other settings, or if not all
            processes see its folder.
    """
    state = PartialState()
    check_shared_folder(path.parent)
    parts = sorted(path.parent.glob(f"{path.name}.[0-9]*"))
    known = _read([path, *parts], keys)
    wait_for_everyone()  # before anybody writes what another would read as known
    batches = [list(range(first, min(first + batch_size, len(keys)))) for first in range(0, len(keys), batch_size)]
    missing = [batch for batch in batches if not all(row in known for row in batch)]
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.name}.{state.process_index}")
    _mend(own)
    hidden = not (show_progress and state.is_main_process)
    failure = None
    with tqdm(total=len(keys), initial=len(known), desc=desc, disable=hidden) as bar:
        for turn, batch in enumerate(missing):
            if turn % state.num_processes == state.process_index:
                try:
                    made = list(zip(batch, make(batch), strict=True))
                except Exception as error:  # the others go on, and keep what they make
                    failure = error
                    break
                lines = [{"row": row, "key": keys[row], **record} for row, record in made if row not in known]
                with own.open("a", encoding="utf-8") as file:
                    file.write("".join(map(_line, lines)))
            bar.update(sum(row not in known for row in batch))
    raise_together(failure)
    parts = sorted(path.parent.glob(f"{path.name}.[0-9]*"))
    known = _read([path, *parts], keys)
    records = [known[row] for row in range(len(keys))]
    wait_for_everyone()

    def join() -> None:
        if parts or not path.is_file():
            with whole_file(path) as part:
                part.write_text("".join(map(_line, records)), encoding="utf-8")
            for one in parts:
                one.unlink()

    on_main_process(join)
    return records


def _read(paths: list[Path], keys: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Records by row; a last line that a kill has torn is left out."""
    known: dict[int, dict[str, Any]] = {}
    for path in filter(Path.is_file, paths):
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                continue
            record = json.loads(line)
            row = record["row"]
            if row >= len(keys) or record["key"] != keys[row]:
                raise ValueError(
                    f"{path} holds a record of row {row} with other content or settings; give another `output_dir`, "
                    "or delete the file."
                )
            known[row] = record
    return known


def _mend(path: Path) -> None:
    """Takes a torn last line off, so that the next record has a line of its own."""
    if path.is_file():
        content = path.read_bytes()
        with path.open("ab") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
