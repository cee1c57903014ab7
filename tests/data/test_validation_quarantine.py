"""What is set aside: its report, its file, and how mended rows come back."""

import io
import json

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from rich.console import Console

from tests.data.validation_rows import EXPECTED, MIXED, PICTURES, answer, dataset_of, notes, row, swapped
from trl_dt2it.data.messages import FEATURES
from trl_dt2it.data.validation import ReasonSummary, ValidationReport, quarantine_report, readmit, validate


# --- the report, and the file


def test_the_report_counts_everything(tmp_path):
    rows = [{**one, "source": source} for one, source in zip(MIXED, ["a", "b", "a", "b", "a", None], strict=True)]
    rows += [row(5, strength=float("inf"), pair_id="a-6", source="a")]
    clean, quarantine = validate(dataset_of(rows), show=False, report_file=tmp_path / "deep" / "report.json")
    report = quarantine_report(clean, quarantine)
    assert (report.rows_in, report.rows_out) == (7, 3)
    assert list(report.reasons) == ["bad_strength", "duplicate_pair", "image_corrupt"]
    assert report.reasons["bad_strength"] == ReasonSummary(2, 2 / 7, "row 1", EXPECTED[0][2])
    assert report.reasons["image_corrupt"] == ReasonSummary(1, 1 / 7, "row 4", EXPECTED[2][2])
    assert report.counts == {"bad_strength": 2, "duplicate_pair": 1, "image_corrupt": 1}
    assert report.sources == {
        "a": {"rows_in": 4, "rows_out": 2, "image_corrupt": 1, "bad_strength": 1},
        "None": {"rows_in": 1, "rows_out": 1},
        "b": {"rows_in": 2, "rows_out": 0, "bad_strength": 1, "duplicate_pair": 1},
    }
    written = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert written == json.loads(report.to_json())
    assert written["reasons"]["bad_strength"]["example"] == "row 1"
    assert written["counts"] == report.counts and written["sources"] == report.sources


def shown(report):
    console = Console(file=io.StringIO(), width=200)
    report.show(console)
    return console.file.getvalue()


def test_the_report_is_printed(capsys):
    validate(dataset_of(MIXED))
    printed = capsys.readouterr().out
    assert "3 of 6 rows can be used" in printed and "16.67%" in printed
    report = quarantine_report(
        *validate(dataset_of([{**one, "source": s} for one, s in zip(MIXED, "aabbbb", strict=True)]), show=False)
    )
    lines = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in shown(report).splitlines() if "│" in line
    ]
    assert ["bad_strength", "1", "16.67%", f"row 1: {EXPECTED[0][2]}"] in lines
    assert ["b", "4", "2", "1 duplicate_pair, 1 image_corrupt"] in lines
    assert shown(ValidationReport(2, 2, {}, {})) == "2 of 2 rows can be used.\n"


def test_the_report_obeys_no_one():
    """Names and messages hold what strangers wrote: markup of `rich`, and codes that a terminal would follow."""
    summary = ReasonSummary(1, 1.0, "[/red]\x1b[2J\r", "the image '[bold]x' \ud800")
    printed = shown(
        ValidationReport(
            1,
            0,
            {"image_missing": summary},
            {"[/a]": {"rows_in": 1, "rows_out": 0}, "b": {"rows_in": 0, "rows_out": 0}},
        )
    )
    assert "[/red]" in printed and "[bold]x" in printed and "[/a]" in printed
    assert "\x1b" not in printed and "\r" not in printed


