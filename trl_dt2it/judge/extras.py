"""What the extra `judge` brings, and the one sentence for those who do not have it."""

from __future__ import annotations


def import_error(name: str) -> ImportError:
    """
    The error for a missing package.

    Args:
        name (`str`):
            The package.

    Returns:
        `ImportError`: with the command that installs it.
    """
    return ImportError(f"The judge needs `{name}`; run `pip install 'trl-dt2it[judge]'`.", name=name)
