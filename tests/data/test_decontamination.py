"""Decontamination: every planted benchmark row is found, however it was disguised, and no other row is lost."""

import functools
import io
import logging
import unicodedata

import imagehash
import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.datasets import load_sample_images

from tests.rows import png
from trl_dt2it.data.decontamination import (
    HASH_WORDS,
    _alike,
    decontaminate,
    distances,
    look_alikes,
    normalize,
    perceptual_hash,
    row_questions,
    vl_rewardbench_source_ids,
)
from trl_dt2it.data.images import ImageOptions
from trl_dt2it.data.messages import FEATURES, T2I_FEATURES, preference
from trl_dt2it.data.t2i import t2i_pair
from trl_dt2it.data.validation import quarantine_report


TILE = 120
QUESTIONS = ("Describe this image in detail.", "What's shown here?", "How many objects are there: 2 or 3?")


@functools.cache
def photographs():
    """Pieces of two real photographs that do not overlap, without pieces of plain sky."""
    tiles = []
    for photograph in map(Image.fromarray, load_sample_images().images):
        for top in range(0, photograph.height - TILE + 1, TILE):
            for left in range(0, photograph.width - TILE + 1, TILE):
                tiles.append(photograph.crop((left, top, left + TILE, top + TILE)))
    return [tile for tile in tiles if np.asarray(tile.convert("L")).std() >= 15]


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def scaled(image, factor):
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def cropped(image, left, top):
    """2 % of each side gone, so much of it at the left and at the top."""
    width, height = (round(0.98 * side) for side in image.size)
    left, top = round(left * (image.width - width)), round(top * (image.height - height))
    return image.crop((left, top, left + width, top + height))


def rewritten(question):
    return f"  {question.upper().strip('.?')} !\n"


DISGUISES = {
    "none": png,
    "JPEG, 95": lambda image: jpeg(image, 95),
    "JPEG, 50": lambda image: jpeg(image, 50),
    "half as large": lambda image: png(scaled(image, 0.5)),
    "twice as large": lambda image: png(scaled(image, 2)),
    "cropped at the left and the top": lambda image: png(cropped(image, 1, 1)),
    "cropped at the right": lambda image: png(cropped(image, 0, 0.5)),
    "all": lambda image: jpeg(scaled(cropped(image, 0, 1), 0.6), 50),
}


def row(question, *images, **changes):
    made = preference(question, "Yes.", "No.", list(images))
    return {"pair_id": None, "source": None, **made, **changes}


def dataset_of(rows, features=FEATURES):
    return Dataset.from_dict({name: [one.get(name) for one in rows] for name in features}, features=features)


def found(train, benchmark, **options):
    """Places of what was dropped, after a look at both results."""
    train = train if isinstance(train, Dataset) else dataset_of(train)
    clean, dropped = decontaminate(train, benchmark, **options)
    rows = dropped["row"][:]
    rest = sorted(set(range(len(train))) - set(rows))
    assert clean.features == train.features
    assert clean.with_format("arrow")[:].to_pylist() == train.select(rest).with_format("arrow")[:].to_pylist()
    assert dropped.column_names == [*train.column_names, "row", "reason", "message", "distance"]
    assert set(dropped["reason"]) <= {"contaminated"}
    return rows, dropped


def benchmark_of(images):
    return [{"question": QUESTIONS[place % 3], "image": png(image)} for place, image in enumerate(images)]


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("rewrite", [False, True])
def test_disguised_benchmark_rows_are_found_and_no_others(disguise, rewrite):
    """Half of the pictures are in the benchmark; the others, their neighbours, ask the same questions."""
    pictures = photographs()
    assert len(pictures) >= 20
    inside, outside = pictures[::2], pictures[1::2]
    benchmark = benchmark_of(inside)
    ask = rewritten if rewrite else str
    planted = [row(ask(QUESTIONS[n % 3]), DISGUISES[disguise](one)) for n, one in enumerate(inside)]
    similar = [row(question, png(one)) for one in outside for question in QUESTIONS]
    asked = [row(ask(QUESTIONS[(n + 1) % 3]), DISGUISES[disguise](one)) for n, one in enumerate(inside)]
    rows, dropped = found([*similar, *planted, *asked], {"vl": benchmark})
    places = [place for place in rows if len(similar) <= place < len(similar) + len(planted)]
    recall, precision = len(places) / len(planted), len(places) / len(rows)
    assert recall >= 0.98 and precision >= 0.98
    # and each is taken for the row that it is
    assert all(f"in row {one['row'] - len(similar)} of vl." in one["message"] for one in dropped)
    assert max(dropped["distance"]) <= 32
    if disguise == "none":
        assert set(dropped["distance"]) == {0}


