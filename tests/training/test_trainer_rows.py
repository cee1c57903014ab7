"""Refusals and drops of the trainer at start: options, columns, rows, lengths and paths."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import trl
from datasets import Dataset, Image
from tokenizers import normalizers
from transformers import (
    AutoProcessor,
)

from trl_dt2it import MultimodalPreferenceCollator, MultimodalRewardTrainer, RewardScorer, token_counter
from trl_dt2it.data import validate
from trl_dt2it.data.rows import RowError
from trl_dt2it.demo.tiny import build_tiny_tokenizer
from trl_dt2it.training import setup

from ..families import example_images, family_dir
from ..rows import make_dataset, make_rows
from ..trainers import config, losses, text_model, trainer_for


def test_a_wrong_word_in_the_configuration_fails_at_once(tmp_path):
    for name, value in (("loss_type", "bradley"), ("on_bad_row", "skip"), ("strength_normalization", "z")):
        with pytest.raises(ValueError, match=f"`{name}` is '{value}'; choose one of"):
            config(tmp_path, **{name: value})
    for name, value in (
        ("label_smoothing", 1.0),
        ("tie_factor", 1.0),
        ("gce_q", 0.0),
        ("gce_q", 1.1),
        ("ordinal_thresholds", [2.0, 1.0]),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is .*; it must be"):
            config(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="`min_pixels` is 9; it must be <= max_pixels"):
        config(tmp_path, min_pixels=9, max_pixels=4)


def test_images_and_a_text_model(tmp_path):
    tokenizer = AutoProcessor.from_pretrained(family_dir("qwen3_vl")).tokenizer
    with pytest.raises(ValueError, match="train set has images, but the model reads text only; .*remove the column"):
        MultimodalRewardTrainer(
            text_model(tokenizer), args=config(tmp_path), train_dataset=make_dataset(2), processing_class=tokenizer
        )


@pytest.mark.parametrize("streamed", [False, True])
def test_tokenized_rows_under_old_names_are_those_under_new_ones(streamed, tmp_path):
    tokenizer = AutoProcessor.from_pretrained(family_dir("qwen3_vl")).tokenizer
    rows = [{"chosen": [5, 6, 7, 8 + i], "rejected": [5, 6, 9]} for i in range(4)]
    results = []
    for suffix in ("ids", "input_ids"):
        data = Dataset.from_list([{f"{side}_{suffix}": ids for side, ids in row.items()} for row in rows])
        given = data.to_iterable_dataset() if streamed else data
        args = config(tmp_path, max_steps=2, train_sampling_strategy="sequential")
        is_old = suffix == "input_ids"
        told = (
            "The column `chosen_input_ids` is read as `chosen_ids`, and `rejected_input_ids` as `rejected_ids`, .* "
            r"rename them .*`dataset.rename_columns\({'chosen_input_ids': 'chosen_ids', "
            r"'rejected_input_ids': 'rejected_ids'}\)`"
        )
        with pytest.warns(FutureWarning, match=told) if is_old else nullcontext():
            trainer = MultimodalRewardTrainer(
                text_model(tokenizer), args=args, train_dataset=given, processing_class=tokenizer
            )
            assert {"chosen_ids", "rejected_ids"} == set(next(iter(trainer.train_dataset)))
            trainer.train()
            rewards = RewardScorer(trainer.model, tokenizer).score_pairs(data, show_progress=False)
        results.append((losses(trainer), rewards.tolist()))
    assert results[0] == results[1] and len(results[0][0]) == 2


def test_a_misspelt_column_is_named(tmp_path):
    data = make_dataset(2).rename_column("rejected", "rejcted")
    with pytest.raises(ValueError, match="columns .*rejcted.*; it needs `chosen` and `rejected` .*unless both begin"):
        trainer_for("qwen3_vl", tmp_path, data)


def bad_rows() -> list[dict]:
    rows = make_rows(6, num_images=(1,), pair_id=[f"p{i}" for i in range(6)])
    rows[2]["images"] = [{"bytes": b"no image", "path": None}]
    rows[4]["images"] = [{"bytes": None, "path": "gone.png"}]
    rows[5]["chosen"] = rows[5]["rejected"]
    return rows


def test_bad_rows_are_read_again_only_for_what_columns_do_not_tell(tmp_path, monkeypatch):
    collator = MultimodalPreferenceCollator(AutoProcessor.from_pretrained(family_dir("qwen3_vl")))
    plain = Dataset.from_list(bad_rows()).cast_column("images", [Image(decode=False)])
    read, made = [], []
    get = Dataset.__getitem__

    def watched(rows, key):
        if isinstance(key, int) and "message" not in rows.column_names:  # the notes of bad rows have one
            read.append(key)
        return get(rows, key)

    monkeypatch.setattr(Dataset, "__getitem__", watched)

    def quarantined(rows, on_bad_row):
        read.clear(), made.clear()
        args = config(tmp_path, on_bad_row=on_bad_row)
        if on_bad_row == "raise":
            with pytest.raises(ValueError, match="3 of 6 rows of the train set cannot be used .*The first, p2: "):
                setup.quarantine_bad_rows(rows, "train", collator, args)
        else:
            assert len(setup.quarantine_bad_rows(rows, "train", collator, args)) == 3
            lines = (tmp_path / "_quarantine_train.jsonl").read_text().splitlines()
            assert [json.loads(line)["pair_id"] for line in lines] == ["p2", "p4", "p5"]

    for on_bad_row in ("raise", "quarantine"):
        quarantined(plain, on_bad_row)
        assert read == []
    transformed = plain.with_transform(lambda batch: made.extend(batch["pair_id"]) or batch)
    quarantined(transformed, "raise")
    assert len({made.count(name) for name in ("p0", "p1", "p3", "p4", "p5")}) == 1 < made.count("p2")
    quarantined(transformed, "quarantine")
    assert made.count("p2") >= made.count("p4") == made.count("p5") > made.count("p0") == made.count("p3")
    monkeypatch.setattr(setup.PartialState, "is_main_process", False)
    made.clear()
    setup.quarantine_bad_rows(transformed, "train", collator, config(tmp_path, on_bad_row="quarantine"))
    assert made.count("p2") > made.count("p4") == made.count("p0")


def test_bad_rows_stop_the_run_at_start(tmp_path):
    message = "3 of 6 rows of the train set cannot be used .*The first, p2: .*Fix them"
    with pytest.raises(ValueError, match=message):
        trainer_for("qwen3_vl", tmp_path, Dataset.from_list(bad_rows()))


def test_bad_rows_are_set_aside_if_wished(tmp_path, caplog):
    data = Dataset.from_list(bad_rows())
    trainer = trainer_for("qwen3_vl", tmp_path, data, {"on_bad_row": "quarantine"}, eval_dataset=data)
    assert trainer.train_dataset["pair_id"] == ["p0", "p1", "p3"]
    for name in ("train", "eval"):
        listed = [json.loads(line) for line in (tmp_path / f"_quarantine_{name}.jsonl").read_text().splitlines()]
        assert [(entry["pair_id"], entry["row"]) for entry in listed] == [("p2", 2), ("p4", 4), ("p5", 5)]
        assert [entry["reason"] for entry in listed] == ["image_corrupt", "image_missing", "equal_answers"]
        assert all(entry["message"] for entry in listed)
    assert "Quarantined 3 of 6 rows of the train set" in caplog.text
    trainer.train()
    with pytest.raises(ValueError, match="No row of the train set can be used"):
        trainer_for("qwen3_vl", tmp_path, data.select([2, 4]), {"on_bad_row": "quarantine"})


def test_bad_rows_of_a_stream(tmp_path, caplog):
    data = Dataset.from_list(bad_rows()).to_iterable_dataset()
    args = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    with pytest.raises(RowError, match="p2: "):
        trainer_for("qwen3_vl", tmp_path, data, args).train()
    trainer = trainer_for("qwen3_vl", tmp_path, data, {**args, "on_bad_row": "quarantine"})
    trainer.train()
    assert "Dropped from the train set: p2, image_corrupt" in caplog.text


def says(text: str, role: str = "assistant", **fields) -> dict:
    return {"role": role, "content": text, **fields}


def rows_that_a_template_makes_equal() -> dict[str, list[dict]]:
    """By the name of a template of TRL's: first a row to train on, then one whose answers differ in what it drops."""
    asked, sky = says("What is in the cup?", "user"), says("And above?", "user")
    thinking = ["<think>\nright\n</think>\n\nTea.", "<think>\nwrong\n</think>\n\nTea."]
    return {
        "qwen3_vl": [
            {"prompt": [asked], "chosen": [says("Tea.")], "rejected": [says("Milk.")]},
            {
                "prompt": [asked],
                "chosen": [says("Tea.", reasoning_content="It is green.")],
                "rejected": [says("Tea.", reasoning_content="It is white.")],
            },
        ],
        "qwen3_5_think": [
            {"chosen": [asked, says(thinking[0])], "rejected": [asked, says(thinking[1])]},  # the last turn's stay
            {
                "chosen": [asked, says(thinking[0]), sky, says("The sky.")],
                "rejected": [asked, says(thinking[1]), sky, says("The sky.")],
            },
        ],
    }


