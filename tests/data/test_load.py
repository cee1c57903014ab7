"""Loading from files and from a Hub, whatever the layout: identity, places of images, shards, streams, counts."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage

from tests.data.fixtures_as_rows import fixture
from tests.hub_server import LoopbackHub
from trl_dt2it.data import SOURCES, RowError, SourceSettings, load_preferences, prepare_shard, validate
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.messages import FEATURES


def png(size=(8, 8), colour="red") -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def povid_rows(count: int) -> list[dict]:
    (row,) = fixture("povid")
    rows = []
    for index in range(count):
        changed = json.loads(json.dumps(row))
        changed["image"] = f"./data/coco/COCO_train2014_{index}.jpg"
        changed["conversations"][1]["value"] = f"Answer {index}."
        rows.append(changed)
    return rows


def text_of(row: dict, side: str = "chosen") -> str:
    return row[side][0]["content"][0]["text"]


@pytest.fixture
def povid(tmp_path) -> Path:
    (tmp_path / "coco").mkdir()
    for index in range(7):
        (tmp_path / "coco" / f"COCO_train2014_{index}.jpg").write_bytes(png((8 + index, 8)))
    (tmp_path / "povid.json").write_text(json.dumps(povid_rows(7)))
    return tmp_path


@pytest.mark.parametrize("layout", ["list", "lines", "parquet", "disk", "folder"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file_gives_the_same_rows(povid, layout, streaming):
    rows, path = povid_rows(7), povid / "povid.json"
    if layout == "lines":
        path = povid / "povid.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif layout in ("parquet", "disk"):
        path = povid / layout
        path.mkdir()
        data = Dataset.from_list(rows)
        data.to_parquet(path / "train.parquet") if layout == "parquet" else data.save_to_disk(path)
    elif layout == "folder":
        path = povid / "files"
        path.mkdir()
        (povid / "povid.json").rename(path / "povid.json")
    pairs = load_preferences("povid", path, image_root=povid / "coco", streaming=streaming)
    assert pairs.features.keys() == FEATURES.keys()
    rows = list(pairs)
    assert [row["pair_id"] for row in rows] == [f"povid-{index}" for index in range(7)]
    assert [text_of(row) for row in rows] == [f"Answer {index}." for index in range(7)]
    assert [row["images"][0].size for row in rows] == [(8 + index, 8) for index in range(7)]
    assert {row["source"] for row in rows} == {"povid"}
    assert len({row["group_id"] for row in rows}) == 7


def test_paths_start_from_the_image_root_and_may_not_leave_it(povid, caplog):
    rows = povid_rows(3)
    rows[1]["image"] = "../../etc/passwd"
    (povid / "povid.json").write_text(json.dumps(rows))
    pairs = load_preferences(
        "povid", povid / "povid.json", image_root=povid / "coco", quarantine_file=povid / "bad" / "povid.jsonl"
    )
    assert [row["pair_id"] for row in pairs] == ["povid-0", "povid-2"]
    paths = [row["images"][0]["path"] for row in pairs.cast_column("images", [Image(decode=False)])]
    assert paths == [str(povid / "coco" / f"COCO_train2014_{index}.jpg") for index in (0, 2)]
    (bad,) = map(json.loads, (povid / "bad" / "povid.jsonl").read_text().splitlines())
    assert (bad["pair_id"], bad["row"], bad["reason"]) == ("povid-1", 1, "image_outside_root")
    assert "Quarantined 1 of 3 pairs of povid (1 image_outside_root); listed in" in caplog.text


def test_a_bad_row_raises_if_so_wished(povid):
    rows = povid_rows(2)
    rows[1]["rejected_conversations"] = rows[1]["conversations"]
    (povid / "povid.json").write_text(json.dumps(rows))
    for streaming in (False, True):
        with pytest.raises(ValueError, match="povid-1"):
            list(load_preferences("povid", povid / "povid.json", on_bad_row="raise", streaming=streaming))


def test_lines_that_are_no_rows_are_set_aside(tmp_path, caplog):
    good = json.dumps(povid_rows(1)[0])
    (tmp_path / "povid.jsonl").write_text(f"{good}\nnot json\n[1]\n\n{good}\n")
    pairs = load_preferences("povid", tmp_path / "povid.jsonl")
    assert [row["pair_id"] for row in pairs.remove_columns("images")] == ["povid-0", "povid-4"]
    assert "Quarantined 2 of 4 pairs of povid (2 not_conversational)" in caplog.text


def test_several_pairs_of_a_row_are_numbered_and_counted(tmp_path, caplog):
    (tmp_path / "v.jsonl").write_text("\n".join(json.dumps(row) for row in fixture("vlfeedback_raw")))
    pairs = load_preferences("vlfeedback", tmp_path / "v.jsonl").remove_columns("images")
    assert [row["pair_id"] for row in pairs] == ["vlfeedback-0-1", "vlfeedback-0-2"]  # 0 has a bad rating
    assert len({row["group_id"] for row in pairs}) == 1
    assert "1 tie" in caplog.text and "1 bad_rating" in caplog.text


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("streaming", [False, True])
def test_shards_together_are_the_whole(povid, number, streaming):
    def load(shard=None):
        pairs = load_preferences("povid", povid / "povid.json", shard=shard, streaming=streaming)
        return [(row["pair_id"], text_of(row)) for row in leave_images_encoded(pairs)]

    shards = [load((index, number)) for index in range(number)]
    assert sorted(row for shard in shards for row in shard) == load()
    assert all(shards)


def test_pairs_of_groups_do_not_depend_on_the_order_of_rows(tmp_path):
    first = fixture("evalmuse")
    second = json.loads(json.dumps(first).replace('"00001"', '"00002"').replace("red hat", "blue hat"))
    (tmp_path / "train_list.json").write_text(json.dumps([first[0], second[0], first[1], second[1]]))
    pairs = load_preferences("evalmuse", tmp_path / "train_list.json", reformulate=False)
    rows = list(pairs.remove_columns(["chosen_image", "rejected_image"]))
    assert [(row["pair_id"], row["caption"]) for row in rows] == [
        ("evalmuse-0", "a lady with a red hat"),
        ("evalmuse-1", "a lady with a blue hat"),
    ]
    with pytest.raises(ValueError, match="without `streaming`"):
        load_preferences("evalmuse", tmp_path / "train_list.json", streaming=True)


def test_rows_that_no_group_is_told_of_are_bad_rows_and_no_group(tmp_path, caplog):
    good, nameless = fixture("evalmuse"), fixture("evalmuse")
    for index, row in enumerate(nameless):
        row |= {"prompt": f"caption {index}", "prompt_id": None}
    lines = [*map(json.dumps, [nameless[0], good[0], nameless[1], good[1]]), '{"prompt": "cut', json.dumps({"a": 1})]
    (tmp_path / "train_list.jsonl").write_text("\n".join(lines))
    pairs = load_preferences("evalmuse", tmp_path / "train_list.jsonl", reformulate=False)
    assert pairs["caption"][:] == ["a lady with a red hat"]
    assert "Quarantined 4 of 5 pairs of evalmuse (3 missing_column, 1 not_conversational)" in caplog.text
    rows = [{key: value for key, value in row.items() if key != "element_score"} for row in [*nameless, *good]]
    Dataset.from_list(rows).to_parquet(tmp_path / "train_list.parquet")
    caplog.clear()
    assert load_preferences("evalmuse", tmp_path / "train_list.parquet", reformulate=False)["caption"][:] == [
        "a lady with a red hat"
    ]
    assert "Quarantined 2 of 3 pairs of evalmuse (2 missing_column)" in caplog.text


def test_text_to_image_pairs_become_two_image_questions(tmp_path):
    rows = [
        {"prompt": f"a square, {index}", "image_path": [f"{index}a.png", f"{index}b.png"], "human_preference": [0, 1]}
        for index in range(6)
    ]
    for row in rows:
        for path in row["image_path"]:
            (tmp_path / path).write_bytes(png())
    (tmp_path / "train.json").write_text(json.dumps(rows))
    pairs = load_preferences("hpdv2", tmp_path / "train.json", image_root=tmp_path)
    shown = [row["images"][0]["path"][-5] for row in pairs.cast_column("images", [Image(decode=False)])]
    assert sorted(shown) == ["a"] * 3 + ["b"] * 3
    raw = load_preferences("hpdv2", tmp_path / "train.json", image_root=tmp_path, reformulate=False)
    assert raw.column_names[:3] == ["caption", "chosen_image", "rejected_image"]


def test_bad_pairs_of_images_are_listed_like_other_bad_pairs(tmp_path, caplog):
    rows = [
        {"prompt": "a square", "image_path": ["a.png", "b.png"], "human_preference": [1, 0]},
        {"prompt": "a circle", "image_path": ["c.png", "c.png"], "human_preference": [1, 0]},
        {"prompt": " ", "image_path": ["d.png", "e.png"], "human_preference": [1, 0]},
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    bad = tmp_path / "bad.jsonl"
    pairs = load_preferences("hpdv2", tmp_path / "train.json", quarantine_file=bad)
    assert pairs["pair_id"][:] == ["hpdv2-0"]
    listed = [json.loads(line) for line in bad.read_text().splitlines()]
    assert [(row["pair_id"], row["reason"]) for row in listed] == [
        ("hpdv2-1", "equal_images"),
        ("hpdv2-2", "empty_caption"),
    ]
    assert "Quarantined 2 of 3 pairs of hpdv2 (1 equal_images, 1 empty_caption)" in caplog.text


def test_a_folder_of_llamafactory_is_no_folder_of_datasets(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json", "ranking": True}}))
    (tmp_path / "mine.json").write_text(json.dumps(fixture("llamafactory_sharegpt")))
    pairs = load_preferences("llamafactory", tmp_path / "mine.json")
    assert len(pairs) == 3
    with pytest.raises(ValueError, match="dataset_info.json tells which files of .* hold rows; pass one of them"):
        load_preferences("llamafactory", tmp_path)


def test_mmpr_reads_every_annotation_with_its_own_image_folder(tmp_path):
    (tmp_path / "annotations").mkdir()
    for name in ("geo", "chart"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").write_bytes(png())
        row = {"image": "1.png", "question": f"<image>\n{name}?", "chosen": "yes", "rejected": "no"}
        (tmp_path / "annotations" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    meta = {
        name: {"root": f"images/{name}", "annotation": f"annotations/{name}.jsonl", "repeat_time": 1, "length": 1}
        for name in ("geo", "chart")
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta, indent=2))
    pairs = load_preferences("mmpr", tmp_path / "meta.json", image_root=tmp_path)
    paths = [row["images"][0]["path"] for row in pairs.cast_column("images", [Image(decode=False)])]
    assert paths == [str(tmp_path / "images" / name / "1.png") for name in ("geo", "chart")]
    assert pairs["pair_id"][:] == ["mmpr-0", "mmpr-1"]


def test_videos_become_evenly_taken_frames_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "video" / "v_abc-Scene-001"
    folder.mkdir(parents=True)
    for number in range(12):
        (folder / f"frame_{number}.png").write_bytes(png((8, 8 + number)))
    (tmp_path / "dpo_pairs.jsonl").write_text(json.dumps(fixture("mm_rlhf_dpo_pairs")[1]))
    pairs = load_preferences("mm_rlhf", tmp_path / "dpo_pairs.jsonl", image_root=tmp_path, max_frames=4)
    (video,) = pairs[0]["videos"]
    assert [frame.size[1] - 8 for frame in video] == [0, 4, 7, 11]
    assert [block["type"] for block in pairs[0]["prompt"][0]["content"]] == ["video", "text"]
    # Nothing of it is remembered: the next run finds the frames that are there then.
    for number in range(2, 12):
        (folder / f"frame_{number}.png").unlink()
    pairs = load_preferences("mm_rlhf", tmp_path / "dpo_pairs.jsonl", image_root=tmp_path, max_frames=4)
    assert [frame.size[1] - 8 for frame in pairs[0]["videos"][0]] == [0, 1]


def test_links_are_followed_anew_in_each_run(povid):
    (povid / "new").mkdir()
    for file in (povid / "coco").iterdir():
        (povid / "new" / file.name).write_bytes(png((30, 30)))
    link = povid / "link"
    for folder, width in (("coco", 8), ("new", 30)):
        link.unlink(missing_ok=True)
        link.symlink_to(povid / folder)
        pairs = load_preferences("povid", povid / "povid.json", image_root=link)
        assert pairs[0]["images"][0].size[0] == width


def test_rows_of_a_format_keep_their_names_unless_told(tmp_path):
    rows = [{**row, "images": []} for row in fixture("trl_canonical")[3:]]
    Dataset.from_list(rows).save_to_disk(tmp_path)
    (row,) = load_preferences("trl", tmp_path)
    assert (row["source"], row["pair_id"]) == ("mmpr", "mmpr-2")
    (row,) = load_preferences("trl", tmp_path, source="mine")
    assert (row["source"], row["pair_id"]) == ("mine", "mmpr-2")


OWN = {"source": "mine", "is_flipped": True, "score": 1, "note": "x", "tags": ["a"], "facts": {"by": 7}, "none": None}
# A row of each layout of a file, as JSON.
ROWS_WITH_OWN = {
    "columns": {"q": "What?", "good": "A.", "bad": "B."},
    "llamafactory": {"instruction": "What?", "chosen": "A.", "rejected": "B."},
    "ms_swift": {"query": "What?", "response": "A.", "rejected_response": "B."},
    "trl": {"prompt": "What?", "chosen": "A.", "rejected": "B."},
    "mmpr": {"question": "What?", "chosen": "A.", "rejected": "B."},
    "vlfeedback": {
        "prompt": "What?",
        "image": "a.png",
        "completions": [
            {"response": text, "annotations": {"Helpfulness": {"Rating": rating}}}
            for text, rating in (("A.", "4"), ("B.", "2"), ("C.", "1"))
        ],
    },
    "hpdv3": {"prompt": "a cat", "path1": "a.png", "path2": "b.png"},
}
OPTIONS = {
    "columns": {"question": "q", "chosen": "good", "rejected": "bad"},
    "vlfeedback": {"aspects": ["Helpfulness"]},
}
LAYOUTS = [("columns", "json"), ("columns", "parquet"), *((name, "jsonl") for name in ROWS_WITH_OWN)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_columns_of_one_s_own_stay_in_every_layout(name, layout, streaming, tmp_path, caplog):
    rows, path = [{**ROWS_WITH_OWN[name], **OWN}, ROWS_WITH_OWN[name]], tmp_path / f"rows.{layout}"
    if layout == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if layout == "json" else "\n".join(map(json.dumps, rows)))
    pairs = list(leave_images_encoded(load_preferences(name, path, streaming=streaming, **OPTIONS.get(name, {}))))
    per_row = len(pairs) // 2
    assert per_row == (3 if name == "vlfeedback" else 1)
    # Objects of JSON become JSON text.
    kept = dict(OWN) if layout == "parquet" else {**OWN, "facts": '{"by": 7}'}
    del kept["none"]
    for pair in pairs[:per_row]:
        assert {column: pair[column] for column in kept} == kept
        assert pair["pair_id"].startswith(f"{name}-0")
        assert pair["group_id"].startswith(f"{name}-") or name == "trl"  # whose rows name their groups
    for pair in pairs[per_row:]:
        empty = {**dict.fromkeys(kept), "source": name} | ({"facts": {"by": None}} if layout == "parquet" else {})
        assert {column: pair[column] for column in kept} == empty or layout == "parquet"
    assert ("none" in pairs[0]) == (layout == "parquet" and streaming)
    assert "original" not in caplog.text


def test_the_source_of_rows_goes_first_unless_told_and_is_kept_then(tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROWS_WITH_OWN["columns"], **OWN}))
    (pair,) = load_preferences("columns", tmp_path / "rows.jsonl", source="ours", **OPTIONS["columns"])
    assert (pair["source"], pair["original_source"], pair["pair_id"]) == ("ours", "mine", "ours-0")
    assert pair["group_id"].startswith("ours-")
    assert "they are kept: `source` as `original_source`" in caplog.text


class Recorded(dict):
    """A row that knows which of its fields were looked at."""

    def __init__(self, row):
        super().__init__(row)
        self.seen = set()

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)


SAMPLES = {
    **{name: name for name in ("povid", "mmpr", "spa_vl", "rlaif_v", "rlhf_v", "evalmuse", "hpdv3", "hpdv2_test")},
    **{name: name for name in ("r1_reward_rl", "wildvision_battle", "pickapic_v2")},
    "columns": None,
    "dt2it_t2i": "dt2it_t2i_input",
    "hpdv2": "hpdv2_train",
    "imagereward": "imagerewarddb",
    "imagereward_pairs": "imagerewarddb_pair",
    "imagereward_rankings": None,
    "llamafactory": "llamafactory_sharegpt",
    "llava_critic": "llava_critic_pairwise",
    "llava_human_preference": "llava_human_preference_10k",
    "llava_reward": "llava_reward_t2i",
    "mm_rlhf": "mm_rlhf_dpo_pairs",
    "ms_swift": "ms_swift_rlhf",
    "omnireward_t2i": "omnireward_t2i",
    "rapidata": "rapidata_image",
    "t2i": None,
    "trl": "trl_canonical",
    "vlfeedback": "vlfeedback_hf",
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_an_adapter_reads_it_says(name):
    """Otherwise a column would be kept a second time, or one that is read would seem to be the user's."""
    source, rows = SOURCES[name], [Recorded(row) for row in fixture(SAMPLES[name])] if SAMPLES[name] else []
    for given in [rows] if source.group_by and rows else rows:
        with contextlib.suppress(RowError):
            list(source.convert(given))
    seen = {field for row in rows for field in row.seen & row.keys()}
    said = source.reads if isinstance(source.reads, tuple) else source.reads({*seen}, {})
    votes = {field for field in seen if field.startswith("weighted_results")}  # of all criteria, which stay columns
    assert said and seen - votes <= {*said, "id"}


