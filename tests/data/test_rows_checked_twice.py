"""A row is checked twice on its way: where it comes in, and where training starts."""

import json
import re
import sys
from collections import Counter
from functools import partial

import pytest
from transformers import AutoProcessor

from tests.families import example_images, family_dir
from tests.rows import png
from tests.trainers import config
from trl_dt2it import MultimodalPreferenceCollator, token_counter
from trl_dt2it.data import (
    ImageOptions,
    build_mixture,
    load_preferences,
    mix,
    prepare_shard,
    read_settings,
    split_by_group,
    validate,
)
from trl_dt2it.data import rows as schema
from trl_dt2it.training.setup import prepare_dataset


COUNT = 6


@pytest.fixture
def calls(monkeypatch):
    """Calls of `check_row` by the answer that the row prefers."""
    counts = Counter()

    def counted(check_row, row, **kwargs):
        counts.update(re.findall(r"no\. \w+", f"{row.get('chosen')}"))
        return check_row(row, **kwargs)

    function = partial(counted, schema.check_row)
    for module in [module for name, module in sys.modules.items() if name.startswith("trl_dt2it.")]:
        if vars(module).get("check_row") is schema.check_row and module is not schema:
            monkeypatch.setattr(module, "check_row", function)
    return counts


@pytest.fixture
def raw(tmp_path):
    """Rows of TRL with a question as text, with messages and with whole conversations, and a table of answers."""
    for index, image in enumerate(example_images(2 * COUNT)):
        (tmp_path / f"{index}.png").write_bytes(png(image))
    rows = {"text": [], "messages": [], "whole": [], "table": []}
    for index in range(COUNT):
        turn = [{"role": "user", "content": f"What is it, {index}?"}]
        names = {form: f"no. {form}{index}" for form in rows}
        sides = {
            form: [[{"role": "assistant", "content": t}] for t in (name, "A dog.")] for form, name in names.items()
        }
        images = {"images": [f"{index}.png"]}
        chosen, rejected = sides["text"]
        rows["text"].append({"prompt": turn[0]["content"], "chosen": chosen, "rejected": rejected, **images})
        chosen, rejected = sides["messages"]
        rows["messages"].append({"prompt": turn, "chosen": chosen, "rejected": rejected, **images})
        chosen, rejected = (turn + side for side in sides["whole"])
        rows["whole"].append({"chosen": chosen, "rejected": rejected, **images})
        rows["table"].append({"question": f"<image>What is {index}?", "a": names["table"], "b": "A dog.", **images})
    for form, made in rows.items():
        (tmp_path / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return tmp_path


def load(raw, form, **options):
    table = {"question": "question", "chosen": "a", "rejected": "b", "images": "images"} if form == "table" else {}
    name = "columns" if form == "table" else "trl"
    return load_preferences(name, raw / f"{form}.jsonl", image_root=raw, source=form, **table, **options)


def start(dataset, raw, **options):
    processor = AutoProcessor.from_pretrained(family_dir("qwen3_vl"))
    args = config(raw / "out", image_root=str(raw), max_length=2000, **options)
    collator = MultimodalPreferenceCollator(processor, ImageOptions(image_root=str(raw)))
    return prepare_dataset(dataset, name="train", collator=collator, args=args)[0]


@pytest.mark.parametrize("on_bad_row", ["raise", "quarantine"])
def test_from_files_to_training(raw, calls, on_bad_row):
    reader = token_counter(AutoProcessor.from_pretrained(family_dir("qwen3_vl")))
    parts = {}
    for form in ("text", "messages", "whole", "table"):
        rows = load(raw, form)
        assert max(calls.values()) == 1
        parts[form], quarantine = validate(rows, image_root=raw, token_counter=reader, max_length=2000, show=False)
        assert (len(parts[form]), len(quarantine)) == (COUNT, 0)
    mixed, _ = validate(mix(parts), image_root=raw, show=False)
    assert len(mixed) == 4 * COUNT and set(calls.values()) == {1}
    train = split_by_group(mixed, 4)["train"]
    assert len(start(train, raw, on_bad_row=on_bad_row)) == len(train)
    assert Counter(calls.values()) == {2: len(train), 1: len(mixed) - len(train)}


def test_through_the_shards_of_a_mixture(raw, calls):
    given = {"name": "trl", "image_root": str(raw)}
    settings = read_settings({form: {**given, "path_or_id": str(raw / f"{form}.jsonl")} for form in ("text", "whole")})
    for form, one in settings.items():
        prepare_shard(raw / "out", form, one, 0)
    build_mixture(raw / "out", settings, test_size=0)
    assert set(calls.values()) == {1} and len(calls) == 2 * COUNT
    train = load_preferences("trl", raw / "out" / "mixture")
    assert len(start(train, raw)) == 2 * COUNT


def test_a_set_that_has_changed_is_checked_anew(raw, calls):
    clean, _ = validate(load(raw, "messages"), image_root=raw, show=False)
    assert set(calls.values()) == {1}
    spoiled = clean.map(lambda row: {"rejected": row["chosen"]})
    assert validate(spoiled, image_root=raw, show=False)[1]["reason"][:] == ["equal_answers"] * COUNT
    clean.set_transform(lambda batch: {**batch, "chosen": batch["rejected"]})
    assert validate(clean, image_root=raw, show=False)[1]["row"][:] == []  # validation looks at the data behind it
    assert max(calls.values()) > 1


def test_a_stream_is_checked_once_before_training(raw, calls):
    clean, bad = validate(load(raw, "messages", streaming=True), image_root=raw, show=False)
    assert len(list(clean)) == COUNT and set(calls.values()) == {1}
    assert list(bad) == []
