"""Looking tests: values by hand with scorers that see the mean of an image, intervals that cover, and resuming."""

import json
import random
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from scipy.stats import t

from trl_dt2it.data.images import ImageOptions, load_image
from trl_dt2it.data.rows import RowError, row_images
from trl_dt2it.evaluation import BENCHMARKS, ScoreFile, audit_looking, compute_metrics, evaluate, read_benchmark
from trl_dt2it.evaluation.looking import CONTROLS, SHOWN
from trl_dt2it.evaluation.metrics import paired_interval

from ..data.fixtures_as_rows import fixture
from ..golden.test_golden_interface import SAMPLES
from ..rows import png
from .benchmark_rows import mm_rlhf_rows, vl_rows


MMRLHF = "mm-rlhf-rewardbench"
EVERY = list(CONTROLS)


def image(*grays: int, size=(12, 8)) -> list[dict]:
    return [{"bytes": png(Image.new("RGB", size, (gray,) * 3)), "path": None} for gray in grays]


def pair(question: str, images: list[dict], group: str) -> dict:
    sides = {side: [{"role": "assistant", "content": f"{side} {group}"}] for side in ("chosen", "rejected")}
    content = [*({"type": "image", "text": None} for _ in images), {"type": "text", "text": question}]
    return {"prompt": [{"role": "user", "content": content}], **sides, "images": images, "group_id": group}


def brightness(row: dict) -> float:
    images = [load_image(one) for one in row_images(row)]
    return float(np.mean([np.asarray(one).mean() for one in images])) if images else 128.0


class Sees:
    """Prefers `chosen` if the question is "text", or else if the image is as bright or dark as the question says."""

    def __init__(self, side: float = 1.0):
        self.side, self.calls = side, []

    def score_pairs(self, dataset):
        self.calls.append(len(dataset))
        margins = []
        for row in dataset:
            question = row["prompt"][0]["content"][-1]["text"]
            seen = np.sign(brightness(row) - 128) * {"bright": 1, "dark": -1, "text": 0}[question]
            margins.append(1.0 if question == "text" else self.side * seen)
        return np.stack([margins, np.zeros(len(margins))], axis=1)


def known_rows() -> list[dict]:
    """Six pairs whose image tells, four whose text tells, two without images, and one with three images."""
    dark, bright = image(20), image(200)
    rows = [pair("dark", dark, f"d{i}") for i in range(3)] + [pair("bright", bright, f"b{i}") for i in range(3)]
    rows += [pair("text", dark if i % 2 else bright, f"t{i}") for i in range(4)]
    return [*rows, pair("text", [], "n0"), pair("text", [], "n1"), pair("bright", image(180, 190, 200), "alone")]


def test_values_by_hand():
    scorer = Sees()
    report = audit_looking(scorer, Dataset.from_list(known_rows()), num_resamples=100)
    assert scorer.calls == [13, 10, 10, 10, 10]  # with the image once
    assert (report.n, report.num_prompts, report.text_only, report.alone) == (10, 10, 2, 1)
    # Another row's image is always the other one, and of a blank one it cannot tell: a tie, which is wrong.
    shown = {"image": 1.0, "blank": 0.4, "swapped": 0.4, "half": 1.0, "quarter": 1.0}
    assert {name: values["overall"] for name, values in report.metrics.items()} == shown
    assert report.gain == pytest.approx({"blank": 0.6, "swapped": 0.6, "half": 0.0, "quarter": 0.0})
    assert report.changed == {"blank": 0.6, "swapped": 0.6, "half": 0.0, "quarter": 0.0}
    assert report.needs_image == 0.6 and report.needs_image_interval[0] < 0.4 < 0.8 < report.needs_image_interval[1]
    # Six of ten differ, all in one direction; with one more in each direction, 7 of 12 and 1 of 12.
    half = t.ppf(0.975, 9) * np.sqrt((8 / 12 - 0.5**2) / 12)
    assert report.gain_interval["swapped"] == pytest.approx((0.5 - half, 0.5 + half))
    assert report.verdict == "looks"
    assert report.text == (
        "The model looks at the image: with another row's image its accuracy is 60.0 points lower (own less other, "
        f"95 % interval {50 - 100 * half:.1f} to {50 + 100 * half:.1f}; 60.0 % of its verdicts change). 60.0 % of "
        "its verdicts need the image (95 % interval {:.1f} to {:.1f}).".format(
            *(100 * end for end in report.needs_image_interval)
        )
    )
    assert report.counted == (
        "10 pairs with images of 10 prompts; dropped: 2 without images, 1 for which no other row has as many other "
        "images."
    )
    assert report.cells[0][:2] == ("its own", "100.0") and report.cells[0][3:] == ("", "", "")
    assert report.cells[2][0] == "another row's" and report.cells[2][3] == "+60.0" and report.cells[2][5] == "60.0"
    content = report.to_dict()
    assert content == json.loads(json.dumps(content)) and content["gain"] == report.gain


