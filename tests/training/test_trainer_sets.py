"""Data sets as users hand them over: with formats and transforms, passed late, with columns named like our own, with
files that change between two runs."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoProcessor

from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.curation import IterativeCurationCallback
from trl_dt2it.data.validation import RowChecks
from trl_dt2it.debias import StyleAuditCallback
from trl_dt2it.training.batching import Evaluation
from trl_dt2it.training.setup import as_trainers

from ..families import family_dir
from ..rows import make_dataset, make_rows, png
from ..trainers import losses, trainer_for


NAMES = ("eval_loss", "eval_accuracy", "eval_margin", "eval_min_reward", "eval_accuracy/a")


@pytest.fixture(scope="module")
def data():
    sources = {"source": ["a", "b", "a", "a", "b"], "strength": [1.0, 2.0, 3.0, 4.0, 5.0]}
    return make_dataset(5, num_images=(1, 2, 0), **sources, extra=[0] * 5)


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory):
    """Losses of two steps on the plain set, and its metrics before them."""
    args = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    trainer = trainer_for("qwen3_vl", tmp_path_factory.mktemp("plain"), data, args, eval_dataset=data)
    metrics = trainer.evaluate()
    trainer.train()
    return {"losses": losses(trainer), **metrics}


def opened(batch: dict[str, list]) -> dict[str, list]:
    """Opens images that the data set holds as bytes of its own, and does not hand over the column that it read."""
    images = [[Image.open(io.BytesIO(one)) for one in row] for row in batch["bytes_of"]]
    kept = {name: values for name, values in batch.items() if name not in ("bytes_of", "image")}
    return {**kept, "images": images, "row_index": ["same"] * len(images)}


def of_decoded(batch: dict[str, list]) -> dict[str, list]:
    """Works on images as `datasets` decodes them."""
    return {**batch, "images": [[image.convert("RGB").copy() for image in row] for row in batch["images"]]}


def with_bytes(data):
    raw = [[image["bytes"] for image in row["images"]] for row in make_rows(5, num_images=(1, 2, 0))]
    return data.remove_columns("images").add_column("bytes_of", raw)


def in_place(data):
    formatted = data.with_format(None)
    formatted.set_transform(of_decoded)
    return formatted


FORMATS = {
    "transform": lambda data: with_bytes(data).with_transform(opened),
    "transform_of_decoded": lambda data: data.with_transform(of_decoded),
    "set_transform": in_place,
    "torch": lambda data: data.with_format("torch"),
    "numpy_columns": lambda data: data.with_format("numpy", columns=[n for n in data.column_names if n != "extra"]),
    "arrow": lambda data: data.with_format("arrow"),
    "columns": lambda data: data.with_format(None, columns=[n for n in data.column_names if n != "extra"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_transforms_train_and_evaluate_as_the_plain_set(name, data, expected, tmp_path):
    args = {"max_steps": 2, "train_sampling_strategy": "sequential", "max_length": 4000}
    if name == "transform":
        args["dataloader_num_workers"] = 1
    rows = FORMATS[name](data)
    trainer = trainer_for("qwen3_vl", tmp_path, rows, args, eval_dataset=rows)
    metrics = trainer.evaluate()
    assert {key: metrics[key] for key in NAMES} == pytest.approx({key: expected[key] for key in NAMES}, rel=1e-5)
    if name in ("transform", "torch"):
        trainer.train()
        assert losses(trainer) == pytest.approx(expected["losses"], rel=1e-5)


def test_columns_that_a_format_hides_are_not_read(data, tmp_path):
    hidden = [name for name in data.column_names if name not in ("strength", "source")]
    trainer = trainer_for("qwen3_vl", tmp_path, data.with_format("torch", columns=hidden))
    assert trainer.loss_type == "bt" and trainer.train_dataset.column_names == hidden


def test_sets_that_are_passed_late_are_prepared_as_those_at_start(data, expected, tmp_path, monkeypatch):
    checked = []
    fault = RowChecks.fault
    monkeypatch.setattr(RowChecks, "fault", lambda checks, row: checked.append(row) or fault(checks, row))
    trainer = trainer_for("qwen3_vl", tmp_path, data, eval_dataset=data.select(range(4)))
    assert len(checked) == 9

    def agrees(metrics, prefix="eval"):
        found = {key: metrics[key.replace("eval", prefix, 1)] for key in NAMES}
        return found == pytest.approx({key: expected[key] for key in NAMES}, rel=1e-5)

    assert len(trainer.evaluate()) and len(checked) == 9
    streamed = data.to_iterable_dataset()
    assert agrees(trainer.evaluate(trainer.train_dataset)) and len(checked) == 9
    assert agrees(trainer.evaluate(data.select(range(5)))) and len(checked) == 14
    assert agrees(trainer.evaluate(streamed)) and agrees(trainer.evaluate(streamed.with_format("torch")))
    both = trainer.evaluate({"whole": data.select(range(5)), "streamed": streamed})
    assert agrees(both, "eval_whole") and agrees(both, "eval_streamed") and len(checked) == 19
    predicted = [trainer.predict(one) for one in (data, streamed)]
    assert predicted[0].predictions.shape == (5, 2) and agrees(predicted[0].metrics, "test")
    np.testing.assert_allclose(predicted[0].predictions, predicted[1].predictions, rtol=1e-5)
    several = trainer.predict({"whole": data, "streamed": streamed})
    np.testing.assert_array_equal(several["whole"].predictions, predicted[0].predictions)
    assert agrees(several["streamed"].metrics, "test_streamed")
    trainer.eval_dataset = {"late": streamed}
    assert agrees(trainer.evaluate(), "eval_late")

    rows = make_rows(3)
    rows[1]["rejected"] = rows[1]["chosen"]
    bad = data.from_list(rows)
    with pytest.raises(
        ValueError, match="1 of 3 rows of the eval set cannot be used .*row 1: `chosen` and `rejected`"
    ):
        trainer.evaluate(bad)
    with pytest.raises(ValueError, match="1 of 3 rows of the test set cannot be used"):
        trainer.predict(bad)


def test_records_of_other_than_one_source_for_each_pair_are_refused():
    evaluation = Evaluation(SimpleNamespace(process_index=0, torch_device_mesh=None))
    columns = [torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.ones(2)]
    with pytest.raises(ValueError, match="zip"):
        evaluation.add({"positions": torch.tensor([0, 1]), "source": ["a"]}, *columns)


def test_batch_metrics_see_each_pair_once_and_know_the_last_batch(data, tmp_path):
    seen, results = [], []

    def compute_metrics(prediction, compute_result):
        seen.append((prediction.predictions.shape[0], prediction.losses.shape[0]))
        results.append(compute_result)
        return {"pairs": sum(count for count, _ in seen)} if compute_result else {}

    args = {"batch_eval_metrics": True, "include_for_metrics": ["loss"], "dataloader_drop_last": True}
    trainer = trainer_for("qwen3_vl", tmp_path, data, args, eval_dataset=data, compute_metrics=compute_metrics)
    assert trainer.evaluate()["eval_pairs"] == 5
    assert seen == [(2, 2), (2, 2), (1, 1)] and results == [False, False, True]


def test_an_image_that_changes_on_disk_is_seen_by_the_next_run(tmp_path):
    rows = make_rows(3, num_images=(1,))
    for index, row in enumerate(rows):
        (tmp_path / f"{index}.png").write_bytes(row["images"][0]["bytes"])
        row["images"] = [f"{index}.png"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(**kwargs):
        data = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path))
        return trainer_for("qwen3_vl", tmp_path, data, {"image_root": str(tmp_path), **kwargs}).train_dataset

    last = tmp_path / "2.png"
    whole = last.read_bytes()
    for content in (None, b"not an image"):
        last.unlink(missing_ok=True)
        if content is not None:
            last.write_bytes(content)
        with pytest.raises(ValueError, match="1 of 3 rows of the train set cannot be used"):
            train()
        last.write_bytes(whole)
        assert len(train()) == 3
    small, large = (png(Image.new("RGB", (size, size))) for size in (32, 56))  # 4 and 16 tokens
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(small)
    assert len(train(max_length=80)) == 3
    (tmp_path / "0.png").write_bytes(large)
    assert len(train(max_length=80)) == 2


def with_lengths(batch: dict[str, list]) -> dict[str, list]:
    return {**of_decoded(batch), "length": [100] * len(batch["source"])}


def test_batches_by_tokens_take_what_a_transform_gives(data, tmp_path):
    args = {"max_tokens_per_batch": 200, "max_steps": 1, "disable_tqdm": False}
    trainer = trainer_for("qwen3_vl", tmp_path, data, args, eval_dataset=data)
    counted = trainer_for("qwen3_vl", tmp_path, data.with_transform(of_decoded), args, eval_dataset=data)
    assert counted._lengths == trainer._lengths
    given = data.with_format(None)
    given.set_transform(with_lengths, columns=data.column_names)
    assert trainer_for("qwen3_vl", tmp_path, given.select(range(5)), args)._lengths == [100] * 5
    counted.train()
    assert counted.evaluate()["eval_accuracy"] == counted.evaluate(data)["eval_accuracy"]
    counted.create_model_card()
    for callback in (IterativeCurationCallback, StyleAuditCallback):
        with pytest.raises(ValueError, match="a transform makes its rows; apply the function with `map` instead"):
            callback(counted)


def test_an_empty_evaluation_set_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="eval set has no rows"):
        trainer_for("qwen3_vl", tmp_path, data).evaluate(data.select([]))


def test_a_column_that_is_nearly_one_that_is_read_is_named(tmp_path, caplog):
    data = make_dataset(2, num_images=(0, 0)).map(
        lambda row, i: {"strenght": float(i), "note": "x", "rejected_digits": i}, with_indices=True
    )
    with caplog.at_level("WARNING", logger="trl_dt2it.training.setup"):
        trainer_for("qwen3_vl", tmp_path, data)
    named = [record.getMessage() for record in caplog.records if "is not read" in record.getMessage()]
    assert named == ["The train set has a column `strenght`, which is not read; rename it if `strength` is meant."]


def test_a_collator_of_the_users_normalizes_strengths_and_gets_the_dummies_that_processes_need(tmp_path):
    data = make_dataset(2, strength=[1.0, 2.0])
    given = MultimodalPreferenceCollator(AutoProcessor.from_pretrained(family_dir("qwen3_vl")))
    trainer = trainer_for("qwen3_vl", tmp_path, data, data_collator=given)
    trainer.train()
    assert trainer.loss_type == "strength_margin" and given.normalizer is None
    own = trainer._collator
    assert trainer.data_collator.media == own.media == ("image",)
    own.add_dummy_image = True
    assert as_trainers(given, own).add_dummy_image and not given.add_dummy_image


def test_several_train_sets_of_different_shape_are_trained_on_together(tmp_path):
    answer = {
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    png_of = make_rows(1, num_images=(1,))[0]["images"][0]["bytes"]
    (tmp_path / "cup.png").write_bytes(png_of)
    row = {"images": ["cup.png"], "prompt": [{"role": "user", "content": "Is it a cup?"}], **answer}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    sets = {
        "readme": load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train"),
        "blocks": make_dataset(2, num_images=(1, 2)),
    }
    trainer = trainer_for("qwen3_vl", tmp_path / "out", sets, {"max_steps": 1, "image_root": str(tmp_path)})
    assert len(trainer.train_dataset) == 3
    trainer.train()
    assert np.isfinite(losses(trainer)).all()
