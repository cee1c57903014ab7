"""Rubric and prompts: what the judge reads, in two languages, and images by their bytes alone."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from trl_dt2it.data import ImageOptions, RowError
from trl_dt2it.judge import (
    DEFAULT_RUBRIC,
    Criterion,
    JudgeReply,
    PairwiseVerdict,
    Rubric,
    both_orders,
    combine_orders,
    image_block,
    listwise_messages,
    pairwise_messages,
    pointwise_messages,
)
from trl_dt2it.judge.prompts import reminded
from trl_dt2it.judge.rubric import fenced_texts


NAMES = [criterion.name for criterion in DEFAULT_RUBRIC.criteria]
QUESTION, CHINESE = "What is it?", "这是什么？"


def encoded(image: Image.Image, kind: str, **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def sent(block: dict) -> tuple[str, bytes]:
    media_type, payload = re.fullmatch("data:([a-z/]+);base64,(.*)", block["image_url"]["url"]).groups()
    return media_type, base64.b64decode(payload, validate=True)


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))


def test_the_default_rubric_has_six_criteria_in_two_languages():
    assert len(set(NAMES)) == 6
    assert sum(criterion.weight for criterion in DEFAULT_RUBRIC.criteria) == pytest.approx(1)
    for criterion in DEFAULT_RUBRIC.criteria:
        assert re.search("[\u4e00-\u9fff]", criterion.text("zh")) and criterion.text("en").isascii()
        assert criterion.text("fr") == criterion.text("en")


def test_the_total_is_the_weighted_mean():
    rubric = Rubric((Criterion("a", 0.75, {"en": "A"}), Criterion("b", 0.25, {"en": "B"})), low=0, high=4)
    assert rubric.total({"a": 4, "b": 0}) == 3
    assert DEFAULT_RUBRIC.total(dict.fromkeys(NAMES, 10)) == 10
    assert DEFAULT_RUBRIC.total(dict.fromkeys(NAMES, 1)) == 1
    for scores in ({"a": 4}, {"a": 4, "b": 0, "c": 1}, {"a": 5, "b": 0}, {"a": float("nan"), "b": 0}):
        with pytest.raises(ValueError, match="score"):
            rubric.total(scores)


def test_the_digest_follows_all_that_is_read():
    def rubric(name="a", weight=0.5, text="A", high=10):
        return Rubric((Criterion(name, weight, {"en": text}), Criterion("z", 1 - weight, {"en": "Z"})), high=high)

    digests = {one.digest() for one in (rubric(), rubric("b"), rubric(weight=0.4), rubric(text="B"), rubric(high=5))}
    assert len(digests) == 5
    assert rubric().digest() == rubric().digest()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Rubric(()), "different names"),
        (lambda: Rubric((Criterion("a", 0.5, {"en": "A"}), Criterion("a", 0.5, {"en": "B"}))), "different names"),
        (lambda: Rubric((Criterion("a", 0.9, {"en": "A"}),)), "add up to 1, got 0.9"),
        (lambda: Rubric((Criterion("a", 1, {"en": "A"}),), low=5, high=5), "`low` must be less"),
        (lambda: Criterion("a b", 1, {"en": "A"}), "identifier"),
        (lambda: Criterion("a", float("nan"), {"en": "A"}), "above 0"),
        (lambda: Criterion("a", 1, {"zh": "A"}), "no English"),
    ],
)
def test_a_rubric_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_listwise_prompt_holds_everything_in_order():
    system, user = messages = listwise_messages(QUESTION, [], ["one", "two", "three"], reference="right")
    assert fenced_texts(messages) == [QUESTION, "right", "one", "two", "three"]
    assert (system["role"], user["role"]) == ("system", "user")
    for criterion in DEFAULT_RUBRIC.criteria:
        assert f"{criterion.name} ({criterion.weight:.0%}): {criterion.text('en')}" in system["content"]
    assert "each of the 3 answers one grade from 1 (worst) to 10 (best)" in system["content"]
    assert "REFERENCE ANSWER is known to be right" in system["content"]
    assert "REFERENCE" not in listwise_messages(QUESTION, [], ["one"])[0]["content"]
    text = user["content"][0]["text"]
    assert [text.index(f"<<<ANSWER {n} | ") for n in (1, 2, 3)] == sorted(
        text.index(f"<<<ANSWER {n} | ") for n in (1, 2, 3)
    )
    with pytest.raises(ValueError, match="`candidates` is empty"):
        listwise_messages(QUESTION, [], [])


def test_the_pointwise_prompt_names_every_score_and_the_pairwise_one_both_places():
    system, _ = messages = pointwise_messages(QUESTION, [], "it", reference="right")
    assert fenced_texts(messages) == [QUESTION, "right", "it"]
    assert ", ".join(f'"{name}": <>' for name in NAMES) in system["content"]
    messages = pairwise_messages(QUESTION, [], "it", "that")
    assert fenced_texts(messages) == [QUESTION, "it", "that"]
    assert re.findall("^<<<(F.*|S.*) [|]", messages[1]["content"][0]["text"], re.M) == [
        "FIRST ANSWER",
        "SECOND ANSWER",
    ]


def test_no_prompt_holds_a_verdict_that_could_be_repeated():
    from trl_dt2it.judge.replies import _objects

    for language in ("en", "zh"):
        for messages in (
            listwise_messages(QUESTION, [], ["a", "b"], language=language),
            pointwise_messages(QUESTION, [], "a", language=language),
            pairwise_messages(QUESTION, [], "a", "b", language=language),
        ):
            assert not list(_objects(messages[0]["content"]))


def test_the_language_is_that_of_the_question_unless_given():
    def is_chinese(messages):
        return "评判" in messages[0]["content"] and "criteria" not in messages[0]["content"]

    for make in (
        lambda question, **kwargs: listwise_messages(question, [], ["一只猫"], **kwargs),
        lambda question, **kwargs: pointwise_messages(question, [], "一只猫", **kwargs),
        lambda question, **kwargs: pairwise_messages(question, [], "一只猫", "a cat", **kwargs),
    ):
        assert is_chinese(make(CHINESE)) and not is_chinese(make(QUESTION))
        assert is_chinese(make(QUESTION, language="zh")) and not is_chinese(make(CHINESE, language="en"))
        with pytest.raises(ValueError, match="`language` must be one of"):
            make(QUESTION, language="fr")
    assert is_chinese(listwise_messages("𠀀?", [], ["a"]))
    assert fenced_texts(listwise_messages(CHINESE, [], ["一", "二"]))[1:] == ["一", "二"]


def test_braces_in_a_text_are_nothing_special():
    text = "{mark} {count} {0} {} %s {{x}}"
    rubric = Rubric((Criterion("a", 1.0, {"en": text}),))
    messages = listwise_messages(text, [], [text], reference=text, rubric=rubric)
    assert fenced_texts(messages) == [text] * 3 and text in messages[0]["content"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_encoded_image_goes_out_byte_for_byte(picture, kind, tmp_path):
    content = encoded(picture, kind)
    path = tmp_path / "x.dat"
    path.write_bytes(content)
    for value in (content, {"bytes": content, "path": "secret/name.png"}, str(path), path, bytearray(content)):
        assert sent(image_block(value)) == (f"image/{kind.lower()}", content)
    messages = listwise_messages(QUESTION, [str(path), content], ["a"])
    assert [block["type"] for block in messages[1]["content"]] == ["image_url", "image_url", "text"]
    assert str(path) not in json.dumps(messages) and "x.dat" not in json.dumps(messages)


def test_all_other_images_become_png(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture, "JPEG", exif=exif, quality=100)
    frames = encoded(picture, "GIF", save_all=True, append_images=[picture.rotate(90)])
    for value in (picture, np.asarray(picture), encoded(picture, "BMP"), encoded(picture, "TIFF"), frames, turned):
        media_type, content = sent(image_block(value))
        image = Image.open(io.BytesIO(content))
        assert (media_type, image.format) == ("image/png", "PNG")
        assert image.size == ((20, 30) if value is turned else (30, 20))
        if value is picture:
            assert np.array_equal(np.asarray(image), np.asarray(picture))


@pytest.mark.parametrize(
    "value, reason",
    [
        ("http://127.0.0.1:1/x.png", "image_url"),
        ("https://example.com/x.png", "image_url"),
        ("data:image/png;base64,AAAA", "image_url"),
        ("file:///etc/passwd", "image_url"),
        ("../../etc/passwd", "image_outside_root"),
        (__file__, "image_corrupt"),
        ("no-such-file.png", "image_missing"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image_corrupt"),
        (None, "image_missing"),
        (7, "image_type"),
    ],
)
def test_an_image_from_elsewhere_is_refused(value, reason):
    with pytest.raises(RowError) as caught:
        listwise_messages(QUESTION, [value], ["a"])
    assert caught.value.reason == reason


def test_the_size_of_an_image_is_checked_before_it_is_sent(picture):
    with pytest.raises(RowError) as caught:
        pairwise_messages(QUESTION, [picture], "a", "b", image_options=ImageOptions(max_image_pixels=599))
    assert caught.value.reason == "image_too_large"


def reply(better: str | None) -> JudgeReply:
    verdict = None if better is None else PairwiseVerdict(better=better)
    return JudgeReply("malformed" if better is None else "ok", verdict, "", 1, 1, False, None)


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ("first", "second", "first"),
        ("second", "first", "second"),
        ("tie", "tie", "tie"),
        ("first", "first", "tie"),  # it prefers a place
        ("second", "second", "tie"),
        ("first", "tie", "tie"),
        ("tie", "first", "tie"),
        ("first", None, None),
        (None, "first", None),
        (None, None, None),
    ],
)
def test_two_orders_make_one_verdict(first, second, expected):
    assert combine_orders(reply(first), reply(second)) == expected


def test_both_orders_ask_the_same_with_the_answers_exchanged(picture):
    one, two = both_orders(QUESTION, [picture], "a", "b", sample=3)
    assert fenced_texts(one.messages) == [QUESTION, "a", "b"]
    assert fenced_texts(two.messages) == [QUESTION, "b", "a"]
    assert one.messages[1]["content"][0] == two.messages[1]["content"][0]
    assert (one.schema, two.schema, one.sample, two.sample) == (PairwiseVerdict, PairwiseVerdict, 3, 3)


def test_two_images_can_be_exchanged_instead(picture):
    other = picture.rotate(180)
    one, two = both_orders("Which is better?", [picture, other], "Image 1.", "Image 2.", swap="images")
    assert fenced_texts(one.messages) == fenced_texts(two.messages) == ["Which is better?", "Image 1.", "Image 2."]
    assert one.messages[1]["content"][:2] == two.messages[1]["content"][1::-1]
    assert one.messages[1]["content"][0] != one.messages[1]["content"][1]
    with pytest.raises(ValueError, match="needs two images, got 1"):
        both_orders("Which?", [picture], "Image 1.", "Image 2.", swap="images")


def test_the_reminder_is_in_the_last_message_and_quotes_nothing():
    for question, word in ((QUESTION, "could not be read"), (CHINESE, "无法读取")):
        messages = listwise_messages(question, [], ["a"])
        again = reminded(messages)
        assert [message["role"] for message in again] == ["system", "user"]
        assert again[1]["content"][:-1] == messages[1]["content"] and word in again[1]["content"][-1]["text"]
        assert len(reminded(again)[1]["content"]) == 3
    assert reminded([{"role": "user", "content": "Hi"}])[0]["content"][0] == {"type": "text", "text": "Hi"}
