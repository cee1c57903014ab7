"""Reward models on benchmarks of preference pairs: the metrics, how sure they are, and beside what was published."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
