"""A model on a benchmark: scores to numbers, counts and labels; what is shown, stored and put into a model card."""

import io
import json
import random
from zlib import crc32

import numpy as np
import pytest
from huggingface_hub import ModelCard, ModelCardData
from rich.console import Console

from tests.data.fixtures_as_rows import fixture
from trl_dt2it.evaluation import (
    PUBLISHED,
    ScoreFile,
    compute_metrics,
    evaluate,
    pooled,
    published_scores,
    read_benchmark,
    show_published,
)
from trl_dt2it.evaluation.metrics import wilson

from .benchmark_rows import mm_rlhf_rows, mm_rows, vl_rows


VL, MM, MMRLHF = "vl-rewardbench", "multimodal-rewardbench", "mm-rlhf-rewardbench"


def by_hash(dataset) -> np.ndarray:
    """Scores that depend on nothing but the row, some of them ties."""
    return np.array(
        [[crc32(f"{one} {side}".encode()) % 7 for side in "cr"] for one in dataset["source_id"]], dtype=float
    )


class Scorer:
    """What a reward model offers; calling it is something else."""

    def __init__(self, scores=None):
        self.scores = scores

    def score_pairs(self, dataset):
        return by_hash(dataset) if self.scores is None else self.scores

    def __call__(self, *args):
        raise AssertionError("`score_pairs` is there")


@pytest.fixture(scope="module")
def results():
    rng = random.Random(0)
    rows = {VL: vl_rows(rng, 90), MM: mm_rows(rng, 80), MMRLHF: mm_rlhf_rows(rng, 20)}
    return {
        name: evaluate(by_hash, name, [row for row in given if "video" not in row], num_resamples=200)
        for name, given in rows.items()
    }


def test_the_result_is_what_the_scores_say():
    rows = vl_rows(random.Random(0), 90)
    dataset = read_benchmark(VL, rows)
    scores = by_hash(dataset)
    for scorer in (by_hash, Scorer(), Scorer(scores.tolist())):
        result = evaluate(scorer, VL, dataset, num_resamples=200)
        assert result.metrics == compute_metrics(VL, rows, scores[:, 0], scores[:, 1])
        assert list(result.metrics) == ["overall", "macro", "general", "hallucination", "reasoning"]
        assert result.headline == "overall" and result.micro == result.metrics["overall"]
        assert result.macro == pytest.approx(result.metrics["macro"])
    categories = np.array(dataset["category"])
    for name in ("general", "hallucination", "reasoning"):
        part = scores[categories == name]
        assert result.n[name] == len(part) > 5
        assert result.ties[name] == int((part[:, 0] == part[:, 1]).sum())
        assert result.correct[name] == int((part[:, 0] > part[:, 1]).sum())
        assert result.wilson[name] == wilson(result.correct[name] / len(part), len(part))
    assert result.ties["overall"] == sum(result.ties[name] for name in ("general", "hallucination", "reasoning")) > 0
    assert "macro" not in result.n and "macro" in result.bootstrap
    assert evaluate(by_hash, VL, rows, num_resamples=200) == result  # raw rows are read first


def test_other_rows_than_the_known_release_are_labelled():
    assert (
        evaluate(lambda d: np.zeros((len(d), 2)), VL, vl_rows(random.Random(0), 4), num_resamples=10).label == "4 rows"
    )
    rows = [{**row, "image": b"\x89PNG"} for row in vl_rows(random.Random(0), 1250)]
    for size, label in ((1247, ""), (1250, "1,250 rows")):
        result = evaluate(lambda d: np.zeros((len(d), 2)), VL, rows[:size], num_resamples=10)
        assert (result.label, len(result.notes), result.metrics["overall"]) == (label, bool(label), 0.0)
    assert result.notes == ("VL-RewardBench has 1,250 rows here: an earlier release, with three more rows.",)


def test_prompts_of_mm_rlhf_rewardbench_and_the_label_without_videos():
    rows = fixture("mm_rlhf_rewardbench")
    result = evaluate(lambda d: np.array([[0, 1], [1, 0], [1, 0], [1, 0], [1, 0]]), MMRLHF, rows, num_resamples=50)
    assert result.label == "image-only, 5 rows" and "cannot be compared" in result.notes[0]
    assert (result.metrics["acc"], result.metrics["acc_plus"]) == (4 / 5, 3 / 4)
    assert (result.n["acc"], result.n["acc_plus"], result.correct["acc_plus"]) == (5, 4, 3)
    assert "acc_plus" not in result.ties and result.ties["acc"] == 0
    assert result.micro == 4 / 5 and result.macro == (1 / 2 + 1 + 1 + 1) / 4
    assert result.settings["bootstrap"]["num_prompts"] == 4


def test_both_orders_show_a_preference_for_a_place():
    def always_the_first(dataset):
        texts = [row["chosen"][0]["content"][0]["text"] for row in dataset]
        return np.array([[1, 0] if "1 is" in text or "first" in text else [0, 1] for text in texts])

    result = evaluate(always_the_first, "mmrb2-t2i", fixture("mmrb2_hf")[:1], num_resamples=10)
    assert result.metrics == {"overall": 0.5, "chosen_first": 1.0, "chosen_second": 0.0}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros(4), r"shape \(4,\), and there are 4 pairs"),
        (np.zeros((3, 2)), r"shape \(3, 2\)"),
        (np.full((4, 2), np.nan), "4 of 4 pairs have a score that is not a number, the first is row 0"),
    ],
)
def test_wrong_scores_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Scorer(scores), VL, vl_rows(random.Random(0), 4))


