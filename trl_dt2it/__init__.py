"""Multimodal reward models for TRL.

Public names load on first use: `__init__.pyi`, here and in each package, says where each is. Importing this package
also makes [`~transformers.AutoModelForSequenceClassification`] know the reward models that it saves.
"""

import lazy_loader

from .models.families import register_auto_classes


__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]

register_auto_classes()
