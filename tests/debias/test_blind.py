"""The blind audit: planted shortcuts are found and named, intervals hold, and rows of all kinds are read."""

import json
import re

import numpy as np
import pytest
from datasets import Dataset
from rich.console import Console

from trl_dt2it.debias import BlindReport, audit_blind, audit_style, blind_margins, with_blind_margins
from trl_dt2it.debias.audit import density_at_zero
from trl_dt2it.debias.blind import (
    Words,
    _margin_accuracy,
    blind_accuracy,
    bucket_of,
    covariance_of_folds,
    fit_probe,
    has_image,
    held_out_scores,
    name_buckets,
    read_ngrams,
    read_pair_text,
    solve,
)
from trl_dt2it.debias.style import answer_batches
from trl_dt2it.demo.digits import SHORTCUTS, make_digits

from ..rows import flip_preferences, make_rows


WORDS = [f"{start}{end}" for start in "bdfgklmnprst" for end in ("ak", "el", "im", "on", "us")]


def plain(rows, **columns) -> Dataset:
    """Rows of strings: question, chosen and rejected answer; with an image that nobody reads."""
    names = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows, strict=True)), strict=True))
    return Dataset.from_dict({**names, "images": [["no.png"]] * len(rows), **columns})


def drawn(rng, count: int, strength: float = 0.5, words: int = 6) -> list[tuple[str, str, str]]:
    """Answers of random words, of which the chosen one opens with a favored word with a known chance."""
    rows = []
    for _ in range(count):
        one, two = (" ".join(rng.choice(WORDS, words)) for _ in range(2))
        starts = ("so", "as") if rng.random() < strength else ("as", "so")
        rows.append((f"what is {rng.choice(WORDS)}?", f"{starts[0]} {one}.", f"{starts[1]} {two}."))
    return rows


def text_of(rows, group=None):
    return read_pair_text(plain(rows), np.ones(len(rows)), np.arange(len(rows)) if group is None else group)


@pytest.fixture(scope="module", params=SHORTCUTS)
def planted(request) -> tuple[str, Dataset, BlindReport]:
    rows = make_digits("train", 2500, shortcut=request.param, shortcut_strength=0.8, num_digits=(1, 2), seed=1)
    return request.param, rows, audit_blind(rows)


def test_planted_shortcuts_are_found_and_style_does_not_see_them(planted):
    kind, rows, report = planted
    share = np.mean([side == "shortcut" for side in rows["style_chosen"]])
    assert report.overall.accuracy == pytest.approx(share, abs=0.02)
    assert report.overall.interval[0] < 0.8 < report.overall.interval[1]
    assert report.overall.num_pairs == 2500 and report.overall.num_groups == len(set(rows["group_id"]))
    low, high = audit_style(rows).overall.interval
    assert low < 0.5 < high


def test_the_n_grams_that_carry_it_are_named(planted):
    kind, rows, report = planted
    top = report.overall.ngrams[0]
    share = np.mean([side == "shortcut" for side in rows["style_chosen"]])
    if kind == "question_answer":
        # Each wording wins after one half of the questions, and loses after the other.
        halves = {"paper shows": ("What is written here?", "Which digits"), "sheet shows": ("Read the", "Please tell")}
        named = {(ngram.text, ngram.question) for ngram in report.overall.ngrams[:4]}
        assert named == {
            (text, question)
            for text, starts in halves.items()
            for question in {f'"{asked}"' for asked in map(question_of, rows)}
            if question.startswith(tuple(f'"{start}' for start in starts))
        }
        assert top.share == pytest.approx(0.25, abs=0.03)
    else:
        assert top.text == {"wording": "paper shows", "number": "seven"}[kind]
        assert top.question is None and top.share == pytest.approx(1.0)
        assert top.chosen == pytest.approx(share)  # every pair has it on one side
    contributions = [ngram.contribution for ngram in report.overall.ngrams]
    assert contributions == sorted(contributions, reverse=True) and top.log_odds > 0.5


def question_of(row) -> str:
    return row["prompt"][0]["content"][-1]["text"]