def test_rounding_makes_ties_that_are_wrong(tmp_path):
    rows = vl_rows(random.Random(0), 4)
    scores = np.array([[0.124, 0.121], [0.5, 0.1], [0.3, 0.1], [0.1, 0.3]])
    file = tmp_path / "scores.parquet"
    full = evaluate(Scorer(scores), VL, rows, num_resamples=10, scores_file=file)
    assert (full.metrics["overall"], full.ties["overall"]) == (3 / 4, 0)
    for rounded in (
        evaluate(Scorer(scores), VL, rows, num_resamples=10, round=2),
        evaluate(ScoreFile(file, round=2), VL, rows, num_resamples=10),
    ):
        assert (rounded.metrics["overall"], rounded.ties["overall"]) == (2 / 4, 1)
    assert evaluate(ScoreFile(file), VL, rows[::-1], num_resamples=10).metrics == full.metrics
    same, other = read_benchmark(VL, rows[::-1]), read_benchmark(VL, rows[:3])
    hashes = [evaluate(by_hash, VL, one, num_resamples=10).settings["rows_sha256"] for one in (same, other)]
    assert hashes[0] == full.settings["rows_sha256"] != hashes[1]


def test_json_holds_all_of_it(results):
    for result in results.values():
        content = json.loads(result.to_json())
        assert content == result.to_dict()
        assert content["metrics"] == result.metrics and content["wilson"][result.headline] == list(
            result.wilson[result.headline]
        )


def test_the_model_card_holds_every_metric(results):
    entries = [entry for result in results.values() for entry in result.model_index_entries()]
    card = ModelCard.from_template(
        ModelCardData(model_name="mine", eval_results=entries), template_str="---\n{{ card_data }}\n---\n# Mine"
    )
    read = ModelCard(str(card)).data.eval_results
    found = {(one.dataset_type, one.metric_name): one.metric_value for one in read}
    assert len(found) == len(entries) == sum(len(result.metrics) for result in results.values())
    hub = {VL: "MMInstruction/VL-RewardBench", MM: "syhuggingface/multimodal_rewardbench"}
    for name, hub_id in hub.items():
        for metric, value in results[name].metrics.items():
            assert found[hub_id, metric] == pytest.approx(value, abs=5.1e-5)
    assert {one.dataset_name for one in read if "MM-RLHF" in one.dataset_name} == {
        f"MM-RLHF-RewardBench ({results[MMRLHF].label})"
    }


def printed(show) -> str:
    buffer = io.StringIO()
    show(Console(file=buffer, width=160))
    return buffer.getvalue()


def test_the_tables_show_the_numbers_beside_published_ones_with_their_source(results):
    result = results[VL]
    text = printed(result.show)
    line = next(line for line in text.splitlines() if line.startswith("│ hallucination"))
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    low, high = (f"{100 * end:.1f}" for end in result.wilson["hallucination"])
    assert cells[1:3] == [f"{100 * result.metrics['hallucination']:.1f}", f"{low} to {high}"]
    assert cells[4:] == [str(result.n["hallucination"]), str(result.ties["hallucination"])]
    assert "90 rows here" in text and "[1] The paper's own groups" in text
    line = next(line for line in text.splitlines() if line.startswith("│ BaseReward 7B"))
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "BaseReward 7B",
        "82.16 [2]",
        "80.85",
        "arXiv 2509.16127, tables 8-10",
    ]
    everything = printed(lambda console: show_published(list(results.values()), console, model="mine"))
    assert "pooled" in everything and f"{100 * pooled(list(results.values())).micro:.1f}" in everything
    assert "pooled" not in text


def test_the_pooled_mean_counts_pairs_as_the_paper_does(results):
    together = pooled(list(results.values()))
    assert together.n == sum(result.n[result.headline] for result in results.values())
    assert together.micro == sum(result.correct[result.headline] for result in results.values()) / together.n
    assert together.mean == pytest.approx(np.mean([result.micro for result in results.values()]))
    assert together.wilson == wilson(together.correct / together.n, together.n)
    assert together.micro != pytest.approx(together.mean, abs=1e-3)
    with pytest.raises(ValueError, match="got vl-rewardbench, vl-rewardbench"):
        pooled([results[VL], results[VL]])
    # The published totals are such means of the published parts, at the sizes of the benchmarks.
    sizes = {VL: 1247, MM: 4711, MMRLHF: 170}
    for model in ("DT2IT-MRM 8B", "BaseReward 7B"):
        parts = {(one.benchmark, one.metric): one.value for one in PUBLISHED if one.model == model}
        total = sum(size * parts[name, "acc" if name == MMRLHF else "overall"] for name, size in sizes.items())
        assert total / 6128 == pytest.approx(parts["pooled", "overall"], abs=0.001)


def test_published_scores_are_shares_with_a_source():
    known = {(one.model, one.benchmark, one.metric) for one in PUBLISHED}
    assert len(known) == len(PUBLISHED)
    names = {VL: {"overall", "macro"}, MM: {"overall"}, MMRLHF: {"acc", "acc_plus"}, "pooled": {"overall"}}
    for one in PUBLISHED:
        assert 0.3 < one.value < 1 and one.metric in names[one.benchmark] and one.source
    best = published_scores(MMRLHF, "acc_plus")
    assert [one.value for one in best] == sorted((one.value for one in best), reverse=True)
    assert {one.metric for one in best} == {"acc_plus"}
