"""The paper's three steps: our rules decide as its published description does, read literally, but lose no rows."""

import random
from collections import defaultdict

import numpy as np
import pytest
from datasets import Dataset, Image, List

from trl_dt2it.curation import pair_ids
from trl_dt2it.curation.noise import combine_scores
from trl_dt2it.curation.rules import (
    UNREADABLE,
    Flip,
    Keep,
    decide,
    flip_weakest_half,
    keep_consistent,
    relabel_by_vote,
)


NUM_CASES = 400


def paper_flips(pairs, score_files):
    """Step 1, over dictionaries keyed by (image, question, answer): flipped pairs, and pairs that stay in the set."""
    found = []
    for name, (image, question, chosen, rejected) in pairs.items():
        differences = []
        for scores in score_files:
            better, worse = scores.get((image, question, chosen)), scores.get((image, question, rejected))
            if better is not None and worse is not None:
                differences.append(better - worse)
        if len(differences) == len(score_files):
            found.append((sum(differences) / len(differences), name))
    negative = [name for average, name in sorted(found, key=lambda entry: entry[0]) if average < 0]
    return set(negative[: len(negative) // 2]), {name for _, name in found}


def paper_keeps(pairs, scores):
    """Step 2: the pairs whose chosen answer has the higher score."""
    kept = set()
    for name, (image, question, chosen, rejected) in pairs.items():
        better, worse = scores.get((image, question, chosen)), scores.get((image, question, rejected))
        if better is not None and worse is not None and better > worse:
            kept.add(name)
    return kept


def paper_relabels(pairs, annotations):
    """Step 3: one vote for the higher score of each annotation; exactly two votes and no draw, or dropped."""
    votes = defaultdict(lambda: defaultdict(float))
    for image, question, first, second, score_first, score_second in annotations:
        key = (image, question, frozenset((first, second)))
        if score_first > score_second:
            votes[key][first] += 1
        elif score_first < score_second:
            votes[key][second] += 1
        else:
            votes[key][first] += 0.5
            votes[key][second] += 0.5
    kept, flipped = set(), set()
    for name, (image, question, chosen, rejected) in pairs.items():
        cast = votes[(image, question, frozenset((chosen, rejected)))]
        if sum(cast.values()) == 2 and cast[chosen] != cast[rejected]:
            (kept if cast[chosen] > cast[rejected] else flipped).add(name)
    return kept, flipped


def random_pairs(rng, count):
    """Pairs by number, of which no two are alike, as the paper's files want them."""
    return {name: (f"{name % 3}.png", f"question {name % 5}", f"good {name}", f"bad {name}") for name in range(count)}


def random_scores(rng, pairs, missing, ties):
    """A file of scores; with `ties`, out of so few values that many are equal."""
    draw = (lambda: rng.randint(-2, 2) / 4) if ties else (lambda: rng.gauss(0, 1))
    triples = [(image, question, answer) for image, question, *answers in pairs.values() for answer in answers]
    return {triple: draw() for triple in triples if rng.random() >= missing}


def as_array(pairs, score_files):
    rows = [
        [[scores.get((image, question, answer), np.nan) for scores in score_files] for answer in answers]
        for image, question, *answers in pairs.values()
    ]
    return np.array(rows, dtype=float).reshape(len(pairs), 2, len(score_files))


def chosen_rows(mask):
    return set(np.flatnonzero(mask).tolist())


@pytest.mark.parametrize("ties", [False, True])
def test_the_first_step_flips_the_pairs_of_the_description(ties):
    sizes, flips, unscored = set(), 0, 0
    for case in range(NUM_CASES):
        rng = random.Random(f"{case}-{ties}")
        pairs = random_pairs(rng, rng.choice([0, 1, 2, 3, 10, 60]))
        # Means of 1, 2 or 4 quarters are exact, so that ties are ties.
        files = [random_scores(rng, pairs, rng.choice([0, 0.1]), ties) for _ in range(rng.choice([1, 2, 4]))]
        decision = decide(combine_scores(as_array(pairs, files)), [Flip(flip_weakest_half)], min_kept=0)
        flipped, scored = paper_flips(pairs, files)
        assert chosen_rows(decision.flip) == flipped
        assert chosen_rows(decision.keep) == scored
        assert chosen_rows(decision.reason == "not scored") == set(pairs) - scored
        sizes.add(len(pairs))
        flips, unscored = flips + len(flipped), unscored + len(pairs) - len(scored)
    assert sizes == {0, 1, 2, 3, 10, 60} and flips > 500 and unscored > 500


@pytest.mark.parametrize("ties", [False, True])
def test_the_second_step_keeps_the_pairs_of_the_description(ties):
    kept_in_all = 0
    for case in range(NUM_CASES):
        rng = random.Random(f"second-{case}-{ties}")
        pairs = random_pairs(rng, rng.choice([0, 1, 2, 30]))
        scores = random_scores(rng, pairs, rng.choice([0, 0.2]), ties)
        decision = decide(combine_scores(as_array(pairs, [scores])), [Keep(keep_consistent)], min_kept=0)
        kept = paper_keeps(pairs, scores)
        assert chosen_rows(decision.keep) == kept and not decision.flip.any()
        kept_in_all += len(kept)
    assert kept_in_all > 1000


def test_the_third_step_relabels_the_pairs_of_the_description():
    counts = {"kept": 0, "flipped": 0, "dropped": 0}
    for case in range(NUM_CASES):
        rng = random.Random(f"third-{case}")
        pairs = random_pairs(rng, rng.choice([0, 1, 2, 30]))
        annotations, votes = [], np.full((len(pairs), 1, 2), UNREADABLE, dtype=np.int8)
        for name, (image, question, chosen, rejected) in pairs.items():
            for order, (first, second) in enumerate(((chosen, rejected), (rejected, chosen))):
                if rng.random() < 0.1:  # an annotation that could not be read is not in the file
                    continue
                scores = rng.choice([(1, 0), (0, 1), (3, 2), (2, 2), (0.5, 0.75)])
                annotations.append((image, question, first, second, *scores))
                for_first = int(np.sign(scores[0] - scores[1]))
                votes[name, 0, order] = for_first if order == 0 else -for_first
        decision = relabel_by_vote(votes, how="majority")
        kept, flipped = paper_relabels(pairs, annotations)
        assert chosen_rows(decision.keep & ~decision.flip) == kept
        assert chosen_rows(decision.keep & decision.flip) == flipped
        for name, number in zip(counts, (len(kept), len(flipped), len(pairs) - len(kept | flipped)), strict=True):
            counts[name] += number
    assert min(counts.values()) > 500


def test_pairs_that_are_there_twice_are_not_lost():
    pairs = {0: ("a.png", "q", "good", "bad"), 1: ("a.png", "q", "good", "bad")}
    # As in the paper's files, both orders of both rows, all four votes under one key.
    annotations = [("a.png", "q", *answers, *scores) for answers, scores in _BOTH_ORDERS] * 2
    assert paper_relabels(pairs, annotations) == (set(), set())
    decision = relabel_by_vote(np.ones((2, 1, 2), dtype=np.int8), how="majority")
    assert decision.keep.all() and not decision.flip.any()
    assert pair_ids(rows([("q", "good", "bad", [b"a"])] * 2)).to_pylist()[1].endswith("#2")


_BOTH_ORDERS = [(("good", "bad"), (1, 0)), (("bad", "good"), (0, 1))]


def test_white_space_around_a_question_loses_no_score():
    # Scored under the stripped question, looked up under the one that is not: missing, so dropped.
    pairs = {0: ("a.png", " q\n", "good", "bad")}
    scores = {("a.png", "q", "good"): 1.0, ("a.png", "q", "bad"): 0.0}
    assert paper_flips(pairs, [scores]) == (set(), set())
    # Ours go by the row, whatever its text.
    given = rows([(" q\n", "good", "bad", [b"a"]), ("q", "good", "bad", [b"a"])])
    assert decide([1.0, -1.0], [Flip(flip_weakest_half)]).keep.tolist() == [True, True]
    assert len(set(pair_ids(given).to_pylist())) == 2


def test_all_images_tell_pairs_apart():
    given = rows([("q", "good", "bad", images) for images in ([b"a", b"b"], [b"a", b"c"], [b"a"], [b"b", b"a"], [])])
    names = pair_ids(given).to_pylist()
    assert len(set(names)) == 5 and not any("#" in name for name in names)


def rows(contents):
    made = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": [*[{"type": "image"}] * len(images), _text(question)]}],
                "chosen": [{"role": "assistant", "content": [_text(chosen)]}],
                "rejected": [{"role": "assistant", "content": [_text(rejected)]}],
                "images": [{"bytes": image, "path": None} for image in images],
            }
            for question, chosen, rejected, images in contents
        ]
    )
    return made.cast_column("images", List(Image()))


def _text(text):
    return {"type": "text", "text": text}