@pytest.mark.parametrize("kind", SHORTCUTS)
def test_a_shortcut_that_is_absent_or_reversed(kind):
    absent, reversed_ = (
        audit_blind(make_digits("test", 1500, shortcut=kind, shortcut_strength=strength, num_digits=(1, 2))).overall
        for strength in (0.5, 0.2)
    )
    assert absent.interval[0] < 0.5 < absent.interval[1]
    # What is nearly always wrong tells as much.
    assert reversed_.interval[0] < 0.8 < reversed_.interval[1]
    assert all(n.chosen < 0.3 for n in reversed_.ngrams if n.text in ("paper shows", "seven") and n.question is None)


def test_the_interval_holds_what_the_probe_reaches_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = {0.5: 0, 0.75: 0}
    for strength in covered:
        for _ in range(40):
            low, high = blind_accuracy(text_of(drawn(rng, 250, strength)), None).interval
            # Without a shortcut, any probe is right in half of the new pairs; else it follows the opening.
            covered[strength] += low <= strength <= high
    assert covered[0.5] >= 34 and covered[0.75] >= 34  # of 40 sets each


def test_positions_in_exact_balance_are_no_habit():
    """The other folds lack an excess of one, so that held-out probes are wrong more often than not."""
    answers = "Image 1 is better than Image 2.", "Image 2 is better than Image 1."
    rows = [("Which is better?", *answers[:: 1 if index % 2 else -1]) for index in range(400)]
    found = blind_accuracy(text_of(rows), None)
    assert found.accuracy < 0.48 and found.interval[0] < 0.5 < found.interval[1]


def test_a_position_habit_is_found():
    answers = "Image 1 is better than Image 2.", "Image 2 is better than Image 1."
    rng = np.random.default_rng(0)
    rows = [(f"Which shows {rng.choice(WORDS)}?", *answers[:: 1 if rng.random() < 0.7 else -1]) for _ in range(600)]
    share = np.mean([chosen.startswith("Image 1") for _, chosen, _ in rows])
    found = audit_blind(plain(rows)).overall
    assert found.accuracy == pytest.approx(share, abs=0.01)
    assert (
        "1 is" in found.ngrams[0].text or "^ image" in found.ngrams[0].text or "than image 2" in found.ngrams[0].text
    )


def test_groups_are_units_and_never_parted():
    rng = np.random.default_rng(0)
    rows = drawn(rng, 100, 0.7)
    alone = blind_accuracy(text_of(rows), None, min_pairs=1)
    often = blind_accuracy(text_of(rows * 5, np.tile(np.arange(100), 5)), None)
    # As wide as of the pairs once, and no pair is recognized by its copy.
    assert often.num_groups == 100 and often.accuracy == pytest.approx(alone.accuracy, abs=0.06)
    widths = [found.interval[1] - found.interval[0] for found in (alone, often)]
    assert widths[1] == pytest.approx(widths[0], rel=0.15)
    assert blind_accuracy(text_of(rows * 5), None).accuracy > 0.95


def test_swapping_all_labels_changes_nothing_but_sides(planted):
    kind, rows, report = planted
    swapped = audit_blind(flip_preferences(rows, 1.0)).overall
    assert swapped.accuracy == pytest.approx(report.overall.accuracy, abs=1e-9)
    named = {(n.text, n.question, n.kind): n for n in swapped.ngrams}
    shared = [n for n in report.overall.ngrams if (n.text, n.question, n.kind) in named]
    for ngram in shared:
        other = named[ngram.text, ngram.question, ngram.kind]
        assert other.chosen == pytest.approx(1 - ngram.chosen) and other.share == pytest.approx(ngram.share)


def test_weights_count():
    rng = np.random.default_rng(0)
    rows = drawn(rng, 1000, 0.8)
    right = np.array([chosen.startswith("so") for _, chosen, _ in rows])
    share = right.mean()
    even = audit_blind(plain(rows, weight=np.where(right, 0.5 / share, 0.5 / (1 - share)).tolist())).overall
    assert even.interval[0] < 0.5 < even.interval[1]
    only = audit_blind(plain(rows, weight=np.where(right, 0.0, 1.0).tolist())).overall
    assert only.accuracy > 0.99 and only.ngrams[0].chosen in (0.0, 1.0)


