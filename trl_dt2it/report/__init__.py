"""One HTML file about a run: its trainings, the effect of curation, and pairs for people to judge.

It is complete and fetches nothing. Figures are static SVG, the page is a Jinja template that escapes all text, and its
only script is that of the gallery.
"""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