def test_what_the_message_and_the_distance_say(tmp_path):
    first, second = photographs()[:2]
    train = [row("Q one?", png(first), pair_id="a"), row("Q two?"), row("Q 3?", png(second))]
    benchmarks = {
        "one": [{"question": "q ONE", "image": png(first), "id": "x-7"}],
        "two": dataset_of([row("q two?", pair_id="t-0"), row("q 3", jpeg(second, 50))]),
    }
    rows, dropped = found(train, benchmarks, dropped_file=tmp_path / "deep" / "dropped.parquet")
    assert rows == [0, 1, 2]
    assert dropped["distance"][:2] == [0, None] and 0 <= dropped["distance"][2] <= 32
    assert dropped["message"][:] == [
        "its question and an image (0 bits apart) are in row 0 of one (x-7).",
        "its question is in row 0 of two (t-0).",
        f"its question and an image ({dropped['distance'][2]} bits apart) are in row 1 of two.",
    ]
    back = Dataset.from_parquet(str(tmp_path / "deep" / "dropped.parquet"), cache_dir=str(tmp_path))
    assert back.to_list() == dropped.to_list()
    report = quarantine_report(dataset_of([]), dropped)
    assert report.counts == {"contaminated": 3} and report.reasons["contaminated"].example == "a"


def test_both_sides_must_have_images_or_none():
    picture = png(photographs()[0])
    train = [row("Who?"), row("Who?", picture)]
    assert found(train, [{"question": "Who?"}])[0] == [0]
    assert found(train, [{"question": "Who?", "image": picture}])[0] == [1]
    assert found(train, [{"question": "Who?", "images": []}, {"question": "What?", "image": picture}])[0] == [0]
    assert found([row("", picture), row("?")], [{"question": "<image>", "image": picture}, {"question": "!"}])[0] == [
        0
    ]


def test_one_image_of_several_is_enough():
    one, two, three = map(png, photographs()[:3])
    train = [row("Which?", one, two), row("Which?", two, three), row("Which?", three, three)]
    assert found(train, [{"question": "Which?", "images": [one, three]}])[0] == [0, 1, 2]
    rows, dropped = found(
        train, {"b": [{"question": "Which?", "images": [two]}, {"question": "Which?", "image": one}]}
    )
    assert rows == [0, 1]


def test_what_is_compared_is_chosen():
    one, two = map(png, photographs()[:2])
    train = [row("Who?", one), row("Who?", two), row("What?", one), row("What?", two), row("Who?"), row("What?")]
    benchmark = [{"question": "who", "image": one}]
    assert found(train, benchmark)[0] == [0]
    rows, dropped = found(train, benchmark, match="image")
    assert rows == [0, 2]
    assert set(dropped["message"]) == {"an image (0 bits apart) is in row 0 of the benchmark."}
    rows, dropped = found(train, benchmark, match="question")
    assert rows == [0, 1, 4]
    assert dropped["distance"][:] == [None] * 3


def test_the_nearest_of_several_images_is_named():
    image = photographs()[0]
    benchmark = [{"question": "Who?", "image": data} for data in (jpeg(cropped(image, 1, 1), 50), png(image))]
    for match in ("both", "image"):
        _, dropped = found([row("Who?", png(image))], benchmark, match=match)
        assert (dropped["distance"][0], dropped["message"][0][-24:]) == (0, "row 1 of the benchmark.".rjust(24))


def test_the_distance_is_exact():
    image = photographs()[0]
    other = DISGUISES["all"](image)
    bits = int(distances(*(perceptual_hash(one)[None] for one in (image, Image.open(io.BytesIO(other)))))[0, 0])
    assert bits > 0
    train, benchmark = [row("Who?", png(image))], [{"question": "Who?", "image": other}]
    for match in ("both", "image"):
        assert found(train, benchmark, match=match, max_distance=bits)[1]["distance"][:] == [bits]
        assert found(train, benchmark, match=match, max_distance=bits - 1)[0] == []


