"""Text-to-image adapters: every field of the sample rows, every reason why a pair is left out, every option."""

from itertools import product

import pytest

from tests.data.fixtures_as_rows import fixture
from trl_dt2it.data import RowError
from trl_dt2it.data.messages import T2I_FEATURES
from trl_dt2it.data.rows import content_group
from trl_dt2it.data.sources import t2i
from trl_dt2it.data.sources.fields import Source
from trl_dt2it.data.sources.t2i import (
    evalmuse,
    hpdv2_test,
    hpdv2_train,
    hpdv3,
    imagereward,
    imagereward_pairs,
    imagereward_rankings,
    llava_reward,
    per_answer_images,
    pickapic,
    rapidata,
)


RED = content_group("a red square", [], [])


def path(name):
    return {"bytes": None, "path": name}


def expected(caption, chosen, rejected, *, strength=None, source_id=None):
    images = [path(image) if isinstance(image, str) else image for image in (chosen, rejected)]
    return {
        "caption": caption,
        "chosen_image": images[0],
        "rejected_image": images[1],
        "strength": strength,
        "group_id": content_group(caption, [], []),
        "source_id": source_id,
    }


def with_raised(results):
    """All that an adapter yields, and the error that it ends with."""
    try:
        yield from results
    except RowError as error:
        yield error


def reasons(results):
    """Reasons and pairs, in order; a pair is its two paths."""
    found = []
    for result in with_raised(results):
        if isinstance(result, RowError):
            assert str(result).endswith(".") and len(str(result)) < 400
            found.append(result.reason)
        else:
            assert set(result) == set(T2I_FEATURES) - {"pair_id", "source"}
            found.append((result["chosen_image"]["path"], result["rejected_image"]["path"]))
    return found


# Sources of one row a pair.


def test_hpdv2_train_takes_either_name_and_either_order():
    first, second = fixture("hpdv2_train")
    assert list(hpdv2_train(first)) == [expected("a red square", "00000001.jpg", "00000002.jpg")]
    assert list(hpdv2_train(second)) == [expected("a green square", "00000004.jpg", "00000003.jpg")]


HPDV2 = {"prompt": "x", "file_path": ["a.jpg", "b.jpg"], "human_preference": [1, 0]}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"human_preference": [1, 1]}, "tie"),
        ({"human_preference": [0, 0]}, "tie"),
        ({"human_preference": [0.7, 0.3]}, "unparsed_verdict"),
        ({"human_preference": None}, "unparsed_verdict"),
        ({"human_preference": [1]}, "unparsed_verdict"),
        ({"file_path": None}, "image_missing"),
        ({"file_path": ["a.jpg", "b.jpg", "c.jpg"]}, "image_missing"),
        ({"file_path": "ab"}, "image_missing"),
        ({"file_path": ["a.jpg", "00168743.jpg"]}, "image_corrupt"),
        ({"file_path": ["train/00006811.jpg", "b.jpg"]}, "image_corrupt"),
        ({"prompt": None}, "not_conversational"),
        ({"prompt": ["x"]}, "not_conversational"),
    ],
)
def test_hpdv2_train_leaves_out(change, reason):
    assert reasons(hpdv2_train({**HPDV2, **change})) == [reason]


def test_all_four_corrupt_files_of_hpdv2_are_known():
    files = ["00006811.jpg", "00168743.jpg", "00331911.jpg", "00310087.jpg"]
    assert [reasons(hpdv2_train({**HPDV2, "file_path": ["a.jpg", file]})) for file in files] == [["image_corrupt"]] * 4