def test_a_set_in_parts_stays_the_source_of_its_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**fixture("llava_critic_pairwise")[0], "image": "a.png"}))
    (pair,) = load_preferences("llava_critic", tmp_path / "rows.jsonl").remove_columns("images")
    assert pair["source"] == "llava_critic"
    assert pair["original_source"] == fixture("llava_critic_pairwise")[0]["source"]


def test_columns_that_mean_the_same_everywhere_are_read_in_every_layout(tmp_path):
    own = {
        "strength": 2,
        "weight": 0.5,
        "label_confidence": 0.8,
        "blind_margin": -1.5,
        "pair_id": 7,
        "group_id": "g",
        "source_id": "s",
        "source": "mine",
    }
    for name in ("columns", "llamafactory", "ms_swift", "trl", "mmpr"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps({**ROWS_WITH_OWN[name], **own}))
        (pair,) = load_preferences(name, path, **OPTIONS.get(name, {}))
        assert {key: pair[key] for key in own} == {**own, "pair_id": "7"}, name
        path.write_text(json.dumps({**ROWS_WITH_OWN[name], "margin": 3}))
        assert load_preferences(name, path, **OPTIONS.get(name, {}))["strength"][:] == [3.0], name
        path.write_text(json.dumps({**ROWS_WITH_OWN[name], "margin": 3, "strength": 2}))
        (pair,) = load_preferences(name, path, **OPTIONS.get(name, {}))
        assert (pair["strength"], pair["original_margin"]) == (2.0, 3), name
        path.write_text(json.dumps({**ROWS_WITH_OWN[name], "strength": "much"}))
        with pytest.raises(ValueError, match="1 bad_strength.*`strength` is 'much'"):
            load_preferences(name, path, **OPTIONS.get(name, {}))
        path.write_text(json.dumps({**ROWS_WITH_OWN[name], "label_confidence": 80}))
        with pytest.raises(ValueError, match="1 bad_label_confidence.*`label_confidence` is 80.0; give the prob"):
            load_preferences(name, path, **OPTIONS.get(name, {}))


