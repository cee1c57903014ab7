"""A decision holds for the pair that it was made about: what was edited, swapped or replaced since stays as it is."""

import io
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage

from trl_dt2it.curation import CurationLedger, pair_contents
from trl_dt2it.curation.rounds.config import BaseModel, CurationRun, SourceSets, read_rounds, set_digest
from trl_dt2it.curation.rounds.sets import corrections, ledger_at
from trl_dt2it.curation.rounds.stages import Stage, run_stages, show_plan
from trl_dt2it.curation.rounds.training import RewardTraining
from trl_dt2it.data import ImageOptions, reformulate_t2i, write_parquet
from trl_dt2it.data.contents import CONTENT_COLUMNS
from trl_dt2it.demo.digits import DEMO_LOADERS
from trl_dt2it.training.config import MultimodalRewardConfig


NAMES = ["a", "b", "c", "d"]
ACTIONS = ["keep", "flip", "drop", "flip"]


def png(colour: str, size: int = 8) -> bytes:
    out = io.BytesIO()
    PILImage.new("RGB", (size, size), colour).save(out, "PNG")
    return out.getvalue()


def pair(name: str, chosen: str = "good", rejected: str = "bad", question: str = "q", image=None, **extra) -> dict:
    image = {"bytes": png("red"), "path": None} if image is None else image
    sides = {"chosen": chosen, "rejected": rejected}
    messages = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    prompt = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": question}]}]
    return {"pair_id": name, "prompt": prompt, **messages, "images": [image], **extra}


def rows_of(*rows: dict) -> Dataset:
    message = {"role": Value("string"), "content": Value("string")}
    block = {"type": Value("string"), "text": Value("string")}
    features = {"pair_id": Value("string"), "prompt": List({"role": Value("string"), "content": List(block)})}
    features |= {"chosen": List(message), "rejected": List(message), "images": List(Image(decode=False))}
    return Dataset.from_list(list(rows), features=Features(features))


@pytest.fixture
def ledger(tmp_path) -> CurationLedger:
    ledger = CurationLedger(tmp_path / "ledger")
    rows = rows_of(*map(pair, NAMES))
    ledger.append(1, "flip", pair_ids=NAMES, actions=ACTIONS, contents=pair_contents(rows), strength=[1.0, 2, 3, 4])
    return ledger


