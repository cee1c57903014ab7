"""Text that strangers wrote, fit for a terminal or a picture."""


def printable(text: object, most: int | None = None, *, instead: str = "\ufffd") -> str:
    """Replace control characters, line breaks, marks of direction and lone surrogates, and cut after `most`."""
    return "".join(char if char.isprintable() else instead for char in str(text)[:most])
