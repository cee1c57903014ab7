"""Rows of benchmarks from files, from memory and from a Hub: whole, unique, in order; videos; what is left out."""

import base64
import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, List, Value

from tests.data.fixtures_as_rows import fixture
from tests.hub_server import LoopbackHub
from trl_dt2it.data import RowError, check_row
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.evaluation import BENCHMARKS, read_benchmark
from trl_dt2it.evaluation import harness as reading_module

from .benchmark_rows import mm_rlhf_rows, png, vl_rows


VL, MM, MMRLHF = "vl-rewardbench", "multimodal-rewardbench", "mm-rlhf-rewardbench"
COLUMNS = ["prompt", "chosen", "rejected", "images", "strength", "pair_id", "group_id", "source", "source_id"]


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(reading_module.logger, "warning", said.append)
    return said


def rows_of(dataset: Dataset) -> list[dict]:
    return list(leave_images_encoded(dataset))


def test_the_rows_are_canonical_and_named_for_good():
    rows = fixture("vl_rewardbench")
    dataset = read_benchmark(VL, rows)
    assert dataset.column_names == [*COLUMNS, "category", "row_index"]
    assert dataset["row_index"][:] == list(range(8)) and set(dataset["source"]) == {VL}
    assert dataset["source_id"][:] == [row["id"] for row in rows]
    assert len(set(dataset["pair_id"])) == 8  # though two rows of the fixture are equal, id and all
    assert dataset["pair_id"][6] == dataset["pair_id"][5] + "#2"
    assert len(set(dataset["group_id"])) == 1  # one question about one image
    for row in rows_of(dataset):
        check_row(row)
    # Another order, and another number of rows: the same names.
    shuffled = random.Random(0).sample(rows[:6], 6)
    again = read_benchmark(VL, shuffled)
    assert {r["source_id"]: r["pair_id"] for r in again} == {
        r["source_id"]: r["pair_id"] for r in dataset.select(range(6))
    }
    assert read_benchmark(VL, dataset) is dataset


@pytest.mark.parametrize("place", ["", "images", "pictures"])
def test_the_authors_own_file_of_vl_rewardbench_names_its_images(place, tmp_path, warnings):
    (row,) = vl_rows(random.Random(1), 1)
    picture = row.pop("image")
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "1.png").write_bytes(picture)
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({**row, "image_path": "1.png", "models": ["a", "b"], "judge": "nobody"}))
    root = tmp_path / place if place == "pictures" else None  # where nobody would look for them
    (read,) = rows_of(read_benchmark(VL, file, image_root=root))
    assert read["images"] == [{"bytes": None, "path": str(tmp_path / place / "1.png")}] and not warnings
    if place == "pictures":
        assert len(read_benchmark(VL, file)) == 1  # scores of another model may be aligned with the rows
        assert warnings == [
            "Image files of 1 of 1 rows of VL-RewardBench are not there, such as 1.png; pass the folder that their "
            "paths start from as `image_root`."
        ]


