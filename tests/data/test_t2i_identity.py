"""A text-to-image pair is its caption and its two images: duplicates, contradictions and benchmark copies are found
whatever wording, language or order a pair got, and by whom."""

import io
import itertools
import json

import numpy as np
import pytest
from datasets import Dataset, Features, concatenate_datasets
from PIL import Image

from tests.data.t2i_pairs import raw
from tests.rows import png
from trl_dt2it.data import T2ITemplate, content_id, decontaminate, load_preferences, mix, validate, write_parquet
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.contents import pair_ids, t2i_identity
from trl_dt2it.data.messages import FEATURES, REFORMULATED_FEATURES, T2I_FEATURES, T2I_IDENTITY
from trl_dt2it.data.t2i import CHINESE, ENGLISH, find_caption, prefers_first, reformulate_t2i


COUNT = 6
RNG = np.random.default_rng(0)
PICTURES = [
    png(Image.fromarray(np.kron(RNG.integers(0, 255, (6, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))))
    for _ in range(4 * COUNT)
]
OWN = T2ITemplate("Vote. The order was: {caption}\n{images}", "Left.", "Right.", ("L ", " R "))
# What DT2IT-MRM's script and UnifiedReward write, as their files begin and end.
SCRIPT = "Image 1: <image>\nImage 2: <image>\nYou are given a text caption and two images.\nText Caption: [{}]"
UNIFIED = "<image>\n<image>\nGiven a caption and two images generated based on this caption, compare. Caption: [{}]"


def couples(first=0, *, swapped=False, caption="a picture of thing {}"):
    """Text-to-image pairs; with `swapped`, the other image is better."""
    rows = []
    for number in range(first, first + COUNT):
        images = [{"bytes": PICTURES[2 * number + side], "path": None} for side in (0, 1)]
        better, worse = images[::-1] if swapped else images
        row = {"caption": caption.format(number), "chosen_image": better, "rejected_image": worse, "source": "s"}
        rows.append({**dict.fromkeys(T2I_FEATURES), **row, "pair_id": f"p{number}-{swapped}"})
    return Dataset.from_list(rows, features=T2I_FEATURES)


def plain(dataset):
    """Rows as they were before there were columns of identity."""
    return dataset.remove_columns(list(T2I_IDENTITY))


def as_strings(dataset, tmp_path, wording, verdicts):
    """Rows of a ShareGPT file, of which every other one shows the better image second."""
    rows = []
    for number, pair in enumerate(raw(dataset)):
        order = (0, 1) if number % 2 else (1, 0)
        images = [(pair["chosen_image"], pair["rejected_image"])[place]["bytes"] for place in order]
        for place, content in enumerate(images):
            (tmp_path / f"{number}-{place}.png").write_bytes(content)
        chosen, rejected = (verdicts[place] for place in order)
        rows.append(
            {
                "conversations": [{"from": "human", "value": wording.format(pair["caption"])}],
                "chosen": {"from": "gpt", "value": chosen},
                "rejected": {"from": "gpt", "value": rejected},
                "images": [f"{number}-{place}.png" for place in (0, 1)],
                "system": "Judge fairly.",
            }
        )
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps(rows))
    pairs = load_preferences("llamafactory", file, image_root=tmp_path)
    write_parquet(pairs, tmp_path / "sharegpt.parquet", image_root=tmp_path)  # bytes, as in other forms
    return Dataset.from_parquet(str(tmp_path / "sharegpt.parquet"), cache_dir=str(tmp_path))


FORMS = {
    "seed 42": lambda pairs, path: reformulate_t2i(pairs),
    "seed 7": lambda pairs, path: reformulate_t2i(pairs, seed=7),
    "Chinese": lambda pairs, path: plain(reformulate_t2i(pairs, seed=1, template=CHINESE)),
    "own wording": lambda pairs, path: reformulate_t2i(pairs, seed=2, template=OWN),
    "older file": lambda pairs, path: plain(reformulate_t2i(pairs, seed=3)),
    "their script": lambda pairs, path: as_strings(
        pairs, path, SCRIPT, ("Image 1 is better than Image 2.", "Image 2 is better than Image 1.")
    ),
    "UnifiedReward": lambda pairs, path: as_strings(
        pairs,
        path,
        UNIFIED,
        ("<think>Red.</think><answer>Image 1 is better</answer>", "<answer>Image 2 is better</answer>"),
    ),
    "raw": lambda pairs, path: pairs,
}
ASKED = [form for form in FORMS if form != "raw"]


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """Each form of the pairs: as they are, and with the other image preferred."""
    folder = tmp_path_factory.mktemp("forms")
    made = {}
    for form, swapped in itertools.product(FORMS, (False, True)):
        (path := folder / f"{form}-{swapped}").mkdir()
        made[form, swapped] = FORMS[form](couples(swapped=swapped), path)
    return made