def test_verdicts():
    def told(count: int, scorer=None, **options) -> str | None:
        rows = [pair(("bright", "dark")[i % 2], image(220 - 200 * (i % 2) + i % 9), f"g{i}") for i in range(count)]
        return audit_looking(scorer or Sees(), Dataset.from_list(rows), num_resamples=50, **options).verdict

    def blind(dataset):
        return np.array([[1.0, 0.5] if row["group_id"][-1] < "6" else [0.5, 1.0] for row in dataset])

    assert told(60) == "looks"
    assert told(60, Sees(side=-1.0)) == "misled"
    assert told(120, blind) == "does not look"
    assert told(20, blind) == "cannot tell"  # with no verdict changed, more may change in the next twenty
    assert told(60, controls=["blank", "low_resolution"]) is None


def test_a_verdict_needs_the_image_if_it_does_not_survive_one_of_two():
    """A third of the verdicts changes with a blank one, another with another row's, and the last with none."""

    def score(dataset):
        bad = next(wrong)
        return np.array([[0.0, 1.0] if row["group_id"][0] == bad else [1.0, 0.0] for row in dataset])

    wrong = iter(["none", "0", "1", "0"])
    rows = Dataset.from_list([pair("text", image(i), f"{i % 3}-{i}") for i in range(30)])
    report = audit_looking(score, rows, controls=["swapped", "blank"], num_resamples=50)
    assert report.needs_image == pytest.approx(2 / 3)
    assert report.gain == pytest.approx({"blank": 1 / 3, "swapped": 1 / 3})
    report = audit_looking(score, rows, controls="blank", scores=[[1.0, 0.0]] * 30, num_resamples=50)
    assert report.needs_image == pytest.approx(1 / 3) and report.text.startswith("33.3 % of its verdicts need")


def test_order_does_not_matter():
    rng = random.Random(0)
    kinds = ("bright", "dark", "text")
    rows = [pair(rng.choice(kinds), image(rng.randrange(256)), f"g{i % 17}") for i in range(60)]
    rows = [{**row, "pair_id": f"p{index}"} for index, row in enumerate(rows)]
    first = audit_looking(Sees(), Dataset.from_list(rows), num_resamples=50)
    rng.shuffle(rows)
    again = audit_looking(Sees(), Dataset.from_list(rows), num_resamples=50)
    assert (first.metrics, first.changed, first.needs_image) == (again.metrics, again.changed, again.needs_image)
    assert first.gain_interval["swapped"] == pytest.approx(again.gain_interval["swapped"])
    assert 0 < first.gain["swapped"] < 1 and first.num_prompts == 17
    other = audit_looking(Sees(), Dataset.from_list(rows), num_resamples=50, seed=1)
    assert other.metrics["blank"] == first.metrics["blank"]
    assert other.metrics["swapped"] != first.metrics["swapped"]


