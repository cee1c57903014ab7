"""The page itself: sections of figures and tables as one HTML file that asks nobody for anything."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..utils import digest
from .figures import Figure


@dataclass(frozen=True)
class Table:
    """
    A table of the page.

    Parameters:
        title (`str`):
            What stands above it.
        columns (`Sequence[str]`):
            Heads.
        rows (`Sequence[Sequence[str]]`):
            Cells.
        align (`str`, *optional*):
            `l` or `r` for each column; by default the first is text, on the left, and the others are numbers.
        is_folded (`bool`, *optional*, defaults to `False`):
            Whether it opens by a click only.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str = ""
    is_folded: bool = False

    def classes(self) -> list[str]:
        """The class of the cells of each column."""
        align = self.align or "l" + "r" * (len(self.columns) - 1)
        return ["number" if one == "r" else "words" for one in align]


@dataclass(frozen=True)
class Section:
    """
    A section of the page.

    Parameters:
        key (`str`):
            Its name in addresses.
        title (`str`):
            Its title.
        lead (`str`, *optional*):
            What one sees, in a sentence or two.
        warnings (`Sequence[str]`, *optional*):
            What went wrong, in red, above all else.
        missing (`str`, *optional*):
            Why there is nothing to see.
        command (`str`, *optional*):
            A command line that goes with it.
        legend (`Sequence[tuple[str, str]]`, *optional*):
            Class of a mark, and what it stands for.
        figures (`Sequence[Figure]`, *optional*):
            Figures.
        tables (`Sequence[Table]`, *optional*):
            Tables.
        facts (`Sequence[tuple[str, str]]`, *optional*):
            Names and values, above all else.
        notes (`Sequence[str]`, *optional*):
            What else a reader has to know.
    """

    key: str
    title: str
    lead: str = ""
    warnings: Sequence[str] = ()
    missing: str | None = None
    command: str = ""
    legend: Sequence[tuple[str, str]] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def render(
    title: str, sections: Sequence[Section], *, subtitle: str = "", gallery: Mapping[str, Any] | None = None
) -> str:
    """
    The page as text.

    Args:
        title (`str`):
            Title.
        sections (`Sequence[Section]`):
            Sections, in order. The gallery stands in the one whose key is `"gallery"`.
        subtitle (`str`, *optional*):
            What stands below the title.
        gallery (`Mapping`, *optional*):
            Pairs and images for the gallery, and what its corrections are called.

    Returns:
        `str`: HTML. Whatever comes from data or settings is text in it, never markup.
    """
    loader = PackageLoader("trl_dt2it.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = (_own_file(name) for name in ("report.css", "report.js"))
    # The browser runs this script and no other, and asks no other machine for anything.
    script_hash = base64.b64encode(bytes.fromhex(digest(script))).decode()
    return environment.get_template("report.html").render(
        title=title,
        subtitle=subtitle,
        sections=sections,
        gallery=gallery,
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        script_hash=script_hash,
    )


def _own_file(name: str) -> str:
    return files("trl_dt2it.report").joinpath("templates", name).read_text(encoding="utf-8")