def reference(question: str, one: str, two: str) -> set[tuple[str, str | None, str]]:
    """N-grams that `one` has and `two` has not, for ASCII texts of few words: by sets of strings."""

    def words(text):
        return ["^", *re.findall(r"\w+|[^\w\s]", text.lower()), "$"]

    def all_of(text):
        inside, marked = words(text), f"^{text}$"
        pairs = [" ".join(pair) for pair in zip(inside, inside[1:], strict=False)]
        return inside, pairs, [marked[index : index + 3] for index in range(len(marked) - 2)]

    own, other = all_of(one), all_of(two)
    single, double, three = (
        [ngram for ngram in dict.fromkeys(mine) if ngram not in theirs]
        for mine, theirs in zip(own, other, strict=True)
    )
    asked = [f'"{question}"', *(word for word in dict.fromkeys(words(question)) if word.isalnum())]
    crossed = {(ngram, part, "words") for ngram in [*single, *double][:8] for part in asked}
    whole = {(ngram, None, "words") for ngram in [*single, *double]}
    return whole | crossed | {(ngram, None, "characters") for ngram in three}


def test_n_grams_are_those_of_a_plain_second_way():
    rows = [
        ("What is it?", "It is a red cat.", "It is a cat, red."),
        ("How many?", "Two.", "There are two dogs and one very old bird near the wall."),
        ("Which is better?", "Image 1 is better than Image 2.", "Image 2 is better than Image 1."),
        ("Is it?", "Yes", "yes"),
    ]
    rows = rows + [(question, rejected, chosen) for question, chosen, rejected in rows]
    dataset = plain(rows)
    (sides,) = answer_batches(dataset)
    ngrams = read_ngrams(sides, Words())
    assert (np.diff(ngrams.pair) >= 0).all() and len(set(bucket_of(ngrams.key).tolist())) > 100
    named = name_buckets(dataset, bucket_of(ngrams.key), [np.arange(len(rows))])
    for index, (question, chosen, rejected) in enumerate(rows):
        for is_chosen, one, two in ((True, chosen, rejected), (False, rejected, chosen)):
            mine = (ngrams.pair == index) & (ngrams.is_chosen == is_chosen)
            names = [tuple(named[at][0][key] for key in ("text", "question", "kind")) for at in np.flatnonzero(mine)]
            assert len(names) == len(set(names)) and set(names) == reference(question, one, two)


def test_long_answers_have_characters_at_both_ends_and_chinese_has_words():
    long = " ".join(WORDS)
    dataset = plain([("", f"{long} ", long), ("图里有几个人?", "有两个人。", "有三个人。")])
    (sides,) = answer_batches(dataset)
    ngrams = read_ngrams(sides, Words())
    names = [name for name, _ in name_buckets(dataset, bucket_of(ngrams.key), [np.arange(2)])]
    found = [
        {(n["text"], n["question"]) for n, pair in zip(names, ngrams.pair, strict=True) if pair == i} for i in (0, 1)
    ]
    # A blank at the end, which no word sees, and a window that ends a character earlier.
    assert {("s $", None), ("us$", None)} <= found[0] and len(found[0]) <= 3
    assert {("两", None), ("三", None), ("有 两", None), ("两", "几"), ("三", '"图里有几个人?"')} <= found[1]


