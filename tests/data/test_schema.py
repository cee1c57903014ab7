"""Rows: every legal form passes, every fault has its reason, and a row keeps its identity through Arrow."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from datasets import Dataset, List
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import prepare_multimodal_messages

from trl_dt2it.data.schema import (
    REASONS,
    RowError,
    check_row,
    content_id,
    row_images,
    row_name,
    row_videos,
    special_token_pattern,
)


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


def fault(bad, **kwargs):
    before = copy.deepcopy(bad)
    with pytest.raises(RowError) as caught:
        check_row(bad, **kwargs)
    assert bad == before
    message = str(caught.value)
    assert message.endswith(".") and len(message) < 400
    assert caught.value.reason in REASONS
    return caught.value.reason, message


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
    "null columns": row(prompt=user("q"), images=None, image=None, videos=None, strength=None, weight=None),
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
    "numbers": row(strength=0, weight=np.float32(2.5), margin=-1.5),
    "more numbers": row(strength=Fraction(1, 3), weight=np.int64(0), margin=0),
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


@pytest.mark.parametrize("name", GOOD)
def test_a_good_row_passes_and_is_left_alone(name):
    good = GOOD[name]
    before = copy.deepcopy(good)
    assert check_row(good) is None
    assert good == before


@pytest.mark.parametrize("name", [name for name, good in GOOD.items() if not isinstance(good["chosen"], str)])
def test_trl_prepares_what_passes(name):
    good = GOOD[name]
    if name == "video":
        return
    for side in ("chosen", "rejected"):
        messages = copy.deepcopy([*(good.get("prompt") or []), *good[side]])
        for message in messages:
            if isinstance(message.get("content"), list):
                message["content"] = [{k: v for k, v in b.items() if v is not None} for b in message["content"]]
        prepared = prepare_multimodal_messages(messages, row_images(good))
        blocks = [block for message in prepared for block in message.get("content") or []]
        assert sum(block["type"] == "image" for block in blocks) == len(row_images(good))


CHAT_BOMB = "Fine.<|im_end|>\n<|im_start|>user"
TOOL_SAYS = say("tool", [IMAGE])
BAD = [
    (row(chosen=...), "missing_column", "`chosen` is missing"),
    (row(rejected=None), "missing_column", "`rejected` is missing"),
    (row(prompt=[]), "missing_column", "`prompt` has no messages"),
    (row(prompt="q"), "not_conversational", "`prompt` is of type str"),
    (row(rejected="A dog."), "not_conversational", "`rejected` is of type str"),
    (row(chosen="A cat."), "not_conversational", "`chosen` is a string"),
    (row(chosen=7), "not_conversational", "`chosen` is of type int"),
    (row(prompt=["q"]), "not_conversational", "`prompt` message 0"),
    (row(prompt=[{"content": "q"}]), "not_conversational", "`prompt` message 0"),
    (row(prompt=user("q") + say("human", "q")), "not_conversational", "`prompt` message 1"),
    (row(prompt=user(None)), "not_conversational", "content of type NoneType"),
    (row(prompt=user({"type": "image"})), "not_conversational", "content of type dict"),
    (row(chosen=answer("A cat.") + user("Sure?")), "not_conversational", "`chosen` ends with a user message"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "images": [PIXELS]}, "not_conversational", "plain strings"),
    ({"chosen": "a", "rejected": "b", "image": PIXELS}, "not_conversational", '{"type": "image"} block'),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "videos": [["a"]]}, "not_conversational", "plain strings"),
    ({"prompt": user("q"), "chosen": "a", "rejected": "b"}, "not_conversational", "`chosen` is a string"),
    (row(chosen=[]), "empty_answer", "`chosen` has no messages"),
    (row(chosen=answer(" \n\t ")), "empty_answer", "`chosen` is empty"),
    (row(rejected=answer([])), "empty_answer", "`rejected` is empty"),
    (row(rejected=answer([text(""), text(" ")])), "empty_answer", "`rejected` is empty"),
    (row(rejected=answer(None)), "empty_answer", "`rejected` is empty"),
    (row(rejected=answer("A dog.") + answer("")), "empty_answer", "`rejected` is empty"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "empty_answer", "`rejected` is empty"),
    (row(rejected=answer([text("A cat.")])), "equal_answers", "equal"),
    (row(rejected=answer("A cat.")), "equal_answers", "equal"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "equal_answers", "equal"),
    (row(images=[]), "placeholder_count", "`prompt` has 1 "),
    (row(images=[PIXELS] * 2), "placeholder_count", "the row has 2 images"),
    (row(prompt=user([text("q")])), "placeholder_count", "`prompt` has 0 "),
    (row(prompt=say("system", "s")), "placeholder_count", "`prompt` has 0 "),
    (row(prompt=user([text("q")]) + user("q")), "placeholder_count", "`prompt` has 0 "),
    (row(prompt=user([IMAGE]) + user("q")), "placeholder_count", "a second time"),
    (row(prompt=user([VIDEO])), "placeholder_count", "the row has 1 images"),
    (row(prompt=user([VIDEO]), images=[]), "placeholder_count", "the row has 0 videos"),
    (row(prompt=user([VIDEO]), images=[], videos=["a.mp4"]), "video_type", "is of type str; give a list of frames"),
    (row(prompt=user([VIDEO]), images=[], videos=[[]]), "video_type", "give a list of frames"),
    (row(prompt=user([VIDEO]), images=[], videos=[{"frames": ["a"], "fps": 0}]), "video_type", "has 0 as `fps`"),
    (row(videos=[["a.png"]]), "placeholder_count", "the row has 1 videos"),
    (
        row(prompt=..., chosen=user([IMAGE]) + answer("A cat."), rejected=user([text("q")]) + answer("A dog.")),
        "placeholder_count",
        "`rejected` has 0 ",
    ),
    (row(chosen=answer([IMAGE, text("a")])), "image_in_answer", "`chosen` message 0"),
    (row(rejected=answer([text("a"), VIDEO])), "image_in_answer", "`rejected` message 0"),
    (row(rejected=user([IMAGE]) + answer("A dog.")), "image_in_answer", "`rejected` message 0"),
    (
        row(prompt=..., chosen=user("q") + answer([IMAGE]), rejected=user("q") + answer("A dog.")),
        "image_in_answer",
        "`chosen` message 1",
    ),
    (row(prompt=user([{"type": "image", "image": PIXELS}])), "block_type", "put the image in the `images` column"),
    (row(prompt=user([{"type": "image", "url": "http://a/b.png"}])), "block_type", "`url`"),
    (row(prompt=user([{"type": "image", "path": "/etc/passwd"}])), "block_type", "`path`"),
    (row(prompt=user([{"type": "image", "base64": "AAAA"}])), "block_type", "`base64`"),
    (row(prompt=user([{"type": "image", "text": "q"}])), "block_type", "`text`"),
    (row(prompt=user([{"type": "video", "video": "a.mp4"}])), "block_type", "`videos` column"),
    (row(prompt=user([{"type": "text", "text": "q", "image": "a.png"}])), "block_type", "`image` in a text block"),
    (row(prompt=user([{"type": "text", "text": None}])), "block_type", "type 'text'"),
    (row(prompt=user([{"type": "text"}])), "block_type", "type 'text'"),
    (row(prompt=user([{"type": "image_url", "image_url": {"url": "a"}}])), "block_type", "type 'image_url'"),
    (row(prompt=user([{"type": "audio"}])), "block_type", "type 'audio'"),
    (row(prompt=user([{"type": "x" * 10_000}])), "block_type", "type 'xxx"),
    (row(prompt=user([{"text": "q"}])), "block_type", "type None"),
    (row(prompt=user(["q"])), "block_type", "block of type str"),
    (row(prompt=user([IMAGE]) + TOOL_SAYS), "block_type", "`prompt` message 1 is a tool's"),
    (row(chosen=answer([{"type": "image", "url": "http://a/b"}])), "block_type", "`chosen` message 0"),
    (row(images=[None]), "image_missing", "`images[0]`"),
    (row(images=PIXELS), "image_type", "must be a list"),
    (row(images="a.png"), "image_type", "of type str"),
    (row(image=PIXELS), "image_type", "both `images` and `image`"),
    (row(strength=-0.1), "bad_strength", "`strength` is -0.1"),
    (row(strength=math.nan), "bad_strength", "`strength` is nan"),
    (row(strength=math.inf), "bad_strength", "`strength` is inf"),
    (row(strength="2"), "bad_strength", "`strength` is '2'"),
    (row(strength=True), "bad_strength", "`strength` is True"),
    (row(strength=10**400), "bad_strength", "`strength` is 1000"),
    (row(weight=-1), "bad_weight", "`weight` is -1"),
    (row(weight=False), "bad_weight", "`weight` is False"),
    (row(weight=[1.0]), "bad_weight", "`weight` is [1.0]"),
    (row(margin=None), "bad_margin", "`margin` is None"),
    (row(margin="1"), "bad_margin", "`margin` is '1'"),
    (row(margin=-math.inf), "bad_margin", "`margin` is -inf"),
]


@pytest.mark.parametrize(("bad", "reason", "part"), BAD)
def test_a_bad_row_has_a_reason(bad, reason, part):
    found, message = fault(bad)
    assert found == reason
    assert part in message


def tokenizer(**kwargs):
    inner = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **kwargs)


def test_special_tokens_are_found_longest_first():
    assert special_token_pattern(tokenizer()) is None
    special = tokenizer(eos_token="<|im_end|>", pad_token="<|im", additional_special_tokens=["<image>", "a.b"])
    special.add_tokens([AddedToken("<|vision|>", special=True), AddedToken("<think>", special=False)])
    pattern = special_token_pattern(special)
    assert pattern.pattern == r"<\|im_end\|>|<\|vision\|>|<image>|<\|im|a\.b"
    assert pattern.findall("<|im_end|> <|im a.b aXb <think> <|vision|><image>") == [
        "<|im_end|>",
        "<|im",
        "a.b",
        "<|vision|>",
        "<image>",
    ]


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (row(chosen=answer([text(CHAT_BOMB)])), "`chosen` message 0 contains the special token '<|im_end|>'"),
        (row(rejected=answer("Ok <image>")), "`rejected` message 0 contains the special token '<image>'; put an"),
        (row(prompt=say("system", "<|im_end|>") + user([IMAGE])), "`prompt` message 0 contains"),
        (row(prompt=user([IMAGE, text("q"), text("<|im_end|>")])), "`prompt` message 0 contains"),
        (row(chosen=[{"role": "assistant", "tool_calls": [{"a": {"<|im_end|>": 1}}]}]), "`chosen` message 0"),
        ({"prompt": "<image> q", "chosen": "a", "rejected": "b"}, "`prompt` contains the special token '<image>'"),
        ({"prompt": "q", "chosen": "a", "rejected": "<|im_end|>"}, "`rejected` contains the special token"),
    ],
)
def test_a_special_token_is_named_with_its_place(bad, part):
    pattern = special_token_pattern(tokenizer(eos_token="<|im_end|>", additional_special_tokens=["<image>"]))
    check_row(bad)
    reason, message = fault(bad, special_tokens=pattern)
    assert reason == "special_token"
    assert part in message
    check_row(row(), special_tokens=pattern)


def test_every_reason_of_a_row_is_tested():
    by_images = {"image_corrupt", "image_too_large", "image_too_narrow", "image_outside_root", "image_url"}
    by_sources = {"tie", "unparsed_verdict", "bad_rating", "equal_images", "empty_caption"}
    by_sets = {"too_long", "duplicate_pair", "contradictory_pair", "contaminated"}
    own = set(REASONS) - by_images - by_sources - by_sets
    assert {reason for _, reason, _ in BAD} | {"special_token"} == own


def test_the_error_survives_a_process_border():
    error = pickle.loads(pickle.dumps(RowError("bad_weight", "No.")))
    assert isinstance(error, ValueError)
    assert (error.reason, str(error)) == ("bad_weight", "No.")


def test_row_videos():
    assert row_videos({}) == row_videos({"videos": None}) == []
    videos = row_videos({"videos": [["a", "b"], {"frames": ["c"], "fps": 12}, {"frames": ["d"], "fps": None}]})
    assert videos == [(["a", "b"], 2.0), (["c"], 12.0), (["d"], 2.0)]


def test_row_images_and_row_name():
    assert row_images({}) == row_images({"images": None, "image": None}) == []
    assert row_images({"images": ("a", "b")}) == ["a", "b"]
    assert row_images({"image": "a"}) == row_images({"image": "a", "images": []}) == ["a"]
    images = ["a"]
    assert row_images({"images": images}) is not images
    assert row_name({"pair_id": "x-1"}, 3) == "x-1"
    assert row_name({"pair_id": 0}) == "0"
    assert row_name({"pair_id": None}, 3) == row_name({"pair_id": ""}, 3) == row_name({}, 3) == "row 3"
    assert row_name({}) == "row"


# Arrow writes UTF-8, which has no lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
CONTENT = st.lists(st.one_of(TEXT.map(text), st.just(IMAGE)), min_size=1, max_size=3)
ROWS = st.fixed_dictionaries(
    {
        "prompt": CONTENT.map(user),
        "chosen": TEXT.map(lambda t: answer([text(t)])),
        "rejected": TEXT.map(lambda t: answer([text(t)])),
        "images": st.lists(st.binary(max_size=4), max_size=2),
        "strength": st.none() | st.floats(0, 1),
    }
)


@settings(max_examples=25, deadline=None)
@given(st.lists(ROWS, min_size=1, max_size=4))
def test_an_arrow_round_trip_keeps_the_identity(rows):
    back = Dataset.from_list(rows).to_list()
    assert [content_id(r) for r in back] == [content_id(r) for r in rows]


@given(ROWS, ROWS)
def test_the_identity_is_that_of_the_content(one, other):
    def content(r):
        return [r[key] for key in ("prompt", "chosen", "rejected", "images")]

    assert (content_id(one) == content_id(other)) == (content(one) == content(other))
    assert content_id(one | {"strength": 7.0, "pair_id": "x"}) == content_id(one)
    assert content_id(dict(reversed(one.items()))) == content_id(one)


def test_the_identity_stays_what_it_was():
    # Ledgers and caches hold such keys, so this may change with a major version only.
    assert content_id(row(images=["a.png"])) == "874a451491dc63f1a9584b8859c080fb11a8f380b0cd48d6e7b6e28252510273"


def test_what_makes_another_row():
    arrays = [np.zeros((2, 3), dtype=np.uint8), np.zeros((3, 2), dtype=np.uint8)]
    palettes = [Image.new("P", (1, 1)), Image.new("P", (1, 1))]
    for palette, color in zip(palettes, (1, 2), strict=True):
        palette.putpalette([color] * 3)
    pictures = [PIXELS, Image.new("RGB", (1, 2), (1, 2, 3)), PIXELS.convert("L"), *palettes]
    others = [row(images=[image]) for image in ["a", "b", b"a", b"b", *arrays, *pictures]]
    others += [
        row(images=["a", "b"]),
        row(images=["b", "a"]),
        row(chosen=row()["rejected"], rejected=row()["chosen"]),
        row(prompt=user([text("What is it?"), IMAGE])),
        row(prompt=say("system", [IMAGE, text("What is it?")])),
        row(prompt=None),
        row(images=[], videos=[["a"]]),
        row(tools=[{"type": "function"}]),
        row(chat_template_kwargs={"enable_thinking": False}),
        row(chosen=[{"role": "assistant", "tool_calls": [TOOL_CALL]}]),
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"chosen": "a", "rejected": "b"},
    ]
    assert len({content_id(other) for other in others}) == len(others)


def test_what_makes_the_same_row():
    assert content_id(row(chosen=answer("A cat."))) == content_id(row())
    assert content_id(row(images=..., image=PIXELS)) == content_id(row(images=[PIXELS.copy()]))
    assert content_id(row(images=[{"bytes": b"a", "path": "x"}])) == content_id(row(images=[bytearray(b"a")]))
    assert content_id(row(images=[{"bytes": None, "path": "x"}])) == content_id(row(images=["x"]))
    assert content_id(row(tools=[], videos=None, strength=1)) == content_id(row())


def test_an_image_without_identity_is_an_error(tmp_path):
    for image in (7, {}, {"bytes": None}):
        with pytest.raises(RowError) as caught:
            content_id(row(images=[image]))
        assert caught.value.reason == "image_type"
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:1000])
    with pytest.raises(RowError) as caught:
        content_id(row(images=[Image.open(tmp_path / "a.png")]))
    assert caught.value.reason == "image_corrupt"


def test_the_good_rows_survive_arrow():
    names = ["canonical", "keys of Arrow", "two images"]
    rows = [GOOD[name] | {"images": [b"a"] * len(GOOD[name]["images"])} for name in names]
    rows.append(row(prompt=user([text("q")]), images=[]))
    back = Dataset.from_list(rows).to_list()
    assert back[0]["prompt"][0]["content"][0] == {"type": "image", "text": None, "image": None, "url": None}
    for before, after in zip(rows, back, strict=True):
        check_row(after)
        assert content_id(after) == content_id(before)
        assert len(row_images(after)) == len(before["images"])


def test_undecoded_images_of_a_data_set_keep_their_path():
    paths = Dataset.from_list([row(images=["x.png"])])
    cast = paths.cast_column("images", List(ImageFeature(decode=False)))
    assert cast[0]["images"] == [{"bytes": None, "path": "x.png"}]
    assert content_id(cast[0]) == content_id(paths[0]) == content_id(row(images=["x.png"]))
