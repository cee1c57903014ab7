"""Rewards of any answers: a scorer, data sets scored in shards, and sampled answers ranked and paired."""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