def test_hpdv3_prefers_path1_and_knows_confidence_and_votes():
    first, second = fixture("hpdv3")
    known = expected("a red square", "images/aa/1.jpg", "images/bb/2.jpg", strength=0.9999)
    unknown = expected("a green square", "images/aa/3.jpg", "images/bb/4.jpg")
    assert list(hpdv3(first)) == [known]
    assert list(hpdv3(second)) == [unknown]
    assert list(hpdv3(first, strength="votes")) == [{**known, "strength": 11 / 13}]
    assert list(hpdv3(second, strength="votes")) == [unknown]
    assert list(hpdv3({**first, "choice_dist": [0, 0]}, strength="votes")) == [{**known, "strength": None}]
    assert list(hpdv3({**first, "choice_dist": [1, 12]}, strength="votes")) == [{**known, "strength": 11 / 13}]
    with pytest.raises(ValueError, match="`strength` is 'share'"):
        list(hpdv3(first, strength="share"))


def test_hpdv3_counts_what_is_less_sure_than_asked_for():
    first, second = fixture("hpdv3")
    assert reasons(hpdv3(first, min_confidence=0.9999)) == [("images/aa/1.jpg", "images/bb/2.jpg")]
    assert reasons(hpdv3(first, min_confidence=1.0)) == ["tie"]
    assert reasons(hpdv3(second, min_confidence=0.5)) == ["tie"]


def test_pickapic_bytes_in_either_order():
    row, tie = fixture("pickapic_v2")
    images = [{"bytes": row[f"jpg_{index}"], "path": None} for index in range(2)]
    assert images[0] != images[1] and images[0]["bytes"].startswith(b"\xff\xd8")
    assert list(pickapic(row)) == [expected("a red square", *images, source_id="1")]
    swapped = {**row, "label_0": 0.0, "label_1": 1.0}
    assert list(pickapic(swapped)) == [expected("a red square", *images[::-1], source_id="1")]
    assert reasons(pickapic(tie)) == ["tie"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"has_label": False}, "unparsed_verdict"),
        ({"are_different": False}, "equal_images"),
        ({"label_0": 0.0}, "unparsed_verdict"),
        ({"label_1": 1.0}, "unparsed_verdict"),
        ({"label_0": None}, "unparsed_verdict"),
        ({"label_0": float("nan")}, "unparsed_verdict"),
        ({"caption": None}, "not_conversational"),
    ],
)
def test_pickapic_leaves_out(change, reason):
    assert reasons(pickapic({**fixture("pickapic_v2")[0], **change})) == [reason]


def test_pickapic_without_images_has_addresses():
    row = {key: value for key, value in fixture("pickapic_v2")[0].items() if not key.startswith("jpg")}
    assert reasons(pickapic(row)) == [("https://example.invalid/a.png", "https://example.invalid/b.png")]


def test_imagereward_pair_configuration():
    (row,) = fixture("imagerewarddb_pair")
    assert list(imagereward_pairs(row)) == [
        expected("a red square", row["img_better"], row["img_worse"], source_id="000001-0001")
    ]
    assert row["img_better"]["path"] == "x1.webp" and row["img_better"]["bytes"].startswith(b"\x89PNG")


def test_rapidata_by_criterion():
    (row,) = fixture("rapidata_image")
    (by_preference,) = rapidata(row)
    assert by_preference == expected("a red square", row["image1"], row["image2"], strength=pytest.approx(0.66))
    (by_alignment,) = rapidata(row, criterion="alignment")
    assert by_alignment["strength"] == pytest.approx(0.8)
    assert reasons(rapidata(row, criterion="coherence")) == ["tie"]
    swapped = {**row, "weighted_results_image1_preference": 0.1, "weighted_results_image2_preference": 0.4}
    assert list(rapidata(swapped)) == [
        expected("a red square", row["image2"], row["image1"], strength=pytest.approx(0.3))
    ]
    assert reasons(rapidata({**row, "weighted_results_image2_preference": None})) == ["bad_rating"]
    assert reasons(rapidata(row, criterion="style")) == ["bad_rating"]


# Formats.


def test_images_of_answers_in_the_input_of_the_papers_reformulation():
    first, second = fixture("dt2it_t2i_input")
    assert list(per_answer_images(first)) == [expected("a red square", "a.png", "b.png")]
    assert list(per_answer_images(second)) == [expected("a green square", "c.png", "d.png")]