def test_the_covariance_of_folds_is_that_of_dense_matrices(monkeypatch):
    monkeypatch.setattr("trl_dt2it.debias.blind._MOST_DRAWS", 4000)
    rng = np.random.default_rng(0)
    text = text_of(drawn(rng, 90, 0.5, words=2), np.arange(90) // 2)
    monkeypatch.setattr("trl_dt2it.debias.blind._SOLVED", 4000 * 90)
    scores, share = held_out_scores(text, 3, seed=0), np.full(90, 1 / 90)
    x, group = text.x.toarray(), text.group
    turned = (share * density_at_zero(scores.score, share > 0))[:, None] * x
    learned = (1 / (1 + np.exp(scores.score)))[:, None] * x
    expected = 0.0
    for fold in scores.folds:
        chance = 1 / (1 + np.exp(-x[fold.train] @ fold.probe))
        hessian = (x[fold.train].T * (chance * (1 - chance))) @ x[fold.train] + np.eye(x.shape[1]) / fold.strength
        inverse = np.linalg.inv(hessian)
        for g in set(group[fold.test]):
            for h in set(group[fold.train]):
                a_g, a_h = (turned[group == one].sum(0) for one in (g, h))
                b_g, b_h = (learned[group == one].sum(0) for one in (g, h))
                expected += (a_g @ inverse @ b_h) * (a_h @ inverse @ b_g)
    assert covariance_of_folds(text, scores, share, seed=0) == pytest.approx(expected, rel=0.1)


def test_conjugate_gradients_solve_the_system():
    rng = np.random.default_rng(0)
    text = text_of(drawn(rng, 200))
    curvature, target = rng.random(200), rng.normal(size=(text.x.shape[1], 3))
    x = text.x.toarray()
    exact = np.linalg.solve((x.T * curvature) @ x + 0.5 * np.eye(x.shape[1]), target)
    error = np.linalg.norm(solve(text.x, curvature, 0.5, target) - exact, axis=0) / np.linalg.norm(exact, axis=0)
    assert error.max() < 0.03


def test_the_probe_minimizes_its_objective():
    rng = np.random.default_rng(0)
    text, weight = text_of(drawn(rng, 200, 0.8)), rng.random(200)
    probe = fit_probe(text.x, weight, 1.0)
    gradient = probe - text.x.T @ (weight / (1 + np.exp(text.x @ probe)))
    assert np.abs(gradient).max() < 1e-2 * np.abs(text.x.T @ weight).max()


def test_many_pairs_are_tuned_on_some_and_lose_their_rarest_n_grams(monkeypatch):
    rng = np.random.default_rng(0)
    rows = drawn(rng, 1200, 0.8)
    monkeypatch.setattr("trl_dt2it.debias.blind._TUNED", 400)
    monkeypatch.setattr("trl_dt2it.debias.blind._SOLVED", 400)
    full = text_of(rows)
    monkeypatch.setattr("trl_dt2it.debias.blind._MOST_ENTRIES", 30_000)
    text = text_of(rows)
    assert text.x.nnz <= 30_000 < full.x.nnz
    share = np.mean([chosen.startswith("so") for _, chosen, _ in rows])
    found = blind_accuracy(text, None)
    assert found.accuracy == pytest.approx(share, abs=0.02)
    assert found.interval[0] < 0.8 < found.interval[1]


def test_sources_are_measured_one_by_one():
    rng = np.random.default_rng(0)
    rows = drawn(rng, 400, 0.85) + drawn(rng, 400, 0.15) + drawn(rng, 50)
    source = ["a"] * 400 + ["b"] * 400 + ["c"] * 50
    report = audit_blind(plain(rows, source=source))
    # One habit and its reverse: together they tell little.
    assert report.overall.accuracy < 0.6
    assert all(abs(report.sources[name].accuracy - 0.85) < 0.05 for name in "ab")
    assert report.sources["c"].accuracy is None and "too few pairs: 50 of at least 200" in report.sources["c"].note
    assert set(report.metrics()) == {"blind/accuracy", "blind/accuracy/a", "blind/accuracy/b"}


def test_rows_without_image_are_left_out_and_counted():
    rng = np.random.default_rng(0)
    rows = drawn(rng, 600, 0.9)
    images = [[] if index % 3 == 0 else ["no.png"] for index in range(600)]
    dataset = plain(rows).remove_columns("images").add_column("images", images)
    report = audit_blind(dataset)
    assert (report.overall.num_pairs, report.num_without_image) == (400, 200)
    assert "200 pairs without image are left out" in report.summary()
    margins = blind_margins(dataset)
    assert (margins[::3] == 0).all() and (np.delete(margins, np.s_[::3]) != 0).all()
    # The same as of these rows alone, also where they are a selection.
    some = dataset.select(np.flatnonzero(np.arange(600) % 3))
    assert audit_blind(some).overall == report.overall
    none = audit_blind(dataset.remove_columns("images"))
    assert none.overall.note == "no pair has an image" and none.num_without_image == 600
    assert "not measured: no pair has an image" in none.summary()
    assert not blind_margins(dataset.remove_columns("images")).any()


def test_images_of_all_kinds_are_seen():
    assert has_image(Dataset.from_list(make_rows(6))).tolist() == [True, True, False] * 2
    assert has_image(Dataset.from_dict({"image": ["a.png", None]})).tolist() == [True, False]
    assert has_image(Dataset.from_dict({"images": [None, ["a"]], "videos": [["b"], None]})).tolist() == [True, True]
    rows = make_digits("test", 8)
    assert has_image(rows).all() and has_image(rows.select([3, 1])).tolist() == [True, True]


def test_conversations_are_read_as_strings_are():
    rng = np.random.default_rng(0)
    rows = drawn(rng, 300, 0.8)

    def say(role, text):
        return {
            "role": role,
            "content": [{"type": "image", "text": None}] * (role == "user") + [{"type": "text", "text": text}],
        }

    earlier = [say("user", "Hello"), say("assistant", "Yes?")]
    turns = [
        {
            "prompt": [*earlier, say("user", question)],
            "chosen": [say("assistant", chosen)],
            "rejected": [say("assistant", rejected)],
            "images": ["no.png"],
        }
        for question, chosen, rejected in rows
    ]
    implicit = [
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"], "images": row["images"]}
        for row in turns
    ]
    expected = audit_blind(plain(rows))
    assert audit_blind(Dataset.from_list(turns)) == expected == audit_blind(Dataset.from_list(implicit))


def test_margins_are_log_odds_of_probes_that_have_not_seen_the_pair():
    rng = np.random.default_rng(0)
    rows = drawn(rng, 1500, 0.9)
    dataset = plain(rows, group_id=[str(index) for index in range(1500)])
    margins = blind_margins(dataset)
    share = np.mean([chosen.startswith("so") for _, chosen, _ in rows])
    assert margins.dtype == np.float64 and (margins > 0).mean() == pytest.approx(share, abs=0.01)
    assert np.mean((np.sign(margins) + 1) / 2) == pytest.approx(audit_blind(dataset).overall.accuracy)
    # Calibrated: the loss is near the entropy of the shortcut.
    entropy = -share * np.log(share) - (1 - share) * np.log(1 - share)
    assert np.logaddexp(0, -margins).mean() == pytest.approx(entropy, abs=0.03)
    with_margins = with_blind_margins(dataset)
    known = has_image(dataset)
    assert with_margins["blind_margin"][:] == [one if has else None for one, has in zip(margins, known, strict=True)]
    assert with_margins.remove_columns("blind_margin")[:] == dataset[:]
    # Text that tells nothing makes no pair sure.
    assert np.abs(blind_margins(plain(drawn(rng, 400)))).mean() < 0.5


def test_margins_of_another_model_are_audited_as_those_of_the_probe():
    rng = np.random.default_rng(0)
    rows = drawn(rng, 400, 0.85) + drawn(rng, 400, 0.6) + drawn(rng, 50)
    source, weight = ["a"] * 400 + ["b"] * 400 + ["c"] * 50, rng.uniform(0.5, 2, 850)
    dataset = plain(rows, source=source, weight=weight)
    by_probe = audit_blind(dataset)
    report = audit_blind(dataset, margins=blind_margins(dataset))
    assert report.overall.accuracy == pytest.approx(by_probe.overall.accuracy, abs=1e-12)
    assert report.overall.interval[0] <= by_probe.overall.interval[0] < by_probe.overall.interval[1]
    assert report.sources["c"].note == by_probe.sources["c"].note and not report.overall.ngrams
    margins = np.where(np.arange(850) % 4 == 0, -2.0, 0.5)
    margins[:2] = 0.0
    report = audit_blind(dataset, margins=margins)
    for name, some in {"a": slice(0, 400), "b": slice(400, 800)}.items():
        won = np.where(margins > 0, 1.0, np.where(margins < 0, 0.0, 0.5))[some]
        assert report.sources[name].accuracy == pytest.approx(np.average(won, weights=weight[some]))
    with pytest.raises(ValueError, match=r"`margins` has shape \(3,\); pass one number per row, \(850,\)"):
        audit_blind(dataset, margins=[1.0, 2.0, 3.0])
    margins[7] = np.nan
    with pytest.raises(ValueError, match="`margins` is nan for row 7; pass a finite number"):
        audit_blind(dataset, margins=margins)
    # Rows without an image need none.
    without = dataset.remove_columns("images").add_column("images", [[]] * 8 + [["no.png"]] * 842)
    assert audit_blind(without, margins=margins).num_without_image == 8


@pytest.mark.parametrize("shift", [0.0, 0.15])
def test_the_interval_of_another_models_margins_holds_what_it_reaches(shift):
    """Two folds, each told by a linear model of the other: of nothing, or of features that tell a little."""
    rng, count, size, held = np.random.default_rng(0), 300, 20, 0
    new = rng.normal(shift, 1, (20_000, size))
    for _ in range(400):
        x = rng.normal(shift, 1, (count, size))
        probes = [np.linalg.solve(part.T @ part + 10 * np.eye(size), part.sum(0)) for part in (x[::2], x[1::2])]
        score = np.empty(count)
        score[1::2], score[::2] = x[1::2] @ probes[0], x[::2] @ probes[1]
        low, high = _margin_accuracy(score, np.ones(count), np.arange(count), 200).interval
        held += low <= np.mean([(new @ probe > 0).mean() for probe in probes]) <= high
    assert held / 400 >= 0.94


def test_report_prints_draws_and_is_json(planted, tmp_path):
    kind, rows, report = planted
    console = Console(width=120, record=True, file=open(tmp_path / "out.txt", "w"))
    report.show(console)
    shown = console.export_text()
    assert f"{report.overall.accuracy:.3f}" in shown and report.overall.ngrams[0].label[:20] in shown
    report.plot(tmp_path / "blind.png")
    assert (tmp_path / "blind.png").stat().st_size > 10_000
    read = json.loads(report.to_json())
    assert read["overall"]["accuracy"] == report.overall.accuracy and read["num_without_image"] == 0
    assert read["overall"]["ngrams"][0]["text"] == report.overall.ngrams[0].text
    assert report.metrics() == {"blind/accuracy": report.overall.accuracy}
    assert report.summary().count("\n") == 0 and "2,500 pairs" in report.summary()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe": "image"}, "`probe` is 'image'; pass \"text\", or use"),
        ({"num_folds": 1}, "`num_folds` is 1; pass at least 2."),
        ({"by": "generator"}, "`by` is 'generator', but the columns are"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    rows = plain(drawn(np.random.default_rng(0), 10))
    with pytest.raises(ValueError, match=re.escape(message)):
        audit_blind(rows, **change)


def test_sets_that_cannot_be_measured_say_why():
    rows = drawn(np.random.default_rng(0), 20)
    assert "too few pairs: 20 of at least 200" in audit_blind(plain(rows)).overall.note
    with pytest.raises(ValueError, match="too few groups: 3 of at least 4"):
        blind_margins(plain(rows[:3]))
    same = plain([("what?", "same", "same")] * 300)
    assert audit_blind(same).overall.note == "no n-gram differs in any pair"
    with pytest.raises(ValueError, match="measured on a whole set, not on a IterableDataset"):
        audit_blind(plain(rows).to_iterable_dataset())
    with pytest.raises(ValueError, match="has no column `rejected`"):
        audit_blind(plain(rows).remove_columns("rejected"))