def test_every_layout_of_vl_rewardbench_gives_the_same_rows(tmp_path):
    rows = vl_rows(random.Random(1), 12)
    rows[3]["id"] = rows[7]["id"] = rows[0]["id"]  # as in the real set, with other contents
    wanted = rows_of(read_benchmark(VL, rows))
    assert len({row["pair_id"] for row in wanted}) == 12
    features = Features(
        {"id": Value("string"), "query": Value("string"), "response": List(Value("string"))}
        | {"human_ranking": List(Value("int64")), "image": Image()}
    )
    data = Dataset.from_list(rows, features=features)
    data.to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert rows_of(read_benchmark(VL, data)) == wanted
    assert rows_of(read_benchmark(VL, tmp_path)) == wanted
    with open(tmp_path / "vl_rewardbench.tsv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "image", "question", "response", "answer", "category"])
        for row in rows:
            image = base64.b64encode(row["image"]).decode()
            writer.writerow([row["id"], image, row["query"], row["response"], row["human_ranking"], ""])
    assert rows_of(read_benchmark(VL, tmp_path / "vl_rewardbench.tsv")) == wanted


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_multimodal_rewardbench_finds_its_images_beside_its_rows(tmp_path, suffix):
    rows = fixture("multimodal_rewardbench")
    for row in rows:
        file = tmp_path / row["Image"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png())
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / f"all_data.{suffix}"
    file.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    dataset = read_benchmark(MM, file)
    assert dataset["category"][:] == ["correctness", "preference", "knowledge", "math", "coding", "safety", "vqa"]
    for row, given in zip(rows_of(dataset), rows, strict=True):
        assert row["images"] == [{"bytes": None, "path": str((tmp_path / given["Image"]).resolve())}]
    assert dataset[0]["images"][0].size == (32, 28)
    with pytest.raises(ValueError, match="image_outside_root.*not inside `image_root`"):
        read_benchmark(MM, [rows[0] | {"Image": "../secret.png"}], image_root=tmp_path)


@pytest.fixture
def mm_rlhf(tmp_path) -> Path:
    rows = mm_rlhf_rows(random.Random(4), 12)
    (tmp_path / "mm_reward_bench.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "not rows of the benchmark"}')
    for row in rows:
        if "image" in row:
            file = tmp_path / "images" / row["image"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png())
        else:
            folder = tmp_path / "images" / row["video"]
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(11):
                (folder / f"frame_{number}.png").write_bytes(png((number, 0, 0)))
    return tmp_path


def test_frames_of_a_video_are_images_in_the_order_of_their_numbers(mm_rlhf, warnings):
    given = [json.loads(line) for line in (mm_rlhf / "mm_reward_bench.jsonl").read_text().splitlines() if line]
    dataset = read_benchmark(MMRLHF, mm_rlhf, max_frames=3)
    assert warnings == [] and len(dataset) == len(given) and "videos" not in dataset.column_names
    assert dataset["group_id"][:] == [f"{MMRLHF}-{row['id']}" for row in given]
    index = next(i for i, row in enumerate(given) if "video" in row)
    row = leave_images_encoded(dataset)[index]
    names = [Path(image["path"]).name for image in row["images"]]
    assert names == ["frame_0.png", "frame_5.png", "frame_10.png"] and row["category"] == "video"
    assert [block["type"] for block in row["prompt"][0]["content"]] == ["image", "image", "image", "text"]
    check_row(row)

    as_videos = read_benchmark(MMRLHF, mm_rlhf, videos="video")
    row = leave_images_encoded(as_videos)[index]
    assert row["images"] == [] and len(row["videos"]) == 1 and len(row["videos"][0]) == 11
    assert [block["type"] for block in row["prompt"][0]["content"]] == ["video", "text"]
    check_row(row)


def test_without_all_frames_the_rows_about_videos_are_left_out_and_counted(mm_rlhf, warnings):
    given = [json.loads(line) for line in (mm_rlhf / "mm_reward_bench.jsonl").read_text().splitlines() if line]
    num_videos = sum("video" in row for row in given)
    skipped = read_benchmark(MMRLHF, mm_rlhf, videos="skip")
    assert len(skipped) == len(given) - num_videos and "video" not in skipped["category"]
    (said,) = warnings
    assert (
        said.startswith(f"Dropped {num_videos} of {len(given)} rows of MM-RLHF-RewardBench,") and "image-only" in said
    )
    folder = next((mm_rlhf / "images" / "video").iterdir())
    for frame in folder.iterdir():
        frame.unlink()
    folder.rmdir()
    partly = read_benchmark(MMRLHF, mm_rlhf)  # the frames of the other videos are there, but half a category is none
    assert partly["pair_id"][:] == skipped["pair_id"][:] and "frames are not there" in warnings[1]
    assert partly["row_index"][:] == [i for i, row in enumerate(given) if "image" in row]
    with pytest.raises(ValueError, match="no_frames.*is no folder of frames"):
        read_benchmark(MMRLHF, mm_rlhf, videos="images")


@pytest.mark.parametrize(
    ("name", "rows", "counts"),
    [
        ("mmrb2-t2i", fixture("mmrb2_hf")[:1], {"chosen_first": 1, "chosen_second": 1}),
        ("mmrb2-t2i", fixture("mmrb2_local")["pairs"], {"chosen_first": 1, "chosen_second": 1}),
        ("omni-rewardbench-t2i", fixture("omnirewardbench_t2i"), {"chosen_first": 1, "chosen_second": 1}),
        ("hpdv2-test", fixture("hpdv2_test"), {"": 3}),
        ("hpdv3-test", fixture("hpdv3")[1:], {"": 1}),
        ("imagereward-test", fixture("imagerewarddb"), {"": 1}),
    ],
)
def test_a_text_to_image_pair_is_a_question_about_two_images(name, rows, counts):
    dataset = read_benchmark(name, rows)
    categories = dataset["category"][:]
    assert {one: categories.count(one) for one in categories} == counts
    assert len(set(dataset["pair_id"])) == len(dataset) and dataset["row_index"][:] == list(range(len(dataset)))
    for row in rows_of(dataset):
        check_row(row)
        assert len(row["images"]) == 2
    if "" not in counts:
        first, second = rows_of(dataset)
        assert first["images"] == second["images"][::-1]
        assert (first["chosen"], first["rejected"]) == (second["rejected"], second["chosen"])
        assert first["group_id"] == second["group_id"]
    both = read_benchmark(name, rows, both_orders=True)
    assert len(both) == 2 * len(read_benchmark(name, rows, both_orders=False))


def test_rows_in_memory_are_grouped_by_keys_of_any_type():
    (row,) = fixture("imagerewarddb")[:1]
    names = [1, "1", 1, "1", None, None, "", ""]  # rows without a key make no pair
    rows = [
        {**row, "prompt_id": name, "rank": rank, "image": png((20 * rank, 40, 90))} for rank, name in enumerate(names)
    ]
    found = read_benchmark("imagereward-test", rows, on_bad_row="leave_out")
    assert len(found) == 2 and len(set(found["group_id"])) == 1  # of one caption


def test_a_nested_file_and_paths_of_images(tmp_path):
    (tmp_path / "t2i.json").write_text(json.dumps(fixture("mmrb2_local"), indent=1))
    dataset = read_benchmark("mmrb2-t2i", tmp_path / "t2i.json", image_root=tmp_path)
    images = [image["path"] for image in rows_of(dataset)[0]["images"]]
    assert images == [str((tmp_path / "images" / name).resolve()) for name in ("a.png", "b.png")]


def test_a_pair_that_people_could_not_decide_is_left_out_and_a_bad_row_is_an_error(warnings):
    rows = fixture("omnirewardbench_ti2t")
    assert read_benchmark("omni-rewardbench-ti2t", rows)["source_id"][:] == ["ti2t_0"]
    assert warnings == ["Dropped 1 of 2 pairs of Omni-RewardBench, answers about images (1 tie)."]
    broken = [rows[0], rows[0] | {"response2": None}]
    with pytest.raises(ValueError, match="1 of 2 pairs of Omni-RewardBench.*missing_column.*`response2`.*on_bad_row"):
        read_benchmark("omni-rewardbench-ti2t", broken)
    assert len(read_benchmark("omni-rewardbench-ti2t", broken, on_bad_row="leave_out")) == 1
    assert warnings[1].startswith("Dropped 1 of 2") and warnings[1].endswith("(1 missing_column).")
    edits = fixture("mmrb2_hf")
    with pytest.raises(ValueError, match="text-to-image part"):
        read_benchmark("mmrb2-t2i", edits)
    assert len(read_benchmark("mmrb2-t2i", edits, on_bad_row="leave_out")) == 2
    # Nothing is left, and the way out is not what the user has already asked for.
    with pytest.raises(ValueError, match=r"1 of 1 pairs.*leave this row out\. Fix the rows\.$"):
        read_benchmark("mmrb2-t2i", edits[1:], on_bad_row="leave_out")


@pytest.mark.parametrize(
    ("name", "rows", "kwargs", "message"),
    [
        ("vlrb", None, {}, "`vlrb` is no known benchmark"),
        ("omni-rewardbench-ti2t", None, {}, "no known place on the Hub"),
        (VL, "nowhere.parquet", {}, "no file or folder nowhere.parquet"),
        (VL, [{}], {"image_root": "nowhere"}, "`image_root` is nowhere, but there is no such folder"),
        (VL, [{}], {"videos": "no"}, "`videos` is 'no'"),
        (VL, [{}], {"on_bad_row": "drop"}, "`on_bad_row` is 'drop'"),
        (VL, fixture("vl_rewardbench"), {"criteria": True}, "no option `criteria`"),
    ],
)
def test_misuse_is_one_clear_sentence(name, rows, kwargs, message):
    with pytest.raises(ValueError, match=message):
        read_benchmark(name, rows, **kwargs)


def test_every_benchmark_has_a_name_a_licence_and_an_adapter():
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name and benchmark.title and benchmark.source.licence
        assert benchmark.source.is_t2i or not benchmark.both_orders
    assert issubclass(RowError, ValueError)


_FROM_HUB = """
from trl_dt2it.evaluation import read_benchmark
rows = read_benchmark({name!r}, {repo!r})
print(len(rows), rows[0]["category"], rows[0]["images"][0].size)
"""


def test_from_a_hub(tmp_path, mm_rlhf):
    vl = vl_rows(random.Random(2), 3)
    Dataset.from_list(vl).cast_column("image", Image()).to_parquet(tmp_path / "test.parquet")
    files = {
        str(file.relative_to(mm_rlhf)): file.read_bytes()
        for file in mm_rlhf.rglob("*")
        if file.is_file() and file.suffix != ".parquet"
    }
    with LoopbackHub() as hub:
        hub.add_dataset("loopback/vl", {"data/test-00000-of-00001.parquet": (tmp_path / "test.parquet").read_bytes()})
        hub.add_dataset("loopback/mm_rlhf", files)
        printed = []
        for name, repo in ((VL, "loopback/vl"), (MMRLHF, "loopback/mm_rlhf")):
            code = _FROM_HUB.format(name=name, repo=repo)
            done = subprocess.run([sys.executable, "-c", code], env=hub.env(), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout.splitlines()[-1])
    num_rows = len([line for line in (mm_rlhf / "mm_reward_bench.jsonl").read_text().splitlines() if line])
    assert printed[0].startswith("3 ") and printed[0].endswith("(32, 28)")
    assert printed[1].startswith(f"{num_rows} ") and printed[1].endswith("(32, 28)")
