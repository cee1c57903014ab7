"""The one error of this package's checks, and the reasons that it may have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal, get_args


Reason = Literal[
    "missing_column",  # `chosen` or `rejected` is absent, or the prompt is empty
    "not_conversational",  # neither strings nor well-formed messages, or images without messages
    "empty_answer",  # nothing but white space to judge
    "equal_answers",  # nothing to prefer
    "placeholder_count",  # as many image or video blocks as images or videos
    "image_in_answer",  # images belong to the prompt
    "block_type",  # a content block that is not a bare placeholder or text
    "special_token",  # text that the tokenizer would read as control tokens
    "bad_strength",
    "bad_weight",
    "bad_margin",
    "image_missing",  # no such file, no such address, or `None`
    "image_corrupt",  # does not decode
    "image_too_large",  # too many pixels or bytes
    "image_too_narrow",  # one side many times the other, which image processors refuse
    "image_outside_root",  # leaves the folder that images may come from
    "image_url",  # an address that is not allowed
    "image_type",  # not a kind of object that holds an image
    "video_type",  # not a list of frames
    "too_long",  # more tokens than `max_length`
    "tie",  # the source prefers neither
    "unparsed_verdict",  # a preference in words that no rule reads, or answers that cannot be found in a text
    "bad_rating",  # a rating that is not a number
    "equal_images",  # a text-to-image pair of one image twice
    "empty_caption",
    "duplicate_pair",  # the same as an earlier row
    "contradictory_pair",  # another row prefers the other answer
    "contaminated",  # in a benchmark
]
REASONS: tuple[str, ...] = get_args(Reason)


def summarise(counts: Mapping[str, int]) -> str:
    """Numbers of rows by reason in one line, the largest first."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(counts).most_common())


def is_milestone(count: int) -> bool:
    """Whether to say how many it were so far: at 1, 10, 100, ..., because a stream has no end to count up to."""
    return str(count).strip("0") == "1"


class RowError(ValueError):
    """
    A row that cannot be used.

    The message is one sentence without the row's name; whoever knows the row puts [`row_name`] in front.

    Args:
        reason (`str`):
            One of [`REASONS`].
        message (`str`):
            What is wrong, in which field, and what to do.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        # Both go into `args`, so that the error survives the trip back from a worker process.
        super().__init__(reason, message)
        self.reason: Reason = reason

    def __str__(self) -> str:
        return self.args[1]
