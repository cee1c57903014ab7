"""Every kind of bad row that a preference set may hold: each ends with its reason, none crashes, none passes."""

import io
import math
import os
import struct
import zlib
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pytest
from datasets import Dataset
from PIL import Image

from tests.data.fixtures_as_rows import fixture
from tests.families import FAMILIES, build_tokenizer, example_images
from tests.families_chat import CHATS
from tests.rows import png
from trl_dt2it.data.converting import Conversion
from trl_dt2it.data.errors import Reason, RowError
from trl_dt2it.data.locations import ImageOptions
from trl_dt2it.data.schema import check_row
from trl_dt2it.data.sources import SOURCES
from trl_dt2it.data.t2i import split_t2i
from trl_dt2it.data.validation import validate


PHOTOGRAPH = example_images(1)[0]
PNG = png(PHOTOGRAPH)
TOKENIZER = build_tokenizer(CHATS["qwen3_vl"])
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def text(value):
    return {"type": "text", "text": value}


def say(role, *content):
    return [{"role": role, "content": list(content)}]


def row(**changes):
    """A good row with one image; a change to `...` removes the column."""
    good = {
        "prompt": say("user", IMAGE, text("What is it?")),
        "chosen": say("assistant", text("A cat.")),
        "rejected": say("assistant", text("A dog.")),
        "images": ["good.png"],
    }
    return {key: value for key, value in (good | changes).items() if value is not ...}


def question(*content, **changes):
    return row(prompt=say("user", *content), **changes)


def rejected(*content, **changes):
    return row(rejected=say("assistant", *content), **changes)


def plain(**changes):
    return {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog.", **changes}


def swapped(one):
    return {**one, "chosen": one["rejected"], "rejected": one["chosen"]}


def image(*images):
    return row(prompt=say("user", *[IMAGE] * len(images), text("What is it?")), images=list(images))


def encoded(data):
    return image({"bytes": data, "path": None})


def saved(format, picture=PHOTOGRAPH, **kwargs):
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **kwargs)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG file that says that it is so large, with no pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


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
        "cut.jpg": saved("JPEG")[:200],
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


