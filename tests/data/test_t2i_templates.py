"""Wordings of two-image questions, and captions that arrive unchanged, whatever is in them."""

import re
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trl import prepare_multimodal_messages

from tests.data.t2i_pairs import pairs, raw, text
from trl_dt2it.data import check_row
from trl_dt2it.data.t2i import CHINESE, ENGLISH, T2ITemplate, is_chinese, reformulate_t2i


# Wordings.


def test_the_same_row_has_the_same_wording_wherever_it_stands():
    dataset = pairs(60)
    order = np.random.default_rng(0).permutation(60)
    wordings = {row["pair_id"]: text(row["prompt"]) for row in raw(reformulate_t2i(dataset))}
    assert {row["pair_id"]: text(row["prompt"]) for row in raw(reformulate_t2i(dataset.select(order)))} == wordings
    assert {row["pair_id"]: text(row["prompt"]) for row in raw(reformulate_t2i(dataset, seed=1))} != wordings


def test_the_language_follows_the_caption():
    captions = ["a cat", "一只猫", "猫 and dog", "ねこ", "고양이", "𠀀", "〇", "кот", "，"]
    chinese = [False, True, True, False, False, True, True, False, False]
    assert [is_chinese(caption) for caption in captions] == chinese
    for row, caption, is_han in zip(raw(reformulate_t2i(pairs(9, captions))), captions, chinese, strict=True):
        templates = CHINESE if is_han else ENGLISH
        possible = [(t.question(caption), {t.first_is_better, t.second_is_better}) for t in templates]
        assert (row["prompt"][0]["content"], {text(row["chosen"]), text(row["rejected"])}) in possible


def test_built_in_wordings():
    assert len(ENGLISH) >= 3 and len(CHINESE) >= 3
    for templates in (ENGLISH, CHINESE):
        assert len({template.prompt for template in templates}) == len(templates)
        assert len({template.first_is_better for template in templates}) == len(templates)
    for template in CHINESE:
        assert all(map(is_chinese, (template.prompt, *template.labels, template.first_is_better)))
    for template in ENGLISH:
        assert template.prompt.isascii() and "".join(template.labels).isascii() and template.first_is_better.isascii()


def test_custom_templates():
    dataset = pairs(12, captions=["{images} {caption} {0} {{x}}"] * 12)
    made = raw(reformulate_t2i(dataset, template="{caption} {x} {{y}} %s <image>\n{images}?"))
    for row in made:
        content = row["prompt"][0]["content"]
        assert [block["type"] for block in content] == ["text", "image", "text", "image", "text"]
        before = "{images} {caption} {0} {{x}} {x} {{y}} %s <image>\nImage 1: "
        assert [block["text"] for block in content] == [before, None, "\nImage 2: ", None, "?"]
        answers = ["Image 1 is better than Image 2.", "Image 2 is better than Image 1."]
        assert [text(row["chosen"]), text(row["rejected"])] in (answers, answers[::-1])
    several = raw(
        reformulate_t2i(pairs(40), template=["A {images} {caption}", T2ITemplate("B {images} {caption}", "1", "2")])
    )
    assert Counter((text(row["prompt"])[0], len(text(row["chosen"]))) for row in several).keys() == {
        ("A", 31),
        ("B", 1),
    }
    bare = T2ITemplate("{images}{caption}", labels=("", ""))
    assert [block["type"] for block in bare.question("x")] == ["image", "image", "text"]


@pytest.mark.parametrize(
    "template, message",
    [
        ("Which? {caption}", "holds {images} 0 times and {caption} 1 times"),
        ("{images}", "holds {images} 1 times and {caption} 0 times"),
        ("{images} {caption} {caption}", "{caption} 2 times"),
        ("", "0 times"),
        ("{images } {Caption}", "holds {images} 0 times and {caption} 0 times"),
        ([], "`template` is empty"),
        (["{images} {caption}", "no"], "0 times"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_wrong_template_is_one_clear_error_at_start(template, message, streaming):
    dataset = pairs(2).to_iterable_dataset() if streaming else pairs(2)
    with pytest.raises(ValueError, match=re.escape(message)):
        reformulate_t2i(dataset, template=template)


def test_answers_of_a_template_must_differ():
    for answers in (("Yes.", "Yes. "), ("", "No.")):
        with pytest.raises(ValueError, match="must be two different texts"):
            T2ITemplate("{images} {caption}", *answers)


# Captions.

PIECES = [
    "{",
    "}",
    "{images}",
    "{caption}",
    "{0}",
    "<image>",
    "<|image_pad|>",
    "猫",
    "עברית",
    "\u202e",
    "🦊",
    "👩‍👩‍👧",
    '"',
    "\\",
    "\n",
]
CAPTIONS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join),
    st.lists(st.sampled_from(PIECES), min_size=100, max_size=100).map(lambda pieces: ("".join(pieces) * 100)[:10_000]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(CAPTIONS.filter(str.strip), min_size=1, max_size=6))
@example(["<image>", "{images}{caption}", "\x00", "x" * 10_000, "a\u2028b", "\ud7ff"])
def test_captions_arrive_unchanged(captions):
    dataset = pairs(len(captions), captions)
    made = reformulate_t2i(dataset)
    reloaded = Dataset(made.data.table.slice(0), info=made.info)
    rows, streamed = raw(reloaded), raw(reformulate_t2i(dataset.to_iterable_dataset()))
    assert rows == streamed
    for row, caption in zip(rows, captions, strict=True):
        check_row(row)
        content = row["prompt"][0]["content"]
        assert [block["type"] for block in content] == ["text", "image", "text", "image", "text"]
        assert content[-1]["text"].endswith(caption)
        template = [
            t
            for t in (*ENGLISH, *CHINESE)
            if t.prompt.removesuffix("{caption}").removeprefix("{images}") + caption == content[-1]["text"]
        ]
        assert len(template) == 1 and template[0] in (CHINESE if is_chinese(caption) else ENGLISH)
        prepared = prepare_multimodal_messages(row["prompt"], row["images"])
        filled = [block["image"] for block in prepared[0]["content"] if block["type"] == "image"]
        assert filled == row["images"]
        for side in ("chosen", "rejected"):
            assert prepare_multimodal_messages(row[side])[0]["content"] == row[side][0]["content"]
