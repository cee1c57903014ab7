"""Health of curation: what is told of each source, on screen and in the ledger; rises of style; how often a set is
seen."""

import json

import numpy as np
import pytest
from rich.console import Console

from trl_dt2it.curation import CurationLedger, Flip, NoiseEstimate, callback, decide, flip_mixture, flip_negative
from trl_dt2it.curation.health import (
    NO_REFERENCE,
    describe_health,
    draw_references,
    num_references,
    show_health,
    style_rises,
    tell_health,
    tell_reading,
)
from trl_dt2it.curation.rounds.stages import Stage, show_plan
from trl_dt2it.curation.rounds.training import RewardTraining
from trl_dt2it.debias.reports import StyleLeakage, StyleReport
from trl_dt2it.training.config import MultimodalRewardConfig

from .trainings import Known, N, data, trained


LONG = "an-organization/a-data-set-with-a-long-name_v2.0-train"


def estimate(reading: str = "read", pairs: int = 4, **given) -> NoiseEstimate:
    """An estimate of some pairs, the first of which is not scored and the last is flipped."""
    posterior = np.array([np.nan, *[0.25] * pairs])
    flip = np.arange(pairs + 1) == pairs
    known = {"rate": 0.2, "interval": (0.104, 0.296), "accuracy": 0.8, "accuracy_interval": (0.75, 0.85)}
    about = {**known, "is_identified": reading != "not read", "contradicted": 0.25, "clean": 0.1, "threshold": 0.5}
    return NoiseEstimate(posterior, flip, reading=reading, **{**about, **given})


UNKNOWN = {"rate": np.nan, "accuracy": np.nan, "is_identified": False}
ESTIMATES = {
    LONG: estimate(pairs=12_345),
    "hard": estimate("hardly read", is_identified=False),
    "not": estimate("not read"),
    "tiny": estimate("unknown", **UNKNOWN, contradicted=np.nan),
    None: estimate(),
}


@pytest.mark.parametrize(
    ("trusted", "held_out"),
    # A tenth, at least 200 but no more than a quarter, at most 1,000; none where that is under 20.
    [(0, 0), (79, 0), (80, 20), (400, 100), (800, 200), (2000, 200), (5000, 500), (10_000, 1000), (10**6, 1000)],
)
def test_a_tenth_of_the_trusted_pairs_is_held_out(trusted, held_out):
    assert num_references(trusted) == held_out


def test_what_the_ledger_keeps_of_a_decision():
    reference = np.array([*[2.0] * 15, *[-1.0] * 4, 0.0, np.nan])
    health = json.loads(json.dumps(describe_health(ESTIMATES, reference)))
    known = health["reference"]
    # A margin of 0 is half right: 15.5 of 20. Wilson's interval of it, by hand.
    z, p, n = 1.959964, 15.5 / 20, 20
    middle, width = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + (z / n / 2) ** 2),
    )
    assert known["pairs"] == 20 and known["accuracy"] == pytest.approx(0.775)
    assert known["interval"] == pytest.approx([middle - width, middle + width], abs=1e-6)
    curve = {name: np.array(values) for name, values in known["curve"].items()}
    assert curve["pairs"].sum() == 20 and (np.diff(curve["margin"]) >= 0).all()
    assert curve["pairs"] @ curve["contradicted"] == pytest.approx(4.5)
    assert list(health["sources"]) == [LONG, "hard", "not", "tiny", ""]
    told = {"pairs": 4, "flipped": 1, "interval": [0.104, 0.296], "contradicted": 0.25, "reading": "hardly read"}
    assert {name: health["sources"]["hard"][name] for name in told} == told
    assert health["sources"]["tiny"]["rate"] is None and health["sources"]["tiny"]["contradicted"] is None
    assert describe_health({}, reference) is None
    assert describe_health({"a": estimate()})["reference"] is None
    assert describe_health({"a": estimate()}, np.array([np.nan]))["reference"] is None


def test_flips_of_another_threshold_are_those_that_are_counted(tmp_path):
    """And all of it is in the ledger, and the same again."""
    rng = np.random.default_rng(0)
    margins = np.where(rng.random(2000) < 0.25, -1, 1) * rng.gamma(3, 1, 2000)
    rows = {}
    for threshold in (0.5, 0.9):
        rule = Flip(
            lambda d, estimates, t=threshold: flip_mixture(d, t, estimates=estimates, reference=np.arange(1, 99))
        )
        decision = decide(margins, [rule])
        health = describe_health(decision.estimates)
        assert health["sources"][""]["flipped"] == decision.flip.sum()
        rows[threshold] = int(decision.flip.sum())
    assert rows[0.5] > rows[0.9]
    ledger = CurationLedger(tmp_path)
    ledger.append(1, "decide", pair_ids=[f"p{i}" for i in range(2000)], decision=decision, health=health)
    assert ledger.rounds[0]["health"] == json.loads(json.dumps(health))


def shown(health, width: int) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show_health(health, console)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 160])
def test_all_is_legible_on_a_narrow_terminal(width):
    lines = shown(describe_health(ESTIMATES, np.array([1.0] * 19 + [-1.0])), width)
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    text = "\n".join(lines)
    # The name is whole, in several lines of its column if there is no room.
    first = next(number for number, line in enumerate(lines) if "12,345" in line)
    column = lines[first].index("12,345")
    assert "".join(line[:column].strip() for line in lines[first : first + 5]).startswith(LONG)
    assert " ".join(lines[first].split()).endswith("12,345 25.0% 75-85% 10-30% 1 read")
    assert "95.0% (76.4% to 99.1%)" in text.replace("\n", " ").replace("  ", " ")
    if width == 160:
        assert any(
            " ".join(line.split()) == "hard 4 25.0% 75-85% 10-30% 1 hardly read, its noise unsure: left alone"
            for line in lines
        )
        assert any(" ".join(line.split()) == "tiny 4 1 too few pairs to tell" for line in lines)
        assert any(line.split()[:2] == ["no", "source"] for line in lines)


