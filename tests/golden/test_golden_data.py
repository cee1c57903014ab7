"""Golden data: what validation sets aside, how mixtures and splits are drawn, and the files of a prepared source."""

import json

from datasets import Dataset

from trl_dt2it.data import (
    mix,
    prepare_shard,
    quarantine_report,
    read_settings,
    split_by_group,
    to_dpo,
    validate,
    with_canonical_columns,
)

from .golden import check
from .pairs_of_each_kind import datasets, image, say
from .tables import files, parquet


def named(source: str, count: int) -> Dataset:
    """Pairs of texts, two about each prompt."""
    return Dataset.from_list(
        [
            {
                "prompt": [say("user", f"{source} {number // 2}?")],
                "chosen": [say("assistant", f"Yes, {number}.")],
                "rejected": [say("assistant", "No.")],
                **{"pair_id": f"{source}-{number}", "group_id": f"{source}-{number // 2}", "source": source},
            }
            for number in range(count)
        ]
    )


def test_mixtures_and_splits():
    sets = {"a": named("a", 12), "b": named("b", 8)}
    draws = {
        "all": {},
        "weights": {"weights": {"a": 1.0, "b": 3.0}},
        "size": {"size": 7, "seed": 1},
        "caps": {"max_per_source": 5, "max_per_group": 1},
    }
    found = {name: mix(sets, **options)["pair_id"][:] for name, options in draws.items()}
    split = split_by_group(mix(sets), 0.3)
    check("mixtures", {**found, "split": {name: part["pair_id"][:] for name, part in split.items()}})


def test_columns_of_converted_rows():
    kinds = {name: datasets()[name] for name in ("one image", "whole conversations", "string messages")}
    rows = {name: with_canonical_columns(one) for name, one in kinds.items()}
    found = {name: {column: str(kind) for column, kind in one.features.items()} for name, one in rows.items()}
    dpo = {name: str(kind) for name, kind in to_dpo(kinds["one image"]).features.items()}
    check("columns", {"canonical": found, "dpo": dpo})


def test_quarantine(tmp_path):
    rows = [{**row, "pair_id": f"row-{number}"} for number, row in enumerate(named("a", 3).to_list())]
    rows += [{**rows[0], "pair_id": "copy"}, {**rows[1], "chosen": rows[1]["rejected"], "pair_id": "same"}]
    rows += [{**rows[2], "chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"], "pair_id": "contrary"}]
    options = {"report_file": tmp_path / "report.json", "quarantine_file": tmp_path / "out.parquet", "show": False}
    clean, quarantine = validate(Dataset.from_list(rows), **options)
    report, file = json.loads((tmp_path / "report.json").read_text()), parquet(tmp_path / "out.parquet")
    assert list(file["columns"])[-1] == "message"  # a sentence, which may be put in other words
    file["rows"] = [row[:-1] for row in file["rows"]]
    assert all(one.pop("message") for one in report["reasons"].values())
    found = {
        "clean": clean["pair_id"][:],
        "counts": quarantine_report(clean, quarantine).counts,
        "report": report,
        "file": file,
    }
    check("quarantine", found)


def test_a_prepared_shard(tmp_path):
    good = [{"caption": f"a hat, {n}", "chosen_image": image(n), "rejected_image": image(n + 1)} for n in range(2)]
    bad = [{**good[0], "caption": None}, {**good[0], "rejected_image": {"bytes": b"no image", "path": None}}]
    Dataset.from_list(good + bad).to_parquet(tmp_path / "rows.parquet")
    settings = read_settings({"hats": {"name": "t2i", "path_or_id": str(tmp_path / "rows.parquet"), "weight": 1.0}})
    record, is_new = prepare_shard(tmp_path / "out", "hats", settings["hats"], 0)
    assert is_new and len(record.pop("made_by")) == 64  # it covers the path and the release
    stem = tmp_path / "out" / "shards" / "hats" / "00000-of-00001"
    found = {"record": record, "files": files(tmp_path / "out")}
    for end in ("parquet", "quarantine.parquet"):
        table = parquet(stem.with_suffix(f".{end}"))
        found[end] = {name: table[name] for name in ("columns", "metadata")} | {"rows": len(table["rows"])}
    lines = stem.with_suffix(".refused.jsonl").read_text().splitlines()
    refused = [json.loads(line) for line in lines]
    assert all(one.pop("message") for one in refused)
    check("prepared", {**found, "refused": refused})
