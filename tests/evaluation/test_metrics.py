"""The metrics against their definitions, written out here once more in the plainest way."""

import math
import random

import numpy as np
import pytest
from datasets import Dataset

from tests.data.fixtures_as_rows import fixture
from trl_dt2it.evaluation import compute_metrics, read_benchmark

from .benchmark_rows import MM_KINDS, VL_PREFIXES, mm_rlhf_rows, mm_rows, vl_rows


VL, MM, MMRLHF = "vl-rewardbench", "multimodal-rewardbench", "mm-rlhf-rewardbench"
FIXTURES = {VL: "vl_rewardbench", MM: "multimodal_rewardbench", MMRLHF: "mm_rlhf_rewardbench"}


def straight_vl(rows, chosen, rejected):
    right, total = {}, {}
    for row, c, r in zip(rows, chosen, rejected, strict=True):
        group = next(VL_PREFIXES[prefix] for prefix in VL_PREFIXES if row["id"].startswith(prefix))
        total[group] = total.get(group, 0) + 1
        right[group] = right.get(group, 0) + (1 if c > r else 0)
    result = {group: right[group] / total[group] for group in total}
    result["overall"] = sum(right.values()) / len(rows)
    if len(total) == 3:
        result["macro"] = (right["general"] / total["general"] + right["hallucination"] / total["hallucination"]) / 3
        result["macro"] += right["reasoning"] / total["reasoning"] / 3
    return result


def straight_mm(rows, chosen, rejected):
    buckets = {}
    for row, c, r in zip(rows, chosen, rejected, strict=True):
        key = row["Category"]
        if key == "open_generation/correctness_task":
            key = "correctness"
        elif key == "open_generation/preference_task":
            key = "preference"
        elif key == "reasoning":
            key = {"mathvista": "math", "EMMA-Coding": "coding", "image2struct": "coding"}[row["Image"].split("/")[1]]
        buckets.setdefault(key, []).append(c > r)
    result = {key: sum(bucket) / len(bucket) for key, bucket in buckets.items()}
    everything = [one for bucket in buckets.values() for one in bucket]
    result["overall"] = sum(everything) / len(everything)
    rest = [one for key, bucket in buckets.items() if key != "safety" for one in bucket]
    if rest:
        result["overall_without_safety"] = sum(rest) / len(rest)
    return result


def straight_mm_rlhf(rows, chosen, rejected):
    result = {}
    for category in (None, "mcq", "long", "short", "safety", "video"):
        by_id = {}
        for row, c, r in zip(rows, chosen, rejected, strict=True):
            path = row.get("image") or row.get("video")
            if category is None or path.split("/")[0] == category:
                by_id.setdefault(row["id"], []).append(c > r)
        if by_id:
            pairs = [one for found in by_id.values() for one in found]
            end = "" if category is None else f"/{category}"
            result[f"acc{end}"] = sum(pairs) / len(pairs)
            result[f"acc_plus{end}"] = sum(all(found) for found in by_id.values()) / len(by_id)
    return result


