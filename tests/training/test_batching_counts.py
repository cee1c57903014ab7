"""Numbers of tokens without decoding images: what the processor makes of the row, in every family."""

import io

import pytest
from datasets import Dataset
from PIL import Image
from transformers import AutoProcessor

from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.rows import RowError
from trl_dt2it.training.batching import UNCOUNTED_TOKENS, PairTokens, count_pairs, count_tokens, pair_size

from ..families import FAMILIES, family_dir
from ..rows import make_dataset, make_rows, png, text_rows, video_rows
from ..trainers import trainer_for


# Wider, higher, smaller and larger than any tile, and sides that no patch divides.
SIZES = [(57, 31), (29, 200), (333, 100), (640, 511), (17, 28), (56, 56), (101, 64)]


def collator_for(family: str) -> MultimodalPreferenceCollator:
    return MultimodalPreferenceCollator(AutoProcessor.from_pretrained(family_dir(family)))


def rows_with(numbers, sizes=SIZES) -> list[dict]:
    rows, sizes = make_rows(len(numbers), num_images=tuple(numbers)), list(sizes) * 10
    for row, number in zip(rows, numbers, strict=True):
        row["images"] = [{"bytes": png(Image.new("RGB", sizes.pop())), "path": None} for _ in range(number)]
    return rows


def shared_by_hand(collator, row) -> int:
    """From the layout of the row that the collator makes, which goes through the processor."""
    collator.share_prefix = True
    batch = collator([row])
    collator.share_prefix = False
    return batch["pair_layout"][0, 0].item() if "pair_layout" in batch else -1


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_processor(family, monkeypatch):
    collator = collator_for(family)
    rows = rows_with([0, 1, 2, 1, 1, 2, 1, 1])
    expected = [PairTokens(*collator.lengths(row), shared_by_hand(collator, row)) for row in rows]
    assert all(tokens.shared > 0 for tokens in expected)
    if type(collator.processing_class).__name__ in UNCOUNTED_TOKENS:
        monkeypatch.setattr("trl_dt2it.training.collator.load_image", None)  # the pixels are not read
    assert [count_tokens(row, collator) for row in rows] == expected


def test_the_table_lists_what_is_proven():
    """A family whose processor needs the pixels stays out of the table."""
    processors = {family: type(collator_for(family).processing_class).__name__ for family in FAMILIES}
    assert set(UNCOUNTED_TOKENS) <= set(processors.values())
    unlisted = {family for family, processor in processors.items() if processor not in UNCOUNTED_TOKENS}
    assert unlisted == {"gemma3", "llava_onevision", "smolvlm"}


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next", "idefics3"])
def test_a_turned_photograph_is_counted_upright(family):
    collator = collator_for(family)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (200, 29)).save(buffer, format="JPEG", exif=exif)
    [row] = rows_with([1])
    row["images"] = [{"bytes": buffer.getvalue(), "path": None}]
    [upright] = rows_with([1], [(29, 200)])
    assert count_tokens(row, collator)[:2] == collator.lengths(row) == collator.lengths(upright)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_videos_go_through_the_processor(family):
    collator = collator_for(family)
    for row in video_rows():
        assert count_tokens(row, collator) == (*collator.lengths(row), shared_by_hand(collator, row))


def test_texts_and_token_rows():
    collator = MultimodalPreferenceCollator(AutoProcessor.from_pretrained(family_dir("qwen3_vl")).tokenizer)
    for kwargs in ({}, {"implicit": True}, {"plain": True}):
        for row in text_rows(2, **kwargs):
            assert count_tokens(row, collator)[:2] == collator.lengths(row)
    # Alike up to the shorter one's last token, which stays its own.
    assert count_tokens({"chosen_ids": [1, 2, 3, 4], "rejected_ids": [1, 2, 9]}, collator) == (4, 3, 2)
    assert count_tokens({"chosen_ids": [1, 2, 3, 4], "rejected_ids": [1, 2, 3]}, collator) == (4, 3, 2)