def test_the_quarantine_file_holds_images_as_they_are(tmp_path):
    """Bytes as bytes, whatever they are, and paths as paths: nothing is opened that the checks refused."""
    rows = [row(0, strength=-1.0), row(1, images=[{"bytes": b"no image", "path": None}])]
    rows += [row(2, images=[{"bytes": None, "path": "/etc/gone.png"}]), row(3)]
    path = tmp_path / "deep" / "bad.parquet"
    clean, quarantine = validate(dataset_of(rows), show=False, quarantine_file=path)
    back = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert back.features == quarantine.features
    assert back.features["images"].feature == ImageFeature(decode=False)
    assert back.to_list() == quarantine.to_list()
    assert [one["images"][0]["bytes"] for one in back] == [PICTURES[0], b"no image", None]
    assert back[2]["images"][0]["path"] == "/etc/gone.png"
    assert list(path.parent.iterdir()) == [path]


# --- mending


def mend(one):
    """What a user would do about five kinds of fault."""
    if one["reason"] == "bad_strength":
        one["strength"] = 2.0
    elif one["reason"] in ("image_corrupt", "image_missing"):
        one["images"] = [{"bytes": PICTURES[one["row"]], "path": None}]
    elif one["reason"] == "empty_answer":
        one["rejected"] = answer("A horse.")
    elif one["reason"] == "placeholder_count":
        one["prompt"] = row(one["row"])["prompt"]
    return one


FAULTS = [
    row(0),
    row(1, strength=float("nan")),
    row(2, images=[{"bytes": b"no image", "path": None}]),
    row(3, images=[{"bytes": None, "path": "/gone.png"}]),
    row(4, rejected=answer(" ")),
    row(5),
    row(6, prompt=row(6)["prompt"] * 2),
]


@pytest.mark.parametrize("through_file", [False, True])
def test_five_kinds_of_fault_are_mended_and_let_in(tmp_path, through_file):
    path = tmp_path / "bad.parquet"
    clean, quarantine = validate(dataset_of(FAULTS), show=False, quarantine_file=path)
    assert quarantine["reason"][:] == [
        "bad_strength",
        "image_corrupt",
        "image_missing",
        "empty_answer",
        "placeholder_count",
    ]
    if through_file:
        quarantine = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    joined, rest = readmit(clean, quarantine.map(mend), show=False)
    assert len(rest) == 0
    assert joined.features == FEATURES
    expected = [row(0), row(5), row(1, strength=2.0), row(2), row(3), row(4, rejected=answer("A horse.")), row(6)]
    assert joined.with_format("arrow")[:].to_pylist() == dataset_of(expected).with_format("arrow")[:].to_pylist()


def test_mended_rows_are_compared_with_clean_ones():
    clean, quarantine = validate(
        dataset_of([row(0), row(1), row(2, strength=-1.0), row(3, strength=-1.0)]), show=False
    )
    mended = [row(0), swapped(row(1)), row(3, strength=-2.0)]
    mended = dataset_of(mended).map(lambda one: {"row": 0, "reason": "", "message": ""})
    joined, rest = readmit(clean, mended, show=False)
    assert joined.with_format("arrow")[:].to_pylist() == dataset_of([row(0)]).with_format("arrow")[:].to_pylist()
    assert [one[:2] for one in notes(rest)] == [
        (1, "contradictory_pair"),
        (2, "duplicate_pair"),
        (3, "contradictory_pair"),
        (4, "bad_strength"),
    ]
    assert rest.column_names == [*FEATURES, "row", "reason", "message"]


def test_clean_rows_are_not_checked_again():
    kept, rest = readmit(dataset_of([row(0, strength=-1.0)]), dataset_of([row(1, strength=-1.0)]), show=False)
    assert (len(kept), rest["row"][:]) == (1, [1])


def test_nothing_to_mend_and_nothing_clean():
    clean = dataset_of([row(0)])
    for first, second in ((clean, clean.select([])), (clean.select([]), clean)):
        joined, rest = readmit(first, second, show=False)
        assert [len(joined), len(rest)] == [1, 0]


def test_mended_rows_with_other_columns_are_refused():
    with pytest.raises(ValueError, match="the column `group_id`"):
        readmit(dataset_of([row(0)]), dataset_of([row(1)]).remove_columns("group_id"))
