"""Validation: every row ends on the right side with the right words, in memory or on disk, as deeply as asked."""

import io

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from PIL import Image, ImageFile

from tests.data.validation_rows import EXPECTED, MIXED, PICTURES, answer, check, dataset_of, notes, processor_of, row
from tests.families import build_tokenizer
from tests.families_chat import CHATS
from tests.rows import png
from trl_dt2it import token_counter
from trl_dt2it.data.messages import FEATURES
from trl_dt2it.data.validation import validate


def test_a_set_is_divided():
    dataset = dataset_of(MIXED)
    clean, quarantine = validate(dataset, show=False)
    assert clean.features == dataset.features == FEATURES
    assert clean.with_format("arrow")[:].equals(dataset.select([0, 2, 5]).with_format("arrow")[:])
    assert clean[0]["images"][0].size == Image.open(io.BytesIO(PICTURES[0])).size
    assert notes(quarantine) == EXPECTED
    assert quarantine.column_names == [*FEATURES, "row", "reason", "message"]
    for place, (source, _, _) in enumerate(EXPECTED):  # whole, images as they came
        kept = {name: quarantine[place][name] for name in FEATURES}
        assert kept == {name: MIXED[source].get(name) for name in FEATURES}


def test_a_set_without_faults_is_left_as_it_is():
    dataset = dataset_of([row(0), row(1)])
    clean, quarantine = validate(dataset, show=False)
    assert clean is dataset
    assert len(quarantine) == 0
    assert quarantine.column_names == [*FEATURES, "row", "reason", "message"]


def test_a_set_of_faults_and_an_empty_set():
    clean, quarantine = validate(dataset_of([row(0, strength=-1.0)] * 3), show=False)
    assert (len(clean), quarantine["reason"][:]) == (0, ["bad_strength"] * 3)
    for empty in (clean, dataset_of([])):
        assert [len(part) for part in validate(empty, show=False)] == [0, 0]


@pytest.mark.parametrize("kind", ["disk", "selected", "shuffled", "formatted", "two processes"])
def test_the_same_wherever_the_rows_are(kind, tmp_path):
    dataset, options = dataset_of(MIXED), {}
    if kind == "disk":
        dataset.save_to_disk(tmp_path)
        dataset = load_from_disk(tmp_path)
    elif kind == "selected":
        dataset = dataset_of([row(9), *MIXED, row(10)]).select(range(1, 1 + len(MIXED)))
    elif kind == "shuffled":
        dataset = dataset_of(MIXED[::-1]).select(range(len(MIXED) - 1, -1, -1))
    elif kind == "formatted":
        dataset = dataset.with_format("numpy")
    else:
        options["num_proc"] = 2
    clean, quarantine = validate(dataset, show=False, **options)
    assert notes(quarantine) == EXPECTED
    assert clean.format == dataset.format
    assert (
        clean.with_format(None)
        .with_format("arrow")[:]
        .equals(dataset_of([row(0), row(2), row(4)]).with_format("arrow")[:])
    )


def test_a_file_that_was_mended_is_read_again(tmp_path):
    path = tmp_path / "a.png"
    dataset = dataset_of([row(images=[{"bytes": None, "path": str(path)}])])
    dataset.to_parquet(tmp_path / "set.parquet", batch_size=1)
    dataset = Dataset.from_parquet(str(tmp_path / "set.parquet"), cache_dir=str(tmp_path / "cache"))
    assert validate(dataset, show=False)[1]["reason"][:] == ["image_missing"]
    path.write_bytes(PICTURES[0])
    assert len(validate(dataset, show=False)[0]) == 1


