"""The page about data, and the README's part of it: every example runs, and every set has its row."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, Image

from trl_dt2it.data import SOURCES

from .data.fixtures_as_rows import fixture
from .families import example_images
from .rows import make_dataset, png
from .test_docs import README, ROOT, code_blocks, replaced


PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """The files that the examples name, and the images of them."""
    monkeypatch.chdir(tmp_path)
    Dataset.from_list(fixture("rlaif_v")).cast_column("image", Image()).to_parquet("rlaif_v.parquet")
    Path("povid.json").write_text(json.dumps(fixture("povid")))
    for folder in ("coco/train2014", "hpdv3", "photos"):
        Path(folder).mkdir(parents=True)
    image = png(example_images(1)[0])
    pairs = [
        {"prompt": f"a square, {n}", "path1": "1.jpg", "path2": "2.jpg", "confidence": c}
        for n, c in enumerate([0.99, 0.5, 0.97, 0.99])
    ]
    for folder in (".", "hpdv3"):
        Path(folder, "train.json").write_text(json.dumps(pairs))
    row = {"q": "What?", "answers": {"good": "A cup.", "bad": "A hat."}, "photo": "cup.png", "gap": 2}
    Path("mine.jsonl").write_text(json.dumps(row))
    Path("photos/cup.png").write_bytes(image)
    battle = {"q": "What?", "answer_a": "A cup.", "answer_b": "A hat."}
    Path("battles.jsonl").write_text("\n".join(json.dumps({**battle, "winner": winner}) for winner in range(3)))
    return tmp_path


def run(block: str, names: dict) -> None:
    if 'load_preferences("rlaif_v")' in block:
        block = replaced(block, 'load_preferences("rlaif_v")', 'load_preferences("rlaif_v", "rlaif_v.parquet")')
    exec(compile(block, "docs", "exec"), names)


def test_the_examples_of_the_page_run(files):
    load, columns, labels, check, t2i, decontamination, mixing = code_blocks("python", PAGE)
    names: dict = {}
    run(load, names)
    assert names["pairs"]["pair_id"][:] == ["hpdv3-0", "hpdv3-2", "hpdv3-3"]
    run(columns, names)
    (row,) = names["pairs"]
    assert (row["source"], row["strength"], row["chosen"][0]["content"][0]["text"]) == ("mine", 2.0, "A cup.")
    run(labels, names)
    assert names["battles"]["pair_id"][:] == ["columns-0", "columns-1"]
    assert [row["chosen"][0]["content"][0]["text"] for row in names["battles"]] == ["A cup.", "A hat."]
    run(check, names)
    assert (len(names["clean"]), len(names["quarantine"])) == (1, 0)
    assert json.loads(Path("report.json").read_text())["rows_in"] == 1
    names["still_bad"] = names["readmit"](names["clean"], names["quarantine"])[1]
    images = [png(image) for image in example_images(2)]
    names["dataset"] = Dataset.from_dict({"text": ["a cup"], "win": [images[0]], "lose": [images[1]]})
    run(t2i, names)
    assert len(names["pairs"][0]["images"]) == 2
    names["benchmark_rows"] = [{"question": names["pairs"][0]["prompt"][0]["content"][-1]["text"], "image": images[0]}]
    run(decontamination, names)
    assert len(names["clean"]) + len(names["dropped"]) == 1
    groups = {"group_id": [f"g{index // 2}" for index in range(60)]}
    names |= {"a": make_dataset(60, **groups), "b": make_dataset(60, seed=1, **groups)}
    run(mixing, names)
    assert len(names["mixture"]) == 90  # twice as many of one as of the other
    assert not set(names["splits"]["train"]["group_id"]) & set(names["splits"]["test"]["group_id"])


def test_the_example_of_the_readme_runs(files):
    Path("hpdv3/1.jpg").write_bytes(png(example_images(1)[0]))
    Path("hpdv3/2.jpg").write_bytes(png(example_images(2, seed=1)[1]))
    (block,) = [block for block in code_blocks("python") if "load_preferences" in block]
    names: dict = {}
    run(block, names)
    assert (len(names["clean"]), len(names["quarantine"])) == (6, 0)


def test_every_set_has_its_row_with_its_licence():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:3] == "| `"]
    table = {name: row for row in rows if len(row) == 5 for name in re.findall(r"`(\w+)`", row[0])}
    formats = {name for name, source in SOURCES.items() if source.hub_id is None}
    assert set(table) == {name for name in SOURCES if name not in formats} | {
        "imagereward_pairs",
        "imagereward_rankings",
    }
    for name, row in table.items():
        source = SOURCES[name]
        assert row[4] == source.licence.replace("unknown", "not stated")
        assert source.hub_id is None or source.hub_id.split("/")[1].split("-v1")[0] in row[1]
    for name in formats:
        assert f"`{name}`" in PAGE
    count = {17: "Seventeen"}[len({row[1] for row in table.values()})]
    assert f"{count} public preference sets" in README


def test_options_that_the_page_names_exist():
    import inspect

    for name, source in SOURCES.items():
        sentence = re.search(rf"((?:`\w+`(?: and )?)+) of `{name}`", PAGE[PAGE.index("Options of an adapter") :])
        options = set(list(inspect.signature(source.convert).parameters)[1:])
        assert set(re.findall(r"`(\w+)`", sentence[1]) if sentence else ()) <= options
