"""The work of one process on the machines of a Ray cluster: the same functions of rows, and the same results."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
