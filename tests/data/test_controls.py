"""Controls: rows read with other images, lazily, whatever form the images have."""

import io
import logging
import pickle
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from tests.rows import make_dataset, make_rows, png, video_rows
from trl_dt2it.data.controls import blank, low_resolution, swapped, without_images
from trl_dt2it.data.images import ImageOptions, load_image
from trl_dt2it.data.rows import check_row, row_images


def picture(seed: int, size=(30, 20)) -> PILImage.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return PILImage.fromarray(pixels)


def one_image_rows(images: list, **columns) -> Dataset:
    rows = make_rows(len(images), num_images=(1,), **columns)
    kept = [{**row, "images": [image]} for row, image in zip(rows, images, strict=True)]
    features = Dataset.from_list([{k: v for k, v in row.items() if k != "images"} for row in kept]).features
    return Dataset.from_list(kept, features=Features({**features, "images": List(Image())}))


def turned_jpeg() -> bytes:
    """A picture of 30 x 20 pixels that its metadata turns upright, to 20 x 30."""
    exif, buffer = PILImage.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture(5).save(buffer, format="JPEG", exif=exif)
    return buffer.getvalue()


def test_a_blank_image_is_gray_and_of_the_upright_size(tmp_path):
    picture(1, (7, 9)).save(tmp_path / "in_root.png")
    images = [{"bytes": png(picture(0)), "path": None}, {"bytes": None, "path": "in_root.png"}, picture(2, (4, 4))]
    images.append({"bytes": turned_jpeg(), "path": None})
    data = one_image_rows(images, source=["a", "b", "c", "d"])
    control = blank(data, image_options=ImageOptions(image_root=str(tmp_path)))
    shown = [row["images"][0] for row in control]
    assert [image.size for image in shown] == [(30, 20), (7, 9), (4, 4), (20, 30)]
    assert {image.getcolors()[0] for image in shown} == {(600, (128,) * 3), (63, (128,) * 3), (16, (128,) * 3)}
    for before, after in zip(data.remove_columns("images"), control, strict=True):
        check_row(after)
        assert {name: value for name, value in after.items() if name != "images"} == before
    assert data[0]["images"][0].getcolors() is None  # the set itself is as before


def test_rows_with_a_single_image_column_and_without_images():
    rows = [{"image": row.pop("images")[0], **row} for row in make_rows(2, num_images=(1,))]
    data = Dataset.from_list([*rows, {**rows[0], "image": None}]).cast_column("image", Image())
    shown = [row["image"] for row in blank(data)]
    assert shown[0].getcolors()[0][1] == (128,) * 3 and shown[2] is None
    assert [row["image_row"] for row in swapped(data)] == [1, 0, None]


def test_frames_of_videos_are_blank_too():
    data = Dataset.from_list([{**row, "videos": [list(row["videos"][0])]} for row in video_rows((4,))])
    frames = blank(data)[0]["videos"][0]
    assert [frame.size for frame in frames] == [(40, 32)] * 4 and frames[0].getpixel((3, 3)) == (128,) * 3
    as_dicts = Dataset.from_list(video_rows((4, 3))[1:])
    video = low_resolution(as_dicts, 0.25)[0]["videos"][0]
    assert video["fps"] == 1.0 and [frame.size for frame in video["frames"]] == [(20, 16)] * 3


def test_low_resolution_leaves_a_share_of_the_pixels():
    data = one_image_rows([{"bytes": png(picture(0, (40, 20))), "path": None}, picture(1, (1, 9))])
    for share, sizes in {0.5: [(28, 14), (1, 6)], 0.25: [(20, 10), (1, 4)], 1: [(40, 20), (1, 9)]}.items():
        control = low_resolution(data, share)
        assert [row["images"][0].size for row in control] == sizes
    quarter, full = np.asarray(low_resolution(data, 0.25)[0]["images"][0]), np.asarray(picture(0, (40, 20)))
    means = full.reshape(10, 2, 20, 2, 3).mean((1, 3))  # of blocks of 2 x 2 pixels; bicubic is close
    assert np.abs(quarter - means).mean() < 20 < np.abs(full[::2, ::2] - means).mean()
    for wrong in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="`pixels` is .*; give the share of the pixels that is left"):
            low_resolution(data, wrong)


