"""Which part of the work a machine takes, as recipes are told on the command line."""

from __future__ import annotations


def parse_shard(text: str | None) -> tuple[int, int]:
    """
    Reads `--shard`.

    Args:
        text (`str`, *optional*):
            `"i/n"`, for the i-th of n parts, i from 0.

    Returns:
        `tuple[int, int]`: `"1/4"` as `(1, 4)`, and `(0, 1)`, which is everything, for `None`.

    Raises:
        `ValueError`: if it is anything else.
    """
    if text is None:
        return 0, 1
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"`--shard` is {text!r}; it must be i/n with 0 <= i < n, such as 0/4.")
    return int(part), int(parts)
