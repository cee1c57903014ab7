"""Preparing a mixture: shards that survive a kill, machines that share the work, and a set that a trainer can take."""

import hashlib
import json
import runpy
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import load_dataset
from PIL import Image as PILImage
from rich.console import Console

from tests.processes import ROOT, Run, start_script
from trl_dt2it.data import (
    T2ITemplate,
    build_mixture,
    load_image,
    load_preferences,
    prepare_shard,
    read_benchmarks,
    read_settings,
    write_parquet,
)
from trl_dt2it.data.messages import T2I_IDENTITY
from trl_dt2it.demo.digits import make_digits, make_digits_t2i


TILE = np.ones((8, 8, 1), np.uint8)
OWN = T2ITemplate("Vote on {caption}\n{images}", "Left.", "Right.")
IN_BENCHMARK = (0, 7, 9)
STAGES = ("clean", "duplicates", "contaminated", "mixed")
RECIPE = ROOT / "recipes" / "prepare_data.py"


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """RLAIF-V's layout with images inside, ShareGPT rows with images in a folder, and HPDv2's pairs of images."""
    folder = tmp_path_factory.mktemp("raw")
    digits = make_digits("train", 60, seed=1)
    images = [row["bytes"] for row in digits.data.column("images").combine_chunks().flatten().to_pylist()]
    texts = [[row[side][0]["content"][-1]["text"] for side in ("prompt", "chosen", "rejected")] for row in digits]
    (folder / "pictures").mkdir()
    for index, image in enumerate(images):
        (folder / "pictures" / f"{index}.png").write_bytes(image)

    def sharegpt(index: int) -> dict:
        question, chosen, rejected = texts[index]
        return {
            "conversations": [{"from": "human", "value": f"<image>{question}"}],
            "chosen": {"from": "gpt", "value": chosen},
            "rejected": {"from": "gpt", "value": rejected},
            "images": [f"{index}.png"],
        }

    rows = [sharegpt(index) for index in range(40)]
    rows[3]["images"] = ["not-there.png"]
    rows[5]["rejected"] = rows[5]["chosen"]
    rows[39] = json.loads(json.dumps(rows[0]))  # in the other shard
    (folder / "own.json").write_text(json.dumps(rows))
    lines = [
        {"question": question, "chosen": chosen, "rejected": rejected, "image": f"{index + 40}.png"}
        for index, (question, chosen, rejected) in enumerate(texts[40:])
    ]
    (folder / "plain.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "benchmark.jsonl").write_text(json.dumps({"query": texts[50][0].upper(), "image": "50.png"}) + "\n")
    t2i = make_digits_t2i("train", 31, seed=2)
    pairs = []
    for index, row in enumerate(t2i):
        for side in ("chosen", "rejected"):
            row[f"{side}_image"].save(folder / "pictures" / f"t{index}-{side}.png")
        names = [f"t{index}-chosen.png", f"t{index}-rejected.png"]
        pairs.append({"prompt": row["caption"], "file_path": names, "human_preference": [1, 0]})
    (folder / "train.json").write_text(json.dumps(pairs))
    return folder


def config(raw: Path, output: Path) -> dict:
    root = str(raw / "pictures")
    return {
        "output_dir": str(output),
        "sources": {
            "own": {"name": "llamafactory", "path_or_id": str(raw / "own.json"), "image_root": root, "num_shards": 2},
            "rlaif_v": {"path_or_id": str(raw / "plain.jsonl"), "image_root": root},
            "hpdv2": {"path_or_id": str(raw / "train.json"), "image_root": root, "max_rows": 21},
        },
        "benchmarks": {"bench": {"path_or_id": str(raw / "benchmark.jsonl"), "question": "query", "image_root": root}},
        "test_size": 0.1,
        "rows_per_file": 30,
    }


def start(settings: dict, *more: str) -> Run:
    path = Path(settings["output_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings))
    return start_script(RECIPE, "--config", path, *more, COLUMNS="200")


def run(settings: dict, *more: str) -> str:
    """Prepares, and gives what was printed."""
    return start(settings, *more).finish()


def digest(folder: Path) -> str:
    """A hash of the mixture's files."""
    files = sorted(folder.glob("mixture/*.parquet"))
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    printed = run(config(raw, output))
    assert "1 image_missing" in printed and "1 equal_answers" in printed
    return output


def test_every_row_is_accounted_for(whole):
    report = json.loads((whole / "report.json").read_text())["sources"]
    assert report["own"] | {"train": 0, "test": 0} == {
        "pairs": 40,
        "clean": 38,
        "reasons": {"equal_answers": 1, "image_missing": 1},
        "duplicates": 1,
        "contaminated": 0,
        "mixed": 37,
        "train": 0,
        "test": 0,
    }
    assert (report["rlaif_v"]["clean"], report["rlaif_v"]["contaminated"], report["rlaif_v"]["mixed"]) == (20, 1, 19)
    assert (report["hpdv2"]["clean"], report["hpdv2"]["mixed"]) == (31, 21)
    splits = load_dataset("parquet", data_dir=str(whole / "mixture"))
    for split, rows in splits.items():
        assert Counter(rows["source"]) == {key: source[split] for key, source in report.items() if source[split]}
    assert sum(map(len, splits.values())) == 37 + 19 + 21
    assert not set(splits["train"]["group_id"]) & set(splits["test"]["group_id"])
    assert len(list((whole / "mixture").glob("train-*.parquet"))) == 3
    bad = load_dataset("parquet", data_files=str(whole / "shards/own/00000-of-00002.quarantine.parquet"))["train"]
    assert (bad["pair_id"][:], bad["reason"][:]) == (["own-3"], ["image_missing"])
    (refused,) = (whole / "shards/own/00000-of-00002.refused.jsonl").read_text().splitlines()
    assert (json.loads(refused)["pair_id"], json.loads(refused)["reason"]) == ("own-5", "equal_answers")


def test_the_files_need_no_other(whole, raw):
    rows = load_dataset("parquet", data_dir=str(whole / "mixture"), split="train")
    row = next(row for row in rows if row["pair_id"] == "rlaif_v-1")
    assert row["images"][0].tobytes() == load_image(str(raw / "pictures" / "41.png")).tobytes()
    assert str(raw) not in json.dumps([row["images"] for row in rows.to_list()], default=str)


def test_a_killed_run_goes_on_and_ends_the_same(raw, whole, tmp_path):
    settings = config(raw, tmp_path / "out")
    running = start(settings)
    assert running.kill_when(lambda: any((tmp_path / "out").glob("shards/*/*.json"))), running.errors
    done = list((tmp_path / "out").glob("shards/*/*.json"))
    assert len(done) < 4 and not (tmp_path / "out/mixture").exists()
    before = done[0].stat().st_mtime_ns
    assert "there already" in run(settings)
    assert done[0].stat().st_mtime_ns == before
    assert digest(tmp_path / "out") == digest(whole)


def test_two_machines_make_what_one_makes(raw, whole, tmp_path):
    settings = config(raw, tmp_path / "out")
    for shard in ("0/2", "1/2"):
        assert "without `--shard`" in run(settings, "--shard", shard)
    run(settings)
    assert digest(tmp_path / "out") == digest(whole)


def test_other_settings_make_a_shard_anew(raw, tmp_path):
    settings = read_settings(config(raw, tmp_path)["sources"])
    assert prepare_shard(tmp_path, "rlaif_v", settings["rlaif_v"], 0)[1]
    assert not prepare_shard(tmp_path, "rlaif_v", settings["rlaif_v"], 0)[1]
    settings["rlaif_v"].weight = 2.0  # plays a part only later
    assert not prepare_shard(tmp_path, "rlaif_v", settings["rlaif_v"], 0)[1]
    assert prepare_shard(tmp_path, "rlaif_v", settings["rlaif_v"], 0, image_check="full")[1]


def test_ranked_prompts_are_prepared_as_their_pairs(tmp_path):
    good = {"prompt": "2+2?", "completions": ["5", "4", "3"], "scores": [1, 3, 2]}
    rows = [good, {**good, "scores": [1, 3]}, {**good, "prompt": "1+3?", "completions": ["5", "4", "<|im_end|>"]}]
    (tmp_path / "ranked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    load = {"path_or_id": str(tmp_path / "ranked.jsonl"), "ranked": True}
    (settings,) = read_settings({"own": {"name": "trl", **load}}).values()
    record, _ = prepare_shard(tmp_path / "out", "own", settings, 0)
    assert (record["pairs"], record["clean"], record["reasons"]) == (7, 6, {"bad_rating": 1})
    made = load_dataset("parquet", data_files=str(tmp_path / "out/shards/own/*.parquet"), split="train")
    assert made["strength"][:3] == [1.0, 2.0, 1.0] and len(set(made["group_id"][:])) == 2


def test_a_mended_file_is_read_anew(raw, tmp_path):
    given = config(raw, tmp_path)["sources"]["rlaif_v"]
    (tmp_path / "plain.jsonl").write_text((raw / "plain.jsonl").read_text())
    (settings,) = read_settings({"rlaif_v": given | {"path_or_id": str(tmp_path / "plain.jsonl")}}).values()
    before, _ = prepare_shard(tmp_path / "out", "rlaif_v", settings, 0)
    lines = (tmp_path / "plain.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "plain.jsonl").write_text("".join(lines[:-1]))
    after, is_new = prepare_shard(tmp_path / "out", "rlaif_v", settings, 0)
    assert is_new and after["pairs"] == before["pairs"] - 1


def test_a_missing_shard_is_named(raw, tmp_path):
    settings = read_settings(config(raw, tmp_path)["sources"])
    prepare_shard(tmp_path, "own", settings["own"], 1)
    with pytest.raises(ValueError, match="1 of 2 shards of own are not there yet"):
        build_mixture(tmp_path, {"own": settings["own"]})


def test_a_source_without_its_images_says_so(raw, tmp_path):
    settings = config(raw, tmp_path)["sources"]
    settings["rlaif_v"]["image_root"] = str(tmp_path)
    with pytest.raises(ValueError, match="No row of rlaif_v can be used; 20 have image_missing"):
        prepare_shard(tmp_path, "rlaif_v", read_settings(settings)["rlaif_v"], 0)


def test_a_dry_run_shows_the_plan_and_writes_nothing(raw, tmp_path):
    printed = run(config(raw, tmp_path / "out"), "--dry_run", "true")
    assert "CC-BY-NC-4.0" in printed and "2 of 2" in printed
    assert "hpdv2: Unpack train.tar.gz (31.7 GB) and give the folder as `image_root`." in " ".join(printed.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "`sources` is empty"),
        ({"povid": {"weight": 1}, "spa_vl": {}}, "spa_vl has no `weight`, but others have"),
        ({"povid": {"num_shards": 0}}, "`num_shards` of povid is 0"),
        ({"a": {"name": "povit"}}, "a names povit, which is no known preference set or format; known are columns, "),
    ],
)
def test_misuse_is_named(sources, message):
    with pytest.raises(ValueError, match=message):
        read_settings(sources)


def test_a_wrong_shard_is_named(raw, tmp_path):
    wrong = start(config(raw, tmp_path / "out"), "--shard=2/2")
    assert wrong.wait() != [0] and "it must be i/n" in wrong.errors


def test_a_benchmark_without_the_column_is_named(raw):
    with pytest.raises(ValueError, match="The benchmark b has no column `question`; its columns are query, image"):
        read_benchmarks({"b": {"path_or_id": str(raw / "benchmark.jsonl")}})


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> Path:
    """Pairs of images of captions: 0 to 7 in HPDv3's file; 4 to 9 in another, where 4 and 5 have the other label."""
    folder = tmp_path_factory.mktemp("captioned")
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    rng = np.random.default_rng(0)
    hpdv3, others = [], []
    for number in range(10):
        for side in (0, 1):
            picture = PILImage.fromarray(np.kron(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8), TILE))
            for root in "ab":
                picture.save(folder / root / f"{root}{number}-{side}.png")
            picture.resize((80, 80)).save(folder / f"{number}-{side}.jpg", quality=70)
        caption, paths = f"thing {number}", [[f"{root}{number}-{side}.png" for side in (0, 1)] for root in "ab"]
        if number < 8:
            hpdv3.append({"prompt": caption, "path1": paths[0][0], "path2": paths[0][1], "confidence": 0.9})
        if number >= 4:
            better, worse = paths[1][::-1] if number < 6 else paths[1]
            others.append({"caption": caption, "chosen_image": better, "rejected_image": worse})
    (folder / "train.json").write_text(json.dumps(hpdv3))
    (folder / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    return folder


def benchmark_files(folder: Path) -> dict[str, dict]:
    """The same benchmark in the shapes in which people have it, images encoded anew."""
    images = {number: [f"{number}-{side}.jpg" for side in (0, 1)] for number in IN_BENCHMARK}
    files = {
        "hpdv3": [{"prompt": f"thing {n}", "path1": two[1], "path2": two[0]} for n, two in images.items()],
        "captions": [{"caption": f"thing {n}", "images": two} for n, two in images.items()],
        "columns": [{"q": f"Thing {n}.", "left": two[0], "right": two[1]} for n, two in images.items()],
        "pairs": [
            {"caption": f"thing {n}", "chosen_image": two[1], "rejected_image": two[0]} for n, two in images.items()
        ],
        "one": [{"prompt": f"thing {n}", "image": two[1]} for n, two in images.items()],
    }
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    asked = load_preferences("hpdv3", folder / "hpdv3.json", image_root=folder, seed=5, template=OWN)
    write_parquet(asked, folder / "asked.parquet", image_root=folder)
    plain = load_preferences("hpdv3", folder / "hpdv3.json", image_root=folder, seed=6)
    write_parquet(plain.remove_columns(list(T2I_IDENTITY)), folder / "plain.parquet", image_root=folder)
    root = {"image_root": str(folder)}
    return {
        "hpdv3": {"name": "hpdv3", "path_or_id": str(folder / "hpdv3.json"), **root},
        "captions": {"path_or_id": str(folder / "captions.json"), **root},
        "columns": {
            "path_or_id": str(folder / "columns.json"),
            "question": "q",
            "image": ["left", "right"],
            **root,
        },
        "pairs": {"path_or_id": str(folder / "pairs.json"), **root},
        "one": {"path_or_id": str(folder / "one.json"), **root},
        "asked": {"path_or_id": str(folder / "asked.parquet")},
        "plain": {"path_or_id": str(folder / "plain.parquet")},
    }


def test_planted_pairs_of_images_are_found_whatever_they_are_worded(captioned, tmp_path):
    root = {name: str(captioned / name) for name in "ab"}
    settings = read_settings(
        {
            "hpdv3": {"path_or_id": str(captioned / "train.json"), "image_root": root["a"], "num_shards": 2},
            "t2i": {"path_or_id": str(captioned / "others.jsonl"), "image_root": root["b"], "template": OWN},
        }
    )
    for key, one in settings.items():
        for shard in range(one.num_shards):
            prepare_shard(tmp_path, key, one, shard)
    for name, given in benchmark_files(captioned).items():
        report = build_mixture(tmp_path, settings, benchmarks=read_benchmarks({name: given}), test_size=0)["sources"]
        # Of 4 and 5 both labels go, of 6 and 7 the second row, and 0, 7 and 9 are in the benchmark.
        counts = {key: [one[stage] for stage in STAGES] for key, one in report.items()}
        assert (name, counts) == (name, {"hpdv3": [8, 2, 2, 4], "t2i": [6, 4, 1, 1]})
        mixture = load_dataset("parquet", data_dir=str(tmp_path / "mixture"), split="train")
        assert sorted(mixture["t2i_caption"]) == [f"thing {number}" for number in (1, 2, 3, 6, 8)]


def test_a_benchmark_of_other_content_makes_another_mixture(raw, tmp_path, caplog):
    """As many rows under the same name, with another question or another image; but not the same from elsewhere."""
    settings = read_settings({"rlaif_v": config(raw, tmp_path)["sources"]["rlaif_v"]})
    prepare_shard(tmp_path, "rlaif_v", settings["rlaif_v"], 0)
    question, images = json.loads((raw / "benchmark.jsonl").read_text())["query"], [str(tmp_path / "50.png")]
    given = [(raw / "pictures" / f"{index}.png").read_bytes() for index in (50, 51)]

    def build(question: str, image: bytes, images: list) -> tuple[int, int]:
        (tmp_path / "50.png").write_bytes(image)
        rows = {"b": [{"question": question, "t2i_caption": None, "images": images}]}
        report = build_mixture(tmp_path, settings, benchmarks=rows, test_size=0)["sources"]["rlaif_v"]
        return report["contaminated"], len(list(tmp_path.glob("mixture*")))

    assert build(question, given[0], images) == (1, 1)
    assert build(question, given[0], [{"bytes": given[0], "path": None}]) == (1, 1) and "it is now" not in caplog.text
    assert build("Else?", given[0], images) == (0, 2)
    assert build("Else?", given[1], images) == (0, 3)
    assert build("Else?", given[1], images) == (0, 3)
    assert build("Else?", given[1], []) == (0, 4)
    assert "mixture was made with other settings, shards or benchmarks; it is now " in caplog.text


def test_settings_of_a_benchmark_that_do_not_fit_are_named(captioned, caplog):
    file = str(captioned / "one.json")
    benchmark_files(captioned)
    for given, message in (
        ({"image": "picture"}, "The benchmark b has no column `picture`; its columns are image, prompt."),
        ({"pictures": "image"}, "The benchmark b has the unknown key `pictures`."),
        ({"image_root": str(captioned / "nowhere")}, "`image_root` is .*nowhere, but there is no such folder."),
    ):
        with pytest.raises(ValueError, match=message):
            read_benchmarks({"b": {"path_or_id": file, **given}})
    rows = [{"prompt": "x", "image": "../one.json"}]
    (captioned / "outside.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="Row 0 of the benchmark b cannot be read: .* is not inside `image_root`"):
        read_benchmarks({"b": {"path_or_id": str(captioned / "outside.json"), "image_root": str(captioned / "a")}})
    (captioned / "text.json").write_text(json.dumps([{"prompt": "x", "photo": "a.png"}]))
    read_benchmarks({"b": {"path_or_id": str(captioned / "text.json")}})
    assert (
        "The benchmark b has no images; if it should, name their column by `image`: its columns are photo, prompt"
        in (caplog.text)
    )


def test_reasons_are_whole_in_a_narrow_terminal(capsys):
    counts = dict.fromkeys(("pairs", "clean", "duplicates", "contaminated", "mixed", "train", "test"), 83132)
    reasons = {"image_outside_root": 1, "contradictory_pair": 1200, "image_missing": 31, "tie": 40}
    table = runpy.run_path(str(RECIPE))["summary"]({"sources": {"[red]": {**counts, "reasons": reasons}}})
    Console(width=80).print(table)
    said = " ".join(capsys.readouterr().out.split())
    assert "Dropped from [red]: 1 image_outside_root, 1,200 contradictory_pair, 31 image_missing, 40 tie" in said


def test_counterfactual_pairs_are_added_to_the_training_rows(raw, whole, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(whole / "shards", output / "shards")
    settings = {**config(raw, output), "counterfactuals": 1.0}
    printed = run(settings)
    report, before = (json.loads((folder / "report.json").read_text())["sources"] for folder in (output, whole))
    assert "added" not in before["own"]
    assert f"Counterfactual pairs added to own: {report['own']['added']}" in printed and report["own"]["added"] >= 10
    assert (report["hpdv2"]["added"], report["own"]["test"]) == (0, before["own"]["test"])
    rows, plain = (load_dataset("parquet", data_dir=str(folder / "mixture")) for folder in (output, whole))
    added = rows["train"].filter(lambda name: name is not None, input_columns="counterfactual_of")
    assert len(added) == len(rows["train"]) - len(plain["train"])
    assert set(rows["train"]["pair_id"]) == set(plain["train"]["pair_id"]) | set(added["pair_id"])
    assert rows["test"]["pair_id"] == plain["test"]["pair_id"][:]
    held = {row["images"][0].tobytes() for row in plain["test"]}
    assert not held & {row["images"][0].tobytes() for row in added}
    refused = start({**settings, "counterfactuals": 1.5})
    assert refused.wait() == [1] and "`counterfactuals` is 1.5" in refused.errors