def test_images_of_answers_with_the_caption_in_the_human_turn():
    (row,) = fixture("omnireward_t2i")
    assert list(per_answer_images(row)) == [expected("Generate an image: a red square", "media/a.png", "media/b.png")]


def sides(chosen, rejected, images=("a.png", "b.png"), **more):
    return {"chosen": {"value": chosen}, "rejected": {"value": rejected}, "images": list(images), **more}


@pytest.mark.parametrize(
    "row, reason",
    [
        (sides("x", "x", ["a.png", "b.png", "c.png"]), "placeholder_count"),
        (sides("x", "x", ["a.png"]), "placeholder_count"),
        ({**sides("x", "x"), "images": None}, "placeholder_count"),
        (sides("x", "y"), "not_conversational"),
        (sides("<image>", "y"), "not_conversational"),
        (
            sides("x", "x", conversations=[{"from": "human", "value": "<image><image>Which is better?"}]),
            "placeholder_count",
        ),
    ],
)
def test_images_of_answers_leave_out(row, reason):
    assert reasons(per_answer_images(row)) == [reason]


def test_a_caption_of_an_answer_stays_as_it_is():
    assert [row["caption"] for row in per_answer_images(sides(" {x}\n", " {x}\n"))] == [" {x}\n"]


def test_llava_reward():
    (row,) = fixture("llava_reward_t2i")
    assert list(llava_reward(row)) == [expected("a red square", "a.png", "b.png", strength=2.5, source_id="1")]
    assert list(llava_reward({**row, "prompt": "a red square"})) == list(llava_reward(row))
    assert reasons(llava_reward({**row, "r_rate": 4.5})) == ["tie"]
    assert reasons(llava_reward({**row, "r_rate": 5})) == ["bad_rating"]
    assert reasons(llava_reward({**row, "c_rate": "N/A"})) == ["bad_rating"]
    assert reasons(llava_reward({**row, "c_rate": float("nan")})) == ["bad_rating"]
    assert reasons(llava_reward({**row, "prompt": ["a red square", "a blue square"]})) == ["not_conversational"]


# Sources of several images.


def test_hpdv2_test_pairs_and_shares_of_votes():
    (row,) = fixture("hpdv2_test")
    # Images b, c, a by rank. Both annotators have b first; one has c before a, the other a before c.
    assert list(hpdv2_test(row)) == [
        expected("a red square", "b.jpg", "a.jpg", strength=1.0),
        expected("a red square", "c.jpg", "a.jpg", strength=0.0),
        expected("a red square", "b.jpg", "c.jpg", strength=1.0),
    ]


def ranked(rank, *annotations):
    raw = [{"rank": annotation, "user_hash": "u"} for annotation in annotations]
    return {"prompt": "x", "image_path": ["a", "b", "c"][: len(rank)], "rank": rank, "raw_annotations": raw}


def test_hpdv2_test_strength_by_hand():
    def strengths(row):
        return [pair["strength"] for pair in hpdv2_test(row)]

    assert strengths(ranked([0, 1], [0, 1], [0, 1], [0, 1], [1, 0])) == [0.5]  # three for, one against
    assert strengths(ranked([0, 1], [0, 1], [0, 0])) == [0.5]  # one for, one sees no difference
    assert strengths(ranked([0, 1], [1, 0], [1, 0], [0, 1])) == [0.0]  # most against the row's ranking
    assert strengths(ranked([0, 1])) == [None]
    assert strengths(ranked([0, 1], [0, 1, 2], None, ["a", "b"])) == [None]  # annotations that cannot be read
    assert strengths({**ranked([0, 1]), "raw_annotations": None}) == [None]


def test_hpdv2_test_leaves_out():
    assert reasons(hpdv2_test(ranked([0, 1, 1]))) == [("a", "b"), ("a", "c"), "tie"]
    assert reasons(hpdv2_test({**ranked([0, 1]), "rank": [0]})) == ["bad_rating"]
    assert reasons(hpdv2_test({**ranked([0, 1]), "rank": [0, None]})) == ["bad_rating"]
    assert reasons(hpdv2_test({**ranked([0, 1]), "image_path": ["a"]})) == ["image_missing"]
    assert reasons(hpdv2_test({**ranked([0, 1, 2]), "prompt": None})) == ["not_conversational"] * 3


