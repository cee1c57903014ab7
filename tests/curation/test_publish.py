"""A curated set goes to a Hub on loopback with its ledger, and comes back from there as it was."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image, List, Value, load_dataset
from huggingface_hub import DatasetCard
from PIL import Image as PILImage

from trl_dt2it.curation import CurationLedger
from trl_dt2it.curation.publish import curated_card, push_curated
from trl_dt2it.data import ImageOptions, RowError
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.export import parquet_shards, published_features

from ..hub_server import LoopbackHub
from ..rows import make_dataset


ROOT = Path(__file__).parents[2]
N = 7
SOURCES = ["rlaif_v", "rlaif_v", "own", "own", "own", "own", "spa_vl"]
ACTIONS = {1: ["keep", "flip", "drop", "flip", "keep", "keep", "drop"], 2: ["keep", "drop", "keep", "keep", "keep"]}
# Round 2 speaks of the first five; the third comes back.
FLIPPED, DROPPED = [3], [1, 6]

PUSH = """
import sys
from datasets import load_from_disk
from trl_dt2it.curation import CurationLedger, push_curated

rows, ledger = load_from_disk(sys.argv[1]), CurationLedger(sys.argv[2])
push_curated(rows, ledger, "me/curated", with_dropped=True, licences={"own": "CC-BY-4.0"}, max_shard_bytes=1)
if len(sys.argv) > 3:
    ledger.undo(2)
    push_curated(rows, ledger, "me/curated", revision="undone", labels="soft", licences={"own": "CC-BY-4.0"})
"""
LOAD = """
import json, sys
from datasets import load_dataset
from huggingface_hub import DatasetCard, snapshot_download
from trl_dt2it.curation import CurationLedger

