"""The page about data, and the README's part of it: every example runs, and every set has its row."""

import contextlib
import io
import json
import re
import subprocess
from pathlib import Path

import pytest
from datasets import Dataset, Image

from trl_dt2it.data import SOURCES
from trl_dt2it.data.columns import leave_images_encoded

from .benchmark_modules import benchmark_module
from .data.fixtures_as_rows import fixture
from .families import example_images
from .rows import make_dataset, png
from .test_docs import README, ROOT, code_blocks, replaced


PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
PUBLIC_FILES = PAGE[PAGE.index("## Files as people publish them") :]
# Of these, a row of the file gives several pairs.
SEVERAL_PAIRS = {"imagereward_rankings", "mmrb2-t2i"}


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
    load, ranked, columns, labels, check, t2i, decontamination, mixing = code_blocks("python", PAGE)
    names: dict = {}
    run(load, names)
    assert names["pairs"]["pair_id"][:] == ["hpdv3-0", "hpdv3-2", "hpdv3-3"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(ranked, names)
    assert printed.getvalue() in PAGE
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
    Path("drafts").mkdir()
    for number, image in enumerate(images, 1):
        Path(f"drafts/cup-{number}.png").write_bytes(image)
    Path("drafts.jsonl").write_text(re.search(r"^# (\{.*\}) in each line$", t2i, flags=re.MULTILINE)[1])
    names["dataset"] = Dataset.from_dict({"text": ["a cup"], "win": [images[0]], "lose": [images[1]]})
    run(t2i.split("pairs = reformulate_t2i")[0], names)
    assert sorted(Path(image["path"]).name for image in leave_images_encoded(names["pairs"])[0]["images"]) == [
        "cup-1.png",
        "cup-2.png",
    ]
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
    drafts = {"caption": "a red cup", "chosen_image": "cup.png", "rejected_image": "hat.png"}
    Path("drafts.jsonl").write_text(json.dumps(drafts))
    Path("photos/hat.png").write_bytes(png(example_images(2)[1]))
    (block,) = [block for block in code_blocks("python") if "load_preferences" in block]
    names: dict = {}
    run(block, names)
    assert (len(names["clean"]), len(names["quarantine"])) == (7, 0)


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


@pytest.fixture(scope="module")
def public_files():
    with benchmark_module("public_files") as module:
        yield module


def test_the_table_of_public_files_adds_up(public_files):
    lines = [line for line in PUBLIC_FILES.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert tuple(header) == public_files.HEADER
    assert len(rows) >= 25 and all(len(row) == len(header) for row in rows)
    listed = [
        f"{repository.name}@{repository.commit[:8]} `{file.path}`"
        for repository in public_files.REPOSITORIES
        for file in repository.files
    ]
    assert [row[0].removesuffix(", its sample") for row in rows] == listed
    read_right = 0
    for place, adapter, rows_in, pairs, quarantined, agreement, images, seconds in rows:
        rows_in, pairs = (int(number.replace(",", "")) for number in (rows_in, pairs))
        bad = sum(int(number) for number in re.findall(r"(\d+) [a-z]", quarantined))
        assert rows_in > 0 and float(seconds) < 60 and images, place
        assert (bad == 0) == (quarantined == "none") and (pairs > 0) != (agreement == "none read"), place
        if adapter.strip("`") not in SEVERAL_PAIRS:
            assert rows_in == pairs + bad, place
        if same := re.fullmatch(r"([\d,]+) of ([\d,]+)", agreement):
            assert same[1] == same[2], place
            read_right += 1
        else:
            assert agreement in ("not compared", "none read"), place
    assert read_right >= 25


def test_a_public_file_is_read_out_of_a_clone(public_files, tmp_path):
    clone = tmp_path / "people" / "pairs"
    (clone / "photos").mkdir(parents=True)
    (clone / "photos" / "cup.png").write_bytes(png(example_images(1)[0]))
    pair = {
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}],
        "chosen": {"from": "gpt", "value": "A cup."},
        "rejected": {"from": "gpt", "value": "A hat."},
        "images": ["photos/cup.png"],
    }
    lost = pair | {"images": ["photos/lost.png"]}
    (clone / "pairs.json").write_text(json.dumps([pair, lost, pair]))
    sample = json.dumps(pair, indent=2)
    (clone / "README.md").write_text(f"```bash\nrun\n```\n\n```json\n[\n{sample},\n  ...\n]\n```\n")
    (clone / "images.jsonl").write_text(
        "".join(
            json.dumps({"text": "a cup", "good": "photos/cup.png", "bad": name}) + "\n"
            for name in ("photos/lost.png", "photos/none.png")
        )
    )
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "pairs"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(clone), *who, *command], check=True)
    commit = public_files.git(clone, "rev-parse", "HEAD").decode().strip()

    def read(*arguments, **options):
        file = public_files.PublicFile(*arguments, **options)
        repository = public_files.Repository("people/pairs", commit, (file,))
        outcome = public_files.read(repository, file, tmp_path)
        cells = public_files.table_row(repository, file, outcome)
        assert cells[0].startswith(f"people/pairs@{commit[:8]} `{file.path}`")
        return cells[2:-1], outcome.refusal

    share_gpt = public_files.of_share_gpt
    missing = "1, not in the repository: 1 image_missing when looked for"
    assert read("pairs.json", "llamafactory", share_gpt, images="photos") == (
        ["3", "1", "1 image_missing, 1 duplicate_pair", "3 of 3", "1, all decoded"],
        "",
    )
    assert read("README.md", "llamafactory", share_gpt, block='"A cup."') == (
        ["1", "1", "none", "1 of 1", missing],
        "",
    )
    swapped = public_files.of_strings("question", "rejected", "chosen")
    flat = {"question": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}
    (cells, _) = read(
        "README.md",
        "columns",
        lambda row: swapped({"question": "What is it?", "chosen": "A cup.", "rejected": "A hat."}),
        flat,
        block='"A cup."',
    )
    assert cells[3] == "0 of 1, 1 not read"
    names = {"caption": "text", "chosen_image": "good", "rejected_image": "bad"}
    assert read("images.jsonl", "reformulate_t2i", public_files.of_two_images(*names.values()), names)[0] == [
        "2",
        "2",
        "none",
        "2 of 2",
        "4, not in the repository: 2 image_missing when looked for",
    ]
    cells, refusal = read("pairs.json", "ms_swift")
    assert cells == ["3", "0", "3 not_conversational", "none read", "not looked at"], refusal
