"""The file of corrections that a report exports: a person's verdicts on single pairs."""

from __future__ import annotations

import json
import os
from pathlib import Path


FORMAT, VERDICTS = "trl-dt2it corrections", ("accept", "wrong", "unsure")

VERSION = 1


def read_corrections(path: str | os.PathLike) -> tuple[str | None, dict[str, tuple[bool, bool]], list[str]]:
    """Read a file of corrections: the fingerprint of its source set, whether each pair is to be flipped against it and
    kept, and the unsure pairs. Raise a `ValueError` if the file is none, or an entry is incomplete or repeated."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); export it from the report once more.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'{path} is no file of corrections: its `format` has to be "{FORMAT}".')
    if content.get("version") != VERSION:
        raise ValueError(f"{path} has version {content.get('version')!r}; this release reads version {VERSION}.")
    wanted: dict[str, tuple[bool, bool]] = {}
    unsure: list[str] = []
    for number, entry in enumerate(content.get("corrections") or []):
        where = f"Correction {number} of {path}"
        if not isinstance(entry, dict) or not isinstance(name := entry.get("pair_id"), str):
            raise ValueError(f"{where} has no `pair_id`; name the pair.")
        verdict = entry.get("verdict")
        if verdict not in VERDICTS:
            raise ValueError(f"{where} has the verdict {verdict!r:.40}; give one of {', '.join(VERDICTS)}.")
        if name in wanted or name in unsure:
            raise ValueError(f"{where} speaks of {name!r} a second time; leave one of them.")
        if verdict == "unsure":
            unsure.append(name)
            continue
        for key in ("flipped", "kept"):
            if not isinstance(entry.get(key), bool):
                raise ValueError(f"{where} has {entry.get(key)!r:.40} as `{key}`; give true or false.")
        wanted[name] = (entry["flipped"], entry["kept"])
    return content.get("source_set"), wanted, unsure
