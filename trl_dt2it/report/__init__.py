"""One HTML file about a run: what was trained on what, what curation did, and pairs for people to judge.

It holds all that it shows and asks no other machine for anything. Figures are static SVG by matplotlib (why:
[`trl_dt2it.report.figures`]), the page is a Jinja template that escapes all text, and its only script is that of
the gallery.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_names


_MODULES = {"write_report": "writing"}

__all__ = ["write_report"]

if TYPE_CHECKING:
    from .writing import write_report

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