def test_columns_that_are_json():
    """`datasets` holds what has several types as JSON text."""
    mixed = [
        {"role": "user", "content": "Who?"},
        {"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]},
    ]
    rows = [{"prompt": mixed, "chosen": answer("I."), "rejected": answer("You.")}, {"prompt": mixed, "chosen": [7]}]
    rows[1]["rejected"] = rows[0]["rejected"]
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    assert "Json" in str(dataset.features)
    clean, quarantine = validate(dataset, show=False)
    assert (len(clean), quarantine["reason"][:]) == (1, ["not_conversational"])
    clean, quarantine = validate(dataset, token_counter=token_counter(build_tokenizer(CHATS["qwen3_vl"])), show=False)
    assert quarantine["reason"][:] == ["special_token", "not_conversational"]


# --- options


def test_images_are_looked_at_as_deeply_as_asked(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    cut = png(Image.fromarray(noise))[:1000]
    rows = [row(0), row(1, images=[{"bytes": cut, "path": None}]), row(2, images=[{"bytes": b"", "path": None}])]
    assert [reason for _, reason, _ in check(rows, image_check="full")[1]] == ["image_corrupt"] * 2
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the pixels were decoded"))
    assert [place for place, _, _ in check(rows)[1]] == [2]
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("an image was opened"))
    assert check(rows, image_check="none") == ([0, 1, 2], [])


def test_too_long_is_one_token_more_than_allowed():
    processor = processor_of("qwen3_vl")
    rows = [row(0), row(0, rejected=answer("A dog. " * 9)), row(0, chosen=answer("A cat. " * 5))]
    lengths = []
    for one in rows:
        content = {key: [{"type": "image"}] if key == "i" else one[key] for key in ("prompt", "chosen", "rejected")}
        images = [Image.open(io.BytesIO(one["images"][0]["bytes"]))]
        for side in ("chosen", "rejected"):
            messages = [
                {**message, "content": [{k: v for k, v in b.items() if v is not None} for b in message["content"]]}
                for message in [*content["prompt"], *content[side]]
            ]
            text = processor.apply_chat_template(messages, tokenize=False)
            lengths.append(len(processor(text=[text], images=images)["input_ids"][0]))
    longest = sorted(set(lengths))
    assert len(longest) == 4 and longest[0] > 10
    options = {"token_counter": token_counter(processor), "duplicates": False}
    assert check(rows, max_length=longest[3], **options)[1] == []
    assert [place for place, _, _ in check(rows, max_length=longest[3] - 1, **options)[1]] == [
        max(range(3), key=lambda place: max(lengths[2 * place : 2 * place + 2]))
    ]
    kept, found = check(rows, max_length=longest[1], **options)
    assert kept == [0] and check(rows, max_length=longest[1], num_proc=2, **options) == (kept, found)
    assert [reason for _, reason, _ in found] == ["too_long"] * 2
    assert found[0][2] == f"prompt and `rejected` have {lengths[3]} tokens, more than {longest[1]}; shorten the text."
    assert found[1][2] == f"prompt and `chosen` have {lengths[4]} tokens, more than {longest[1]}; shorten the text."


def test_a_processor_that_must_see_the_pixels_counts_too():
    cut = png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)))[:1000]
    rows = [row(0), row(1, images=[{"bytes": cut, "path": None}], pair_id="cut")]
    kept, found = check(rows, token_counter=token_counter(processor_of("gemma3")), max_length=4000)
    assert kept == [0]
    assert found[0][1] == "image_corrupt" and not found[0][2].startswith("cut")


def test_a_template_that_refuses_a_conversation_is_a_reason():
    processor = processor_of("qwen3_vl")
    processor.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
    processor.chat_template += "{{ messages[-1].content[0].text }}"
    system = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}]
    plain = row(0, images=[], prompt=[{"role": "user", "content": [{"type": "text", "text": "Who?"}]}])
    kept, found = check(
        [plain, {**plain, "prompt": system + plain["prompt"]}], token_counter=token_counter(processor), max_length=9
    )
    assert kept == [0]
    assert found == [
        (1, "not_conversational", "the chat template refuses the conversation (No system.); fix its roles.")
    ]


def test_special_tokens_are_those_of_the_tokenizer_or_processor():
    rows = [row(0, chosen=answer("A cat.<|im_end|>")), row(1)]
    assert check(rows) == ([0, 1], [])
    for reader in (processor_of("qwen3_vl"), build_tokenizer(CHATS["qwen3_vl"])):
        kept, [(place, reason, message)] = check(rows, token_counter=token_counter(reader))
        assert (kept, place, reason) == ([1], 0, "special_token")
        assert message.startswith("`chosen` message 0 contains the special token '<|im_end|>'")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"max_length": 9}, "pass the model's processor"),
        ({"max_length": 0}, "at least 1"),
        ({"image_check": "all"}, "`image_check` is 'all'"),
    ],
)
def test_options_that_do_not_fit(options, part):
    with pytest.raises(ValueError, match=part):
        validate(dataset_of([row(0)]), **options)


def test_sets_that_do_not_fit():
    with pytest.raises(ValueError, match="it needs `chosen` and `rejected`"):
        validate(Dataset.from_list([{"caption": "a", "chosen_image": b"a", "rejected_image": b"b"}]))
    with pytest.raises(ValueError, match="a column `reason`"):
        validate(Dataset.from_list([{"chosen": "a", "rejected": "b", "reason": "c"}]))
    with pytest.raises(ValueError, match="not only its tokenizer"):
        validate(dataset_of([row(0)]), token_counter=token_counter(build_tokenizer(CHATS["qwen3_vl"])), max_length=9)