MAKERS = {
    VL: (lambda rng: vl_rows(rng, rng.randint(1, 60)), straight_vl),
    MM: (lambda rng: mm_rows(rng, rng.randint(1, 60)), straight_mm),
    MMRLHF: (lambda rng: mm_rlhf_rows(rng, rng.randint(1, 16)), straight_mm_rlhf),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_thousand_random_score_vectors_give_what_the_definition_gives(name):
    make, straight = MAKERS[name]
    rng = random.Random(name)
    rows = []
    for trial in range(1000):
        if trial % 10 == 0:
            rows = make(rng)
            if trial % 20 == 0:  # some rows twice
                rows = rows + rng.choices(rows, k=len(rows) // 4)
        # Every third vector has few different values, so that a third of its pairs are ties.
        draw = (lambda: rng.randrange(3)) if trial % 3 == 0 else (lambda: rng.gauss(0, 1))
        chosen, rejected = [draw() for _ in rows], [draw() for _ in rows]
        found, expected = compute_metrics(name, rows, chosen, rejected), straight(rows, chosen, rejected)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert math.isclose(found[key], value, rel_tol=0, abs_tol=1e-12), key


@pytest.mark.parametrize("name", MAKERS)
def test_swapping_chosen_and_rejected_turns_accuracy_around_where_there_are_no_ties(name):
    rows = MAKERS[name][0](random.Random(5))
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(size=(2, len(rows)))
    found, swapped = (compute_metrics(name, rows, *scores) for scores in ((chosen, rejected), (rejected, chosen)))
    over_pairs = [key for key in found if not key.startswith("acc_plus")]
    assert len(over_pairs) >= 5
    for key in over_pairs:
        assert found[key] + swapped[key] == pytest.approx(1, abs=1e-12)
    tied = chosen.copy()
    tied[0] = rejected[0]
    headline = over_pairs[0]
    both = (compute_metrics(name, rows, *scores)[headline] for scores in ((tied, rejected), (rejected, tied)))
    assert sum(both) == pytest.approx(1 - 1 / len(rows))  # the tie is wrong either way


@pytest.mark.parametrize("name", FIXTURES)
def test_perfect_scores_give_1_and_ties_give_0(name):
    rows = fixture(FIXTURES[name])
    ones = [1.0] * len(rows)
    assert set(compute_metrics(name, rows, ones, [0.0] * len(rows)).values()) == {1.0}
    assert set(compute_metrics(name, rows, ones, ones).values()) == {0.0}


def test_the_known_values_of_the_fixtures():
    rows = fixture("mm_rlhf_rewardbench")
    one_wrong = compute_metrics(MMRLHF, rows, [1, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0])
    assert one_wrong["acc"] == 5 / 6 and one_wrong["acc_plus"] == 4 / 5
    assert one_wrong["acc/mcq"] == 1 / 2 and one_wrong["acc_plus/mcq"] == 0
    assert one_wrong["acc/video"] == one_wrong["acc_plus/video"] == 1
    # In the order of the fixture: general x 2, hallucination x 3, reasoning x 3.
    found = compute_metrics(VL, fixture("vl_rewardbench"), [1, 0, 1, 1, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0, 1, 1])
    assert found == pytest.approx(
        {"overall": 4 / 8, "macro": (1 / 2 + 2 / 3 + 1 / 3) / 3, "general": 1 / 2}
        | {"hallucination": 2 / 3, "reasoning": 1 / 3}
    )
    found = compute_metrics(MM, fixture("multimodal_rewardbench"), [1, 1, 1, 0, 1, 0, 1], [0, 0, 0, 1, 0, 1, 0])
    assert list(found) == [
        *("overall", "overall_without_safety", "correctness", "preference", "knowledge"),
        *("math", "coding", "safety", "vqa"),
    ]
    assert found["overall"] == 5 / 7 and found["overall_without_safety"] == 5 / 6
    assert (found["math"], found["coding"], found["safety"]) == (0, 1, 0)


def test_overall_weighs_by_pairs_and_macro_by_groups():
    # The sizes of the release with 1,250 rows; only hallucination is right.
    sizes = {"wildvision-battle-": 173, "svit-": 10, "hallucination_pair-": 448, "RLAIF-V-": 233, "RLHF-V-": 68}
    sizes |= {"mathverse_": 167, "mmmu_validation_Art_": 151}
    rows = [{"id": f"{prefix}{index}"} for prefix, size in sizes.items() for index in range(size)]
    chosen = [float(VL_PREFIXES[next(p for p in sizes if row["id"].startswith(p))] == "hallucination") for row in rows]
    found = compute_metrics(VL, rows, chosen, [0.5] * 1250)
    assert found == pytest.approx(
        {"overall": 749 / 1250, "macro": 1 / 3, "general": 0.0, "hallucination": 1.0, "reasoning": 0.0}
    )


def test_a_difference_that_rounding_would_take_counts():
    rows = fixture("mm_rlhf_rewardbench")
    assert compute_metrics(MMRLHF, rows, [0.1234567890123457] * 6, [0.1234567890123456] * 6)["acc"] == 1.0
    single = np.float32(1) + np.finfo(np.float32).eps
    assert compute_metrics(MMRLHF, rows, np.full(6, single), np.ones(6, np.float32))["acc"] == 1.0


@pytest.mark.parametrize("name", FIXTURES)
def test_canonical_rows_give_the_same_metrics_as_raw_ones(name):
    rows = [row for row in fixture(FIXTURES[name]) if not row.get("video")]
    dataset = read_benchmark(name, rows)
    scores = np.random.default_rng(1).normal(size=(2, len(rows)))
    found = compute_metrics(name, rows, *scores)
    assert compute_metrics(name, dataset, *scores) == found
    assert compute_metrics(name, list(dataset.remove_columns("images")), *scores) == found
    assert compute_metrics(name, Dataset.from_list(rows), *scores) == found


def test_rows_of_other_layouts_fall_into_the_same_groups():
    # The judge's answers keep the row in `Meta`, and the paper's own file has two keys only.
    (answer,) = fixture("multimodal_rewardbench_answers")
    assert compute_metrics(MM, [answer], [1.0], [0.0])["preference"] == 1.0
    found = compute_metrics(MM, fixture("multimodal_rewardbench_dt2it"), [1.0, 0.0], [0.0, 1.0])
    assert found == {"overall": 0.5, "overall_without_safety": 1.0, "math": 1.0, "safety": 0.0}
    # VLMEvalKit's file of VL-RewardBench names the set or the group.
    rows = [{"index": 3, "category": "povid"}, {"index": 4, "category": "reasoning"}, {"index": "RLHF-V-5"}]
    found = compute_metrics(VL, rows, [1, 0, 1], [0, 1, 0])
    assert found == {"overall": 2 / 3, "hallucination": 1.0, "reasoning": 0.0}  # no macro without all three


def test_a_reasoning_item_of_an_unknown_folder_is_not_lost():
    kinds = [("matharena_1", "images/new/1.png", "math"), ("sketch_1", "images/new/2.png", "coding")]
    rows = [{"ID": name, "Image": image, "Category": "reasoning"} for name, image, _ in kinds]
    found = compute_metrics(MM, rows, [1.0, 1.0], [0.0, 0.0])
    assert set(found) == {"overall", "overall_without_safety", "math", "coding"}
    message = "Row 0 of Multimodal RewardBench: the category is reasoning, and neither an `ID` nor the folder"
    with pytest.raises(ValueError, match=message):
        compute_metrics(MM, [{"image_path": "images/new/1.png", "category": "reasoning"}], [1.0], [0.0])
    assert len(MM_KINDS) == 8


@pytest.mark.parametrize(
    ("name", "rows", "scores", "message"),
    [
        ("vlrb", [{"id": "a"}], ([1.0], [0.0]), "`vlrb` is no known benchmark. Known are vl-rewardbench"),
        (VL, [{"id": "a"}], ([1.0, 2.0], [0.0]), "1 rows .* 2 scores of chosen and 1 of rejected"),
        (VL, [{"id": "a"}, {"id": "b"}], ([1.0], [0.0]), "2 rows .* 1 scores"),
        (VL, [{"id": "a"}, {"id": "b"}], ([1.0, float("nan")], [0.0, 1.0]), "1 of 2 pairs .* the first is row 1"),
        (VL, [{"query": "?"}], ([1.0], [0.0]), "Row 0 of VL-RewardBench: .* neither an `id` nor a known `category`"),
        (VL, [], ([], []), "no row of VL-RewardBench"),
        (MM, [{"Category": "music"}], ([1.0], [0.0]), "Row 0 of Multimodal RewardBench: .* category 'music'"),
        (
            MMRLHF,
            [{"id": "1", "image": "a.png"}],
            ([1.0], [0.0]),
            "Row 0 of MM-RLHF-RewardBench: .* path 'a.png', which names none of mcq",
        ),
        (MMRLHF, [{"image": "mcq/a.png"}], ([1.0], [0.0]), "Row 0 of MM-RLHF-RewardBench has no 'group_id'"),
    ],
)
def test_what_cannot_be_computed_says_why(name, rows, scores, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(name, rows, *scores)