def test_columns_that_mean_the_same_everywhere_are_read_in_tables_too(tmp_path):
    """A table is text, and a cell without a value is empty."""
    header = "q,good,bad,strength,weight,label_confidence,blind_margin,source,pair_id"
    (tmp_path / "rows.csv").write_text(f"{header}\nWhat?,A.,B.,2,0.5,0.8,-1.5,mine,a\nWho?,C.,D.,,,,,mine,b\n")
    for streaming in (False, True):
        pairs = list(load_preferences("columns", tmp_path / "rows.csv", streaming=streaming, **OPTIONS["columns"]))
        own = ("strength", "weight", "label_confidence", "blind_margin", "source", "pair_id")
        assert [[pair[name] for name in own] for pair in pairs] == [
            [2.0, 0.5, 0.8, -1.5, "mine", "a"],
            [None, None, None, None, "mine", "b"],
        ]


def test_columns_with_names_of_ours_are_kept_by_other_names(tmp_path, caplog):
    row = {**ROWS_WITH_OWN["columns"], "prompt": "p", "chosen": 1, "row": 2, "source": {"a": 1}, "original_row": 3}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (pair,) = load_preferences("columns", tmp_path / "rows.jsonl", **OPTIONS["columns"])
    assert text_of(pair) == "A." and pair["source"] == "columns"
    kept = {"original_prompt": "p", "original_chosen": 1, "original_row_": 2, "original_source": '{"a": 1}'}
    assert {name: pair[name] for name in (*kept, "original_row")} == {**kept, "original_row": 3}
    assert "`prompt` as `original_prompt`, `chosen` as `original_chosen`, `row` as `original_row_`" in caplog.text


