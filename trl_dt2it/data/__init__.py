"""Preference data: public sets as canonical rows, their checks, their mixture, and how images are read."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
