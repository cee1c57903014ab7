"""What is written for others holds no file that lies outside of the data set, whichever way it is written."""

import io
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, LargeList, List, Value
from PIL import Image as PILImage

from trl_dt2it.cli import load_recipe
from trl_dt2it.data import ImageOptions, RowError, prepare_shard, read_settings, write_parquet
from trl_dt2it.data.export import find_unpublishable, parquet_shards, published_features, refuse_unpublishable


SECRET = b"root:x:0:0 of this machine alone"


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder `photos` with a picture, a note and a link out of it; beside it, a secret that is a picture too."""
    photos = tmp_path / "photos"
    photos.mkdir()
    PILImage.new("RGB", (8, 8), "red").save(photos / "a.png")
    (photos / ".env").write_bytes(SECRET)
    secret = io.BytesIO()
    PILImage.new("RGB", (8, 8), "blue").save(secret, "PNG")
    (tmp_path / "secret.png").write_bytes(secret.getvalue() + SECRET)
    (tmp_path / "photos2").mkdir()  # its name begins like that of the root
    (tmp_path / "photos2/b.png").write_bytes(secret.getvalue() + SECRET)
    (photos / "link.png").symlink_to(tmp_path / "secret.png")
    (photos / "folder").symlink_to(tmp_path)
    return tmp_path


def outside(place: Path) -> dict[str, str]:
    """Ways out of the folder `photos`, and the reason for which each is refused."""
    paths = [str(place / "secret.png"), "../secret.png", "x/../../secret.png", "link.png", "folder/secret.png"]
    paths += [str(place / "photos2/b.png"), f"{place}/photos/../secret.png", "/etc/passwd", "//etc/passwd"]
    addresses = [f"file://{place}/secret.png", "FILE:///etc/passwd", "http://127.0.0.1:9/a.png", "s3://bucket/a.png"]
    addresses += [f"zip://a.png::{place}/secret.png", "data:image/png;base64,AAAA", "hf://datasets/me/x/a.png"]
    return {**dict.fromkeys(paths, "image_outside_root"), **dict.fromkeys(addresses, "image_url")}


IMAGES = {
    "images": (List(Image(decode=False)), lambda path: [{"bytes": None, "path": path}]),
    "decoded": (List(Image()), lambda path: [{"bytes": None, "path": path}]),
    "image": (Image(), lambda path: {"bytes": None, "path": path}),
    "chosen_image": (Image(mode="RGB"), lambda path: {"bytes": None, "path": path}),
    "videos": (List(List(Image())), lambda path: [[{"bytes": None, "path": path}]]),
    "about": ({"more": LargeList(Image())}, lambda path: {"more": [{"bytes": None, "path": path}]}),
}


def rows_with(column: str, paths: list[str]) -> Dataset:
    feature, value = IMAGES[column]
    features = Features({"pair_id": Value("string"), column: feature})
    columns = {"pair_id": [f"p{number}" for number in range(len(paths))], column: [value(path) for path in paths]}
    return Dataset.from_dict(columns, features=features)


def write_one(rows, out, options):
    write_parquet(rows, out, image_options=options)


def shards_of(rows, out, options):
    list(parquet_shards(rows, options, 9))


@pytest.mark.parametrize("column", IMAGES)
def test_no_file_from_outside_gets_into_a_file_for_others(place, column, tmp_path):
    options, out = ImageOptions(image_root=str(place / "photos")), tmp_path / "out.parquet"
    ways = outside(place)
    for path, reason in ways.items():
        rows = rows_with(column, ["a.png", path])
        for write in (write_one, shards_of):
            with pytest.raises(RowError, match="^p1: the image ") as error:
                write(rows, out, options)
            assert error.value.reason == reason
        assert not out.exists() and not list(tmp_path.glob("*.part"))
        assert {row: one.reason for row, one in find_unpublishable(rows, options).items()} == {1: reason}
    # Nobody said where files may come from: none may, also of those that lie where they should.
    for path in ["a.png", str(place / "photos/a.png"), *ways]:
        with pytest.raises(RowError, match="p0: the image ") as error:
            write_parquet(rows_with(column, [path]), out)
        assert error.value.reason == ways.get(path, "image_outside_root")
    with pytest.raises(RowError, match=r"^17 of 18 rows have an image that must not be written; the first, p1: "):
        refuse_unpublishable(rows_with(column, ["a.png", *ways, "/etc/shadow"]), options)
    write_parquet(rows_with(column, ["a.png"]), out, image_options=options)
    content = out.read_bytes()
    assert (place / "photos/a.png").read_bytes() in content and str(place).encode() not in content


def test_only_images_are_taken_out_of_the_root(place, tmp_path):
    options = ImageOptions(image_root=str(place / "photos"))
    with pytest.raises(RowError, match="p0: the image '.env' is not an image, and is not published") as error:
        write_parquet(rows_with("images", [".env"]), tmp_path / "out.parquet", image_options=options)
    assert error.value.reason == "image_corrupt" and not (tmp_path / "out.parquet").exists()
    # One that is larger than a model may read is one all the same.
    write_parquet(
        rows_with("images", ["a.png"]),
        tmp_path / "out.parquet",
        image_options=ImageOptions(image_root=str(place / "photos"), max_image_pixels=9),
    )


def test_hosts_that_are_allowed_open_no_files(place):
    """With `allowed_hosts` and without `image_root`, every path used to be read."""
    with pytest.raises(RowError, match="say by `image_root`"):
        list(parquet_shards(rows_with("images", ["/etc/passwd"]), ImageOptions(allowed_hosts=("a.org",)), 9))


def test_texts_that_become_images_are_looked_at_too(place):
    rows = Dataset.from_dict({"pair_id": ["x", "y"], "images": [["../secret.png"], ["a.png"]]})
    assert published_features(rows.features)["images"] == List(Image())
    options = ImageOptions(image_root=str(place / "photos"))
    assert not find_unpublishable(rows, options)
    assert list(find_unpublishable(rows, options, paths_are_images=True)) == [0]
    write_parquet(rows, place / "paths.parquet", image_options=options)
    assert pq.read_table(place / "paths.parquet")["images"].to_pylist() == [["../secret.png"], ["a.png"]]
    with pytest.raises(RowError, match="x: the image '../secret.png' is not inside `image_root`"):
        write_parquet(rows, place / "images.parquet", image_root=place / "photos")
    write_parquet(rows.select([1]), place / "images.parquet", image_root=place / "photos")
    (image,) = pq.read_table(place / "images.parquet")["images"].to_pylist()[0]
    assert image == {"bytes": (place / "photos/a.png").read_bytes(), "path": "a.png"}


def test_a_mixture_takes_no_files_from_outside(place, tmp_path):
    """Its shards hold images: a row that names any other file is listed with its reason."""

    def line(path, number):
        text = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"What is it, {number}?"}]}
        sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        return json.dumps({"prompt": [text], **sides, "images": [path]}) + "\n"

    ways = list(outside(place))
    given = ["a.png", *ways]
    (place / "rows.jsonl").write_text("".join(line(path, number) for number, path in enumerate(given)))
    source = {"name": "trl", "path_or_id": str(place / "rows.jsonl"), "image_root": str(place / "photos")}
    (settings,) = read_settings({"own": source}).values()
    record, _ = prepare_shard(tmp_path / "out", "own", settings, 0)
    # What stands in a `data:` address is within the row, and here no image.
    expected = {"image_outside_root": 9, "image_url": len(ways) - 10, "image_corrupt": 1}
    assert record["clean"] == 1 and record["reasons"] == expected
    table = pq.read_table(tmp_path / "out/shards/own/00000-of-00001.parquet")
    assert table["images"].to_pylist()[0][0]["bytes"] == (place / "photos/a.png").read_bytes()
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or SECRET not in file.read_bytes()
    # Nobody says where the files of a set may lie: neither may one that is where the command runs.
    del settings.load["image_root"]
    with pytest.raises(ValueError, match=re.escape("No row of own can be used")) as error:
        prepare_shard(tmp_path / "other", "own", settings, 0)
    assert "say by `image_root`" in str(error.value)
    assert not list((tmp_path / "other").rglob("*.parquet"))


@pytest.mark.parametrize("recipe", ["score_data", "build_dpo_pairs", "construct_preferences"])
def test_recipes_refuse_before_they_work(place, tmp_path, recipe):
    """Nothing is loaded, sampled, scored or paid for whose result could not be written."""
    said = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "q"}]}]
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row = {"pair_id": "p", "prompt": said, **sides, "answers": ["a", "b"], "candidates": [{"text": "a"}]}
    images = [{"bytes": None, "path": str(place / "secret.png")}]
    features = Dataset.from_list([row]).features
    rows = Dataset.from_list([{**row, "images": images}], features=Features({**features, "images": List(Image())}))
    rows.to_parquet(tmp_path / "rows.parquet")
    flags = ["--dataset_name", str(tmp_path / "rows.parquet"), "--output_dir", str(tmp_path / "out")]
    flags += {
        "score_data": ["--model", "nowhere"],
        "build_dpo_pairs": ["--reward_model", "nowhere"],
        "construct_preferences": ["--judge", '{"base_url": "http://127.0.0.1:9/v1", "model": "m"}'],
    }[recipe]
    module = load_recipe(recipe)
    for more, message in (
        ([], "is a file; say by `image_root`"),
        (["--image_root", str(place / "photos")], "not inside"),
    ):
        with pytest.raises(
            RowError, match=f"^1 of 1 rows have an image that must not be written; the first, p: .*{message}"
        ):
            module.main(*module.make_parser().parse_args_and_config([*flags, *more]))
    assert not list((tmp_path / "out").glob("*.json*"))