def test_what_is_left_of_a_column_is_kept(tmp_path):
    row = {"q": {"text": "What?", "by": "me"}, "answers": {"good": "A.", "bad": "B."}}
    options = {"question": "q.text", "chosen": "answers.good", "rejected": "answers.bad"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    for layout, left in (("jsonl", '{"by": "me"}'), ("parquet", {"by": "me"})):
        (pair,) = load_preferences("columns", tmp_path / f"rows.{layout}", **options)
        assert pair["q"] == left and "answers" not in pair


def test_values_of_one_column_of_json_may_be_of_several_types(tmp_path, caplog):
    values = {"int": [1, 2.5], "any": [1, "one"], "large": [2**70, 1], "cut": ["\ud83d", "x"], "list": [[1], ["a"]]}
    rows = [{**ROWS_WITH_OWN["columns"], **{k: v[n] for k, v in values.items()}, "l": [[], [2]][n]} for n in (0, 1)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = load_preferences("columns", tmp_path / "rows.jsonl", **OPTIONS["columns"])
    found = {name: pairs[name][:] for name in (*values, "l")}
    assert found == {
        "int": [1.0, 2.5],
        "any": ["1", "one"],
        "large": [str(2**70), "1"],
        "cut": ["?", "x"],
        "list": ["[1]", '["a"]'],
        "l": [[], [2]],
    }


def test_a_stream_of_json_knows_its_columns_from_its_first_rows(tmp_path, caplog):
    row, path = ROWS_WITH_OWN["columns"], tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [row] * 1000 + [{**row, "late": 1}])))
    assert "late" not in list(load_preferences("columns", path, streaming=True, **OPTIONS["columns"]))[-1]
    assert "The column `late` is in none of the first 1000 rows of the stream and is not kept" in caplog.text
    path.write_text("\n".join(map(json.dumps, [{**row, "n": 1}] * 1000 + [{**row, "n": "one"}])))
    with pytest.raises(ValueError, match="`n` is 'one', but int64 in the first rows of the stream"):
        list(load_preferences("columns", path, streaming=True, **OPTIONS["columns"]))