@pytest.fixture
def said(caplog, monkeypatch):
    """Warnings of the package, as one text."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("trl_dt2it"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


def outcome(dataset: Dataset) -> dict[str, str]:
    """For each pair that is left what is now its chosen answer."""
    return {row["pair_id"]: row["chosen"][0]["content"] for row in dataset.select_columns(["pair_id", "chosen"])}


def warned(said) -> list[str]:
    found = [record.getMessage() for record in said.records if "decided about them" in record.getMessage()]
    said.clear()
    return found


EDITS = {
    "answers swapped": {"chosen": "bad", "rejected": "good"},
    "an answer edited": {"chosen": "good!"},
    "the prompt edited": {"question": "Q"},
    "another image": {"image": {"bytes": png("blue"), "path": None}},
    "an image that differs in its middle": {"image": {"bytes": png("red", 9), "path": None}},
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_was_changed_is_told_and_left_alone(ledger, said, edit):
    same = rows_of(*map(pair, NAMES))
    assert outcome(ledger.apply(same)) == {"a": "good", "b": "bad", "d": "bad"} and not warned(said)
    changed = rows_of(pair("a"), pair("b", **EDITS[edit]), pair("c", **EDITS[edit]), pair("d"))
    curated = ledger.apply(changed)
    first = EDITS[edit].get("chosen", "good")
    assert outcome(curated) == {"a": "good", "b": first, "c": first, "d": "bad"}  # not flipped, not dropped
    assert curated["curation_flipped"][:] == [False, False, False, True]
    (told,) = warned(said)
    assert told == (
        "2 of 4 pairs, 'b' the first, have another prompt, other answers (edited or swapped) or other images than "
        "when the ledger decided about them; this is not applied to them. Put the rows back, or decide anew: score "
        "them and append a round."
    )
    # The strength of the ledger is that of another pair, too.
    strengths = ledger.apply(changed.add_column("strength", [0.5] * 4), refresh_strength=True)["strength"][:]
    assert strengths == [1.0, 0.5, 0.5, 4.0]
    # Decided anew, about what they are now.
    warned(said)
    ledger.append(2, "flip", pair_ids=["b", "c"], actions=["flip", "keep"], contents=pair_contents(changed))
    second = EDITS[edit].get("rejected", "bad")
    assert outcome(ledger.apply(changed)) == {"a": "good", "b": second, "c": first, "d": "bad"} and not warned(said)
    # And of the rows as they were, the last word is now about others: what was said before holds.
    assert outcome(ledger.apply(same)) == {"a": "good", "b": "bad", "d": "bad"} and len(warned(said)) == 1


def test_a_curated_set_may_be_curated_again_but_not_without_its_marks(ledger, said):
    curated = ledger.apply(rows_of(*map(pair, NAMES)))
    assert outcome(ledger.apply(curated)) == outcome(curated) and not warned(said)
    lost = curated.remove_columns("curation_flipped")  # b and d stand the other way round, and nothing says so
    assert outcome(ledger.apply(lost)) == outcome(curated)
    assert warned(said)[0].startswith("2 of 3 pairs, 'b' the first, ")
    ledger.undo(1)
    ledger.append(2, "flip", pair_ids=NAMES, actions=["flip"] * 4, contents=pair_contents(curated))
    assert outcome(ledger.apply(curated)) == {"a": "bad", "b": "bad", "d": "bad"}  # from the source on


def test_images_count_wherever_they_lie(ledger, said, tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(png("red"))
    path = str(tmp_path / "photos/a.png")
    in_files = rows_of(*(pair(name, image={"bytes": None, "path": path}) for name in NAMES))
    assert outcome(ledger.apply(in_files)) == {"a": "good", "b": "bad", "d": "bad"} and not warned(said)
    write_parquet(in_files, tmp_path / "rows.parquet", image_options=ImageOptions(image_root=str(tmp_path)))
    back = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), cache_dir=tmp_path / "c", split="train")
    assert pair_contents(back).equals(pair_contents(in_files))
    relative = rows_of(*(pair(name, image={"bytes": None, "path": "a.png"}) for name in NAMES))
    assert pair_contents(relative, image_root=tmp_path / "photos").equals(pair_contents(in_files))
    # Where an image cannot be read, the texts have to do; nothing is fetched.
    for value in ("nowhere.png", "http://127.0.0.1:9/a.png"):
        unread = rows_of(*(pair(name, image={"bytes": None, "path": value}) for name in NAMES[:2]), pair("c", "x"))
        found = pair_contents(unread)
        assert found["content"].null_count == 2 and found["content_text"].null_count == 0
        assert outcome(ledger.apply(unread)) == {"a": "good", "b": "bad", "c": "x"} and len(warned(said)) == 1
    # A file that is replaced under its name.
    (tmp_path / "photos/a.png").write_bytes(png("green"))
    assert outcome(ledger.apply(in_files)) == dict.fromkeys(NAMES, "good") and len(warned(said)) == 1


def test_a_persons_word_is_about_what_the_person_saw(ledger, said):
    ledger.correct({"b": "keep", "c": "keep"})
    changed = rows_of(pair("a"), pair("b", "edited"), pair("c"), pair("d"))
    assert outcome(ledger.apply(changed)) == {"a": "good", "b": "edited", "c": "good", "d": "bad"}
    assert warned(said)[0].startswith("1 of 4 pairs, 'b' the first")
    # Also after the round that knew the pair is undone: what a person says stands on its own.
    ledger.undo(1, "flip")
    assert outcome(ledger.apply(changed))["b"] == "edited" and len(warned(said)) == 1


def test_a_ledger_that_does_not_know_is_read_and_says_so_once(tmp_path, said):
    ledger = CurationLedger(tmp_path / "old")
    ledger.append(1, "flip", pair_ids=NAMES, actions=ACTIONS)
    assert not set(CONTENT_COLUMNS) & set(pq.read_schema(next((tmp_path / "old").glob("*.parquet"))).names)
    swapped = rows_of(pair("a"), pair("b", "bad", "good"), pair("d"))
    for _ in range(2):
        assert outcome(ledger.apply(swapped)) == {"a": "good", "b": "good", "d": "bad"}
    told = [record.getMessage() for record in said.records if "goes unnoticed" in record.getMessage()]
    assert len(told) == 1 and "does not know what was in the pairs that round-00001-flip.parquet decided" in told[0]
    # A run of this release repeats what an earlier one had decided.
    contents = pair_contents(rows_of(*map(pair, NAMES)))
    ledger.append(1, "flip", pair_ids=NAMES, actions=ACTIONS, contents=contents)
    assert len(ledger.rounds) == 1


def test_rows_that_no_check_has_seen_have_no_content():
    rows = Dataset.from_dict({"pair_id": ["x"], "chosen": [[{"role": "assistant"}]], "rejected": [[{"role": "a"}]]})
    assert pair_contents(rows)["pair_id"].to_pylist() == ["x"]
    for name in CONTENT_COLUMNS:
        assert pair_contents(Dataset.from_dict({"pair_id": ["x"], "text": ["y"]}))[name].to_pylist() == [None]


# ---------------------------------------------------------------------------------------------------- run folders


def run_on(tmp_path: Path, num_pairs: int) -> CurationRun:
    """A run over so many pairs, whose models are never made."""
    specs = {
        "base": {"clean": {"digits": {"num_pairs": 2}}},
        "pool": {"noisy": {"digits": {"num_pairs": num_pairs}}},
    }
    args = MultimodalRewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    sets = SourceSets(specs, args, lambda: "nowhere", DEMO_LOADERS)
    return CurationRun(tmp_path, RewardTraining(args), [BaseModel("m", 0)], sets, read_rounds("mixture"), ["curated"])


def test_each_pool_finds_its_ledger_again(tmp_path, said):
    first, second = run_on(tmp_path, 4), run_on(tmp_path, 5)
    for turn in range(2):
        for run, number in ((first, 4), (second, 5)):
            ledger = ledger_at(run, [(1, "decide")])
            names = run.sets.contents("pool")["pair_id"]
            if turn == 0:
                assert len(ledger.state()) == 0
                own = {"source_set": run.sets.fingerprint("pool"), "contents": run.sets.contents("pool")}
                ledger.append(1, "decide", pair_ids=names, actions=["keep"] * number, **own)
                ledger.correct({names[number - 1].as_py(): "drop"})
            assert len(ledger.state()) == number and ledger.directory == tmp_path / "ledger"
            assert len(list(tmp_path.glob("ledger*"))) == (1 if turn == 0 and number == 4 else 2)
    # A plan looks into the ledger of its pool, and moves none.
    before = sorted(tmp_path.glob("ledger*"))
    assert corrections(first) != corrections(second) and all(map(corrections, (first, second)))
    assert corrections(run_on(tmp_path, 3)) == [] and sorted(tmp_path.glob("ledger*")) == before
    told = [one.getMessage() for one in said.records if "another pool" in one.getMessage()]
    assert len(told) == 3 and told[-1].endswith("the one of this pool is back from where it was moved before.")


def test_a_replaced_image_is_another_set():
    one, other = rows_of(pair("a")), rows_of(pair("a", image={"bytes": png("blue"), "path": None}))
    digests = {set_digest(rows, pair_contents(rows)) for rows in (one, other)}
    assert len(digests) == 2


def stages_of(setting: int, log: list[str]) -> list[Stage]:
    """A shared stage, and one that writes into a file beside, as decisions go into a ledger."""

    def score(folder):
        log.append(f"score {setting}")
        (folder / "scores").write_text(str(setting))
        return {"value": setting}

    def decide(folder):
        log.append(f"decide {setting}")
        (folder.parent.parent / "beside").write_text((folder.parent / "score/scores").read_text())
        return {"value": setting}

    scoring = Stage("round-1/score", score, {"setting": setting}, is_shared=True)
    return [scoring, Stage("round-1/decide", decide, {}, ("round-1/score",), is_replayed=True)]


def test_stages_are_done_by_one_run_at_a_time(tmp_path):
    (tmp_path / "running.json").write_text('{"pid": 1, "host": "elsewhere", "since": "then", "command": "c"}')
    log: list[str] = []
    with pytest.raises(ValueError, match="is in use by process 1 on elsewhere since then"):
        run_stages(stages_of(1, log), tmp_path)
    assert not log
    # One of several machines holds its part by itself, and stops before what is not shared.
    assert list(run_stages(stages_of(1, log), tmp_path, only_shared=True)) == ["round-1/score"]


def test_what_other_settings_made_is_moved_aside_and_comes_back(tmp_path, capsys):
    log: list[str] = []
    for setting in (1, 2, 1, 2, 1):
        records = run_stages(stages_of(setting, log), tmp_path)
        assert records["round-1/score"]["counts"] == {"value": setting}
        assert (tmp_path / "beside").read_text() == (tmp_path / "round-1/score/scores").read_text() == str(setting)
    assert log == ["score 1", "decide 1", "score 2", "decide 2", "decide 1", "decide 2", "decide 1"]
    (aside,) = (tmp_path / "round-1").glob("score.old-*")
    assert (aside / "scores").read_text() == "2" and len(list((tmp_path / "round-1").iterdir())) == 4
    told = capsys.readouterr().out
    aside = tmp_path / "round-1/score.old-1"  # where the first was moved
    assert f"1/2 round-1/score: what was made with other settings is now in {aside}." in told
    assert f"1/2 round-1/score: made with these settings before, and back from {aside}." in told
    show_plan(stages_of(2, log), tmp_path)
    lines = [[cell.strip() for cell in line.split("│")[1:3]] for line in capsys.readouterr().out.splitlines()]
    assert ["round-1/score", "done"] in lines and ["round-1/decide", "begun"] in lines


def test_captions_with_two_images_are_known_before_and_after_they_are_reformulated(tmp_path, said):
    for index in range(8):
        for side in "ab":
            (tmp_path / f"{side}{index}.png").write_bytes(png("red", 3 + index + 20 * (side == "b")))

    def captions(swapped=(), edited=()) -> Dataset:
        rows = []
        for index in range(8):
            paths = [{"bytes": None, "path": str(tmp_path / f"{side}{index}.png")} for side in "ab"]
            chosen, rejected = reversed(paths) if index in swapped else paths
            caption = f"another cat {index}" if index in edited else f"a cat {index}"
            names = {"pair_id": f"p{index}", "source": "pictures"}
            rows.append({"caption": caption, "chosen_image": chosen, "rejected_image": rejected, **names})
        image = Image(decode=False)
        texts = dict.fromkeys(("caption", "pair_id", "source"), Value("string"))
        return Dataset.from_list(rows, Features({**texts, "chosen_image": image, "rejected_image": image}))

    def flipped(dataset: Dataset) -> list[str]:
        said.clear()
        found = ledger.apply(dataset).select_columns(["pair_id", "curation_flipped"])
        return [row["pair_id"] for row in found if row["curation_flipped"]]

    ledger = CurationLedger(tmp_path / "ledger")
    one, other = (reformulate_t2i(captions(), strength=None, seed=seed) for seed in (1, 2))
    contents = pair_contents(one)
    actions = ["flip" if index % 2 else "keep" for index in range(8)]
    ledger.append(1, "flip", pair_ids=contents["pair_id"], actions=actions, contents=contents)
    for dataset in (one, other, captions()):
        assert flipped(dataset) == ["p1", "p3", "p5", "p7"] and not warned(said)
    curated = ledger.apply(captions())
    assert flipped(curated) == ["p1", "p3", "p5", "p7"] and not warned(said)
    assert curated["chosen_image"][1]["path"].endswith("b1.png")
    assert flipped(captions(swapped=[1], edited=[3])) == ["p5", "p7"] and "2 of 8 pairs" in warned(said)[0]
    for file in tmp_path.glob("*.png"):
        file.unlink()
    for dataset in (one, other, captions()):  # the caption alone is known by now
        assert flipped(dataset) == ["p1", "p3", "p5", "p7"] and not warned(said)