def implicit_row(first_answers, questions) -> dict:
    """Two turns; the image is in the second question."""
    sides = []
    for answer, question in zip(first_answers, questions, strict=True):
        sides.append(
            [
                {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
            ]
        )
    [row] = rows_with([1])
    return {"chosen": sides[0], "rejected": sides[1], "images": row["images"]}


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "llava_onevision"])
def test_sides_that_differ_before_the_image_share_nothing(family):
    collator = collator_for(family)
    before = implicit_row(["Hi.", "Good day."], ["What is it?", "What is it?"])
    behind = implicit_row(["Hi.", "Hi."], ["What is it?", "What colour is it?"])
    assert count_tokens(before, collator) == (*collator.lengths(before), -1)
    assert shared_by_hand(collator, before) == -1
    assert count_tokens(behind, collator) == (*collator.lengths(behind), shared_by_hand(collator, behind))
    assert count_tokens(behind, collator).shared > 0


def test_a_bad_row_is_named():
    collator = collator_for("qwen3_vl")
    [row] = rows_with([1])
    with pytest.raises(RowError, match=r"p7: .*not an image"):
        count_tokens({**row, "pair_id": "p7", "images": [{"bytes": b"x", "path": None}]}, collator)
    with pytest.raises(RowError, match="p7: .*empty"):
        count_tokens({**row, "pair_id": "p7", "chosen": [{"role": "assistant", "content": ""}]}, collator)


def test_what_a_pair_adds_to_a_batch():
    collator = collator_for("qwen3_vl")
    assert pair_size(PairTokens(70, 50, 40), collator) == 140
    collator.pad_to_multiple_of = 16
    assert pair_size(PairTokens(70, 50, 40), collator) == 160
    collator.share_prefix = True
    assert pair_size(PairTokens(70, 50, 40), collator) == 80
    assert pair_size(PairTokens(70, 50, -1), collator) == 160


@pytest.mark.parametrize("num_proc", [None, 2])
def test_counting_leaves_the_set_as_it_is(num_proc):
    collator = collator_for("qwen3_vl")
    data = leave_images_encoded(make_dataset(6)).select([5, 0, 3])
    counts = count_pairs(data, name="train", collator=collator, num_proc=num_proc)
    assert counts.column_names == ["chosen", "rejected", "shared"]
    assert [tuple(row.values()) for row in counts.to_pylist()] == [count_tokens(row, collator) for row in data]
    assert len(data) == 3 and data.column_names == make_dataset(1).column_names


def test_the_trainer_counts_once_for_both(tmp_path, monkeypatch):
    """`max_length` and `max_tokens_per_batch` read the same counts; what is left out has no length."""
    data = make_dataset(6)
    collator = collator_for("qwen3_vl")
    tokens = [count_tokens(row, collator) for row in leave_images_encoded(data)]
    limit = sorted(max(pair[:2]) for pair in tokens)[3]
    calls = []
    monkeypatch.setattr(
        "trl_dt2it.training.batching.count_tokens", lambda *args: calls.append(args) or count_tokens(*args)
    )
    trainer = trainer_for("qwen3_vl", tmp_path, data, {"max_length": limit, "max_tokens_per_batch": 300})
    assert len(calls) == 6 and len(trainer.train_dataset) == 4
    kept = [pair for pair in tokens if max(pair[:2]) <= limit]
    assert trainer._lengths == [chosen + rejected - shared for chosen, rejected, shared in kept]


def test_a_pair_of_two_rows_has_its_batch_alone(tmp_path):
    rows = [implicit_row(["Hi.", answer], ["What is it?", "What colour?"]) for answer in ("Hi.", "Good day.", "Hi.")]
    trainer = trainer_for("qwen3_vl", tmp_path, Dataset.from_list(rows), {"max_tokens_per_batch": 1000})
    assert sorted(map(sorted, trainer._get_train_sampler())) == [[0, 2], [1]]
    for batch in trainer.get_train_dataloader():
        assert batch["input_ids"].numel() <= 1000
        assert ("pair_layout" in batch) == (len(batch["pairs"]["weight"]) == 2)
