"""Multimodal reward models for TRL.

The names below load on first use. Importing the package also makes
[`~transformers.AutoModelForSequenceClassification`] know the reward models that the package saves: at once where
transformers' Auto classes are loaded already, otherwise when they are, so that the import stays cheap. (`wrapt` has
such import hooks too, but takes a fifth of the time that `import trl` takes.)
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .lazy import lazy_names


__version__ = "0.1.0"

_MODULES = {
    "MultimodalPreferenceCollator": "collator",
    "MultimodalRewardConfig": "reward_config",
    "MultimodalRewardTrainer": "reward_trainer",
    "RewardScorer": "scoring",
    "load_reward_model": "modeling",
    "token_counter": "token_counts",
}

__all__ = [
    "MultimodalPreferenceCollator",
    "MultimodalRewardConfig",
    "MultimodalRewardTrainer",
    "RewardScorer",
    "__version__",
    "load_reward_model",
    "token_counter",
]

if TYPE_CHECKING:
    from .collator import MultimodalPreferenceCollator
    from .modeling import load_reward_model
    from .reward_config import MultimodalRewardConfig
    from .reward_trainer import MultimodalRewardTrainer
    from .scoring import RewardScorer
    from .token_counts import token_counter


_AUTO_MODULE = "transformers.models.auto.modeling_auto"


def _register() -> bool:
    """Registers the classes, now if it can be, otherwise as soon as the import that is in the way is done."""
    try:
        import_module(".modeling", __name__)
    except ImportError:
        # Some family's configuration is in the middle of its own import, which is what has imported the Auto classes.
        if not any(isinstance(finder, _RetryOnImport) for finder in sys.meta_path):
            sys.meta_path.insert(0, _RetryOnImport())
        return False
    return True


class _RetryOnImport:
    """An import finder that finds nothing, and tries to register our classes whenever something is imported."""

    is_trying = False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> None:
        if not self.is_trying:
            self.is_trying = True
            if _register() and self in sys.meta_path:
                sys.meta_path.remove(self)
            self.is_trying = False


class _RegisterOnImport:
    """An import finder that registers our classes as soon as transformers' Auto classes have been imported."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _AUTO_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # on this one loader
        return spec


if _AUTO_MODULE in sys.modules:
    import_module(".modeling", __name__)
else:
    sys.meta_path.insert(0, _RegisterOnImport())


__getattr__, __dir__ = lazy_names(__name__, _MODULES)