def test_images_of_one_s_own_stay_images(tmp_path):
    row = {**ROWS_WITH_OWN["columns"], "crop": {"bytes": png((9, 8)), "path": None}}
    Dataset.from_list([row]).cast_column("crop", Image()).to_parquet(tmp_path / "rows.parquet")
    (pair,) = load_preferences("columns", tmp_path / "rows.parquet", **OPTIONS["columns"])
    assert pair["crop"].size == (9, 8)


def test_pairs_of_several_rows_keep_what_these_have_in_common(tmp_path):
    rows = [{**row, "note": "x", "by": name} for row, name in zip(fixture("evalmuse")[:2], "ab", strict=True)]
    (tmp_path / "train_list.json").write_text(json.dumps(rows))
    (pair,) = load_preferences("evalmuse", tmp_path / "train_list.json", reformulate=False).select_columns(
        ["note", "by"]
    )
    assert pair == {"note": "x", "by": None}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("rlaif", {}, "`rlaif` is no known preference set or format. Known are .*rlaif_v"),
        ("povid", {"min_confidence": 0.5}, "`povid` has no option `min_confidence`; it takes no options"),
        ("hpdv3", {"min_confidenc": 0.5}, "it takes .*min_confidence"),
        ("columns", {"question": "q"}, "`columns` needs the options chosen, rejected"),
        ("trl", {}, "This is a format and not a data set; pass `path_or_id`"),
        ("povid", {"path_or_id": "./nowhere.json"}, "There is no file or folder ./nowhere.json"),
        ("povid", {"path_or_id": "/nowhere"}, "There is no file or folder /nowhere"),
        (
            "povid",
            {"image_root": "/nowhere"},
            "`image_root` is /nowhere, but there is no such folder. Images are not .*2014",
        ),
        ("povid", {"on_bad_row": "drop"}, "`on_bad_row` is 'drop'"),
        ("povid", {"shard": (2, 2)}, "`shard` is"),
        ("povid", {"streaming": True, "quarantine_file": "x"}, "A streamed set has no `quarantine_file`"),
    ],
)
def test_misuse_is_named_before_anything_is_read(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_preferences(name, **arguments)


COCO = "Images are not shipped: give the folder of COCO's train2014 as `image_root`."


def test_an_image_that_is_not_found_says_where_those_of_the_set_are(povid, tmp_path):
    """When the set is loaded, when it is checked, under a name of one's own or not, and on a stream."""
    for streaming in (False, True):
        with pytest.raises(
            ValueError, match=r"image_outside_root.* is not inside `image_root`; move it there\. Images are"
        ):
            rows = [{**row, "image": "../x.jpg"} for row in povid_rows(1)]
            (tmp_path / "outside.json").write_text(json.dumps(rows))
            outside = {"image_root": povid / "coco", "streaming": streaming, "on_bad_row": "raise"}
            list(load_preferences("povid", tmp_path / "outside.json", **outside))
    (povid / "coco" / "COCO_train2014_3.jpg").unlink()
    pairs = load_preferences("povid", povid / "povid.json", image_root=povid / "coco")
    _, bad = validate(pairs, show=False)
    assert bad["reason"][:] == ["image_missing"]
    assert bad["message"][0].endswith(f"check the path and `image_root`. {COCO}")
    _, others = validate(pairs.remove_columns("source").add_column("source", ["mine"] * 7), show=False)
    assert others["message"][0].endswith("check the path and `image_root`.")
    settings = SourceSettings("povid", load={"path_or_id": str(povid / "povid.json"), "image_root": str(tmp_path)})
    with pytest.raises(ValueError, match=rf"No row of mine can be used; 7 have image_missing\..*{COCO}"):
        prepare_shard(tmp_path / "out", "mine", settings, 0)


PAIR = {"prompt": "q", "chosen": "a, long", "rejected": "b"}
OTHER = {"prompt": "q", "chosen": "42", "rejected": "NA"}


def texts(pairs):
    return [tuple(row[name][0]["content"][0]["text"] for name in PAIR) for row in leave_images_encoded(pairs)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("windows.jsonl", "\ufeff" + json.dumps(PAIR) + "\r\n" + json.dumps(OTHER) + "\r\n"),
        ("windows.json", "\ufeff" + json.dumps([PAIR, OTHER], indent=2)),
        ("named.json", json.dumps({"info": {"version": 1}, "data": [PAIR, OTHER]}, indent=2)),
        ("named_in_one_line.json", json.dumps({"pairs": [PAIR, OTHER]})),
        (
            "viewer.json",
            json.dumps({"features": [], "rows": [{"row_idx": n, "row": r} for n, r in enumerate((PAIR, OTHER))]}),
        ),
        ("table.csv", 'prompt,chosen,rejected\nq,"a, long",b\nq,42,NA\n'),
        ("windows.csv", '\ufeffprompt,chosen,rejected\r\nq,"a, long",b\r\nq,42,NA\r\n'),
        ("table.tsv", "prompt\tchosen\trejected\nq\ta, long\tb\nq\t42\tNA\n"),
    ],
)
def test_files_as_people_write_them(tmp_path, name, content, streaming):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    pairs = load_preferences("trl", tmp_path / name, streaming=streaming)
    assert texts(pairs) == [tuple(PAIR.values()), tuple(OTHER.values())]