# What each is, the row or rows, and the reason.
KINDS = [
    # --- files
    ("a PNG file that was cut off", image("cut.png"), "image_corrupt"),
    ("a JPEG file that was cut off", image("cut.jpg"), "image_corrupt"),
    ("a file without bytes", image("empty.png"), "image_corrupt"),
    ("a web page saved as JPEG", image("page.jpg"), "image_corrupt"),
    ("an SVG drawing", image("drawing.png"), "image_corrupt"),
    ("an EPS program", image("program.png"), "image_corrupt"),
    ("a file of too many bytes", image("huge.png"), "image_too_large"),
    ("a file that is not there", image("gone.png"), "image_missing"),
    ("a folder", image("folder.png"), "image_missing"),
    ("a pipe", image("pipe.png"), "image_missing"),
    ("a link to nowhere", image("nowhere.png"), "image_missing"),
    ("a link to itself", image("loop.png"), "image_missing"),
    ("a link out of the root", image("link.png"), "image_outside_root"),
    ("a link to a device", image("device.png"), "image_outside_root"),
    ("a path with `..`", image("../secret.png"), "image_outside_root"),
    ("a path with `..` behind a folder", image("folder.png/../../secret.png"), "image_outside_root"),
    ("an absolute path", image("/etc/hostname"), "image_outside_root"),
    ("a path in a dict", image({"bytes": None, "path": "../secret.png"}), "image_outside_root"),
    ("a zero byte in a path", image("good.png\0.jpg"), "image_missing"),
    ("a path too long for a file system", image("a" * 5000), "image_missing"),
    ("an empty path", image(""), "image_missing"),
    ("the second of two images", image("good.png", "gone.png"), "image_missing"),
    # --- addresses
    ("a data URL", image("data:image/png;base64,AAAA"), "image_url"),
    ("a web address", image("http://169.254.169.254/latest/meta-data"), "image_url"),
    ("a file URL", image("file:///etc/hostname"), "image_url"),
    ("a bucket", image("s3://bucket/a.png"), "image_url"),
    # --- bytes
    ("bytes of a cut off PNG", encoded(PNG[: len(PNG) // 2]), "image_corrupt"),
    ("a PNG with a hole", encoded(PNG[:300] + bytes(50) + PNG[350:]), "image_corrupt"),
    ("no bytes", encoded(b""), "image_corrupt"),
    ("an icon, which is in no list of formats", encoded(saved("ICO")), "image_corrupt"),
    ("a decompression bomb", encoded(png_header(30_000, 30_000)), "image_too_large"),
    ("a smaller bomb, of which Pillow only warns", encoded(png_header(9000, 9000)), "image_too_large"),
    ("an image without width", encoded(png_header(0, 7)), "image_corrupt"),
    ("a line of pixels", encoded(png(Image.new("RGB", (201, 1)))), "image_too_narrow"),
    ("a column of pixels", encoded(png(Image.new("RGB", (2, 403)))), "image_too_narrow"),
    # --- what is no image
    ("no image in the list", image(None), "image_missing"),
    ("no image in the dict", image({"bytes": None, "path": None}), "image_missing"),
    ("a number for an image", image(7), "image_type"),
    ("a number for bytes", image({"bytes": 7, "path": None}), "image_type"),
    ("one path where a list belongs", row(images="good.png"), "image_type"),
    ("both columns", row(image="good.png"), "image_type"),
    # --- placeholders and blocks
    ("one placeholder too many", question(IMAGE, IMAGE, text("What is it?")), "placeholder_count"),
    ("one placeholder too few", question(text("What is it?")), "placeholder_count"),
    ("an image that no one asks about", row(prompt=say("system", text("Look."))), "placeholder_count"),
    ("a video that is not there", question(IMAGE, VIDEO), "placeholder_count"),
    ("an image key in a block", question({"type": "image", "image": "good.png"}), "block_type"),
    ("a URL in a block", question({"type": "image", "url": "http://127.0.0.1/a.png"}), "block_type"),
    ("a path in a block", question({"type": "image", "path": "/etc/hostname"}), "block_type"),
    ("an image in a text block", question(IMAGE, {"type": "text", "text": "q", "image": "a.png"}), "block_type"),
    ("a block as OpenAI has it", question({"type": "image_url", "image_url": {"url": "a.png"}}), "block_type"),
    ("sound", question(IMAGE, {"type": "audio"}), "block_type"),
    ("a block without type", question(IMAGE, {"text": "What is it?"}), "block_type"),
    ("a text block without text", question(IMAGE, {"type": "text"}), "block_type"),
    ("a string for a block", question("What is it?"), "block_type"),
    ("an image that a tool shows", row(prompt=say("user", text("q")) + say("tool", IMAGE)), "block_type"),
    ("an image in chosen", row(chosen=say("assistant", IMAGE, text("Here."))), "image_in_answer"),
    ("a video in rejected", rejected(VIDEO, text("Here.")), "image_in_answer"),
    # --- videos
    ("a video file", question(IMAGE, VIDEO, videos=["a.mp4"]), "video_type"),
    ("a video without frames", question(IMAGE, VIDEO, videos=[{"frames": [], "fps": 1.0}]), "video_type"),
    ("a video that stands still", question(IMAGE, VIDEO, videos=[{"frames": ["a"], "fps": 0.0}]), "video_type"),
    ("a frame that is not there", question(IMAGE, VIDEO, videos=[["gone.png"]]), "image_missing"),
    # --- messages
    ("no chosen", row(chosen=None), "missing_column"),
    ("no rejected", row(rejected=None), "missing_column"),
    ("no question", row(prompt=[]), "missing_column"),
    ("a question in words, answers in messages", row(prompt="What is it?"), "not_conversational"),
    ("one answer in words", row(rejected="A dog."), "not_conversational"),
    ("images beside plain strings", plain(images=["good.png"]), "not_conversational"),
    ("a list of strings", row(chosen=["A cat."]), "not_conversational"),
    ("a number for an answer", row(chosen=7), "not_conversational"),
    ("a role of ShareGPT", row(prompt=say("human", IMAGE)), "not_conversational"),
    ("no role", row(chosen=[{"role": None, "content": "A cat."}]), "not_conversational"),
    ("content of another type", row(chosen=[{"role": "assistant", "content": {"a": 1}}]), "not_conversational"),
    ("a user who says nothing", row(prompt=[{"role": "user", "content": None}]), "not_conversational"),
    (
        "the user has the last word",
        row(chosen=say("assistant", text("A.")) + say("user", text("B."))),
        "not_conversational",
    ),
    # --- answers
    ("no messages", row(chosen=[]), "empty_answer"),
    ("no blocks", row(rejected=say("assistant")), "empty_answer"),
    ("an empty string", plain(rejected=""), "empty_answer"),
    ("white space", rejected(text(" \n\t ")), "empty_answer"),
    ("white space of other scripts", rejected(text("\u00a0\u3000\u2003")), "empty_answer"),
    # They are empty: no one sees a difference, and a tokenizer still makes tokens of them.
    ("characters of no width", rejected(text("\u200b\u200d\ufeff\u2060")), "empty_answer"),
    ("characters of no width in words", plain(chosen="\u200b"), "empty_answer"),
    ("marks of direction and a filler", rejected(text("\u200f\u202e"), text("\u3164")), "empty_answer"),
    ("a control character", plain(rejected="\0"), "empty_answer"),
    ("equal answers", rejected(text("A cat.")), "equal_answers"),
    ("equal but for white space around", rejected(text("A cat.\n")), "equal_answers"),
    ("equal but for blocks", rejected(text("A "), text("cat.")), "equal_answers"),
    ("equal words", plain(rejected="A cat."), "equal_answers"),
    ("equal words but for white space around", plain(rejected="  A cat.\n"), "equal_answers"),
    # --- special tokens
    ("a control token in the question", question(IMAGE, text("q<|im_end|>")), "special_token"),
    ("a control token in chosen", row(chosen=say("assistant", text("A.<|im_end|>\n<|im_start|>"))), "special_token"),
    ("a control token in rejected", rejected(text("A<|endoftext|>")), "special_token"),
    (
        "a control token of the system",
        row(prompt=say("system", text("<|im_start|>")) + row()["prompt"]),
        "special_token",
    ),
    ("an image token in an answer", rejected(text("See <|image_pad|>")), "special_token"),
    ("a control token in plain words", plain(prompt="q<|im_end|>"), "special_token"),
    # --- numbers
    ("strength that is no number", row(strength=math.nan), "bad_strength"),
    ("infinite strength", row(strength=math.inf), "bad_strength"),
    ("negative strength", row(strength=-0.5), "bad_strength"),
    ("strength too large for the loss", row(strength=1e39), "bad_strength"),
    ("strength in words", row(strength="much"), "bad_strength"),
    ("strength that is a truth", row(strength=True), "bad_strength"),
    ("weight that is no number", row(weight=math.nan), "bad_weight"),
    ("infinite weight", row(weight=-math.inf), "bad_weight"),
    ("negative weight", row(weight=-1), "bad_weight"),
    ("weight too large for the loss", row(weight=1e300), "bad_weight"),
    ("several weights", row(weight=[1.0]), "bad_weight"),
    ("no margin in a column of margins", row(margin=None), "bad_margin"),
    ("infinite margin", row(margin=math.inf), "bad_margin"),
    # --- other rows
    ("the same pair twice", [row(), row(strength=2.0)], "duplicate_pair"),
    ("the same words twice", [plain(), plain()], "duplicate_pair"),
    ("both answers preferred", [row(), swapped(row())], "contradictory_pair"),
    ("both answers preferred, one twice", [plain(), swapped(plain()), plain()], "contradictory_pair"),
]


def check(rows, folder, **options):
    """Validates rows as they come from Arrow, in memory and streamed."""
    options = {
        "image_options": ImageOptions(image_root=str(folder)),
        "image_check": "full",
        "processing_class": TOKENIZER,
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
    doubles = {"duplicate_pair": 1, "contradictory_pair": 0}
    assert num_good == doubles.get(reason, 0)
    assert found == [reason] * (len(rows) - num_good if isinstance(rows, list) else 1)
    assert streamed == found if reason not in doubles else streamed  # of those, a stream lets the first one pass


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
    clean, quarantine = validate(table_of(rows), processing_class=TOKENIZER, **options)
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


# Rows that Arrow cannot hold: what the user meets where they come up, and what `check_row` says where rows are made.
NOT_IN_ARROW = [
    ("half a character", rejected(text("A dog \ud83d")), "not_conversational", UnicodeEncodeError),
    ("half a character in words", plain(prompt="\udc80"), "not_conversational", UnicodeEncodeError),
    ("a strength beyond all numbers", row(strength=10**400), "bad_strength", OverflowError),
    ("a picture where a message belongs", row(chosen=[PHOTOGRAPH]), "not_conversational", None),
    ("an object for an image", row(images=object()), "image_type", pa.ArrowInvalid),
]


@pytest.mark.parametrize(("bad", "reason", "error"), [pytest.param(*kind[1:], id=kind[0]) for kind in NOT_IN_ARROW])
def test_what_arrow_cannot_hold_is_named_by_check_row(bad, reason, error):
    if error is not None:
        with pytest.raises(error):
            Dataset.from_list([bad])
    with pytest.raises(RowError) as caught:
        check_row(bad)
    assert caught.value.reason == reason
    assert str(caught.value).endswith(".")


def wildvision(**changes):
    return {**fixture("wildvision_battle")[0], **changes}


def vlfeedback(rating):
    raw = fixture("vlfeedback_raw")[0]
    raw["completions"][0]["annotations"]["Helpfulness"]["Rating"] = rating
    return raw


def critic(reply):
    raw = fixture("llava_critic_pairwise")[0]
    raw["conversations"][1]["value"] = reply
    return raw


MESSAGES = {"question": "q", "chosen": "c", "rejected": "r", "image": "i"}
SHARE = fixture("llamafactory_sharegpt")[0]

# Bad rows of sources, which an adapter refuses: the source, its options, the row, the reason.
OF_SOURCES = [
    ("a tie", "wildvision_battle", {}, wildvision(winner="tie"), "tie"),
    ("both bad", "wildvision_battle", {}, wildvision(winner="tie (bothbad)"), "tie"),
    ("a winner that no one knows", "wildvision_battle", {}, wildvision(winner="model_c"), "unparsed_verdict"),
    ("no winner", "wildvision_battle", {}, wildvision(winner=None), "unparsed_verdict"),
    (
        "an empty answer",
        "wildvision_battle",
        {},
        wildvision(conversation_b=[wildvision()["conversation_b"][0], {"role": "assistant", "content": " "}]),
        "empty_answer",
    ),
    ("a reply without verdict", "llava_critic", {}, critic("Both have their merits."), "unparsed_verdict"),
    ("a reply that finds a tie", "llava_critic", {}, critic("The two responses are equally good."), "tie"),
    ("a rating that was not given", "vlfeedback", {}, vlfeedback("N/A"), "bad_rating"),
    ("a rating that is no number", "vlfeedback", {}, vlfeedback("nan"), "bad_rating"),
    ("more markers than images", "llamafactory", {}, {**SHARE, "images": []}, "placeholder_count"),
    ("no JSON", "rlhf_v", {}, {**fixture("rlhf_v")[0], "text": "{"}, "unparsed_verdict"),
    ("a number for an answer", "columns", MESSAGES, {"q": "q", "c": 1, "r": "b", "i": "a"}, "not_conversational"),
    ("a column that is not there", "columns", MESSAGES, {"q": "q", "c": "a", "i": "a"}, "missing_column"),
    ("half a character", "columns", MESSAGES, {"q": "q", "c": "a \ud83d", "r": "b", "i": "a"}, "not_conversational"),
    ("images that are one", "pickapic_v2", {}, {**fixture("pickapic_v2")[0], "are_different": False}, "equal_images"),
]


@pytest.mark.parametrize(
    ("source", "options", "raw", "reason"), [pytest.param(*kind[1:], id=kind[0]) for kind in OF_SOURCES]
)
def test_a_bad_row_of_a_source_is_refused_with_its_reason(source, options, raw, reason):
    made = list(Conversion(SOURCES[source], source, options).convert(raw, 0))
    assert reason in [one["reason"] for one in made]
    assert all(one["message"].endswith(".") for one in made if one["reason"])
    Dataset.from_list([one for one in made if not one["reason"]])  # what is left fits into Arrow


T2I = [
    ("no caption", {"caption": None}, "empty_caption"),
    ("a caption of white space", {"caption": " \n"}, "empty_caption"),
    ("one image twice", {"rejected_image": {"bytes": PNG, "path": None}}, "equal_images"),
    ("an image that is not there", {"chosen_image": None}, "image_missing"),
    ("a negative strength", {"strength": -1.0}, "bad_strength"),
]


@pytest.mark.parametrize(("changes", "reason"), [pytest.param(*kind[1:], id=kind[0]) for kind in T2I])
def test_a_bad_text_to_image_pair_is_set_aside_with_its_reason(changes, reason):
    other = {"bytes": png(PHOTOGRAPH.transpose(Image.Transpose.ROTATE_90)), "path": None}
    pair = {
        "caption": "a temple",
        "chosen_image": {"bytes": PNG, "path": None},
        "rejected_image": other,
        "strength": 1.0,
    }
    good, bad = split_t2i(Dataset.from_list([pair, {**pair, **changes}]))
    assert (len(good), bad["reason"][:]) == (1, [reason])


def test_a_conversation_that_is_too_long(folder):
    _, processor = FAMILIES["qwen3_vl"](TOKENIZER)
    processor.chat_template = CHATS["qwen3_vl"].template
    long = rejected(text("A dog. " * 200))
    options = {"processing_class": processor, "max_length": 300}
    assert check([row(), long], folder, **options) == (1, ["too_long"], ["too_long"])


def test_every_reason_has_its_kind():
    kinds = [kind[2] for kind in (*KINDS, *NOT_IN_ARROW, *T2I)] + [kind[4] for kind in OF_SOURCES] + ["too_long"]
    assert set(kinds) == set(get_args(Reason)) - {"contaminated"}  # which is no fault of the row
    assert len(kinds) >= 130
    names = [kind[0] for kind in KINDS]
    assert len(set(names)) == len(names)


def test_nothing_outside_of_the_root_is_opened(folder, monkeypatch):
    opened = []
    plain_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: opened.append(self) or plain_open(self, *args))
    for _, rows, _ in KINDS:
        check(rows, folder)
    assert opened and all(path.is_relative_to(folder.resolve()) for path in opened)
