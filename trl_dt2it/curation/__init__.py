"""Iterative curation: find wrong labels with a reward model, decide by rules, keep a ledger, and undo at will."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
