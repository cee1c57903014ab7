"""Loading a processor and setting how many pixels it gives an image."""

from __future__ import annotations

import os

from transformers import AutoProcessor, ProcessorMixin

from .rendering import ProcessingClass


def load_processing_class(
    name_or_path: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> ProcessingClass:
    """
    The processor of a vision-language model, or the tokenizer of a text model.

    Args:
        name_or_path (`str` or `os.PathLike`):
            Hub id or directory.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code that ships with the checkpoint may run.

    Returns:
        [`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]
    """
    return AutoProcessor.from_pretrained(
        name_or_path, revision=revision or "main", trust_remote_code=trust_remote_code
    )


def set_pixel_limits(
    processing_class: ProcessingClass, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> None:
    """
    Sets the smallest and largest number of pixels to which the processor scales an image. They are saved with it.

    Args:
        processing_class ([`~transformers.ProcessorMixin`]):
            Changed in place.
        min_pixels (`int`, *optional*):
            Smallest number of pixels; `None` leaves the processor's own.
        max_pixels (`int`, *optional*):
            Largest number of pixels.

    Raises:
        `ValueError`: if the processor has no such limits, as those that scale every image to one size.
    """
    if min_pixels is None and max_pixels is None:
        return
    # In the families with pixel limits the class's default size has these two keys, and they hold areas, not edges, in
    # spite of their names. The others name one edge, or height and width.
    image_processor = processing_class.image_processor if isinstance(processing_class, ProcessorMixin) else None
    if image_processor is None or set(type(image_processor).size or ()) != {"shortest_edge", "longest_edge"}:
        raise ValueError(
            f"`min_pixels` and `max_pixels` have no effect on {type(processing_class).__name__}, which has no pixel "
            "limits; leave them out."
        )
    current = image_processor.size
    image_processor.size = type(current)(
        shortest_edge=current["shortest_edge"] if min_pixels is None else min_pixels,
        longest_edge=current["longest_edge"] if max_pixels is None else max_pixels,
    )