def with_images(rows: list[dict]) -> list[dict]:
    """Rows of MM-RLHF-RewardBench, each prompt with an image of its own."""
    kept = [{**row, "number": int(row["id"][:-2])} for row in rows if "image" in row]
    return [
        {
            **row,
            "prompt": ("bright", "dark", "text")[row["number"] % 3],
            "image": {**image(37 * row["number"] % 256)[0], "path": row["image"]},
        }
        for row in kept
    ]


def test_a_benchmark_with_several_pairs_of_a_prompt_and_categories(tmp_path):
    rows = with_images(mm_rlhf_rows(random.Random(1), 24))
    file, plain = tmp_path / "mm.parquet", tmp_path / "plain.parquet"
    result = evaluate(Sees(), MMRLHF, rows, controls=EVERY, scores_file=file, num_resamples=50)
    without = evaluate(Sees(), MMRLHF, rows, scores_file=plain, num_resamples=50)
    assert "looking" not in without.to_dict() and '"looking"' not in without.to_json()
    content = result.to_dict()
    assert content.pop("looking")["metrics"].keys() == SHOWN.keys() and content == without.to_dict()
    assert file.read_bytes() == plain.read_bytes()
    looking, dataset = result.looking, read_benchmark(MMRLHF, rows)
    assert looking.n == len(rows) and looking.num_prompts == len({row["id"] for row in rows})
    assert looking.metrics["image"] == result.metrics and looking.bootstrap["image"].keys() == result.bootstrap.keys()
    for shown in ("blank", "swapped", "half", "quarter"):
        scores = ScoreFile(tmp_path / f"mm.{shown}.parquet")(dataset)
        assert looking.metrics[shown] == compute_metrics(MMRLHF, dataset, *scores.T)
        assert {"acc", "acc_plus", "acc/long"} <= looking.metrics[shown].keys()
    assert looking.metrics["quarter"] == looking.metrics["image"] != looking.metrics["swapped"]
    # Rounded scores are rounded in controls too: everything is a tie.
    tied = evaluate(lambda rows: Sees().score_pairs(rows) / 10, MMRLHF, rows, controls=["blank"], round=0)
    assert tied.looking.metrics["image"]["acc"] == tied.looking.metrics["blank"]["acc"] == 0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_its_own_metrics_by_image(name):
    rows = fixture(SAMPLES[name])
    rows = rows[:1] if name == "mmrb2-t2i" else rows

    def blind(dataset):
        return np.array([[1.0, crc32(pair_id.encode()) % 2] for pair_id in dataset["pair_id"]])

    result = evaluate(blind, name, rows, controls=["blank", "low_resolution"], num_resamples=10)
    looking = result.looking
    assert looking.n + looking.text_only == result.n[result.headline] and looking.verdict is None
    assert looking.metrics["image"] == looking.metrics["blank"] == looking.metrics["quarter"]
    assert looking.text_only or looking.metrics["image"] == result.metrics


def test_images_are_read_as_the_scorer_reads_them(tmp_path):
    """Outside of the scorer's root there is no image to make gray, and its reader says so."""
    Image.new("RGB", (4, 4), (200,) * 3).save(tmp_path / "a.png")

    class Reads(Sees):
        collator = SimpleNamespace(image_options=ImageOptions(image_root=str(tmp_path)))

        def score_pairs(self, dataset):
            images = [load_image(row["images"][0], self.collator.image_options) for row in dataset]
            return np.array([[np.asarray(image).mean(), 150.0] for image in images])

    rows = Dataset.from_list([pair("bright", [{"bytes": None, "path": "a.png"}], "g0")])
    for scorer in (Reads(), Reads().score_pairs):
        report = audit_looking(scorer, rows, controls=["blank"], num_resamples=10)
        assert report.gain == {"blank": 1.0}
    outside = Dataset.from_list([pair("bright", [{"bytes": None, "path": str(tmp_path.parent / "b.png")}], "g0")])
    with pytest.raises(RowError, match="is not inside `image_root`"):
        audit_looking(Reads(), outside, scores=[[1.0, 0.0]], controls=["blank"], num_resamples=10)


