"""One HTML file about a run: what was trained on what, what curation did, and pairs for people to judge.

It holds all that it shows and asks no other machine for anything. Figures are static SVG by matplotlib (why:
[`trl_dt2it.report.figures`]), the page is a Jinja template that escapes all text, and its only script is that of
the gallery.
"""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
