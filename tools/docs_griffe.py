"""Docstrings in Hugging Face's grammar as mkdocstrings wants them: types without marks, references as code."""

import re
from typing import Any

from griffe import Extension, Object


PARAMETER = re.compile(r"^(\s+\*{0,2}[\w, ]+) \((.+?)(?:, \*optional\*.*)?\):[ ]*$", flags=re.MULTILINE)
TYPED = re.compile(r"^(\s+)`([\w.]+)`: ", flags=re.MULTILINE)  # of what is returned or raised
REFERENCE = re.compile(r"\[`~?(?:\w+\.)*(\w+)`\](?!\()")
GROUP = re.compile(r"^\s*> Parameters that .*$", flags=re.MULTILINE)


def plain(text: str) -> str:
    """A docstring without the marks that would be shown as they are."""

    def parameter(match: re.Match) -> str:
        kind = REFERENCE.sub(r"\1", match[2]).replace("`", "")
        return f"{match[1]} ({kind}):"

    text = PARAMETER.sub(parameter, text)
    return GROUP.sub("", REFERENCE.sub(r"`\1`", TYPED.sub(r"\1\2: ", text)))


class Plain(Extension):
    """An extension that griffe calls for every object that it has read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