def test_duplicates_are_complete(shaped):
    """Of each pair in all forms, the first stays."""
    rows = concatenate_datasets([shaped[form, False].shuffle(seed=COUNT) for form in ASKED])
    clean, bad = validate(rows, show=False)
    assert clean["pair_id"][:] == rows["pair_id"][:COUNT]
    assert bad["row"][:] == list(range(COUNT, len(rows))) and set(bad["reason"]) == {"duplicate_pair"}
    stream, bad = validate(rows.to_iterable_dataset(), show=False)
    assert [row["pair_id"] for row in stream] == clean["pair_id"][:]
    assert {row["reason"] for row in bad} == {"duplicate_pair"}


def test_contradictions_are_complete(shaped):
    for one, other in zip(ASKED, [*ASKED[2:], *ASKED[:2]], strict=True):
        both = concatenate_datasets([shaped[one, False], shaped[other, True].shuffle(seed=COUNT)])
        clean, bad = validate(both, show=False)
        assert (len(clean), set(bad["reason"])) == (0, {"contradictory_pair"})
    stream, bad = validate(both.to_iterable_dataset(), show=False)
    # The earlier row has gone out of the stream when the later one comes.
    assert sum(1 for _ in stream) == COUNT and {row["reason"] for row in bad} == {"contradictory_pair"}


@pytest.mark.parametrize("benchmark", FORMS)
def test_copies_of_a_benchmark_are_found_and_no_others(shaped, benchmark):
    others = reformulate_t2i(couples(COUNT), seed=6)
    asked = concatenate_datasets([others, *(shaped[form, True] for form in ASKED)])
    raw_pairs = concatenate_datasets([couples(COUNT), shaped["raw", True]])
    for train in (asked, raw_pairs):
        clean, dropped = decontaminate(train, {"bench": shaped[benchmark, False]})
        assert dropped["row"][:] == list(range(COUNT, len(train)))
        places = [int(message.split("row ")[1].split(" ")[0]) for message in dropped["message"]]
        assert places == list(range(COUNT)) * (len(dropped) // COUNT)


def test_copies_that_were_encoded_anew_and_asked_about_in_words(shaped):
    benchmark = []
    for number, row in enumerate(raw(shaped["raw", False])):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(row["rejected_image"]["bytes"])).resize((96, 96)).save(buffer, format="JPEG", quality=60)
        words = (ENGLISH, CHINESE)[number % 2][number // 2].prompt.replace("{images}", "<image><image>")
        benchmark.append({"question": words.format(caption=row["caption"].upper()), "images": [buffer.getvalue()]})
    for form in FORMS:
        assert len(decontaminate(shaped[form, False], {"bench": benchmark})[1]) == COUNT


def test_the_same_images_with_another_caption_are_another_pair():
    others = couples(caption="quite another picture of thing {}")
    both = concatenate_datasets([reformulate_t2i(couples()), reformulate_t2i(others, seed=5)])
    assert len(validate(both, show=False)[0]) == 2 * COUNT
    assert len(decontaminate(reformulate_t2i(others), {"bench": couples()})[1]) == 0
    assert len(validate(concatenate_datasets([both, reformulate_t2i(couples(COUNT))]), show=False)[0]) == 3 * COUNT


@pytest.mark.parametrize("forget", [lambda rows: rows, plain, lambda rows: rows.remove_columns("pair_id")])
def test_both_orders_on_request_are_two_rows(forget):
    rows = forget(reformulate_t2i(couples(), both_orders=True))
    anew = forget(reformulate_t2i(couples(), both_orders=True, seed=9))
    against = forget(reformulate_t2i(couples(swapped=True), both_orders=True, seed=9))
    assert len(set(map(content_id, raw(rows)))) == len(validate(rows, show=False)[0]) == 2 * COUNT
    assert len(set(pair_ids(rows).to_pylist())) == 2 * COUNT
    clean, bad = validate(concatenate_datasets([rows, anew]), show=False)
    assert (len(clean), set(bad["reason"])) == (2 * COUNT, {"duplicate_pair"})
    clean, bad = validate(concatenate_datasets([rows, against]), show=False)
    assert (len(clean), set(bad["reason"])) == (0, {"contradictory_pair"})
    stream = concatenate_datasets([rows, anew, against]).to_iterable_dataset()
    clean, bad = validate(stream, show=False)
    assert sum(1 for _ in clean) == 2 * COUNT
    reasons = [row["reason"] for row in bad]
    assert reasons == ["duplicate_pair"] * 2 * COUNT + ["contradictory_pair"] * 2 * COUNT


def test_both_orders_beside_a_pair_that_is_asked_about_once():
    both, once = reformulate_t2i(couples(), both_orders=True), reformulate_t2i(couples(), seed=4)
    for rows in ([both, once], [once, both]):
        clean, bad = validate(concatenate_datasets(rows), show=False)
        assert (len(clean), set(bad["reason"])) == (2 * COUNT, {"duplicate_pair"})
    against = reformulate_t2i(couples(swapped=True))
    assert len(validate(concatenate_datasets([both, against]), show=False)[0]) == 0


def test_identity_stays_with_the_row(tmp_path):
    """Through files, mixtures and flips, under names that do not depend on the reformulation."""
    unnamed = couples().remove_columns("pair_id")
    names = [pair_ids(reformulate_t2i(unnamed, seed=seed).remove_columns("pair_id")).to_pylist() for seed in (1, 2)]
    assert names[0] == names[1] == list(map(content_id, raw(couples())))
    assert names[0] != pair_ids(reformulate_t2i(couples(swapped=True)).remove_columns("pair_id")).to_pylist()
    rows = reformulate_t2i(couples(), template=OWN)
    write_parquet(rows, tmp_path / "rows.parquet")
    back = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path))
    answers = Dataset.from_list([dict.fromkeys(FEATURES)], features=FEATURES)
    mixed = mix({"rows": back, "answers": answers}).filter(lambda row: row["pair_id"] is not None)
    flipped = mixed.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    for one, other in ((rows, couples()), (mixed.sort("pair_id"), couples()), (flipped.sort("pair_id"), None)):
        expected = raw(couples(swapped=True) if other is None else other)
        assert list(map(t2i_identity, raw(one))) == list(map(t2i_identity, expected))


