"""Every kind of bad row that a preference set may hold: each ends with its reason, none crashes, none passes."""

import os
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset

from tests.data.bad_rows import KINDS, PHOTOGRAPH, PNG, TOKENIZER, encoded, image, plain, rejected, row, say
from tests.data.image_files import encode
from tests.data.schema_rows import text
from tests.families import FAMILIES
from tests.families_chat import CHATS
from trl_dt2it import token_counter
from trl_dt2it.data.images import ImageOptions
from trl_dt2it.data.validation import validate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image root with good and bad files in it, and a file beside it that nobody may read."""
    outside = tmp_path_factory.mktemp("outside")
    root = outside / "root"
    root.mkdir()
    (outside / "secret.png").write_bytes(PNG)
    files = {
        "good.png": PNG,
        "cut.png": PNG[: len(PNG) // 2],
        "cut.jpg": encode(PHOTOGRAPH, "JPEG")[:200],
        "empty.png": b"",
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    (root / "folder.png").mkdir()
    (root / "link.png").symlink_to(outside / "secret.png")
    (root / "nowhere.png").symlink_to("gone.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "device.png").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.png")
    with (root / "huge.png").open("wb") as file:  # takes no room on the disk
        file.truncate(64 * 1024 * 1024 + 1)
    return root


def check(rows, folder, **options):
    """Validates rows as they come from Arrow, in memory and streamed."""
    options = {
        "image_options": ImageOptions(image_root=str(folder)),
        "image_check": "full",
        "token_counter": token_counter(TOKENIZER),
        "show": False,
        **options,
    }
    dataset = Dataset.from_list(rows if isinstance(rows, list) else [rows])
    clean, quarantine = validate(dataset, **options)
    good, bad = validate(dataset.to_iterable_dataset(), **options)
    streamed = list(bad)
    assert len(list(good)) + len(streamed) == len(clean) + len(quarantine) == len(dataset)
    for message in [*quarantine["message"], *(one["message"] for one in streamed)]:
        assert message.endswith(".") and len(message) < 500
    return len(clean), quarantine["reason"][:], [one["reason"] for one in streamed]


def test_the_row_that_all_are_made_of_is_good(folder):
    for good in (row(), plain(), image("good.png", str(folder / "good.png")), encoded(PNG)):
        assert check(good, folder)[0] == 1


@pytest.mark.parametrize(("rows", "reason"), [pytest.param(*kind[1:], id=kind[0]) for kind in KINDS])
def test_a_bad_row_is_set_aside_with_its_reason(folder, rows, reason):
    num_good, found, streamed = check(rows, folder)
    repeats = {"duplicate_pair": 1, "contradictory_pair": 0}
    assert num_good == repeats.get(reason, 0)
    assert found == [reason] * (len(rows) - num_good if isinstance(rows, list) else 1)
    assert streamed == found if reason not in repeats else streamed  # of those, a stream lets the first one pass


@pytest.mark.parametrize("image_check", ["header", "none"])
def test_no_bad_row_crashes_a_lighter_check(folder, image_check):
    for _, rows, _ in KINDS:
        check(rows, folder, image_check=image_check)


def test_all_together_end_as_each_alone(folder):
    """Bad rows among good ones, all that have the same types."""
    rows, expected = [], []
    for number, (_, bad, reason) in enumerate(KINDS):
        good = {**row(chosen=say("assistant", text(f"A cat {number}."))), "source_id": f"good {number}"}
        together = [*rows, {**good, **bad, "source_id": f"bad {number}"}, good] if isinstance(bad, dict) else rows
        try:
            table_of(together)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            continue
        # With a column of margins every row needs one, and among numbers `True` becomes 1.0.
        if len(together) > len(rows) and "margin" not in bad and bad.get("strength") is not True:
            rows = together
            expected.append((f"bad {number}", reason))
    assert len(expected) >= 60
    options = {"image_options": ImageOptions(image_root=str(folder)), "image_check": "full", "show": False}
    clean, quarantine = validate(table_of(rows), token_counter=token_counter(TOKENIZER), **options)
    assert list(zip(quarantine["source_id"], quarantine["reason"], strict=True)) == expected
    assert clean["source_id"][:] == [one["source_id"] for one in rows if one["source_id"].startswith("good")]


def table_of(rows):
    """A table with the columns of all rows, images in it as bytes and paths."""

    def struct(image):
        return {"bytes": None, "path": image} if isinstance(image, str) else image

    rows = [
        {
            **one,
            "images": [struct(image) for image in one["images"]] if isinstance(one["images"], list) else one["images"],
        }
        for one in rows
    ]
    return Dataset.from_dict(
        {name: [one.get(name) for one in rows] for name in dict.fromkeys(sum(map(list, rows), []))}
    )


def test_a_conversation_that_is_too_long(folder):
    _, processor = FAMILIES["qwen3_vl"](TOKENIZER)
    processor.chat_template = CHATS["qwen3_vl"].template
    long = rejected(text("A dog. " * 200))
    options = {"token_counter": token_counter(processor), "max_length": 300}
    assert check([row(), long], folder, **options) == (1, ["too_long"], ["too_long"])


def test_nothing_outside_of_the_root_is_opened(folder, monkeypatch):
    opened = []
    plain_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: opened.append(self) or plain_open(self, *args))
    for _, rows, _ in KINDS:
        check(rows, folder)
    assert opened and all(path.is_relative_to(folder.resolve()) for path in opened)