def muse(name, score, meaningless=(0, 0, 0), prompt_id="7"):
    return {
        "prompt_id": prompt_id,
        "prompt": "a hat",
        "img_path": name,
        "total_score": score,
        "promt_meaningless": meaningless if isinstance(meaningless, (int, float)) else list(meaningless),
    }


def test_evalmuse_fixture():
    (pair,) = evalmuse(fixture("evalmuse"))
    assert pair == expected(
        "a lady with a red hat", "SDXL/00001.png", "SD1.5/00001.png", strength=pytest.approx(2.0), source_id="00001"
    )


FOUR = [muse("b", [3, 4, 2]), muse("a", 5.0), muse("d", [1]), muse("c", [2, 2, 2, 4, 5])]  # means 3, 5, 1, 3


@pytest.mark.parametrize(
    "options, pairs",
    [
        ({}, [("a", "b"), ("a", "c"), ("a", "d"), "tie", ("b", "d"), ("c", "d")]),
        ({"pairs": "extremes"}, [("a", "d")]),
        ({"pairs": "adjacent"}, [("a", "b"), "tie", ("c", "d")]),
        ({"min_gap": 2.0}, [("a", "b"), ("a", "c"), ("a", "d"), "tie", ("b", "d"), ("c", "d")]),
        ({"min_gap": 2.1}, ["tie", "tie", ("a", "d"), "tie", "tie", "tie"]),
        ({"min_gap": 4.5, "pairs": "extremes"}, ["tie"]),
    ],
)
def test_evalmuse_pairing_rules(options, pairs):
    assert reasons(evalmuse(FOUR, **options)) == pairs


def test_evalmuse_strengths_and_rounding():
    strengths = {reasons([pair])[0]: pair["strength"] for pair in evalmuse(FOUR) if isinstance(pair, dict)}
    assert strengths == {("a", "b"): 2, ("a", "c"): 2, ("a", "d"): 4, ("b", "d"): 2, ("c", "d"): 2}
    # 0.1 + 0.2 is not 0.3 in floats: neither a tie nor a gap may hang on the last digit.
    assert reasons(evalmuse([muse("a", 0.1 + 0.2), muse("b", 0.3)])) == ["tie"]
    assert reasons(evalmuse([muse("a", 1.2), muse("b", 0.9)], min_gap=0.3)) == [("a", "b")]


def test_evalmuse_leaves_out():
    assert reasons(evalmuse([muse("a", 5, (1, 1, 0)), muse("b", 1, (1, 0, 1))])) == ["empty_caption"]
    assert reasons(evalmuse([muse("a", 5, (1, 1, 0)), muse("b", 1, (1, 0, 0))])) == [("a", "b")]  # half is no majority
    assert reasons(evalmuse([muse("a", 5, 0.8), muse("b", 1, 0.6)])) == ["empty_caption"]
    with pytest.raises(RowError, match="meaningless; drop it"):
        list(evalmuse([muse("a", 5, 0.8)]))
    bad = [muse("a", 5), muse("b", ["N/A", 3]), muse("c", None), muse("d", []), muse("e", 1)]
    assert reasons(evalmuse(bad)) == ["bad_rating"] * 3 + [("a", "e")]
    assert reasons(evalmuse([muse("a", 5)])) == []
    assert reasons(evalmuse([muse("a", 5)], pairs="extremes")) == []
    with pytest.raises(ValueError, match="`pairs` is 'some'"):
        list(evalmuse(FOUR, pairs="some"))


def test_imagereward_ranks():
    first, second = rows = fixture("imagerewarddb")
    pair = expected("a red square", first["image"], second["image"], strength=2, source_id="000001-0001")
    assert list(imagereward(rows)) == [pair]
    assert list(imagereward(rows[::-1])) == [pair]
    assert pair["group_id"] == RED


