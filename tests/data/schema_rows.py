"""Parts of rows, and a row of every legal form."""

from fractions import Fraction

import numpy as np
from PIL import Image


IMAGE, VIDEO = {"type": "image"}, {"type": "video"}
PIXELS = Image.new("RGB", (2, 1), (1, 2, 3))


def text(value):
    return {"type": "text", "text": value}


def say(role, content):
    return [{"role": role, "content": content}]


def user(content):
    return say("user", content)


def answer(content):
    return say("assistant", content)


def row(**changes):
    """A good row with one image; a change to `None` stays, a change to `...` removes the column."""
    good = {
        "prompt": user([IMAGE, text("What is it?")]),
        "chosen": answer([text("A cat.")]),
        "rejected": answer([text("A dog.")]),
        "images": [PIXELS],
    }
    return {key: value for key, value in (good | changes).items() if value is not ...}


ARROW = {"type": "image", "text": None, "image": None, "url": None}
TOOL_CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "cat"}}}
GOOD = {
    "canonical": row(),
    "paths": row(images=["a.png"]),
    "single image": row(images=..., image=PIXELS),
    "single image, empty list": row(images=[], image=PIXELS),
    "two images": row(prompt=user([IMAGE, text("and"), IMAGE]), images=[PIXELS, "b.png"]),
    "keys of Arrow": row(
        prompt=user([ARROW, {"type": "text", "text": "q", "image": None}]),
        chosen=[{"role": "assistant", "content": [{"type": "text", "text": "a", "url": None}], "tool_calls": None}],
    ),
    "system and turns": row(
        prompt=say("system", "Be brief.") + user([IMAGE]) + answer([text("Yes?")]) + user([text("What is it?")])
    ),
    "strings": row(prompt=user("What is it?"), chosen=answer("A cat."), rejected=answer("A dog.")),
    "strings, two images": row(prompt=say("system", "s") + user("q") + answer("a") + user("q"), images=[PIXELS] * 2),
    "text only": row(prompt=user("q"), images=[]),
    "no image columns": row(prompt=user("q"), images=...),
    "null columns": row(
        prompt=user("q"),
        images=None,
        image=None,
        videos=None,
        strength=None,
        weight=None,
        label_confidence=None,
        blind_margin=None,
    ),
    "implicit": row(
        prompt=...,
        chosen=user([IMAGE, text("q")]) + answer([text("A cat.")]),
        rejected=user([IMAGE, text("q")]) + answer([text("A dog.")]),
    ),
    "implicit, null prompt": row(
        prompt=None, chosen=user("q") + answer("A cat."), rejected=user("q") + answer("A dog."), images=[PIXELS]
    ),
    "plain": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "plain, empty prompt": {"prompt": "", "chosen": "a", "rejected": "b", "images": []},
    "plain, implicit": {"chosen": "q a", "rejected": "q b"},
    "numbers": row(strength=0, weight=np.float32(2.5), margin=-1.5, label_confidence=1, blind_margin=-2),
    "more numbers": row(strength=Fraction(1, 3), weight=np.int64(0), margin=0, label_confidence=np.float32(0)),
    "tools": row(
        prompt=user("Look."),
        chosen=[{"role": "assistant", "tool_calls": [TOOL_CALL]}],
        rejected=[{"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}]
        + [{"role": "tool", "name": "look", "content": "a cat"}]
        + answer("A dog."),
        images=[],
        tools=[{"type": "function"}],
    ),
    "video": row(prompt=user([VIDEO, text("q")]), images=[], videos=[["a.png"]]),
    "literal marker": row(chosen=answer("An <image> tag.")),
}
