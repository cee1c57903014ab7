"""Style bias of preference pairs: measure it, remove it, and build pairs that have none."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
