"""Every kind of bad row, with its reason. `test_validation_bad_rows.py` puts the files under the image root."""

import math

from PIL import Image

from tests.data import schema_rows
from tests.data.image_files import encode, png_header
from tests.data.schema_rows import IMAGE, VIDEO, text
from tests.families import build_tokenizer, example_images
from tests.families_chat import CHATS
from tests.rows import png


PHOTOGRAPH = example_images(1)[0]
PNG = png(PHOTOGRAPH)
TOKENIZER = build_tokenizer(CHATS["qwen3_vl"])


def say(role, *content):
    return [{"role": role, "content": list(content)}]


def row(**changes):
    """A good row whose image is a file; a change to `...` removes the column."""
    return schema_rows.row(**{"images": ["good.png"], **changes})


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
    ("an icon, which is in no list of formats", encoded(encode(PHOTOGRAPH, "ICO")), "image_corrupt"),
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
    ("confidence above one", row(label_confidence=1.01), "bad_label_confidence"),
    ("negative confidence", row(label_confidence=-1e-9), "bad_label_confidence"),
    ("confidence that is no number", row(label_confidence=math.nan), "bad_label_confidence"),
    ("confidence in words", row(label_confidence="high"), "bad_label_confidence"),
    ("blind margin that is no number", row(blind_margin=math.nan), "bad_blind_margin"),
    ("blind margin in words", row(blind_margin="low"), "bad_blind_margin"),
    ("no margin in a column of margins", row(margin=None), "bad_margin"),
    ("infinite margin", row(margin=math.inf), "bad_margin"),
    # --- other rows
    ("the same pair twice", [row(), row(strength=2.0)], "duplicate_pair"),
    ("the same words twice", [plain(), plain()], "duplicate_pair"),
    ("both answers preferred", [row(), swapped(row())], "contradictory_pair"),
    ("both answers preferred, one twice", [plain(), swapped(plain()), plain()], "contradictory_pair"),
]
