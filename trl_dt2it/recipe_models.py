"""What recipes have in common about models and the processes that share the work."""

from __future__ import annotations

import torch
from accelerate import PartialState


def share_work() -> PartialState:
    """The processes that a launcher has started, also where there is no accelerator: there each would think, unless
    told otherwise, that it is the only one. A recipe calls it before anything asks for a `PartialState`."""
    return PartialState(cpu=not torch.accelerator.is_available())