def test_an_image_that_cannot_be_read_stays_for_its_reader_to_name(tmp_path):
    data = one_image_rows([{"bytes": None, "path": str(tmp_path / "later.png")}, {"bytes": b"none", "path": None}])
    for control in (blank(data), low_resolution(data)):  # made before there is a file: images are read with their row
        assert [row["images"][0]["bytes"] for row in control] == [None, b"none"]
    control = blank(data)
    picture(0).save(tmp_path / "later.png")
    assert control[0]["images"][0].size == (30, 20)


def test_swapped_rows_show_images_of_their_source_that_are_not_their_own():
    images = [{"bytes": png(picture(seed)), "path": None} for seed in (0, 0, 0, 1, 2, 2, 3, 4)]
    data = one_image_rows(images, source=["a"] * 6 + ["b"] * 2)
    control = swapped(data, seed=3)
    partners = [row["image_row"] for row in control]
    assert partners[6:] == [7, 6] and all(partner < 6 for partner in partners[:6])
    plain = data.cast_column("images", List(Image(decode=False)))
    for row, partner, own in zip(control, partners, plain, strict=True):
        assert row["images"] == plain[partner]["images"] != own["images"] and row["chosen"] == own["chosen"]
    assert [row["image_row"] for row in swapped(data, seed=3)] == partners
    assert any([row["image_row"] for row in swapped(data, seed=seed)] != partners for seed in range(4))
    drawn = Counter(row["image_row"] for seed in range(90) for row in swapped(data.select([0, 3, 4]), seed=seed))
    assert drawn == pytest.approx({0: 90, 1: 90, 2: 90}, abs=30)  # each of two others as often


def test_swapped_rows_have_as_many_images_and_share_none():
    data = make_dataset(12, num_images=(1, 2, 0, 2), source=[*"aabbaabbaabb"])
    shared = data[1]["images"][1]
    rows = [{**row, "images": [shared, row["images"][1]]} if i == 5 else row for i, row in enumerate(data)]
    data = Dataset.from_list(rows, features=data.features)
    control = swapped(data)
    for index, row in enumerate(control):
        assert (row["image_row"] is None) == (index % 4 == 2)
        check_row(row)
        own = {png(image) for image in data[index]["images"]}
        assert own.isdisjoint(png(load_image(image)) for image in row_images(row))
    assert control[1]["image_row"] not in (5, 1)  # of which one image is the same


def test_swapped_goes_beyond_the_source_and_says_where_it_cannot(caplog):
    alone = make_dataset(3, num_images=(1, 1, 2), source=["a", "b", "c"])
    with caplog.at_level(logging.WARNING, logger="trl_dt2it"):
        assert [row["image_row"] for row in swapped(alone)] == [1, 0, None]
    assert "1 of 3 rows keep their own images" in caplog.text
    with pytest.raises(
        ValueError, match="None of the 3 rows can show the images of another: no other row has as many"
    ):
        swapped(one_image_rows([{"bytes": png(picture(0)), "path": None}] * 3))
    with pytest.raises(ValueError, match="None of the 2 rows .*: they have no images"):
        swapped(make_dataset(2, num_images=(0,)))


def test_rows_without_images_ask_about_none():
    data = make_dataset(3, num_images=(1, 2, 0), source=["a", "b", "c"])
    for before, row in zip(data, without_images(data), strict=True):
        check_row(row)
        assert "images" not in row and row["prompt"][0]["content"] == before["prompt"][0]["content"][-1:]
        assert (row["chosen"], row["source"]) == (before["chosen"], before["source"])


@pytest.mark.parametrize("control", [blank, low_resolution, swapped, without_images])
def test_a_control_goes_through_a_users_transform_and_to_workers(control):
    data = make_dataset(6, num_images=(1, 2), pair_id=[*"abcdef"])
    expected = list(control(data))
    seen = data.with_transform(lambda batch: {**batch, "chosen": batch["rejected"], "rejected": batch["chosen"]})
    for row, plain in zip(control(seen), expected, strict=True):
        assert row["pair_id"] == plain["pair_id"] and row["chosen"] == plain["rejected"]
        assert row.get("image_row") == plain.get("image_row")
    copied = pickle.loads(pickle.dumps(control(data).select([4, 1])))
    workers = {"num_workers": 1, "multiprocessing_context": "spawn"} if control is swapped else {}
    loader = DataLoader(copied, batch_size=1, collate_fn=list, **workers)
    for row, plain in zip((row for (row,) in loader), (expected[4], expected[1]), strict=True):
        assert row["pair_id"] == plain["pair_id"]
        images = [[png(load_image(image)) for image in row_images(some)] for some in (row, plain)]
        assert images[0] == images[1]
