"""Judges about dropped pairs: both orders, one image and two, a server at its worst, and no call paid twice."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, concatenate_datasets

from trl_dt2it.curation import CurationLedger, relabel_by_vote
from trl_dt2it.curation.judging import estimate_judging, judge_pairs, read_judging
from trl_dt2it.curation.rounds.config import CurationRun, SourceSets, Step
from trl_dt2it.curation.rounds.run import ask_judges
from trl_dt2it.curation.rounds.training import RewardTraining
from trl_dt2it.curation.rules import UNREADABLE
from trl_dt2it.data import reformulate_t2i, write_parquet
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.mixing import swap_pairs
from trl_dt2it.data.t2i import CHINESE, ENGLISH
from trl_dt2it.demo import READER_DIR
from trl_dt2it.demo.digits import DEMO_LOADERS, WORDS, make_digits, make_digits_t2i
from trl_dt2it.judge import Endpoint, JudgeClient, JudgeError
from trl_dt2it.judge.rubric import fenced_texts
from trl_dt2it.training.config import MultimodalRewardConfig

from ..judge.server import Fault, JudgeServer
from .runs import arguments, outcome, start


FIRST = {template.first_is_better for template in (*ENGLISH, *CHINESE)}


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def image_hashes(body: dict) -> list[str]:
    blocks = [block for block in body["messages"][-1]["content"] if block["type"] == "image_url"]
    return [sha(base64.b64decode(block["image_url"]["url"].partition(",")[2])) for block in blocks]


def captioned(question: str) -> str:
    """The digit that the caption of a question about two images names."""
    (digit,) = [str(n) for n, word in enumerate(WORDS) if re.search(rf"\b{word}\b", question.rsplit(":")[-1])]
    return digit


class TruthfulJudge:
    """
    Knows the digit of every image, and so which answer is right; with moods that depend on the images alone.

    Of eight pairs one gets no verdict that can be read, one the first answer in whatever order, and one is refused.
    Every fourth call fails once in some way before it is answered.
    """

    MOODS = ("malformed", "first", "refused", "", "", "", "", "")

    def __init__(self, truth: dict[str, str], moods: bool = True, faults: bool = True) -> None:
        self.truth, self.moods, self.faults = truth, moods, faults
        self.tries: Counter[str] = Counter()
        self.full: Counter[str] = Counter()  # whole replies by what was asked
        self.lock = threading.Lock()

    def mood(self, hashes: list[str]) -> str:
        return self.MOODS[int(sha("".join(sorted(hashes)).encode()), 16) % 8] if self.moods else ""

    def better(self, body: dict) -> str:
        question, *answers = fenced_texts(body["messages"])[:3]
        digits = [self.truth[one] for one in image_hashes(body)]
        if len(digits) == 1:
            right = [WORDS[int(digits[0])] in answer for answer in answers]
        else:
            wanted = captioned(question)
            shown = [digits[0] if answer in FIRST else digits[1] for answer in answers]
            right = [digit == wanted for digit in shown]
        return "tie" if right[0] == right[1] else "first" if right[0] else "second"

    def __call__(self, body: dict) -> str | Fault:
        asked, mood = sha(json.dumps(body["messages"]).encode()), self.mood(image_hashes(body))
        with self.lock:
            self.tries[asked] += 1
            if self.faults and self.tries[asked] == 1 and int(asked, 16) % 4 == 0:
                number = int(asked, 16) // 4 % 4
                return [
                    Fault(status=429, headers={"Retry-After": "0.01"}),
                    Fault(status=500),
                    Fault(text="{}", cut=True),
                    Fault(text="{}", close=True),
                ][number]
            self.full[asked] += 1
        if mood == "malformed":
            return "Both have their merits."
        if mood == "refused":
            return Fault(refusal="I do not judge handwriting.")
        return json.dumps({"better": "first" if mood == "first" else self.better(body)})


def mixed_pairs(count: int, noise: float = 0.0) -> tuple[Dataset, dict[str, str]]:
    """Pairs about one image and pairs of two images, and the digit of each image."""
    text = leave_images_encoded(make_digits("train", count, noise=noise))
    raw = leave_images_encoded(make_digits_t2i("train", count, noise=noise))
    t2i = leave_images_encoded(reformulate_t2i(raw))
    truth = {sha(row["images"][0]["bytes"]): row["digits"] for row in text}
    for row in raw:
        truth |= {sha(row[f"{side}_image"]["bytes"]): row[f"{side}_digits"] for side in ("chosen", "rejected")}
    shared = ["prompt", "chosen", "rejected", "images", "strength", "pair_id", "group_id", "source"]
    return concatenate_datasets([text.select_columns(shared), t2i.select_columns(shared)]), truth


def client(server: JudgeServer, path, **kwargs) -> JudgeClient:
    endpoint = Endpoint(server.base_url, "judge", timeout=5.0)
    return JudgeClient(endpoint, path, show_progress=False, retry_delay=0.002, **kwargs)


def test_both_orders_of_pairs_of_one_and_of_two_images(tmp_path):
    pairs, truth = mixed_pairs(6)
    judge = TruthfulJudge(truth, moods=False, faults=False)
    with JudgeServer(judge) as server:
        one = client(server, tmp_path / "judge.jsonl", max_concurrency=1)
        found = judge_pairs(pairs, [one], pairs_at_once=5, show_progress=False)
        assert found.votes.shape == (12, 1, 2) and (found.votes == 1).all() and found.counts() == {"ok": 24}
        asked = [request.body for request in server.requests]
        for place, row in enumerate(pairs):
            texts = [fenced_texts(body["messages"])[1:3] for body in asked[2 * place : 2 * place + 2]]
            hashes = [image_hashes(body) for body in asked[2 * place : 2 * place + 2]]
            sent = [sha(image["bytes"]) for image in row["images"]]
            answers = [row[side][0]["content"][0]["text"] for side in ("chosen", "rejected")]
            if place < 6:  # the answers change places
                assert hashes == [sent, sent] and texts == [answers, answers[::-1]]
            else:  # the images do, and with them what the answers mean
                assert hashes == [sent, sent[::-1]] and texts[0] == texts[1] == sorted(answers) and len(sent) == 2
        # Of flipped pairs the judge says the opposite, and has been asked all of it before.
        flipped = judge_pairs(swap_pairs(pairs, np.arange(12) % 2 == 0), [one], show_progress=False)
        assert flipped.votes[:, 0].tolist() == [[-1, -1] if place % 2 == 0 else [1, 1] for place in range(12)]
        assert len(server.requests) == 24
        first = judge_pairs(pairs.select([8]), [one], swap="answers", show_progress=False)
        assert first.votes.tolist() == [[[1, 1]]] and len(server.requests) in (25, 26)


def test_what_cannot_be_read_is_no_vote(tmp_path):
    pairs, truth = mixed_pairs(16)
    judge = TruthfulJudge(truth)
    with JudgeServer(judge) as server:
        found = judge_pairs(pairs, [client(server, tmp_path / "judge.jsonl")], show_progress=False)
        expected = []
        for row in pairs:
            mood = judge.mood([sha(image["bytes"]) for image in row["images"]])
            expected.append({"malformed": UNREADABLE, "refused": UNREADABLE, "first": None, "": 1}[mood])
        assert {UNREADABLE, None, 1} == set(expected)
        decision = relabel_by_vote(found.votes)
        for place, (wanted, votes) in enumerate(zip(expected, found.votes[:, 0].tolist(), strict=True)):
            # Who always takes the first speaks for each side once.
            assert sorted(votes) == ([-1, 1] if wanted is None else [wanted, wanted]), place
            assert decision.keep[place] == (wanted == 1) and not decision.flip[place]
        reasons = {"judges agree with the label", "judges disagree", "vote unreadable"}
        assert set(decision.counts()) == reasons
        # Nothing is answered twice, whatever was asked again after a fault; reminders are another question.
        assert set(judge.full.values()) == {1} and max(judge.tries.values()) == 2
        calls = len(server.requests)
        again = judge_pairs(pairs, [client(server, tmp_path / "judge.jsonl")], show_progress=False)
        assert (again.votes == found.votes).all() and len(server.requests) == calls


def test_a_row_that_cannot_be_asked_about_is_listed(tmp_path):
    pairs, truth = mixed_pairs(2)
    rows = pairs.to_list()
    rows[1]["images"] = [{"bytes": b"no image", "path": None}]
    with JudgeServer(TruthfulJudge(truth, moods=False)) as server:
        bad = Dataset.from_list(rows, features=pairs.features)
        found = judge_pairs(bad, [client(server, tmp_path / "judge.jsonl")], show_progress=False)
    assert found.votes[:, 0].tolist() == [[1, 1], [UNREADABLE] * 2, [1, 1], [1, 1]]
    assert list(found.problems) == [1] and found.problems[1].startswith(rows[1]["pair_id"])
    assert found.counts() == {"ok": 6, "not_asked": 2}


def test_a_judge_that_is_gone_stops_it_in_the_first_chunk(tmp_path):
    pairs, truth = mixed_pairs(20)
    judge = TruthfulJudge(truth, moods=False, faults=False)
    with JudgeServer(judge) as server:
        one = client(server, tmp_path / "judge.jsonl", max_retries=0)
        gone = JudgeClient(Endpoint("http://127.0.0.1:9/v1", "gone"), tmp_path / "gone.jsonl", max_retries=0)
        with pytest.raises(JudgeError, match="^gone at 127.0.0.1:9/v1 does not answer"):
            judge_pairs(pairs, [one, gone], pairs_at_once=4, show_progress=False)
        assert len(server.requests) == 8 and gone.usage().calls <= 8
        server.answer = lambda body: judge(body) if len(server.requests) < 20 else Fault(status=503)
        with pytest.raises(JudgeError, match="^judge at .* does not answer .*status 503"):
            judge_pairs(pairs, [one], pairs_at_once=4, show_progress=False)
        assert len(server.requests) <= 40
        server.answer = judge
        assert judge_pairs(pairs, [one], show_progress=False).counts() == {"ok": 80}
        assert sum(judge.full.values()) == 80


def test_pairs_without_an_answer_are_asked_about_again_and_nothing_is_decided_about_them(tmp_path):
    specs = {name: {"noisy": {"digits": {"num_pairs": 8, "noise": 0.5}}} for name in ("base", "pool")}
    args = MultimodalRewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
    sets = SourceSets(specs, args, lambda: str(READER_DIR), DEMO_LOADERS)
    pool, names = sets.usable("pool"), sets.names("pool").to_pylist()
    truth = {sha(row["images"][0]["bytes"]): row["digits"] for row in leave_images_encoded(pool)}
    silent = [sha(row["images"][0]["bytes"]) for row in leave_images_encoded(pool)][2]
    judge = TruthfulJudge(truth, moods=False, faults=False)
    before, step = [(1, "decide")], Step(rules=[{"keep": "keep_consistent"}], judge=True)
    folder = tmp_path / "round-1/judge"
    folder.mkdir(parents=True)
    (folder / "begun.json").write_text(json.dumps({"digest": "d"}))

    def ask(**given):
        about = {"base_url": server.base_url, "model": "judge", "max_retries": 0, **given}
        run = CurationRun(tmp_path, RewardTraining(args), [], sets, [], [], read_judging(about))
        return ask_judges(run, folder, number=1, step=step, before=before)

    with JudgeServer(lambda body: Fault(status=500) if image_hashes(body) == [silent] else judge(body)) as server:
        ledger = CurationLedger(tmp_path / "ledger")
        ledger.append(1, "decide", pair_ids=names, actions=["drop"] * 6 + ["keep"] * 2)
        with pytest.raises(
            JudgeError, match="^1 of 6 pairs have no answer of all judges .2 questions failed.; start a"
        ):
            ask()
        assert [entry["stage"] for entry in ledger.history(names[0])] == ["decide"]
        with pytest.raises(JudgeError, match="`max_unanswered` of the judge"):
            ask(max_unanswered=0.1)
        counts = ask(max_unanswered=0.2)
        assert (counts["judged"], counts["unanswered"], counts["kept"]) == (5, 1, 7)
        assert counts["replies"] == {"ok": 10, "transport": 2}
        assert [entry["stage"] for entry in ledger.history(names[2])] == ["decide"]  # dropped, as it was
        assert sum(judge.full.values()) == 10

        ledger.undo(1, "judge")
        server.answer = judge
        with pytest.raises(JudgeError, match="the budget had no room for 2 questions.*larger budget"):
            ask(max_calls=1)
        server.answer = lambda body: Fault(status=400, body={"error": {"message": "The prompt is too long."}})
        counts = ask()  # that nobody can answer does not hold the run
        assert (counts["unanswered"], counts["kept"], counts["replies"]) == (1, 7, {"ok": 10, "rejected": 2})
        assert [entry["stage"] for entry in ledger.history(names[2])] == ["decide"]
        ledger.undo(1, "judge")
        server.answer = judge
        counts = ask()
        assert (counts["judged"], counts["kept"], counts["replies"]) == (6, 8, {"ok": 12})
        assert "unanswered" not in counts and set(judge.full.values()) == {1} and len(judge.full) == 12


def test_what_judging_is_estimated_to_cost():
    pairs, _ = mixed_pairs(4)
    given = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "output_price": 1e6, "max_tokens": 10}
    judging = read_judging({"endpoints": [given, {**given, "model": "n", "output_price": 2e6}], "votes": "majority"})
    most = estimate_judging(pairs, judging.endpoints, sample=4)
    # 8 pairs in both orders; each reply at most 10 tokens, at 1 and at 2 USD a token.
    assert most.calls == 32 and most.cost == pytest.approx(16 * 10 * (1 + 2))
    settings = judging.settings()
    assert settings["judges"][1]["model"] == "n" and judging.votes == "majority"
    # An earlier release knew no order: what its runs have done stays done.
    assert set(settings) == {"judges", "budgets", "votes", "swap", "language"}
    ordered = read_judging({**given, "order": "gain", "pairs": "dropped", "accuracy": 0.9}).settings()
    assert set(ordered) - set(settings) == {"order", "accuracy"}


def test_a_run_with_a_judge_that_is_killed_pays_for_no_call_twice(tmp_path):
    pairs, truth = mixed_pairs(12, noise=0.4)
    write_parquet(pairs, tmp_path / "pool.parquet")
    judge = TruthfulJudge(truth)
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    with JudgeServer(judge) as server:
        about = {"base_url": server.base_url, "model": "judge", "max_concurrency": 1, "timeout": 5.0}
        about |= {"order": "gain", "max_calls": 1000}
        settings = {
            "pool": {"mixed": {"dataset_name": str(tmp_path / "pool.parquet")}},
            "rounds": [{"rules": [{"keep": "keep_consistent"}], "judge": True, "min_kept": 0.0}],
            "judge": about,
            "max_steps": 2,
        }
        start(arguments(calm, **settings)).finish()
        paid = set(judge.full)
        judge.tries.clear(), judge.full.clear()
        run = start(arguments(killed, **settings))
        assert run.kill_when(lambda: len(server.requests) > 0 and sum(judge.full.values()) >= 8)
        assert not (killed / "round-1/judge/stage.json").exists()
        (store,) = killed.glob("judge-*.jsonl")
        answered = sum(json.loads(line)["event"] == "reply" for line in store.read_text().splitlines())
        assert 7 <= answered <= len(judge.full) < len(paid)
        start(arguments(killed, **settings)).finish()
        # The one call that was under way may have been answered to nobody.
        assert set(judge.full) == paid and sum(judge.full.values()) - len(paid) <= 1
        assert outcome(killed) == outcome(calm)

    votes = pq.read_table(killed / "round-1/judge/votes.parquet").to_pydict()
    dropped = set(votes["pair_id"])
    ledger = CurationLedger(killed / "ledger")
    rows = {row["pair_id"]: row for row in pairs}
    kinds = Counter()
    for row in ledger.state().to_pylist():
        history = ledger.history(row["pair_id"])
        assert [entry["stage"] for entry in history] == ["decide"] + ["judge"] * (row["pair_id"] in dropped)
        if row["pair_id"] not in dropped:
            assert row["kept"] and not row["flipped"]
            continue
        assert history[0]["action"] == "drop"
        one = rows[row["pair_id"]]
        mood = judge.mood([sha(image["bytes"]) for image in one["images"]])
        is_right = judge_says(one, truth)
        assert row["kept"] == (mood == "") and (not row["kept"] or row["flipped"] == (not is_right))
        kinds[len(one["images"]), mood] += 1
    # Pairs of one image and of two, with and without a clear verdict.
    assert {count for count, _ in kinds} == {1, 2} and len({mood for _, mood in kinds}) >= 3
    summary = json.loads((killed / "summary.json").read_text())["rounds"]["round-1/judge"]
    assert summary["judged"] == len(dropped) and summary["replies"]["ok"] > 0


def judge_says(row: dict, truth: dict[str, str]) -> bool:
    """Whether the label of a pair is right."""
    digits = [truth[sha(image["bytes"])] for image in row["images"]]
    chosen = row["chosen"][0]["content"][0]["text"]
    if len(digits) == 1:
        return WORDS[int(digits[0])] in chosen
    question = "".join(block["text"] or "" for block in row["prompt"][0]["content"])
    return digits[0 if chosen in FIRST else 1] == captioned(question)
