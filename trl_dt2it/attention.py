"""Which attention implementation can run here."""

from __future__ import annotations

import torch
from transformers.utils import is_flash_attn_2_available, logging


logger = logging.get_logger(__name__)


def usable_attention(implementation: str | None) -> str | None:
    """
    The wished attention implementation where it can run, and `"sdpa"`, with a warning, where it cannot.

    Args:
        implementation (`str`, *optional*):
            Such as `"flash_attention_2"`; `None` leaves the choice to transformers.

    Returns:
        `str` or `None`
    """
    if implementation != "flash_attention_2":
        return implementation
    if not torch.cuda.is_available():
        reason = "there is no CUDA device"
    elif not is_flash_attn_2_available():
        reason = "flash-attn is not installed (`pip install trl-dt2it[flash]`)"
    else:
        return implementation
    logger.warning(f'`attn_implementation="flash_attention_2"` cannot run because {reason}; "sdpa" is used instead.')
    return "sdpa"
