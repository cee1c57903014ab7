"""Rows: every legal form passes, and every fault has its reason."""

import copy
import math
import pickle

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import prepare_multimodal_messages

from tests.data.schema_rows import GOOD, IMAGE, PIXELS, VIDEO, answer, row, say, text, user
from trl_dt2it.data.rows import REASONS, RowError, check_row, row_images, row_name, row_videos, special_token_pattern


def fault(bad, **kwargs):
    before = copy.deepcopy(bad)
    with pytest.raises(RowError) as caught:
        check_row(bad, **kwargs)
    assert bad == before
    message = str(caught.value)
    assert message.endswith(".") and len(message) < 400
    assert caught.value.reason in REASONS
    return caught.value.reason, message


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
    (
        row(prompt="q"),
        "not_conversational",
        "`prompt` is of type str; give all fields as strings or as lists of messages",
    ),
    (row(rejected="A dog."), "not_conversational", "`rejected` is of type str"),
    (row(chosen="A cat."), "not_conversational", "`chosen` is a string"),
    (row(chosen=7), "not_conversational", "`chosen` is of type int"),
    (row(prompt=["q"]), "not_conversational", "`prompt` message 0"),
    (row(prompt=[{"content": "q"}]), "not_conversational", "`prompt` message 0"),
    (row(prompt=user("q") + say("human", "q")), "not_conversational", "`prompt` message 1"),
    (row(prompt=user(None)), "not_conversational", "content of type NoneType; give a string or a list of blocks"),
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
    (
        row(prompt=user([IMAGE]) + user("q")),
        "placeholder_count",
        "image blocks in one user message and a string as another, where TRL adds the images a second time",
    ),
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
    (row(rejected=answer([text("a"), VIDEO])), "image_in_answer", "so ask about them there."),
    (row(rejected=user([IMAGE]) + answer("A dog.")), "image_in_answer", "`rejected` message 0"),
    (
        row(prompt=..., chosen=user("q") + answer([IMAGE]), rejected=user("q") + answer("A dog.")),
        "image_in_answer",
        "`chosen` message 1",
    ),
    (
        row(prompt=user([{"type": "image", "image": PIXELS}])),
        "block_type",
        'has `image` in its image block; leave {"type": "image"} alone and put the image in the `images` column',
    ),
    (row(prompt=user([{"type": "image", "url": "http://a/b.png"}])), "block_type", "`url`"),
    (row(prompt=user([{"type": "image", "path": "/etc/passwd"}])), "block_type", "`path`"),
    (row(prompt=user([{"type": "image", "base64": "AAAA"}])), "block_type", "`base64`"),
    (row(prompt=user([{"type": "image", "text": "q"}])), "block_type", "`text`"),
    (row(prompt=user([{"type": "video", "video": "a.mp4"}])), "block_type", "`videos` column"),
    (
        row(prompt=user([{"type": "text", "text": "q", "image": "a.png"}])),
        "block_type",
        "`image` in a text block; drop it",
    ),
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
    (row(images=PIXELS), "image_type", "must be a list, also of a single image"),
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
    (row(label_confidence=1.5), "bad_label_confidence", "`label_confidence` is 1.5; give the probability"),
    (row(label_confidence=True), "bad_label_confidence", "`label_confidence` is True"),
    (
        row(blind_margin=math.inf),
        "bad_blind_margin",
        "`blind_margin` is inf; give the log odds that `chosen` is better",
    ),
    (row(label_confidence=math.nan), "bad_label_confidence", "`label_confidence` is nan"),
    (row(margin=None), "bad_margin", "`margin` is None"),
    (row(margin="1"), "bad_margin", "`margin` is '1'"),
    (row(margin=-math.inf), "bad_margin", "`margin` is -inf"),
    (row(margin=-math.inf), "bad_margin", "or drop the column"),
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
