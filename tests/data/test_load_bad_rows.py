"""Bad rows that no set can hold, that an adapter refuses or that are two images: each with its own reason."""

from typing import get_args

import pyarrow as pa
import pytest
from datasets import Dataset
from PIL import Image

from tests.data.bad_rows import KINDS, PHOTOGRAPH, PNG, plain, rejected, row
from tests.data.fixtures_as_rows import fixture
from tests.data.schema_rows import text
from tests.rows import png
from trl_dt2it.data.load import Conversion
from trl_dt2it.data.rows import Reason, RowError, check_row
from trl_dt2it.data.sources import SOURCES
from trl_dt2it.data.t2i import split_t2i


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


def test_every_reason_has_its_kind():
    kinds = [kind[2] for kind in (*KINDS, *NOT_IN_ARROW, *T2I)] + [kind[4] for kind in OF_SOURCES] + ["too_long"]
    assert set(kinds) == set(get_args(Reason)) - {"contaminated"}  # which is no fault of the row
    assert len(kinds) >= 130
    names = [kind[0] for kind in KINDS]
    assert len(set(names)) == len(names)