def test_only_images_of_matching_questions_are_decoded(monkeypatch):
    monkeypatch.setattr(imagehash, "phash", lambda *args, **kwargs: pytest.fail("an image was hashed"))
    train = [row("Who?", png(photographs()[0])), row("What?", b"no image")]
    assert found(train, [{"question": "Where?"}])[0] == []


def test_an_image_that_cannot_be_read_stays_and_is_counted(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.WARNING)
    good = png(photographs()[0])
    train = [row("Who?", b"no image"), row("Who?", {"bytes": None, "path": "/gone.png"}), row("What?", b"no image")]
    train += [row("Who?", b"no image", good), row("Who?", good)]
    rows, _ = found(train, [{"question": "Who?", "image": good}])
    assert rows == [3, 4]
    assert [message.split(" ")[0] for message in caplog.messages] == ["Quarantined", "2"]
    assert "cannot be read" in caplog.messages[1]
    assert caplog.messages[0] == "Quarantined 2 of 5 rows, because they are in a benchmark."


def test_images_come_from_where_they_may(tmp_path):
    (tmp_path / "root").mkdir()
    for path in (tmp_path / "root" / "a.png", tmp_path / "b.png"):
        path.write_bytes(png(photographs()[0]))
    options = ImageOptions(image_root=str(tmp_path / "root"))
    train = [row("Who?", {"bytes": None, "path": path}) for path in ("a.png", "../b.png")]
    assert found(train, [{"question": "Who?", "image": "a.png"}], image_options=options)[0] == [0]
    with pytest.raises(ValueError, match="row 0 of b cannot be compared: the image '../b.png' is not inside"):
        decontaminate(dataset_of(train), {"b": [{"question": "Who?", "image": "../b.png"}]}, image_options=options)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_sets_on_disk_selected_and_shared_out(tmp_path, num_proc):
    images = [png(image) for image in photographs()[:4]]
    dataset_of([row(f"Who is {n}?", images[n % 4]) for n in range(20)]).to_parquet(tmp_path / "a.parquet")
    train = Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=str(tmp_path)).select(range(19, 0, -1))
    benchmark = [{"question": f"Who is {n}", "image": images[n % 4]} for n in (3, 11, 0)]
    assert found(train, benchmark, num_proc=num_proc)[0] == [8, 16]
    assert found(train, benchmark, num_proc=num_proc, match="image")[0] == [
        n for n in range(19) if (19 - n) % 4 in (0, 3)
    ]


def test_nothing_to_look_at_and_nothing_to_look_for():
    train = dataset_of([row("Who?", png(photographs()[0]))])
    for match in ("both", "image", "question"):
        for empty in ([], {}, {"a": []}):
            assert found(train, empty, match=match)[0] == []
        assert found(train.select([]), [{"question": "Who?"}], match=match)[0] == []


def test_every_kind_of_row_has_its_question():
    text = {"type": "text", "text": "Who?"}
    who = [{"role": "user", "content": [{"type": "image", "text": None}, text]}]
    system = [{"role": "system", "content": "Be brief."}]
    said = [{"role": "assistant", "content": "He."}]
    assert row_questions({"prompt": who}) == ["who"]
    assert row_questions({"prompt": system + who, "question": "other"}) == ["who"]
    assert row_questions({"prompt": None, "chosen": who + said, "rejected": who}) == ["who"]
    assert row_questions({"prompt": who + said + [{"role": "user", "content": "Why?"}]}) == ["whowhy", "who", "why"]
    assert row_questions({"prompt": "Who?"}) == row_questions({"question": "<image>\nWHO"}) == ["who"]
    assert row_questions({"caption": "Who?", "chosen_image": b"a"}) == ["who"]
    assert row_questions({"prompt": who[:1] and [{"role": "user", "content": [who[0]["content"][0]]}]}) == [""]
    assert row_questions({"chosen": "Who? He.", "rejected": "b"}) == row_questions({"prompt": []}) == []


def test_a_question_in_one_turn_is_found():
    picture = png(photographs()[0])
    turns = [("user", "<image>\nHello!"), ("assistant", "Hi."), ("user", "Who is it?")]
    assert found([row(turns, picture)], [{"question": "Who is it?", "image": picture}])[0] == [0]