def processor_with(template: str):
    processor = AutoProcessor.from_pretrained(family_dir("qwen3_vl"))
    processor.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return processor


@pytest.mark.parametrize("template", rows_that_a_template_makes_equal())
def test_answers_that_the_template_makes_equal_are_bad_rows(template, tmp_path, caplog):
    good, equal = rows_that_a_template_makes_equal()[template]
    data = Dataset.from_list([{**good, "pair_id": "good"}, {**equal, "pair_id": "equal"}])
    processor = processor_with(template)
    model = str(family_dir("qwen3_vl"))

    def start(train, evaluation=None, **args):
        args = config(tmp_path, max_steps=1, reward_statistics_pairs=0, **args)
        given = {"train_dataset": train, "eval_dataset": evaluation, "processing_class": processor}
        return MultimodalRewardTrainer(model, args=args, **given)

    message = r"1 of 2 rows of the {} set cannot be used \(1 equal_answers\). The first, equal: .* equal as the model"
    with pytest.raises(ValueError, match=message.format("train")):
        start(data)
    with pytest.raises(ValueError, match=message.format("eval")):
        start(data.select([0]), data)
    trainer = start(data, on_bad_row="quarantine")
    assert trainer.train_dataset["pair_id"] == ["good"]
    assert json.loads((tmp_path / "_quarantine_train.jsonl").read_text())["reason"] == "equal_answers"
    with pytest.raises(RowError, match="equal: `chosen` and `rejected` are equal as the model reads them"):
        trainer.data_collator(list(data))
    assert len(trainer.predict(data).predictions) == 1  # a raw set is checked, too
    stream = data.to_iterable_dataset()
    with pytest.raises(RowError, match="equal: "):
        start(stream).train()
    assert [row["pair_id"] for row in start(stream, on_bad_row="quarantine").train_dataset] == ["good"]
    assert "Dropped from the train set: equal, equal_answers" in caplog.text
    clean, quarantine = validate(data, token_counter=token_counter(processor), show=False)
    assert (clean["pair_id"], quarantine["reason"]) == (["good"], ["equal_answers"])
    assert len(validate(data, show=False)[0]) == 2  # without the template nobody knows


