"""Writing down what an adapter has to give, and collecting what it gives."""

import copy

import pytest

from trl_dt2it.data import RowError
from trl_dt2it.data.messages import FEATURES
from trl_dt2it.data.rows import content_group


IMAGE, VIDEO = {"type": "image", "text": None}, {"type": "video", "text": None}


def text(value):
    return {"type": "text", "text": value}


def say(role, *content):
    return {"role": role, "content": [text(block) if isinstance(block, str) else block for block in content]}


def user(*content):
    return say("user", *content)


TABLE = user(IMAGE, "What is on the table?")


def says(*turns):
    """Messages of strings; the first is by the user."""
    return [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]


def path(name):
    return {"bytes": None, "path": name}


def expected(prompt, chosen, rejected, images=(), *, strength=None, source_id=None, videos=()):
    prompt = prompt if isinstance(prompt, list) else [prompt]
    images = [path(image) if isinstance(image, str) else image for image in images]
    row = {
        "prompt": prompt,
        "chosen": [say("assistant", chosen)],
        "rejected": [say("assistant", rejected)],
        "images": images,
        "strength": strength,
        "group_id": content_group(prompt, images, videos),
        "source_id": source_id,
    }
    return {**row, "videos": list(videos)} if videos else row


def results(adapter, row, **options):
    """What an adapter gives, with reasons in place of errors; the row stays as it was."""
    before, found = copy.deepcopy(row), []
    try:
        found.extend(adapter(row, **options))
    except RowError as error:
        found.append(error)
    assert row == before
    for index, result in enumerate(found):
        if isinstance(result, RowError):
            assert str(result).endswith(".") and len(str(result)) < 400
            found[index] = result.reason
        else:
            assert set(result) - {"videos", "weight"} >= set(FEATURES) - {"pair_id", "source"}
    return found


def message(adapter, row, **options):
    with pytest.raises(RowError) as caught:
        list(adapter(row, **options))
    return str(caught.value)


def changed(row, change):
    """A row with other values; `...` removes a key."""
    row = copy.deepcopy(row) | change
    return {key: value for key, value in row.items() if value is not ...}


def answer(row, side):
    """The text of an answer."""
    return row[side][0]["content"][0]["text"]