@pytest.mark.parametrize("streaming", [False, True])
def test_not_a_number_is_what_python_writes(tmp_path, caplog, streaming):
    """`json.dump` writes NaN, which is no JSON: a bad strength, and no reason to refuse the file."""
    rows = [PAIR, {**OTHER, "margin": float("nan")}, {**PAIR, "prompt": "r", "other": float("inf")}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("list.json", "lines.jsonl"):
        caplog.clear()
        assert len(texts(load_preferences("trl", tmp_path / name, streaming=streaming))) == 2
        assert "bad_strength" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (json.dumps([PAIR]).encode()[:-9], "cut.json is not JSON .*line 1 column"),
        (json.dumps([PAIR], indent=1).encode()[:-2] + b",\n]", "is not JSON .*line 7 column"),  # as in JavaScript
        (json.dumps(PAIR, indent=1).encode()[:-2] + b",\n}", "is not JSON .*line 5 column"),
        (json.dumps([PAIR]).encode("utf-16"), "is in UTF-16 .* save it as UTF-8"),
        ('{"prompt": "na\u00efve"}\n'.encode("latin-1"), "is not UTF-8 .*save it as UTF-8"),
        (json.dumps({"data": [PAIR], "rows": [PAIR]}).encode(), "has several lists of rows: `data`, `rows`"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_sentence(tmp_path, content, problem, streaming):
    (tmp_path / "cut.json").write_bytes(content)
    with pytest.raises(ValueError, match=problem) as error:
        list(load_preferences("trl", tmp_path / "cut.json", streaming=streaming))
    assert "cut.json" in str(error.value) and "\n" not in str(error.value)


def test_a_row_over_several_lines_is_one_row(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(PAIR, indent=2))
    assert texts(load_preferences("trl", tmp_path / "one.json")) == [tuple(PAIR.values())]
    # A first line that is damaged costs no more than itself.
    (tmp_path / "lines.json").write_text(json.dumps(PAIR)[:-5] + "\n" + json.dumps(OTHER))
    assert texts(load_preferences("trl", tmp_path / "lines.json")) == [tuple(OTHER.values())]
    (tmp_path / "bad.csv").write_text('prompt,chosen,rejected\nq,a,b,c,d\n"')
    with pytest.raises(ValueError, match="bad.csv cannot be read as a table"):
        load_preferences("trl", tmp_path / "bad.csv")


def test_an_archive_has_to_be_unpacked_first(tmp_path):
    (tmp_path / "annotations.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="Unpack annotations.zip first"):
        load_preferences("mmpr", tmp_path)


def test_sources_for_non_commercial_use_say_so(tmp_path, caplog):
    (tmp_path / "r.jsonl").write_text(
        json.dumps({"question": "What?", "chosen": "A.", "rejected": "B.", "image": "x"})
    )
    load_preferences("rlaif_v", tmp_path / "r.jsonl")
    assert "not for commercial use" in caplog.text


def test_every_source_tells_its_licence():
    assert all(source.licence for source in SOURCES.values())
    assert {name for name, source in SOURCES.items() if source.is_non_commercial} >= {"rlaif_v", "rlhf_v"}


_FROM_HUB = """
from trl_dt2it.data import load_preferences
pairs = load_preferences("{name}", "loopback/{name}", {options})
print([(row["pair_id"], row["chosen"][0]["content"][0]["text"]) for row in pairs.remove_columns("images")])
"""


def test_hub_ids_are_read_raw_files_and_parquet_alike(tmp_path):
    rlaif = Dataset.from_list(fixture("rlaif_v")).cast_column("image", Image())
    rlaif.to_parquet(tmp_path / "train.parquet")
    with LoopbackHub() as hub:
        hub.add_dataset("loopback/rlaif_v", {"data/train-00000.parquet": (tmp_path / "train.parquet").read_bytes()})
        hub.add_dataset(
            "loopback/vlfeedback",
            {"vlfeedback_80k.jsonl": json.dumps(fixture("vlfeedback_raw")[0]).encode(), "VLFeedback.py": b"1 / 0"},
        )
        out = {}
        for name in ("rlaif_v", "vlfeedback"):
            code = _FROM_HUB.format(name=name, options="")
            out[name] = subprocess.run(
                [sys.executable, "-c", code], env=hub.env(), check=True, capture_output=True, text=True
            ).stdout.splitlines()[-1]
    assert "('rlaif_v-0', 'A red cup is on the table.')" in out["rlaif_v"]
    assert out["vlfeedback"].count("vlfeedback-0-") == 2


def test_a_table_of_captions_and_two_pictures_loads_in_one_call(tmp_path):
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(png((8 + index, 8)))
    rows = [
        {"text": f"a cat {n}", "win": f"{2 * n}.png", "lose": f"{2 * n + 1}.png", "gap": n, "prompt": "?"}
        for n in range(3)
    ]
    rows += [{"text": "a dog", "win": "../0.png", "lose": "1.png", "gap": 1}, {"text": "a dog", "win": "0.png"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"caption": "text", "chosen_image": "win", "rejected_image": "lose", "strength": "gap"}
    for name in ("t2i", "columns"):
        for streaming in (False, True):
            pairs = load_preferences(
                name, tmp_path / "pairs.jsonl", image_root=tmp_path, source="mine", streaming=streaming, **names
            )
            found = list(leave_images_encoded(pairs))
            assert [(row["t2i_caption"], row["strength"], row["pair_id"]) for row in found] == [
                (f"a cat {n}", float(n), f"mine-{n}") for n in range(3)
            ]
            for n, row in enumerate(found):
                paths = [str(tmp_path / f"{2 * n + side}.png") for side in (0, 1)]
                assert sorted(image["path"] for image in row["images"]) == paths
                assert (row["images"][0]["path"] == paths[0]) == (text_of(row) == row["t2i_first"])
    # With the names that `reformulate_t2i` expects, and those of the row kept.
    rows = [{"caption": "x", "chosen_image": "0.png", "rejected_image": "1.png", "pair_id": "p", "source_id": 3}]
    (tmp_path / "plain.json").write_text(json.dumps(rows))
    (row,) = load_preferences("t2i", tmp_path / "plain.json", image_root=tmp_path, reformulate=False)
    assert (row["caption"], row["pair_id"], row["source_id"], row["strength"]) == ("x", "p", "3", None)
    with pytest.raises(ValueError, match="there is no column `win`; the row has caption, chosen_image"):
        load_preferences("t2i", tmp_path / "plain.json", chosen_image="win")
