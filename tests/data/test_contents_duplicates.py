"""Pairs that stand twice, and pairs that contradict each other: which row stays, and what is another pair."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.validation_rows import BLANK, PICTURES, answer, check, row, swapped
from trl_dt2it.data.contents import find_duplicates, pair_digest
from trl_dt2it.data.messages import preference


def test_the_first_of_equal_rows_stays():
    assert check([row(0), row(1), row(0), row(1), row(0)]) == (
        [0, 1],
        [
            (place, "duplicate_pair", f"it is the same pair as row {first}; keep one of them.")
            for place, first in ((2, 0), (3, 1), (4, 0))
        ],
    )


def test_no_row_of_a_contradiction_stays():
    rows = [row(0), row(1), swapped(row(0)), row(0), swapped(row(0))]
    message = "row {} prefers the other answer; keep the one that is right."
    others = {0: 2, 2: 0, 3: 2, 4: 0}
    assert check(rows) == (
        [1],
        [(place, "contradictory_pair", message.format(other)) for place, other in others.items()],
    )


def test_the_other_row_is_called_by_its_name():
    rows = [row(0, pair_id="a-7"), row(0), row(1), swapped(row(1, pair_id="a-9"))]
    assert [message for _, _, message in check(rows)[1]] == [
        "it is the same pair as a-7; keep one of them.",
        "a-9 prefers the other answer; keep the one that is right.",
        "row 2 prefers the other answer; keep the one that is right.",
    ]


def test_what_is_another_pair():
    two = preference("<image>\n<image>\nWhich?", "The first.", "The second.", PICTURES[:2])
    rows = [
        {**BLANK, **two},
        # The same pictures in the other order, and so the other answer: as `reformulate_t2i` gives both orders.
        {**BLANK, **swapped({**two, "images": two["images"][::-1]})},
        {**BLANK, **two, "images": [two["images"][0]] * 2},
        row(0),
        row(0, images=row(1)["images"]),
        row(0, prompt=row(1)["prompt"]),
        row(0, prompt=[{**row(0)["prompt"][0], "role": "system"}]),
        row(0, rejected=answer("A bird.")),
        row(0, chosen=answer("A bird.")),
    ]
    assert check(rows) == (list(range(len(rows))), [])


def test_what_is_the_same_pair():
    plain = {"prompt": "q ", "chosen": "a", "rejected": "b"}
    same = [
        (row(0), row(0, strength=3.0, pair_id="x", images=[{"bytes": PICTURES[0], "path": "b.png"}])),
        (
            row(0),
            {**row(0), "prompt": None, **{side: row(0)["prompt"] + row(0)[side] for side in ("chosen", "rejected")}},
        ),
        (row(0), row(0, videos=[], tools=None, chat_template_kwargs={})),
        (plain, {"chosen": "q a", "rejected": "q b"}),
        ({**plain, "chosen": answer("a"), "prompt": []}, {**plain, "chosen": answer("a"), "prompt": None}),
    ][:4]
    for one, other in same:
        assert pair_digest(one) == pair_digest(other)
        assert pair_digest(swapped(one)) == pair_digest(one)._replace(is_swapped=not pair_digest(one).is_swapped)
    others = [
        row(0),
        row(0, tools=[{"type": "function"}]),
        row(0, tools='[{"type": "function"}]'),
        row(0, chat_template_kwargs={"enable_thinking": True}),
        row(0, videos=[["a.png"]]),
        row(0, videos=[{"frames": ["a.png"], "fps": 1.0}]),
        plain,
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    assert len({pair_digest(other).key for other in others}) == len(others)
    assert all(len(pair_digest(other).key) == 16 for other in others)


def test_a_bad_row_is_no_one_s_duplicate():
    bad = row(0, strength=-1.0)
    kept, found = check([bad, row(0), swapped(bad)])
    assert kept == [1]
    assert [reason for _, reason, _ in found] == ["bad_strength", "bad_strength"]


def test_duplicates_are_left_alone_if_asked():
    rows = [row(0), row(0), swapped(row(0))]
    assert check(rows, duplicates=False) == ([0, 1, 2], [])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), *[st.booleans()] * 3), max_size=30))
def test_duplicates_are_those_of_a_plain_search(drawn):
    high, low = (np.array([one[half] for one in drawn], dtype=np.uint64) for half in (0, 1))
    labels, is_bad, is_mirror = (np.array([one[part] for one in drawn], dtype=bool) for part in (2, 3, 4))
    for mirrors in (is_mirror, None):
        expected = []
        for place, (*key, label, bad, mirror) in enumerate(drawn):
            same = [other for other, one in enumerate(drawn) if list(one[:2]) == key and not one[3]]
            against = [other for other in same if drawn[other][2] != label]
            same = [other for other in same if mirrors is None or drawn[other][4] == mirror]
            if not bad and (against or same[0] < place):
                expected.append((place, (against or same)[0], bool(against)))
        repeats = find_duplicates(high, low, labels, is_bad, mirrors)
        assert list(zip(*(part.tolist() for part in repeats), strict=True)) == expected