def test_text_to_image_pairs():
    one, two, three = map(png, photographs()[:3])
    pairs = [t2i_pair("A temple.", one, two), t2i_pair("A temple.", three, three), t2i_pair("A rose.", one, two)]
    train = dataset_of(pairs, T2I_FEATURES)
    assert found(train, [{"question": "a temple", "images": [two]}])[0] == [0]
    assert found(train, dataset_of(pairs[1:2], T2I_FEATURES))[0] == [1]


@pytest.mark.parametrize(
    ("same", "other"),
    [
        ("Is this a CAT?", "is this, a cat"),
        ("<image>\nWho?", "who"),
        ("Straße", "STRASSE"),
        ("\uff37\uff48\uff4f\uff1f", "Who?"),  # full width
        ("图中有几只猫？", "图中有几只 猫"),
        ("“Who” — he said…", '"Who" - he said...'),
        ("e\u0301te", "\u00e9te"),
        ("Wh\u200bo\ufeff?", "Who?"),
    ],
)
def test_the_same_question(same, other):
    assert normalize(same) == normalize(other) != ""


def test_other_questions():
    questions = ["2 + 2", "2 = 2", "2 < 2", "22", "कि", "की", "Is it red?", "Is it read?", "x²y", "$5", "€5"]
    assert len({normalize(question) for question in questions}) == len(questions)


@given(st.text())
def test_normalising_twice_is_normalising_once(text):
    once = normalize(text)
    assert normalize(once) == once
    assert not any(unicodedata.category(char)[0] in "PZ" or char.isspace() for char in once)


@given(st.binary(min_size=48, max_size=48))
def test_distances_are_counted_bit_by_bit(data):
    hashes = np.frombuffer(data, dtype=np.uint64).reshape(2, HASH_WORDS)
    expected = sum(bin(int(a) ^ int(b)).count("1") for a, b in zip(*hashes, strict=True))
    assert distances(hashes, hashes).tolist() == [[0, expected], [expected, 0]]


def test_a_hash_holds_what_imagehash_gives():
    image = photographs()[0]
    expected = imagehash.phash(image, hash_size=12)
    bits = np.unpackbits(perceptual_hash(image).view(np.uint8))
    assert bits[:144].tolist() == expected.hash.ravel().astype(int).tolist() and not bits[144:].any()
    other = imagehash.phash(photographs()[1], hash_size=12)
    assert distances(perceptual_hash(image)[None], perceptual_hash(photographs()[1])[None]) == [[expected - other]]


def test_known_ids_are_dropped():
    ids = {"povid": {7, "9"}, "other": ["x"]}
    named = [("povid", "povid-7", None), ("povid", "povid-9-2", None), ("povid", "p", "9"), ("other", None, "x")]
    unnamed = [
        ("povid", "povid-70", "70"),
        ("povid", "povid-2-9", None),
        ("rlhf_v", "rlhf_v-7", "7"),
        (None, "povid-7", "7"),
    ]
    train = [row("Who?", source=s, pair_id=p, source_id=i) for s, p, i in (*named, *unnamed)]
    rows, dropped = found(train, [], source_ids=ids)
    assert rows == [0, 1, 2, 3]
    assert set(dropped["message"]) == {"its source and id are those of a benchmark row."}
    assert dropped["distance"][:] == [None] * 4


def test_the_ids_of_vl_rewardbench():
    ids = ["wildvision-battle-12", "vlfeedback_q1-svit-9", "hallucination_pair-1003", "RLAIF-V-55", "RLHF-V-7"]
    ids += ["mathverse_2633", "mathverse_2633", "mmmu_validation_Art_1", "RLAIF-V-55", "RLAIF-V-6"]
    assert vl_rewardbench_source_ids([{"id": one} for one in ids]) == {
        "wildvision_battle": {"12"},
        "povid": {"1003"},
        "rlaif_v": {"6", "55"},
        "rlhf_v": {"7"},
    }
    doubtful = [
        "RLAIF-V-5x",
        "VLFeedback-7",
        "mathverse_7",
        "mmmu_pro_7",
        "hallucination_pair",
        "my RLHF-V-7",
        None,
        7,
    ]
    assert vl_rewardbench_source_ids([{"id": one} for one in doubtful] + [{}]) == {}