def test_what_is_no_text_to_image_pair():
    row = raw(reformulate_t2i(couples()))[0]
    bare = {**row, **dict.fromkeys(T2I_IDENTITY)}
    assert t2i_identity(row) == t2i_identity(bare) is not None
    question = bare["prompt"][0]
    for changes in (
        {"images": row["images"][:1]},
        {"images": [row["images"][0]] * 2},
        {"chosen": row["rejected"]},
        {"chosen": [{"role": "assistant", "content": "I cannot tell."}]},
        {"prompt": [{"role": "user", "content": "Image 1: Image 2: Which caption is better?"}]},
        {"prompt": [question, row["chosen"][0], question]},
        {"tools": [{"type": "function"}]},
    ):
        assert t2i_identity({**bare, **changes}) is None
    # What Arrow makes of keys that only other rows have.
    nulls = {"chat_template_kwargs": {"enable_thinking": None}, "tools": None, "videos": []}
    assert t2i_identity({**bare, **nulls}) == t2i_identity(row)
    # A caption of the user's own about other rows is no identity.
    assert t2i_identity({**bare, "prompt": [{"role": "user", "content": "What?"}], "t2i_caption": None}) is None
    conversation = {side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")}
    assert t2i_identity({**row, **conversation, "prompt": None}) == t2i_identity(row)


@pytest.mark.parametrize("caption", ["a cat", "Caption: [x]", "a  b\n c", "]", "猫 {caption}", "<image> x"])
def test_captions_are_found_in_every_known_wording(caption):
    wordings = [t.prompt.replace("{images}", " ".join(t.labels)) for t in (*ENGLISH, *CHINESE)]
    wordings += [t.prompt.replace("{images}", labels) for t in CHINESE for labels in ("", " ".join(ENGLISH[0].labels))]
    wordings += [text.replace("<image>", " ").replace("{}", "{caption}") for text in (SCRIPT, UNIFIED)]
    for wording in wordings:
        assert find_caption(wording.replace("{caption}", caption)) == " ".join(caption.split())
    assert find_caption(caption) is None


def test_verdicts_are_read():
    for template in (*ENGLISH, *CHINESE):
        assert prefers_first(template.first_is_better) is True and prefers_first(template.second_is_better) is False
    assert prefers_first("image 2 is better\n") is False and prefers_first("Image 1 is better than image 2") is True
    for unknown in ("", "Image 3 is better.", "Image 1 is better than Image 1.", "Image 1 is not better.", "Both."):
        assert prefers_first(unknown) is None


def test_identity_columns_are_in_every_reformulated_set():
    made = leave_images_encoded(reformulate_t2i(couples()))
    assert Features({name: made.features[name] for name in T2I_IDENTITY}) == T2I_IDENTITY
    assert list(made.features) == list(REFORMULATED_FEATURES)