def test_a_sentence_says_which_sources_the_model_reads():
    told = tell_health(describe_health(ESTIMATES))
    assert told == (
        "The model reads 2 of 5 sources; it hardly reads 'hard'; it does not read 'not', which it leaves alone; "
        "it has too few pairs of 'tiny' to tell."
    )
    assert tell_health(describe_health({None: estimate()})) == "The model reads 1 of 1 source."
    bad = describe_health({f"s{number}": estimate("not read") for number in range(8)})
    assert "does not read 's0', 's1', 's2', 's3', 's4', 's5', 2 more, which" in tell_health(bad)
    assert any(NO_REFERENCE[:40] in line for line in shown(bad, 200))
    assert tell_reading(describe_health({None: estimate()})["sources"][""]) == "read"


def audit(auc: float, low: float) -> dict:
    return {"auc": auc, "interval": [low, 1.0]}


def test_rises_of_style_are_named_also_where_there_is_no_source():
    before = {"sources": {}, "overall": audit(0.55, 0.5)}
    (told,) = style_rises({"before": before, "after": {"sources": {}, "overall": audit(0.7, 0.65)}})
    assert told.startswith("Style tells more of the labels after curation than before (leakage 0.550 to 0.700)")
    for after in (audit(0.7, 0.5), audit(0.559, 0.551), audit(None, 0.5)):
        assert style_rises({"before": before, "after": {"sources": {}, "overall": after}}) == []
    assert style_rises({"before": before}) == style_rises({}) == []


def test_a_training_that_curates_names_a_rise_at_its_end(tmp_path, monkeypatch):
    """The sets that are audited are those before and after, whose leakage is what the test says."""
    seen, said = [], []

    def audit_style(dataset):
        seen.append([row[0]["content"] for row in dataset["chosen"]])
        if len(seen) > 2:
            raise ValueError("no style")
        return StyleReport(StyleLeakage(N, N, *[(0.55, (0.5, 0.6)), (0.7, (0.65, 0.75))][len(seen) - 1]), {})

    monkeypatch.setattr(callback, "audit_style", audit_style)
    monkeypatch.setattr(callback.logger, "warning", said.append)
    dataset, strengths = data(), [-1.0 if row in (2, 5) else 1.0 for row in range(N)]
    given = {"scorer": Known(strengths), "rules": [Flip(flip_negative)]}
    trained(tmp_path / "a", dataset, **given)
    chosen, rejected = ([row[0]["content"] for row in dataset[name]] for name in ("chosen", "rejected"))
    assert seen == [chosen, [(rejected if row in (2, 5) else chosen)[row] for row in range(N)]]
    assert [sentence[:61] for sentence in said] == ["Style tells more of the labels after curation than before (le"]
    # The model is trained by then, so that nothing about an audit may stop it from being saved.
    trained(tmp_path / "b", dataset, **given)
    assert said[1:] == ["Style is not audited after the curation: no style"]
    # Nothing is audited where nothing has changed.
    trained(tmp_path / "c", dataset, scorer=Known([1.0] * N), rules=[Flip(flip_negative)])
    assert len(seen) == 3


def test_how_often_a_set_is_seen_by_a_fixed_number_of_steps(tmp_path, capsys):
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}
    common = {"use_cpu": True, "bf16": False, "report_to": "none"}
    args = MultimodalRewardConfig(str(tmp_path), max_steps=250, **batch, **common)
    assert RewardTraining(args).times_seen(1600) == 5.0 and RewardTraining(args).times_seen(0) is None
    assert RewardTraining(MultimodalRewardConfig(str(tmp_path), **batch, **common)).times_seen(1600) is None
    packed = MultimodalRewardConfig(
        str(tmp_path), max_steps=250, max_tokens_per_batch=100, train_sampling_strategy="random", **common
    )
    assert RewardTraining(packed).times_seen(1600) is None
    stages = [
        Stage(
            "train", lambda folder: {}, {}, expected={"pairs": 81_000, "steps": 250, "times seen": 250 * 32 / 81_000}
        ),
        Stage("a-name-of-forty-characters-and-a-few-more", lambda folder: {}, {}, expected={"pairs": 10}),
    ]
    show_plan(stages, tmp_path, Console(width=80))
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert ["train", "to do", "81,000", "250", "0.1", "", ""] in rows
    assert ["to do in all", "", "", "250", "", "0", "0"] in rows
    assert "…" not in out and "times" in out
    show_plan(stages[1:], tmp_path, Console(width=80))
    assert "times" not in capsys.readouterr().out  # where epochs say it


@pytest.mark.parametrize(
    ("sizes", "wanted"), [([8] * 10, 24), ([1] * 79, 0), ([1] * 80, 20), ([50, 50], 50), ([100], 0), ([1] * 5000, 500)]
)
def test_whole_groups_are_held_out_until_they_are_enough(sizes, wanted):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    rows = draw_references(groups)
    assert len(rows) == wanted and not set(groups[rows]) & set(np.delete(groups, rows))
    assert len(draw_references(np.empty(0, dtype=np.int64))) == 0
