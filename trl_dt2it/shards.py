"""The part of the work that a machine takes, as recipes are told on the command line."""

from __future__ import annotations


def parse_shard(text: str | None) -> tuple[int, int]:
    """Read `--shard`: `"1/4"` as `(1, 4)`, and `None` as `(0, 1)`, which is everything."""
    if text is None:
        return 0, 1
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ValueError(f"`--shard` is {text!r}; it must be i/n with 0 <= i < n, such as 0/4.")
    return int(part), int(parts)