def test_answers_that_the_tokenizer_makes_equal_are_bad_rows(tmp_path):
    tokenizer = build_tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    composed, decomposed = "\u00e9", "e\u0301"
    assert tokenizer(composed).input_ids == tokenizer(decomposed).input_ids
    other = {"prompt": "A ", "chosen": composed, "rejected": "cafe"}
    for reason, rows in (
        ("equal_answers", [other, {**other, "rejected": decomposed}]),
        ("equal_answers", [{"chosen_ids": [1, 2], "rejected_ids": [1, 3]}, {"chosen_ids": [1], "rejected_ids": [1]}]),
        ("empty_answer", [{"chosen_ids": [1, 2], "rejected_ids": [1, 3]}, {"chosen_ids": [1], "rejected_ids": []}]),
    ):
        given = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
        with pytest.raises(ValueError, match=rf"1 of 2 rows .* \(1 {reason}\). The first, row 1: "):
            MultimodalRewardTrainer(text_model(tokenizer), args=config(tmp_path), **given)
        args = config(tmp_path, on_bad_row="quarantine")
        assert len(MultimodalRewardTrainer(text_model(tokenizer), args=args, **given).train_dataset) == 1


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tmp_path):
    processor = AutoProcessor.from_pretrained(family_dir("qwen3_vl"))
    refusal = "{%- if messages[0].role != 'user' %}{{ raise_exception('Start with a user.') }}{%- endif %}"
    processor.chat_template = refusal + processor.chat_template
    rows = make_rows(2, num_images=(0,))
    rows[1]["prompt"].insert(0, says("Be brief.", "system"))
    rows[1]["prompt"][0]["content"] = [{"type": "text", "text": "Be brief."}]
    message = (
        "1 of 2 rows .*1 not_conversational.*row 1: the chat template refuses the conversation .Start with a user"
    )
    with pytest.raises(ValueError, match=message):
        trainer_for("qwen3_vl", tmp_path, Dataset.from_list(rows), processing_class=processor)
    with pytest.raises(RowError, match="row 1: the chat template refuses"):
        MultimodalPreferenceCollator(processor)(rows)


