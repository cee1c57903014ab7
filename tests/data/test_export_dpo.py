"""Rows for TRL's DPO trainer: the same pairs, and the same tokens as the reward model reads."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, List, load_dataset
from PIL import Image as PILImage
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from tests.families import example_images
from tests.pairs import processor_of
from tests.rows import make_dataset, make_rows, png, text_rows, video_rows
from trl_dt2it import MultimodalPreferenceCollator
from trl_dt2it.data import ImageOptions, RowError, content_id, load_image, to_dpo
from trl_dt2it.data.columns import leave_images_encoded


COLUMNS = ["prompt", "chosen", "rejected", "images"]
VIDEOS = [(make_rows(1, num_images=(0,))[0], []), (video_rows()[0], video_rows()[0]["videos"])]


def encoded(dataset) -> list[dict]:
    return list(leave_images_encoded(dataset))


def test_pairs_stay_what_they_are_and_images_are_not_written_anew():
    data = make_dataset(7, pair_id=[f"p{i}" for i in range(7)], strength=[1.0] * 7)
    for given in (data, data.select([5, 1, 3]), data.select([2, 2, 0])):
        made = to_dpo(given)
        assert made.column_names == COLUMNS and made.features["images"] == List(Image(mode="RGB"))
        assert list(map(content_id, encoded(made))) == list(map(content_id, encoded(given)))
        for row, before in zip(made, encoded(given), strict=True):
            shown = [np.asarray(load_image(image)) for image in before["images"]]
            assert all(image.mode == "RGB" for image in row["images"])
            assert [np.asarray(image).tolist() for image in row["images"]] == [image.tolist() for image in shown]
        assert encoded(to_dpo(made)) == encoded(made)
    sets = (data, to_dpo(data), to_dpo(to_dpo(data)))
    assert len({one.data.column("images").chunk(0).buffers()[-1].address for one in sets}) == 1
    assert to_dpo(data.select([])).column_names == COLUMNS


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava"])
def test_trl_reads_the_tokens_that_the_reward_model_reads(family):
    processor, data = processor_of(family), make_dataset(3, num_images=(1, 2))
    ours = MultimodalPreferenceCollator(processor)(encoded(data))
    theirs = DataCollatorForVisionPreference(processor, max_length=None)([dict(row) for row in to_dpo(data)])
    for side in range(6):
        expected = ours["input_ids"][side][ours["attention_mask"][side].bool()]
        found = theirs["input_ids"][side][theirs["attention_mask"][side].bool()]
        if family == "llava":  # TRL adds no beginning of sequence where the template writes none
            assert expected[0] == processor.tokenizer.bos_token_id
            expected = expected[1:]
        assert expected.tolist() == found.tolist()
    torch.testing.assert_close(theirs["pixel_values"][: len(ours["pixel_values"])], ours["pixel_values"])


def test_other_shapes_of_the_same_pairs(tmp_path):
    rows = make_rows(4, num_images=(1,))
    wanted = list(map(content_id, rows))
    for index, row in enumerate(rows):
        (tmp_path / f"{index}.png").write_bytes(row["images"][0]["bytes"])
    implicit = [
        {**{side: row["prompt"] + row[side] for side in ("chosen", "rejected")}, "images": row["images"]}
        for row in rows
    ]
    single = [{**{k: row[k] for k in COLUMNS[:3]}, "image": row["images"][0]} for row in rows]
    strings = [
        {
            **{side: [{"role": "assistant", "content": row[side][0]["content"][0]["text"]}] for side in COLUMNS[1:3]},
            "prompt": [{"role": "user", "content": row["prompt"][0]["content"][1]["text"]}],
            "images": row["images"],
        }
        for row in rows
    ]
    for shape in (implicit, single, strings):
        assert list(map(content_id, encoded(to_dpo(Dataset.from_list(shape))))) == wanted
    # Files under a folder, as JSON lines name them.
    lines = [{**row, "images": [f"{index}.png"]} for index, row in enumerate(rows)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train")
    made = to_dpo(loaded, image_options=ImageOptions(image_root=str(tmp_path)))
    assert [row["images"][0]["path"] for row in encoded(made)] == [str(tmp_path / f"{i}.png") for i in range(4)]
    assert [png(row["images"][0]) for row in made] == [row["images"][0]["bytes"] for row in rows]
    # A row without images among others has an empty list, not None.
    mixed = Dataset.from_list([strings[0], {**strings[1], "images": None}])
    assert [len(row["images"]) for row in to_dpo(mixed)] == [1, 0]


def test_texts_alone_stay_texts():
    made = to_dpo(Dataset.from_list(text_rows(2, implicit=True)))
    assert made.column_names == COLUMNS[:3] and list(made) == text_rows(2)
    plain = Dataset.from_list(text_rows(2, plain=True))
    assert list(to_dpo(plain)) == text_rows(2, plain=True)


def test_what_trl_cannot_read_or_should_not_is_refused(tmp_path):
    with pytest.raises(RowError, match=r"^row 1: there is a video"):
        to_dpo(Dataset.from_list([{**row, "images": [], "videos": shown} for row, shown in VIDEOS]))
    with pytest.raises(ValueError, match="no column `rejected`; it has chosen"):
        to_dpo(Dataset.from_dict({"chosen": ["a"]}))
    outside, root = tmp_path / "secret.png", tmp_path / "root"
    root.mkdir()
    example_images(1)[0].save(outside)
    row = {**make_rows(1, num_images=(1,))[0], "pair_id": "mine"}
    for path, reason in (("../secret.png", "image_outside_root"), ("https://example.com/a.png", "image_url")):
        with pytest.raises(RowError, match="^mine: ") as error:
            to_dpo(Dataset.from_list([{**row, "images": [path]}]), image_options=ImageOptions(image_root=str(root)))
        assert error.value.reason == reason
    bomb = PILImage.new("RGB", (100, 100))
    with pytest.raises(RowError, match="100 x 100 pixels"):
        to_dpo(Dataset.from_list([{**row, "images": [png(bomb)]}]), image_options=ImageOptions(max_image_pixels=99))
    different = make_rows(2, num_images=(1,))
    implicit = {side: one["prompt"] + one[side] for side, one in zip(("chosen", "rejected"), different, strict=True)}
    with pytest.raises(RowError, match="`prompt`"):
        to_dpo(Dataset.from_list([{**implicit, "images": different[0]["images"]}]))
