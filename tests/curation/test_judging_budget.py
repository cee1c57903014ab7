"""A budget of judges in the rounds: the order of calls, whole pairs alone, and what a kill or a failure does."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_dt2it.curation import CurationLedger, Decision, Keep, decide, keep_consistent
from trl_dt2it.curation.judging import read_judging
from trl_dt2it.curation.rounds.config import CurationRun, SourceSets, Step
from trl_dt2it.curation.rounds.results import tell_judging
from trl_dt2it.curation.rounds.run import ask_judges
from trl_dt2it.curation.rounds.training import RewardTraining
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.demo import READER_DIR
from trl_dt2it.demo.digits import DEMO_LOADERS
from trl_dt2it.judge import JudgeError
from trl_dt2it.judge.rubric import fenced_texts
from trl_dt2it.training.config import MultimodalRewardConfig

from ..judge.server import Fault, JudgeServer
from .test_judging import TruthfulJudge, image_hashes, sha


def rounds_run(tmp_path, num_pairs=12, noise=0.5):
    """A pool of digits, a truthful judge of it, and a call that asks judges about it."""
    specs = {name: {"noisy": {"digits": {"num_pairs": num_pairs, "noise": noise}}} for name in ("base", "pool")}
    args = MultimodalRewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    sets = SourceSets(specs, args, lambda: str(READER_DIR), DEMO_LOADERS)
    rows = list(leave_images_encoded(sets.usable("pool")))
    judge = TruthfulJudge({sha(row["images"][0]["bytes"]): row["digits"] for row in rows}, moods=False, faults=False)
    step = Step(rules=[{"keep": "keep_consistent"}], judge=True)
    folder = tmp_path / "round-1/judge"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "begun.json").write_text(json.dumps({"digest": "d"}))

    def ask(*judges, **given):
        about = judges[0] if len(judges) == 1 else {"endpoints": list(judges)}
        run = CurationRun(tmp_path, RewardTraining(args), [], sets, [], [], read_judging({**about, **given}))
        return ask_judges(run, folder, number=1, step=step, before=[(1, "decide")])

    return sets.usable("pool"), sets.names("pool").to_pylist(), judge, ask


def decided(names, posterior, kept=None, flipped=None) -> Decision:
    count = len(names)
    flipped = np.zeros(count, dtype=bool) if flipped is None else flipped
    kept = np.ones(count, dtype=bool) if kept is None else kept
    strength = np.linspace(1, 2, count)
    return Decision(flipped, kept, strength, np.zeros(count, dtype=np.int16), ("by hand",), np.array(posterior))


def asked_pairs(server, pool) -> list[int]:
    """Rows of the pool in the order in which a server was asked about them, once for each call."""
    places = {sha(row["images"][0]["bytes"]): index for index, row in enumerate(leave_images_encoded(pool))}
    return [places[image_hashes(request.body)[0]] for request in server.requests]


def test_a_budget_goes_where_it_is_worth_most(tmp_path):
    pool, names, judge, ask = rounds_run(tmp_path)
    wrong = np.array(pool["is_flipped"][:])
    assert 0 < wrong.sum() < 12
    posterior = [0.1, 0.3, 0.5, 0.25, 0.05, 0.45, 0.4, 0.35, 0.9, 0.7, 0.22, 0.15]
    flipped, kept = np.array(posterior) > 0.5, np.arange(12) != 4
    CurationLedger(tmp_path / "ledger").append(
        1, "decide", pair_ids=names, decision=decided(names, posterior, kept, flipped), orientation="source"
    )
    with JudgeServer(judge) as server:
        about = {"base_url": server.base_url, "model": "judge", "max_concurrency": 1, "order": "gain", "pairs": "all"}
        about["accuracy"] = 0.8
        counts = ask(about, max_calls=9)
        # Dropped pair 4 counts as a coin, of a smaller margin than pair 2 is none; then 5 and 6. Nine calls are four
        # pairs, each in both orders.
        assert asked_pairs(server, pool) == [2, 2, 4, 4, 5, 5, 6, 6]
        assert (counts["judged"], counts["not asked (budget)"], counts["not asked (no gain)"]) == (4, 5, 3)
        assert counts["replies"] == {"ok": 8} and "unanswered" not in counts
        labels = CurationLedger(tmp_path / "ledger").labels(pa.array(names))
        asked = np.isin(np.arange(12), [2, 4, 5, 6])
        assert labels["flipped"][asked].tolist() == wrong[asked].tolist() and labels["kept"].all()
        assert labels["flipped"][~asked].tolist() == flipped[~asked].tolist()
        noise = [((wrong ^ flipped) & kept).sum() / 11, (wrong ^ labels["flipped"]).sum() / 12]
        assert counts["order"] == "gain" and counts["curve"]["calls"] == [0, 2, 4, 6, 8]
        assert [counts["curve"]["noise"][index] for index in (0, -1)] == pytest.approx(noise, abs=1e-6)
        assert counts["noise_after"] == counts["curve"]["noise"][-1]
        noise = " to ".join(f"{value:.1%}" for value in counts["curve"]["noise"])
        assert tell_judging("round-1/judge", counts) == (
            f"round-1/judge: 8 calls in the order gain, judges right in about 80%, wrong labels {noise}; not asked: "
            "5 pairs for lack of budget, 3 without gain."
        )
        history = CurationLedger(tmp_path / "ledger").history(names[6])
        after = 0.4 * 0.8 / (0.4 * 0.8 + 0.6 * 0.2) if wrong[6] else 0.4 * 0.2 / (0.4 * 0.2 + 0.6 * 0.8)
        assert [one["posterior"] for one in history] == pytest.approx([0.4, after], abs=1e-6)
        # A larger budget asks about the next pairs alone, and a smaller one takes away nothing that was paid.
        for calls, expected in ((24, [2, 4, 5, 6, 7, 1, 9, 3, 10]), (2, [2, 4, 5, 6, 7, 1, 9, 3, 10])):
            CurationLedger(tmp_path / "ledger").undo(1, "judge")
            counts = ask(about, max_calls=calls)
            assert asked_pairs(server, pool) == [row for row in expected for _ in (0, 1)]
            assert counts["not asked (budget)"] == 0 and counts["judged"] == 9
        CurationLedger(tmp_path / "ledger").undo(1, "judge")
        counts = ask(about, max_calls=2, order="random")  # nothing is left, but replies are there
        assert (counts["judged"], counts["not asked (budget)"], counts["not asked (no gain)"]) == (9, 3, 0)
        assert len(server.requests) == 18


def test_a_pair_is_asked_about_whole_or_not_at_all(tmp_path):
    pool, names, judge, ask = rounds_run(tmp_path)
    CurationLedger(tmp_path / "ledger").append(1, "decide", pair_ids=names, actions=["drop"] * 12)

    tries = Counter()

    def forgetful(body):
        """The first reply to every question cannot be read, and the reminder costs another call."""
        question = (*fenced_texts(body["messages"]), *image_hashes(body))
        tries[question] += 1
        return judge(body) if tries[question] == 2 else "Hm."

    with JudgeServer(forgetful) as server, JudgeServer(judge) as other:
        about = {"base_url": server.base_url, "model": "judge", "order": "margin", "max_concurrency": 2}
        second = {"base_url": other.base_url, "model": "other", "max_calls": 6}
        judges = [{key: value for key, value in about.items() if key != "order"} | {"max_calls": 100}, second]
        counts = ask(*judges, order="margin")
        # The second judge has no room for a fourth pair, of which the first is then not asked either.
        assert (counts["judged"], counts["not asked (budget)"], counts["kept"]) == (3, 9, 3)
        assert len(other.requests) == 6 and len(server.requests) == 12
        assert counts["curve"]["calls"] == [0, 4, 8, 12]
    for limit in range(1, 12):
        folder = tmp_path / str(limit)
        pool, names, judge, ask = rounds_run(folder)
        CurationLedger(folder / "ledger").append(1, "decide", pair_ids=names, actions=["drop"] * 12)
        tries.clear()
        with JudgeServer(forgetful) as server:
            counts = ask({**about, "base_url": server.base_url, "max_calls": limit})
            assert len(server.requests) <= limit
            votes = pq.read_table(folder / "round-1/judge/votes.parquet")
            first, second = (votes[f"status_0_{order}"].to_numpy() == "over_budget" for order in (0, 1))
            is_half = first != second
            assert sum(is_half) <= 1  # never but for a reminder at the very end
            assert counts["judged"] >= (limit - 2) // 4 and counts["judged"] + counts["not asked (budget)"] == 12


def test_failures_are_no_lack_of_budget(tmp_path):
    pool, names, judge, ask = rounds_run(tmp_path)
    CurationLedger(tmp_path / "ledger").append(1, "decide", pair_ids=names, actions=["drop"] * 12)
    silent = sha(next(iter(leave_images_encoded(pool)))["images"][0]["bytes"])
    with JudgeServer(lambda body: Fault(status=500) if image_hashes(body) == [silent] else judge(body)) as server:
        about = {"base_url": server.base_url, "model": "judge", "max_retries": 0, "order": "margin", "max_calls": 16}
        with pytest.raises(JudgeError, match="^1 of 8 pairs have no answer of all judges .2 questions failed"):
            ask(about)
        server.answer = judge
        counts = ask(about, max_calls=20)
        assert (counts["judged"], counts["not asked (budget)"]) == (9, 3)


def test_without_a_posterior_the_margins_tell(tmp_path):
    pool, names, judge, ask = rounds_run(tmp_path, num_pairs=200, noise=0.3)
    wrong = np.array(pool["is_flipped"][:])
    margins = np.random.default_rng(0).exponential(1.0, 200) * np.where(wrong, -1, 1)
    decision = decide(margins, [Keep(keep_consistent)], min_kept=0)
    CurationLedger(tmp_path / "ledger").append(1, "decide", pair_ids=names, decision=decision, orientation="source")
    with JudgeServer(judge) as server:
        about = {"base_url": server.base_url, "model": "judge", "order": "gain", "pairs": "all", "max_calls": 20}
        counts = ask(about)
        # The labels that the model contradicts are dropped; those that it contradicts most come first.
        votes = pq.read_table(tmp_path / "round-1/judge/votes.parquet").to_pydict()
        contradicted = np.flatnonzero(wrong)[np.argsort(margins[wrong])]
        assert votes["pair_id"][: len(contradicted)] == [names[row] for row in contradicted]
        assert votes["status_0_0"][:11] == ["ok"] * 10 + ["over_budget"] and len(server.requests) == 20
        assert counts["flipped"] == 10 and counts["curve"]["changed"][-1] == 10


def test_a_budget_is_spent_as_if_there_had_been_no_kill(tmp_path):
    outcomes = []
    for is_killed in (False, True):
        folder = tmp_path / str(is_killed)
        pool, names, judge, ask = rounds_run(folder)
        CurationLedger(folder / "ledger").append(1, "decide", pair_ids=names, decision=decided(names, [0.4] * 12))
        calls = Counter()

        def answer(body, judge=judge, is_killed=is_killed, calls=calls):
            calls["all"] += 1
            return Fault(status=401) if is_killed and calls["all"] == 6 else judge(body)

        with JudgeServer(answer) as server:
            about = {"base_url": server.base_url, "model": "judge", "max_concurrency": 1}
            about |= {"order": "uncertainty", "pairs": "all", "max_calls": 15}
            if is_killed:
                with pytest.raises(JudgeError):
                    ask(about)
                about["max_calls"] += 1  # the call that was refused
            counts = ask(about)
            assert counts["judged"] == 7
            outcomes.append(
                (counts["curve"], CurationLedger(folder / "ledger").state().drop_columns(["pair_id"]).to_pydict())
            )
    assert outcomes[0] == outcomes[1]


def test_nobody_is_asked_where_no_verdict_would_change_anything(tmp_path):
    pool, names, judge, ask = rounds_run(tmp_path, num_pairs=90)
    posterior = np.where(np.arange(90) % 3, 0.45, 0.02)
    ledger = CurationLedger(tmp_path / "ledger")
    ledger.append(1, "decide", pair_ids=names, decision=decided(names, posterior))
    with JudgeServer(judge) as server:
        about = {"base_url": server.base_url, "model": "judge", "order": "gain", "pairs": "all"}
        for calls, judged in ((20, 10), (1000, 60)):
            counts = ask(about, max_calls=calls)
            assert (counts["judged"], counts["not asked (no gain)"]) == (judged, 30)
            assert counts["not asked (budget)"] == 60 - judged and len(server.requests) == 2 * judged
            # What is one half, nearly, tells little of the judge.
            assert 0.75 < counts["judge_accuracy"] < 0.85
            votes = pq.read_table(tmp_path / "round-1/judge/votes.parquet")
            assert len(votes) == 60 and set(votes["pair_id"].to_pylist()).isdisjoint(names[::3])
            ledger.undo(1, "judge")
        # All replies are there; who asks about all in any order gets the rest.
        counts = ask(about, order="random", max_calls=1000)
        assert counts["judged"] == 90 and len(server.requests) == 180
        wrong = np.array(pool["is_flipped"][:])
        flipped = CurationLedger(tmp_path / "ledger").labels(pa.array(names))["flipped"]
        assert (flipped[posterior > 0.1] == wrong[posterior > 0.1]).all()
