"""Style features: what each counts, in English and Chinese, and what none of them sees."""

from math import log, log1p

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_dt2it.debias import STYLE_FEATURES, style_features
from trl_dt2it.debias.style import LEXICON, read_pair_style


def features(text: str, prompt: str | None = None) -> dict[str, float]:
    prompts = None if prompt is None else [prompt]
    return dict(zip(STYLE_FEATURES, style_features([text], prompts)[0].tolist(), strict=True))


def test_an_english_answer():
    text = 'Sure! It\'s a red boat, perhaps.\n\n## Why\n\n- I see **two** masts\n- "37" is on `it`'
    found = features(text, "Is it a red boat?")
    words = "sure it's a red boat perhaps why i see two masts 37 is on it".split()
    assert found["characters"] == log1p(len(text))
    assert found["words"] == log1p(len(words))
    assert found["sentences"] == log1p(5)  # Sure! | It's ... perhaps. | ## Why | first item | second item
    assert found["sentence_length"] == log1p(len(words) / 5)
    assert found["paragraphs"] == log1p(3)
    assert found["headings"] == found["bold"] == found["code"] == found["hedges"] == found["first_person"] == log1p(1)
    assert found["list_items"] == log1p(2)
    assert found["exclamation_marks"] == log1p(1)
    assert found["quotation_marks"] == log1p(2)
    assert found["opener"] == 1.0
    visible = len("".join(text.split()))
    assert found["digit_share"] == 2 / visible
    assert found["punctuation_share"] == len('!\',.##-****-""``') / visible
    assert found["upper_case_share"] == 4 / sum(char.isalpha() for char in text)  # S, I, W, I
    assert found["lexical_variety"] == 1.0  # no word twice
    assert found["word_length"] == pytest.approx(sum(map(len, words)) / len(words))
    assert found["prompt_overlap"] == pytest.approx(len({"is", "it", "a", "red", "boat"} & set(words)) / len(words))
    for absent in ("table_rows", "links", "emoji", "question_marks", "refusals", "enthusiasm", "json"):
        assert found[absent] == 0.0, absent


def test_a_chinese_answer():
    text = "好的，我看到一只猫。它可能在睡觉！抱歉，无法看清“37”。"
    found = features(text, "图中有猫吗？")
    assert found["words"] == log1p(2 + 6 + 6 + 2 + 4 + 1)  # Han characters, and 37
    assert found["sentences"] == log1p(3)
    assert found["sentence_length"] == log1p(21 / 3)
    assert found["opener"] == 1.0
    assert found["hedges"] == found["first_person"] == found["exclamation_marks"] == log1p(1)
    assert found["refusals"] == found["quotation_marks"] == log1p(2)
    assert found["punctuation_share"] == 7 / len(text)
    assert found["digit_share"] == 2 / len(text)
    assert found["word_length"] == 2.0  # of 37 alone
    assert found["upper_case_share"] == 0.0
    assert found["prompt_overlap"] == 1 / 20  # 猫, of twenty different words: 看 is there twice
    assert found["lexical_variety"] == log(20) / log(21)


@pytest.mark.parametrize(
    ("feature", "without", "having"),
    [
        ("headings", "Title\ntext", "# Title\ntext"),
        ("list_items", "one\ntwo", "1. one\n2) two"),
        ("list_items", "一 two\n", "（1）一\n- two"),
        ("list_items", "3.5 metres", "3. metres"),
        ("bold", "5 * 3 * 2 is 30", "5 is *much* less"),
        ("bold", "snake_case__name", "__strong__ words"),
        ("code", "print", "```\nprint\n```"),
        ("table_rows", "a or b", "| a | b |\n|---|---|"),
        ("links", "see example.org", "see [this](http://example.org)"),
        ("emoji", "good", "good 👍"),
        ("exclamation_marks", "好。", "好！"),
        ("question_marks", "Yes.", "Yes?"),
        ("hedges", "It is a cat.", "It seems to be a cat."),
        ("hedges", "It is a cat.", "It is kind of a cat."),
        ("refusals", "I can see it.", "I can’t see it."),
        ("refusals", "可以", "作为人工智能，我不能回答"),
        ("first_person", "It is his.", "It's mine."),
        ("opener", "It is sure to be a cat.", "**Certainly!** It is a cat."),
        ("enthusiasm", "A cat.", "A wonderful cat."),
        ("enthusiasm", "一张照片", "一张精彩的照片"),
        ("upper_case_share", "a cat", "A CAT"),
        ("json", "a {cat}", '{"animal": "cat"}'),
        ("json", "[cat", 'So:\n```json\n{"animal": "cat"}\n```'),
        ("word_length", "a cat", "an elephant"),
    ],
)
def test_a_feature_sees_its_kind_of_style(feature, without, having):
    assert features(having)[feature] > features(without)[feature]