def test_too_long_pairs_are_left_out_and_counted(tmp_path, caplog):
    data = make_dataset(6, num_images=(0, 2))
    probe = trainer_for("qwen3_vl", tmp_path, data)
    lengths = [max(probe.data_collator.lengths(row)) for row in data]
    limit = sorted(lengths)[2]
    trainer = trainer_for("qwen3_vl", tmp_path, data, {"max_length": limit})
    assert len(trainer.train_dataset) == 3
    assert f"Dropped 3 of 6 pairs of the train set: longer than {limit} tokens." in caplog.text
    with pytest.raises(ValueError, match="None is left; raise `max_length`"):
        trainer_for("qwen3_vl", tmp_path, data, {"max_length": 3})


def test_paths_are_read_under_the_image_root(tmp_path):
    rows = make_rows(2, num_images=(1,))
    for index, row in enumerate(rows):
        example_images(1, seed=index)[0].save(tmp_path / f"{index}.png")
        row["images"] = [f"{index}.png"]
    trainer = trainer_for("qwen3_vl", tmp_path, Dataset.from_list(rows), {"image_root": str(tmp_path)})
    trainer.train()
    rows[1]["images"] = ["../1.png"]
    with pytest.raises(ValueError, match=r"1 of 2 rows .*image_outside_root"):
        trainer_for("qwen3_vl", tmp_path, Dataset.from_list(rows), {"image_root": str(tmp_path)})


def test_the_decoder_of_datasets_never_sees_the_path(tmp_path):
    """`datasets` decodes whatever path a row holds; ours refuses what leaves the root."""
    example_images(1)[0].save(tmp_path / "secret.png")
    (tmp_path / "root").mkdir()
    row = {**make_rows(1, num_images=(1,))[0], "images": [{"bytes": None, "path": str(tmp_path / "secret.png")}]}
    from datasets import Features, Image, List

    plain = Dataset.from_list([row])
    data = plain.cast(Features({**plain.features, "images": List(Image())}))
    assert data[0]["images"][0].size
    with pytest.raises(ValueError, match="image_outside_root"):
        trainer_for("qwen3_vl", tmp_path, data, {"image_root": str(tmp_path / "root")})
    assert Path(tmp_path / "secret.png").exists()


def test_a_native_model_instance_is_refused(tmp_path):
    from transformers import AutoModelForImageTextToText

    native = AutoModelForImageTextToText.from_pretrained(family_dir("qwen3_vl"))
    with pytest.raises(ValueError, match="load it with `trl_dt2it.load_reward_model`"):
        MultimodalRewardTrainer(native, args=config(tmp_path), train_dataset=make_dataset(2))