DatasetCard.load("me/curated").validate()
pairs = load_dataset("me/curated", split="train")
dropped = load_dataset("me/curated", "dropped", split="train")
folder = snapshot_download("me/curated", repo_type="dataset", allow_patterns="ledger/*")
state = CurationLedger(f"{folder}/ledger").state().to_pydict()
pairs.to_parquet(sys.argv[1])
print(json.dumps({"ids": pairs["pair_id"][:], "dropped": dropped["pair_id"][:], "state": state}))
"""


@pytest.fixture(scope="module")
def pool() -> Dataset:
    return make_dataset(N, source=SOURCES, pair_id=[f"pair-{i}" for i in range(N)])


@pytest.fixture
def ledger(pool, tmp_path) -> CurationLedger:
    ledger = CurationLedger(tmp_path / "ledger")
    for number, actions in ACTIONS.items():
        ids = pool["pair_id"][: len(actions)]
        settings = {"rule": "flip `negative`", "digest": "d"}
        ledger.append(
            number,
            "flip",
            pair_ids=ids,
            actions=actions,
            sources=SOURCES[: len(ids)],
            models=["a|b"],
            settings=settings,
        )
    return ledger


def client(hub: LoopbackHub, code: str, *args: object) -> str:
    env = {**os.environ, **hub.env(), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def pixels(value) -> bytes:
    return PILImage.open(io.BytesIO(value["bytes"])).convert("RGB").tobytes()


def test_what_is_pushed_is_loaded_again(pool, ledger, tmp_path):
    pool.save_to_disk(tmp_path / "pool")
    with LoopbackHub() as hub:
        client(hub, PUSH, tmp_path / "pool", ledger.directory, "undone")
        answer = json.loads(client(hub, LOAD, tmp_path / "back.parquet").splitlines()[-1])
        files = hub.files("me/curated", repo_type="dataset")
        undone = hub.files("me/curated", "undone", repo_type="dataset")
    kept = [row for row in range(N) if row not in DROPPED]
    assert answer["ids"] == [f"pair-{row}" for row in kept]
    assert answer["dropped"] == [f"pair-{row}" for row in DROPPED]
    expected = ledger.redo(2) or ledger.state().to_pydict()
    assert answer["state"] == expected
    back = leave_images_encoded(load_dataset("parquet", data_files=str(tmp_path / "back.parquet"), split="train"))
    for row, place in zip(leave_images_encoded(pool).select(kept), range(len(kept)), strict=True):
        index = kept[place]
        sides = ("rejected", "chosen") if index in FLIPPED else ("chosen", "rejected")
        assert [back[place][side] for side in ("chosen", "rejected")] == [row[side] for side in sides]
        assert back[place]["curation_flipped"] == (index in FLIPPED) and back[place]["prompt"] == row["prompt"]
        assert list(map(pixels, back[place]["images"])) == list(map(pixels, row["images"]))
    # One commit each: the second push is of the branch alone, and its ledger says what was undone.
    names = {name for name in files if name.startswith("ledger/")}
    assert names == {"ledger/ledger.json", "ledger/round-00001-flip.parquet", "ledger/round-00002-flip.parquet"}
    assert set(undone) == {*names, "README.md", "data/train-00000.parquet"}  # `dropped` is gone from there
    assert json.loads(undone["ledger/ledger.json"])["events"] and not json.loads(files["ledger/ledger.json"])["events"]
    pushed = pq.read_table(io.BytesIO(undone["data/train-00000.parquet"]))
    assert pushed["pair_id"].to_pylist() == [f"pair-{row}" for row in (0, 1, 3, 4, 5)]
    assert pushed["label_confidence"].to_pylist() == [None] * 5  # people and plain actions say nothing of doubt
    assert "label_confidence" not in back.column_names


def test_the_card_says_where_pairs_come_from(pool, ledger):
    card = curated_card(
        pool, ledger, "me/curated", columns=["prompt", "chosen"], with_dropped=True, licences={"own": "CC-BY-4.0"}
    )
    again = DatasetCard(str(card))
    assert again.data.license == ["cc-by-4.0", "cc-by-nc-4.0"] and again.data.size_categories == "n<1K"
    assert [config["config_name"] for config in again.data.configs] == ["default", "dropped"]
    assert again.data.source_datasets == ["openbmb/RLAIF-V-Dataset", "sqrti/SPA-VL"]
    rows = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in card.text.splitlines() if line.startswith("|")]
    table = {row[0].split("](")[0].strip("["): row[1:] for row in rows}
    # Pairs, kept, flipped, left out, licence: by hand.
    assert table["own"] == ["4", "4", "1", "0", "CC-BY-4.0"]
    assert table["rlaif\\_v"] == ["2", "1", "0", "1", "CC-BY-NC-4.0"]
    assert table["spa\\_vl"] == ["1", "0", "0", "1", "CC-BY-4.0"]
    assert [row for row in rows if row[1:2] == ["flip"]] == [
        ["1", "flip", "7", "3", "2", "2"],
        ["2", "flip", "5", "4", "0", "1"],
    ]
    assert "Of 7 pairs, 5 are kept, 1 of them with chosen and rejected exchanged, and 2 are left out" in card.text
    assert "Not for commercial use: rlaif\\_v." in card.text and "No licence is known" not in card.text
    assert 'round 1, flip, by a\\|b: `` {"rule": "flip `negative`"} ``' in card.text
    assert "{%" not in card.text and "{{ " not in card.text and "None" not in card.text


def test_text_of_a_data_set_is_no_markup(pool, ledger, tmp_path):
    names = ["<script>|x\n# y", *SOURCES[1:]]
    card = curated_card(pool.remove_columns("source").add_column("source", names), ledger, "me/c", columns=[])
    (line,) = [line for line in card.text.splitlines() if "script" in line and line.startswith("|")]
    assert line.startswith("| \\<script\\>\\|x \\# y | 1 |") and line.endswith("| unknown |")
    assert "No licence is known of: " in card.text and "unknown" in DatasetCard(str(card)).data.license


def test_images_are_read_from_nowhere_but_the_root(pool, tmp_path):
    """A row of somebody else's could name any file of this machine."""
    (tmp_path / "photos").mkdir()
    image = next(row["images"][0] for row in leave_images_encoded(pool) if row["images"])
    (tmp_path / "photos/a.png").write_bytes(image["bytes"])
    (tmp_path / "secret").write_text("secret")
    for path in (str(tmp_path / "photos/a.png"), "a.png"):
        rows = Dataset.from_dict({"pair_id": ["x"], "images": [[path]]})
        with pytest.raises(RowError, match="x: the image .* is a file; say by `image_root`"):
            list(parquet_shards(rows, ImageOptions(), 10))
        (shard,) = parquet_shards(rows, ImageOptions(image_root=str(tmp_path / "photos")), 10)
        assert pq.read_table(io.BytesIO(shard))["images"].to_pylist() == [[{**image, "path": "a.png"}]]
    rows = Dataset.from_dict({"pair_id": ["x"], "images": [["../secret"]]})
    with pytest.raises(RowError, match="x: the image '../secret' is not inside `image_root`"):
        list(parquet_shards(rows, ImageOptions(image_root=str(tmp_path / "photos")), 10))


def test_features_of_what_is_published(pool):
    encoded = leave_images_encoded(pool)
    assert encoded.features["images"] == List(Image(decode=False))
    assert published_features(encoded.features) == pool.features
    found = published_features({"image": Value("string"), "videos": List(List(Image(decode=False)))})
    assert found == {"image": Image(), "videos": List(List(Image()))}
    with pytest.raises(ValueError, match="The column `videos` holds paths"):
        published_features({"videos": List(Value("string"))})


def test_what_cannot_be_pushed_is_said_before_anything_is(pool, ledger, tmp_path):
    with pytest.raises(ValueError, match="holds no round that stands; there is nothing to publish"):
        push_curated(pool, CurationLedger(tmp_path / "empty"), "me/curated")
    with pytest.raises(ValueError, match="`split` is '../x'"):
        push_curated(pool, ledger, "me/curated", split="../x")