def test_variety_falls_with_repetition_and_hardly_with_length():
    short = "the cat sat on the mat near the dog"
    assert features("cat cat cat cat dog")["lexical_variety"] < features("cat dog hen cow pig")["lexical_variety"]
    rng = np.random.default_rng(0)
    words = [f"w{index}" for index in range(2000)]
    share = 1 / np.arange(1, 2001)
    draw = [" ".join(rng.choice(words, size, p=share / share.sum())) for size in (100, 400)]
    variety = [features(text)["lexical_variety"] for text in draw]
    ratio = [len(set(text.split())) / len(text.split()) for text in draw]
    assert abs(variety[0] - variety[1]) < 0.06 < 0.15 < ratio[0] - ratio[1]
    assert 0 < features(short)["lexical_variety"] < 1


def test_what_an_answer_says_is_not_seen():
    pairs = [
        ("The image shows three dogs.", "The image shows seven cats."),
        ("It is **left** of the red car.", "It is **over** the tan bus as."),
        ("图中有一只猫。", "屋里没两条狗。"),
    ]
    for one, other in pairs:
        found, changed = features(one), features(other)
        differing = [name for name in STYLE_FEATURES if abs(found[name] - changed[name]) > 1e-9]
        # Only how long the words are may differ between words.
        assert set(differing) <= {"words", "word_length", "sentence_length"}, differing


def test_an_empty_answer_is_zero_but_for_variety():
    found = features(" \n ")
    assert found.pop("lexical_variety") == 1.0
    assert set(found.values()) == {0.0}


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.characters(codec=None), max_size=80) | st.text("#*-1. \n|`_[](){}\"!?好。🎉I'", max_size=60),
    prompt=st.text(max_size=20),
)
def test_any_text_has_finite_features_in_range(text, prompt):
    (row,) = style_features([text], [prompt])
    assert np.isfinite(row).all() and (row >= 0).all()
    for name, value in zip(STYLE_FEATURES, row, strict=True):
        if name.endswith("share") or name in ("opener", "json", "prompt_overlap", "lexical_variety"):
            assert value <= 1.0, name


def test_rows_come_in_order_and_equal_texts_are_equal():
    texts, prompts = ["one two", "a", "one two", "one two"], ["one", "", "one", "x"]
    table = style_features(texts, prompts)
    assert table.shape == (4, len(STYLE_FEATURES)) and table.dtype == np.float64
    assert (table[0] == table[2]).all()
    overlap = STYLE_FEATURES.index("prompt_overlap")
    assert table[:, overlap].tolist() == [0.5, 0.0, 0.5, 0.0]
    assert style_features([]).shape == (0, len(STYLE_FEATURES))


def test_every_feature_is_defined_and_a_wrong_number_of_prompts_is_named():
    assert tuple(LEXICON["features"]) == STYLE_FEATURES and 20 <= len(STYLE_FEATURES) <= 30
    with pytest.raises(ValueError, match="2 texts but 1 prompts"):
        style_features(["a", "b"], ["c"])


def test_confidences_that_do_not_count_are_told(caplog):
    rows = {"chosen": ["Yes!", "No."], "rejected": ["Maybe.", "Well."]}
    for confidence, is_told in (([1.0, None], False), (["", "0.5"], False), ([1.0, 0.9], True)):
        read_pair_style(Dataset.from_dict({**rows, "label_confidence": confidence}))
        assert ("`label_confidence` does not count in it" in caplog.text) is is_told