def test_a_killed_run_goes_on_and_another_model_starts_anew(tmp_path):
    rows = with_images(mm_rlhf_rows(random.Random(1), 12))
    expected = evaluate(Sees(), MMRLHF, rows, controls=EVERY, num_resamples=50)

    class Killed(Sees):
        def score_pairs(self, dataset):
            if len(self.calls) == 3:
                raise KeyboardInterrupt
            return super().score_pairs(dataset)

    given = {"controls": EVERY, "scores_file": tmp_path / "scores.jsonl", "num_resamples": 50}
    with pytest.raises(KeyboardInterrupt):
        evaluate(Killed(), MMRLHF, rows, **given)
    resumed = Sees()
    assert evaluate(resumed, MMRLHF, rows[::-1], **given).looking.metrics == expected.looking.metrics
    assert len(resumed.calls) == 1 + 2
    (tmp_path / "scores.half.json").unlink()  # as a kill before it leaves it
    once = Sees()
    assert evaluate(once, MMRLHF, rows, **given).looking == expected.looking and len(once.calls) == 2
    other = Sees(side=-1.0)
    assert evaluate(other, MMRLHF, rows, **given).looking != expected.looking and len(other.calls) == 5


def test_what_is_refused_before_anything_is_scored(tmp_path):
    scorer, rows = Sees(), vl_rows(random.Random(0), 4)
    with pytest.raises(ValueError, match="`controls` has 'gray'; pass some of 'blank', 'swapped', 'low_resolution'."):
        evaluate(scorer, "vl-rewardbench", rows, controls=["blank", "gray"])
    same = [{**row, "image": rows[0]["image"]} for row in rows]
    with pytest.raises(ValueError, match="None of the 4 rows can show the images of another"):
        evaluate(scorer, "vl-rewardbench", same, controls=EVERY)
    bare = Dataset.from_list([pair("text", [], f"g{i}") for i in range(3)]).remove_columns("images")
    for dataset in (bare, bare.add_column("images", [[]] * 3)):
        with pytest.raises(ValueError, match="None of the 3 rows of the set has an image; evaluate them without"):
            audit_looking(scorer, dataset)
    with pytest.raises(ValueError, match="holds scores of the rows' own images; pass a model for `controls`"):
        evaluate(ScoreFile(tmp_path / "scores.parquet"), "vl-rewardbench", rows, controls=EVERY)
    assert scorer.calls == []


@pytest.mark.parametrize(("up", "down"), [(0.0, 0.0), (0.02, 0.01), (0.1, 0.1), (0.3, 0.05), (0.5, 0.0)])
@pytest.mark.parametrize("correlation", [0.0, 1.0])
def test_paired_intervals_hold_the_truth(up, down, correlation):
    rng, held, sizes = np.random.default_rng(0), [], np.random.default_rng(1).integers(1, 5, size=60)
    unit = np.repeat(np.arange(60), sizes)
    for _ in range(400):
        draws = rng.random(60)[unit] if correlation else rng.random(len(unit))
        difference = np.where(draws < up, 1.0, np.where(draws < up + down, -1.0, 0.0))
        low, high = paired_interval(difference, unit)
        assert -1 <= low <= difference.mean() <= high <= 1 and low < high
        held.append(low <= up - down <= high)
    assert np.mean(held) >= 0.93


def test_a_paired_interval_of_one_prompt_tells_nothing():
    low, high = paired_interval(np.ones(50), np.zeros(50, dtype=int))
    assert low < 0 and high == 1
    assert paired_interval(np.array([1.0]), np.array([7])) == (low, high)
