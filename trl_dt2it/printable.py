"""Text that strangers wrote, fit for a terminal or a picture."""


def printable(text: object, most: int | None = None, *, instead: str = "\ufffd") -> str:
    """
    Text of a data set or a model without what a terminal would obey.

    Args:
        text (`object`):
            The text, or what is to be written as one.
        most (`int`, *optional*):
            The number of characters after which it is cut off.
        instead (`str`, *optional*, defaults to `U+FFFD`):
            What stands for each character that is taken out.

    Returns:
        `str`: with `instead` in place of control characters, line breaks, marks of direction and lone surrogates.
    """
    return "".join(char if char.isprintable() else instead for char in str(text)[:most])
