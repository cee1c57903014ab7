"""Text that strangers wrote, fit for a terminal or a picture."""


def printable(text: object, most: int) -> str:
    """
    Text of a data set or a model without what a terminal would obey.

    Args:
        text (`object`):
            The text, or what is to be written as one.
        most (`int`):
            The number of characters after which it is cut off.

    Returns:
        `str`: with `U+FFFD` in place of control characters, line breaks, marks of direction and lone surrogates.
    """
    return "".join(char if char.isprintable() else "\ufffd" for char in str(text)[:most])
