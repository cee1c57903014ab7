"""The report without a browser: what is in the file, what is text, which images get into it, and what is refused."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from trl_dt2it.curation import CurationLedger
from trl_dt2it.data.images import ImageOptions
from trl_dt2it.data.mixing import with_columns
from trl_dt2it.debias import audit_blind, audit_style
from trl_dt2it.demo.digits import make_digits
from trl_dt2it.report import health_section, write_report
from trl_dt2it.report.gallery import conversation, thumbnails

from .run_folder import NASTY, NASTY_ID, NASTY_SOURCE, evaluation_file, write_stage


SECTIONS = ["run", "strength", "style", "flow", "rewards", "calibration", "benchmarks", "gallery"]


class Page(HTMLParser):
    """What of a page is text, and which tags it has."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.data, self.text, self.scripts = [], {}, {}, []
        self._section, self._script = "", None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "section":
            self._section = attributes["id"]
        if tag == "script":
            self.scripts.append("")
            self._script = attributes.get("type", "")

    def handle_endtag(self, tag):
        self._script = None if tag == "script" else self._script

    def handle_data(self, data):
        if self._script is not None:
            self.scripts[-1] += data
        else:
            self.text[self._section] = self.text.get(self._section, "") + " " + data


def words(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_every_section_has_its_figures(run, tmp_path):
    page = Page(write_report(tmp_path / "r.html", run=run, evaluations=[evaluation_file(tmp_path)]).read_text("utf-8"))
    text = {name: words(content) for name, content in page.text.items()}
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == SECTIONS
    assert "Not here" not in " ".join(text.values())
    assert "+ curated 139 0.8000 0.4902 to 0.9433 30 1 s final/curated" in text["run"]  # Wilson's interval of 8 of 10
    assert "2026-01-02 03:04:05 UTC" in text["run"] and "round 1 flip flip_mixture by=source" in text["run"]
    # Of source a, 20 pairs from -4 to -0.2: 9 are flipped.
    assert "a 20 -2.10 100.0% 20" in text["strength"]
    assert "round 2 30 9 0 1 97.5%" in text["flow"] and "round 1, judge 25 10 3 2 95.0%" in text["flow"]
    assert "Test set, + curated 10 +1.60 ± 0.80 +0.10 ± 0.20 0.8000" in text["rewards"]
    assert "10 0" in text["calibration"] and "0.85 to 0.90 8 0.881 1.000" in text["calibration"]
    assert "overall 70.0 39.7 to 89.2 40.0 to 90.0 10 1" in text["benchmarks"]
    assert "too few pairs: 40 of at least 200" in text["style"]


def test_a_looking_test_has_bars_and_its_sentence(tmp_path):
    path = evaluation_file(tmp_path)
    content = json.loads(path.read_text())
    shown = {"image": 0.7, "blank": 0.4, "swapped": 0.5}
    looking = {
        **{
            "verdict": "looks",
            "text": "The model <i>looks</i>.",
            "n": 10,
            "num_prompts": 9,
            "text_only": 2,
            "alone": 0,
        },
        "metrics": {name: {"overall": value, "acc": 0.25} for name, value in shown.items()},
        "bootstrap": {name: {"overall": [value - 0.1, value + 0.2]} for name, value in shown.items()},
        **{"gain": {"blank": 0.3, "swapped": 0.2}, "gain_interval": {"blank": [0.1, 0.5], "swapped": [-0.1, 0.5]}},
        **{"changed": {"blank": 0.31, "swapped": 0.22}, "needs_image": 0.4, "needs_image_interval": [0.2, 0.6]},
    }
    content["results"][0] |= {"looking": {**looking, "of another release": 1}}
    path.write_text(json.dumps(content))
    page = Page(write_report(tmp_path / "r.html", evaluations=[path]).read_text("utf-8"))
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == [
        *SECTIONS[:-1],
        "looking",
        "gallery",
    ]
    text = words(page.text["looking"])
    assert (
        "The model <i>looks</i>." in text and "VL-RewardBench: 10 pairs with images of 9 prompts; dropped: 2" in text
    )
    assert "its own 70.0 60.0 to 90.0 blank 40.0 30.0 to 60.0 +30.0 10.0 to 50.0 31.0 another row's 50.0" in text
    assert "metric its own blank another row's overall 70.0 40.0 50.0 acc 25.0 25.0 25.0" in text
    labels = [attributes.get("aria-label", "") for _, attributes in page.tags]
    told = "own 0.700, 0.600 to 0.900; blank 0.400, 0.300 to 0.600; another's 0.500, 0.400 to 0.700"
    assert f"Accuracy by the image shown, with 95 % intervals: {told}" in labels


def test_what_comes_from_data_is_text(run, tmp_path):
    evaluation = evaluation_file(tmp_path)
    source = write_report(tmp_path / "r.html", run=run, evaluations=[evaluation], title="<i>x</i>").read_text("utf-8")
    page = Page(source)
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "gallery-data"},
        {},
    ]
    assert not {tag for tag, _ in page.tags} & {"b", "i", "img", "iframe", "object", "embed", "base"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for tag, attributes in page.tags:
        for name in ("href", "src", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:,")), (tag, attributes)
    assert NASTY_SOURCE in page.text["strength"] and "my-<b>model</b>" in page.text["benchmarks"]
    gallery = json.loads(page.scripts[0])
    pairs = {pair["id"]: pair for pair in gallery["pairs"]}
    assert len(pairs) == 40 and list(pairs)[0] == NASTY_ID  # the strongest flip
    for number, text in NASTY.items():
        one = pairs[NASTY_ID if number == 0 else f"pair-{number}"]
        assert one["prompt"].endswith(text) and one["chosen"].endswith(text)
    assert "<" not in page.scripts[0].replace("\\u003c", "")
    # Nothing of this machine but what the user named.
    assert str(tmp_path) not in source.replace(str(run), "")


def test_the_gallery_tells_what_the_ledger_says(run, tmp_path):
    page = Page(write_report(tmp_path / "r.html", run=run, gallery=20).read_text("utf-8"))
    gallery = json.loads(page.scripts[0])
    pairs = {pair["id"]: pair for pair in gallery["pairs"]}
    assert [pair["state"] for pair in pairs.values()] == ["flipped"] * 9 + ["dropped"] + ["kept"] * 10
    assert [pair["strength"] for pair in pairs.values()][:3] == [4.0, 3.8, 3.6]
    one = pairs["pair-10"]
    assert (one["state"], one["flipped"], one["since"], one["reason"]) == (
        "flipped",
        True,
        "round 2",
        "decided by decide",
    )
    first, judged, last = one["history"]
    assert (
        first["action"] == "drop" and first["scores"] == [["tiny, seed 42", -1.0, 1.0]] and first["strength"] == -2.0
    )
    assert judged["votes"] == [["judge", 1, 1]] and judged["reason"] == "judges agree with the label"
    assert last["action"] == "flip" and last["strength"] == 2.0
    # An image under the root is there; one outside of it is not, and why is said.
    content = base64.b64decode(gallery["images"][pairs["pair-5"]["images"][0]].split(",")[1])
    assert Image.open(io.BytesIO(content)).size == (96, 32)
    assert pairs["pair-6"]["images"] == ["image_outside_root"]
    assert gallery["source_set"] == CurationLedger(run / "ledger").source_set


def test_thumbnails_are_small_and_of_nothing_that_lies_elsewhere(tmp_path):
    Image.effect_noise((1600, 1200), 90).convert("RGB").save(tmp_path / "large.png")
    images: dict[str, str] = {}
    row = {"images": ["large.png", "large.png", "../large.png", "https://localhost/a.png", "large.png"]}
    found = thumbnails(row, ImageOptions(str(tmp_path), allowed_hosts=("localhost",)), images)
    assert found == [0, 0, "image_outside_root", "image_url", "and 1 more"]
    (address,) = images.values()
    assert address.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).size == (320, 240)
    # Without a root, a path may be any file of the machine; what it names stays out of a page for others.
    assert thumbnails({"images": [str(tmp_path / "large.png")]}, ImageOptions(), {}) == ["image_outside_root"]
    assert thumbnails(row, ImageOptions(str(tmp_path), max_image_pixels=1_000_000), {})[0] == "image_too_large"
    video = {"videos": [[Image.new("RGB", (64, 48)), "nowhere.png"]]}
    assert thumbnails(video, ImageOptions(), images) == [1]


def test_texts_of_rows_with_an_implicit_prompt_and_of_several_turns():
    def say(role, text):
        return {"role": role, "content": text}

    start = [say("user", "One?"), say("assistant", "1."), say("user", "Two?")]
    row = {"chosen": [*start, say("assistant", "2.")], "rejected": [*start, say("assistant", "3.")]}
    prompt = "user: One?\n\nassistant: 1.\n\nuser: Two?"
    assert conversation(row) == {"prompt": prompt, "chosen": "2.", "rejected": "3."}
    block = {"type": "image", "text": None}
    row = {"prompt": [{"role": "user", "content": [block, block, {"type": "text", "text": "Which?"}]}]}
    row |= {"images": ["a", "b"], "chosen": [say("assistant", "A" * 7000)], "rejected": "B"}
    shown = conversation(row)
    assert shown["prompt"] == "[image] [image] Which?" and shown["rejected"] == "B"
    assert len(shown["chosen"]) < 6100 and shown["chosen"].endswith("[7,000 characters in all]")


def test_what_is_absent_says_why(run, tmp_path):
    evaluation = evaluation_file(tmp_path)
    text = Page(write_report(tmp_path / "r.html", evaluations=[evaluation]).read_text("utf-8")).text
    for name in ("run", "strength", "flow", "gallery"):
        assert "Not here: no run of rounds was given" in text[name]
    assert "no scores lie beside" in text["rewards"] and "no audit was given" in text["style"]
    (run / "run.json").unlink()  # as of an older release
    text = Page(write_report(tmp_path / "r.html", run=run).read_text("utf-8")).text
    assert "no run.json" in text["gallery"] and "no run.json" in text["style"] and "round 2" in text["flow"]
    record = {"started": "2026-01-02T03:04:05+00:00", "sets": {"pool": {"a": {"dataset_name": "gone.parquet"}}}}
    record |= {"command": None, "machine": "", "versions": {}, "pairs": {"pool": {}}, "images": {}, "rounds": []}
    record |= {"models": [{"model_name_or_path": "tiny"}], "training": {"args": {}}}
    (run / "run.json").write_text(json.dumps(record))
    text = Page(write_report(tmp_path / "r.html", run=run).read_text("utf-8")).text
    assert "`pool.a` is gone.parquet, but there is no such file" in text["gallery"]
    shutil.rmtree(run / "ledger")
    text = Page(write_report(tmp_path / "r.html", run=run).read_text("utf-8")).text
    assert "has not decided about any pair yet" in text["strength"] and "final/curated" in text["run"]
    assert not (run / "ledger").exists()


def test_a_run_that_balanced_its_base_shows_that_and_what_each_stage_gained(run, tmp_path):
    for when, bias in (("before", 0.9), ("after", 0.5)):
        (run / "balance-style").mkdir(exist_ok=True)
        audit = audit_style(make_digits("train", 400, style_bias=bias))
        (run / f"balance-style/style_{when}.json").write_text(audit.to_json())
    summary = json.loads((run / "summary.json").read_text())
    accuracies = {"unbalanced": (0.5, 0.25), "base": (0.75, 0.5), "uncurated": (0.625, 0.25), "curated": (0.875, 0.75)}
    summary["final"] = {
        name: {**summary["final"]["curated"], "model_dir": name, "accuracy": both, "accuracy/a": part}
        for name, (both, part) in accuracies.items()
    }
    summary["harm"] = ["Curation made <b>it</b> worse."]
    (run / "summary.json").write_text(json.dumps(summary))
    page = write_report(tmp_path / "r.html", run=run).read_text("utf-8")
    assert '<p class="warning">Curation made &lt;b&gt;it&lt;/b&gt; worse.</p>' in page
    text = Page(page).text
    assert "Of the constructed data, weighted." in text["style"] and "400" in text["style"]
    table = words(text["run"]).split("Test accuracy by source")[1]
    assert table.startswith(" trained on all a base data as it came 0.5000 0.2500 base data only 0.7500 0.5000")
    assert "gain by balancing style +0.2500 +0.2500 gain by curation +0.2500 +0.5000" in table


def test_audits_of_style_from_files(tmp_path):
    for name, bias in (("before", 0.9), ("after", 0.5)):
        report = audit_style(make_digits("train", 400, style_bias=bias))
        (tmp_path / f"{name}.json").write_text(report.to_json())
    paths = {f"style_{name}": tmp_path / f"{name}.json" for name in ("before", "after")}
    text = words(Page(write_report(tmp_path / "r.html", **paths).read_text("utf-8")).text["style"])
    for name in ("before", "after"):
        part = json.loads((tmp_path / f"{name}.json").read_text())["overall"]
        assert f"all pairs {name} 400 {part['auc']:.3f} {part['interval'][0]:.3f} to" in text
        telling = max(part["features"], key=lambda feature: abs(part["features"][feature]["auc"] - 0.5))
        assert f" {telling} " in text
    assert "What carries it" in text


def test_an_audit_without_images(tmp_path):
    rows = make_digits("train", 400, shortcut="question_answer", num_digits=(1, 2))
    rows = with_columns(rows, {"source": [f"<b>{index % 2}" for index in range(400)]})
    report = audit_blind(rows, min_pairs=201)
    (tmp_path / "blind.json").write_text(report.to_json())
    (tmp_path / "both.json").write_text(json.dumps({"overall": {}, "blind": json.loads(report.to_json())}))
    pages = [
        write_report(tmp_path / "r.html", blind=tmp_path / f"{name}.json").read_text("utf-8")
        for name in ("blind", "both")
    ]
    assert pages[0] == pages[1]
    text, part = words(Page(pages[0]).text["blind"]), report.overall
    low, high = part.interval
    assert f"all pairs 400 {part.num_groups} {part.accuracy:.3f} {low:.3f} to {high:.3f}" in text
    assert "<b>0 200" in text and "too few pairs: 200 of at least 201" in text
    top = part.ngrams[0]
    assert f"{top.label} {top.share:.1%} {top.chosen:.1%} {top.log_odds:+.2f}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "There is nothing to report on"),
        ({"blind": "list.json"}, "list.json is no audit without images"),
        ({"run": "nowhere"}, "nowhere is no folder of a run"),
        ({"evaluations": ["bad.json"]}, "bad.json is not JSON"),
        ({"evaluations": ["list.json"]}, "list.json holds no result of an evaluation"),
        ({"style_before": "list.json"}, "list.json is no audit of style"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=message):
        write_report("r.html", **arguments)
    assert not (tmp_path / "r.html").exists()


def test_calls_to_judges_have_a_curve(run, tmp_path):
    points = {"calls": [0, 2, 4], "changed": [0, 1, 1], "noise": [0.25, 0.2, 0.2]}
    left = {"not asked (budget)": 7, "not asked (no gain)": 1234}
    counts = {"judged": 2, "order": "gain", "judge_accuracy": 0.75, "curve": points, **left}
    write_stage(run, "round-1/judge", counts)
    write_stage(run, "round-2/judge", {**counts, "curve": {name: points[name] for name in ("calls", "changed")}})
    page = Page(write_report(tmp_path / "r.html", run=run).read_text("utf-8"))
    text = words(page.text["flow"])
    assert "round-1/judge gain 4 2 1 25.0% 20.0% 7 1,234" in text and "round-2/judge gain 4 2 1 7 1,234" in text
    assert "round-1/judge: judges asked in the order gain" in text and "share of wrong labels" in text
    labels = [attributes.get("aria-label", "") for _, attributes in page.tags]
    assert "share of wrong labels by calls, from 0.25 at 0 to 0.2 at 4" in labels
    assert "labels changed by calls, from 0 at 0 to 1 at 4" in labels


def curves(source: str, reading: str, pairs: int, rate: float | None = 0.2, **given) -> dict:
    """The entry of a source in the ledger, with fitted curves if there are any."""
    told = {"rate": rate, "interval": [0.1, 0.3], "accuracy": 0.8, "accuracy_interval": [0.7, 0.9], "clean": 0.1}
    told |= {"is_identified": True, "reading": reading, "contradicted": 0.25, "threshold": 0.5, "flipped": 3}
    if rate is not None:
        line = {"margin": [0.5, 1.5], "pairs": [pairs / 2] * 2, "contradicted": [0.4, 0.1]}
        names = ("accuracy", "accuracy_low", "accuracy_high", "noise", "posterior")
        told["curves"] = line | {name: [0.6, 0.9] for name in names}
    return {source: {**told, "pairs": pairs, **given}}


def add_health(run, sources: dict) -> None:
    """Put the health of a decision into the first and the last round of a ledger."""
    path = run / "ledger/ledger.json"
    record = json.loads(path.read_text())
    curve = {"margin": [0.5, 1.5], "pairs": [100, 100], "contradicted": [0.3, 0.1]}
    known = {"pairs": 200, "accuracy": 0.8, "interval": [0.75, 0.85], "curve": curve}
    record["rounds"][0]["health"] = {"reference": known, "sources": curves(NASTY_SOURCE, "hardly read", 40)}
    record["rounds"][-1]["health"] = {"reference": None, "sources": sources}
    path.write_text(json.dumps(record))


def test_health_comes_first(run, tmp_path):
    sources = curves("a", "read", 900) | curves(NASTY_SOURCE, "not read", 1000, 0.6) | curves("", "unknown", 7, None)
    add_health(run, sources)
    page = Page(write_report(tmp_path / "r.html", run=run).read_text("utf-8"))
    text = {name: words(content) for name, content in page.text.items()}
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == ["health", *SECTIONS]
    told = f"The model reads 1 of 3 sources; it does not read {NASTY_SOURCE!r}, which it leaves alone; it has too few"
    assert told in text["health"]
    assert f"The model takes most labels of {NASTY_SOURCE!r} to be wrong" in text["health"]
    assert "There are no pairs known to be right" in text["health"]
    assert "at the last decision (round 2)" in text["health"]
    # The largest first.
    cells = "25.0% 70-90% 10-30% 3"
    assert f"{NASTY_SOURCE} 1,000 {cells} not read, left alone a 900 {cells} read" in text["health"]
    assert "no source 7 25.0% 3 too few pairs to tell" in text["health"]
    earlier = text["health"].split("Earlier decisions")[-1]
    assert "round 1 known to be right 200 20.0% 75-85% round 1" in earlier
    assert f"round 1 {NASTY_SOURCE} 40 25.0% 70-90% 10-30% 3 hardly read" in earlier
    warnings = [attributes for tag, attributes in page.tags if attributes.get("class") == "warning"]
    assert len(warnings) == 2


def test_figures_of_health_are_of_the_data_and_the_curves(monkeypatch):
    """Dots are shares of at least forty pairs, weighted; lines are the curves of the ledger."""
    drawn = []
    monkeypatch.setattr(health_section, "as_svg", lambda drawing, name: drawn.append((name, drawing.axes[0])) or "")
    known = {"pairs": 200, "accuracy": 0.8, "interval": [0.75, 0.85]}
    # Twelve bins of 20 pairs become six of 40.
    shares = np.arange(12) / 20
    known["curve"] = {"margin": np.arange(12).tolist(), "pairs": [20] * 12, "contradicted": shares.tolist()}
    many = {f"s{number}": curves("", "read", 100 + number)[""] for number in range(8)}
    entry = {"round": 1, "stage": "decide", "health": {"reference": known, "sources": many}}
    section = health_section.health_section(SimpleNamespace(standing=[entry]))
    assert [name for name, _ in drawn] == [*[f"noise-{number}" for number in range(6)], "noise-reference"]
    assert [one.title for one in section.figures[:2]] == ["Known to be right, 200 pairs", "s7, 107 pairs"]
    assert section.notes == ["Figures of the 6 largest sources; all 8 are in the table."]
    dots = drawn[-1][1].lines[-1]
    assert dots.get_xdata() == pytest.approx([0.5, 2.5, 4.5, 6.5, 8.5, 10.5])
    assert dots.get_ydata() == pytest.approx((shares[::2] + shares[1::2]) / 2)
    errors, noise, posterior, dots = drawn[0][1].lines
    assert errors.get_ydata() == pytest.approx([0.4, 0.1]) and dots.get_ydata() == pytest.approx([0.4, 0.1])
    assert noise.get_ydata() == pytest.approx([0.6, 0.9]) and posterior.get_ydata() == pytest.approx([0.6, 0.9])
    assert section.warnings == []
    entry["health"]["sources"] = {f"s{n}": curves("", "read", 100 + n, 0.6)[""] for n in range(8)}
    (told,) = health_section.health_section(SimpleNamespace(standing=[entry])).warnings
    assert told.startswith("The model takes most labels of 's7', 's6', 's5', 's4', 's3', 's2' and 2 more to be wrong:")
    assert health_section.health_section(SimpleNamespace(standing=[{"round": 1}])) is None
    assert health_section.health_section(None) is None


def test_a_rise_of_style_stands_on_top_also_of_a_run_that_has_not_ended(run, tmp_path):
    (run / "summary.json").unlink()
    for when, bias in (("before", 0.5), ("after", 0.9)):
        (tmp_path / f"{when}.json").write_text(audit_style(make_digits("train", 400, style_bias=bias)).to_json())
    paths = {f"style_{when}": tmp_path / f"{when}.json" for when in ("before", "after")}
    for given in ({"run": run}, {}):
        page = write_report(tmp_path / "r.html", **paths, **given).read_text("utf-8")
        top = page[: page.index("<section")]
        assert '<p class="warning">Style tells more of the labels of &#39;digits&#39; after curation' in top
    # Weights that balance constructed pairs are no curation.
    (run / "balance-style").mkdir()
    for when in ("before", "after"):
        shutil.copy(tmp_path / f"{when}.json", run / f"balance-style/style_{when}.json")
    assert 'class="warning"' not in write_report(tmp_path / "r.html", run=run).read_text("utf-8")