def rated(name, rank, rating=None):
    return {"prompt": "x", "prompt_id": "p", "image_path": name, "rank": rank, "overall_rating": rating}


def test_imagereward_by_hand():
    rows = [rated("a", 1, 7), rated("b", 2, 4), rated("c", 2, 5), rated("d", 3, 6)]
    assert reasons(imagereward(rows)) == [("a", "b"), ("a", "c"), ("a", "d"), "tie", ("b", "d"), ("c", "d")]
    strengths = [pair["strength"] for pair in imagereward(rows) if isinstance(pair, dict)]
    assert strengths == [3, 2, 1, None, None]  # d is rated higher than b and c, and ranked lower
    assert [pair["strength"] for pair in imagereward([rated("a", 1), rated("b", 2, 3)])] == [None]
    assert reasons(imagereward([rated("a", 1), rated("b", None)])) == ["bad_rating"]


@pytest.mark.parametrize("adapter, row", [(evalmuse, muse), (imagereward, rated)])
def test_images_are_compared_under_one_caption_only(adapter, row):
    first, second, third = row("a", 1), row("b", 2), row("c", 3) | {"prompt": "another"}
    assert reasons(adapter([first, second, third])).count("not_conversational") == 2
    assert len(reasons(adapter([first, second, third]))) == 3
    for nothing in ({"prompt_id": None}, {"prompt_id": ""}):
        with pytest.raises(RowError, match="`prompt_id` is missing"):
            list(adapter([first | nothing]))


def test_imagereward_rankings():
    row = {"prompt": "x", "generations": ["a", "b", "c"], "ranking": [2, 1, 2]}
    assert reasons(imagereward_rankings(row)) == [("b", "a"), "tie", ("b", "c")]
    assert [pair["strength"] for pair in imagereward_rankings(row) if isinstance(pair, dict)] == [None, None]
    assert reasons(imagereward_rankings({**row, "ranking": [1, 2]})) == ["bad_rating"]
    assert reasons(imagereward_rankings({**row, "ranking": None})) == ["bad_rating"]
    assert reasons(imagereward_rankings({**row, "generations": "abc"})) == ["bad_rating"]
    (error,) = with_raised(imagereward_rankings({**row, "generations": None}))
    assert "`generations`" in str(error)


STRANGE = [None, 0, -1.5, True, float("nan"), "", "x", b"x", [], [None], [1, 2], [[], []], ["x", {}], {}, {"x": 1}]
SAMPLES = [
    (hpdv2_train, "hpdv2_train"),
    (hpdv2_test, "hpdv2_test"),
    (hpdv3, "hpdv3"),
    (pickapic, "pickapic_v2"),
    (imagereward_pairs, "imagerewarddb_pair"),
    (rapidata, "rapidata_image"),
    (per_answer_images, "omnireward_t2i"),
    (llava_reward, "llava_reward_t2i"),
    (evalmuse, "evalmuse"),
    (imagereward, "imagerewarddb"),
]


@pytest.mark.parametrize("adapter, name", SAMPLES)
def test_no_strange_field_crashes_an_adapter(adapter, name):
    rows = fixture(name)
    for field, value in product(rows[0], [*STRANGE, ...]):
        strange = {key: item for key, item in {**rows[0], field: value}.items() if item is not ...}
        try:
            results = list(adapter([strange, *rows[1:]] if adapter in (evalmuse, imagereward) else strange))
        except RowError as error:
            results = [error]
        for result in results:
            assert isinstance(result, RowError) or isinstance(result["caption"], str)
            assert isinstance(result, RowError) or result["strength"] is None or result["strength"] >= 0


def test_every_source_is_described():
    sources = [item for item in vars(t2i).values() if isinstance(item, Source)]
    assert len(sources) == 12
    assert all(source.is_t2i and source.licence and source.note and not source.is_non_commercial for source in sources)
    grouped = {source.convert for source in sources if source.group_by == "prompt_id"}
    assert grouped == {evalmuse, imagereward}