@pytest.mark.parametrize(
    ("benchmark", "options", "part"),
    [
        ([], {"match": "all"}, "`match` is 'all'"),
        ([], {"max_distance": -1}, "from 0 to 144"),
        ([], {"max_distance": 145}, "from 0 to 144"),
        ([{"image": b"a"}], {}, "row 0 of the benchmark has no question"),
        ({"b": [{"question": "q"}, {"chosen": "a", "rejected": "b"}]}, {}, "row 1 of b has no question"),
        (
            [{"question": "q", "image": b"a", "id": "x"}],
            {},
            r"row 0 of the benchmark \(x\) cannot be compared: the image",
        ),
    ],
)
def test_what_does_not_fit(benchmark, options, part):
    with pytest.raises(ValueError, match=part):
        decontaminate(dataset_of([row("q")]), benchmark, **options)


def test_a_column_in_the_way_is_an_error():
    with pytest.raises(ValueError, match="a column `distance`"):
        decontaminate(dataset_of([row("q")]).add_column("distance", [1]), [])


# ------------------------------------------------------------------------------------------------------- look-alikes


def partition(groups):
    return sorted(sorted(np.flatnonzero(groups == group).tolist()) for group in set(groups.tolist()))


def test_rows_whose_images_look_alike_are_one_group():
    tiles = photographs()[:6]
    darker = Image.eval(tiles[0], lambda value: int(0.9 * value))
    rows = [[tiles[0]], [darker], [scaled(tiles[0], 0.7)], [tiles[1]], [tiles[2], tiles[3]], [tiles[3], tiles[2]]]
    rows += [[tiles[2]], [], None, [tiles[4]], [tiles[4]]]
    images = [None if row is None else [{"bytes": jpeg(image, 90), "path": None} for image in row] for row in rows]
    images[9] = [{"bytes": b"no image", "path": None}]
    dataset = Dataset.from_dict({"images": images, "prompt": [str(index) for index in range(len(rows))]})
    expected = [[0, 1, 2], [3], [4, 5], [6], [7], [8], [9], [10]]
    assert partition(look_alikes(dataset)) == expected
    order = np.random.default_rng(0).permutation(len(rows))
    assert partition(look_alikes(dataset.select(order))[np.argsort(order)]) == expected
    assert look_alikes(Dataset.from_dict({"prompt": ["a", "b"]})).tolist() == [0, 1]
    assert look_alikes(dataset.select([7, 8, 9])).tolist() == [0, 1, 2]  # no image at all


def test_look_alikes_are_those_of_all_comparisons():
    """Against all pairs of hashes: near ones, some of them in chains, and others."""
    rng = np.random.default_rng(3)
    hashes = [rng.integers(0, 2, 144, dtype=np.uint8) for _ in range(150)]
    for _ in range(250):
        near = hashes[rng.integers(len(hashes))].copy()
        near[rng.choice(144, rng.integers(0, 13), replace=False)] ^= 1
        hashes.append(near)
    packed = np.packbits(np.pad(np.stack(hashes), [(0, 0), (0, 48)]), axis=1).view(np.uint64)
    edges = np.concatenate(list(_alike(packed[:, None], most=500)))
    near = distances(packed, packed) <= 8
    assert near[tuple(edges.T)].any() and len(edges) < 9 * len(packed)
    size = len(packed)
    graph = coo_array((np.ones(len(edges), dtype=bool), tuple(edges.T)), shape=(size, size))
    expected = connected_components(near, directed=False)
    assert partition(connected_components(graph, directed=False)[1]) == partition(expected[1])
    assert 150 <= expected[0] < size - 100


def test_many_copies_of_one_image_take_no_more_memory_than_rows():
    rng = np.random.default_rng(4)
    bits = np.repeat(rng.integers(0, 2, (1, 144), dtype=np.uint8), 3000, axis=0)
    bits[np.arange(3000), rng.integers(0, 144, 3000)] ^= 1
    edges = list(_alike(np.packbits(np.pad(bits, [(0, 0), (0, 48)]), axis=1).view(np.uint64)[:, None]))
    assert 2900 < sum(map(len, edges)) < 9 * 3000 * 4
