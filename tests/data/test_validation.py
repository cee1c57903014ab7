"""Validation: every row ends on the right side with the right words, in memory, on disk or streamed; all come back."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset, IterableDataset, load_from_disk
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from rich.console import Console
from torch.utils.data import DataLoader

from tests.families import FAMILIES, build_tokenizer, example_images
from tests.families_chat import CHATS
from tests.rows import png
from trl_dt2it.data.canonical import FEATURES, preference
from trl_dt2it.data.duplicates import find_doubles, pair_digest
from trl_dt2it.data.quarantine import ReasonSummary, ValidationReport, quarantine_report
from trl_dt2it.data.validation import readmit, validate


PICTURES = [png(image) for image in example_images(12)]
BLANK = {"pair_id": None, "source": None}


def row(number=0, **changes):
    """A good row; each number has its own image, question and answers."""
    made = preference(f"What is in picture {number}?", f"A cat {number}.", "A dog.", [PICTURES[number]])
    return {**BLANK, **made, "strength": 1.0, **changes}


def swapped(one):
    return {**one, "chosen": one["rejected"], "rejected": one["chosen"]}


def dataset_of(rows):
    return Dataset.from_dict({name: [one.get(name) for one in rows] for name in FEATURES}, features=FEATURES)


def notes(quarantine):
    return [(one["row"], one["reason"], one["message"]) for one in quarantine]


def check(rows, **options):
    """The clean rows' places and the notes about the others."""
    rows = [{**one, "source_id": str(place)} for place, one in enumerate(rows)]
    clean, quarantine = validate(dataset_of(rows), show=False, **options)
    assert quarantine["source_id"][:] == list(map(str, quarantine["row"]))
    return list(map(int, clean["source_id"])), notes(quarantine)


def answer(text):
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def processor_of(family):
    """The processor alone, without the model's weights."""
    _, processor = FAMILIES[family](build_tokenizer(CHATS[family]))
    processor.chat_template = CHATS[family].template
    return processor


MIXED = [row(0), row(1, strength=-1.0), row(2), row(2), row(3, images=[{"bytes": b"no image", "path": None}]), row(4)]
EXPECTED = [
    (1, "bad_strength", "`strength` is -1.0; give a finite number that is not negative, or None if unknown."),
    (3, "duplicate_pair", "it is the same pair as row 2; keep one of them."),
    (4, "image_corrupt", "the image is not an image in a known format (PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM)."),
]


def test_a_set_is_divided():
    dataset = dataset_of(MIXED)
    clean, quarantine = validate(dataset, show=False)
    assert clean.features == dataset.features == FEATURES
    assert clean.with_format("arrow")[:].equals(dataset.select([0, 2, 5]).with_format("arrow")[:])
    assert clean[0]["images"][0].size == Image.open(io.BytesIO(PICTURES[0])).size
    assert notes(quarantine) == EXPECTED
    assert quarantine.column_names == [*FEATURES, "row", "reason", "message"]
    for place, (source, _, _) in enumerate(EXPECTED):  # whole, images as they came
        kept = {name: quarantine[place][name] for name in FEATURES}
        assert kept == {name: MIXED[source].get(name) for name in FEATURES}


def test_a_set_without_faults_is_left_as_it_is():
    dataset = dataset_of([row(0), row(1)])
    clean, quarantine = validate(dataset, show=False)
    assert clean is dataset
    assert len(quarantine) == 0
    assert quarantine.column_names == [*FEATURES, "row", "reason", "message"]


def test_a_set_of_faults_and_an_empty_set():
    clean, quarantine = validate(dataset_of([row(0, strength=-1.0)] * 3), show=False)
    assert (len(clean), quarantine["reason"][:]) == (0, ["bad_strength"] * 3)
    for empty in (clean, dataset_of([])):
        assert [len(part) for part in validate(empty, show=False)] == [0, 0]


@pytest.mark.parametrize("kind", ["disk", "selected", "shuffled", "formatted", "two processes"])
def test_the_same_wherever_the_rows_are(kind, tmp_path):
    dataset, options = dataset_of(MIXED), {}
    if kind == "disk":
        dataset.save_to_disk(tmp_path)
        dataset = load_from_disk(tmp_path)
    elif kind == "selected":
        dataset = dataset_of([row(9), *MIXED, row(10)]).select(range(1, 1 + len(MIXED)))
    elif kind == "shuffled":
        dataset = dataset_of(MIXED[::-1]).select(range(len(MIXED) - 1, -1, -1))
    elif kind == "formatted":
        dataset = dataset.with_format("numpy")
    else:
        options["num_proc"] = 2
    clean, quarantine = validate(dataset, show=False, **options)
    assert notes(quarantine) == EXPECTED
    assert clean.format == dataset.format
    assert (
        clean.with_format(None)
        .with_format("arrow")[:]
        .equals(dataset_of([row(0), row(2), row(4)]).with_format("arrow")[:])
    )


def test_a_file_that_was_mended_is_read_again(tmp_path):
    path = tmp_path / "a.png"
    dataset = dataset_of([row(images=[{"bytes": None, "path": str(path)}])])
    dataset.to_parquet(tmp_path / "set.parquet", batch_size=1)
    dataset = Dataset.from_parquet(str(tmp_path / "set.parquet"), cache_dir=str(tmp_path / "cache"))
    assert validate(dataset, show=False)[1]["reason"][:] == ["image_missing"]
    path.write_bytes(PICTURES[0])
    assert len(validate(dataset, show=False)[0]) == 1


def test_columns_that_are_json():
    """`datasets` holds what has several types as JSON text."""
    mixed = [
        {"role": "user", "content": "Who?"},
        {"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]},
    ]
    rows = [{"prompt": mixed, "chosen": answer("I."), "rejected": answer("You.")}, {"prompt": mixed, "chosen": [7]}]
    rows[1]["rejected"] = rows[0]["rejected"]
    dataset = Dataset.from_list(rows, on_mixed_types="use_json")
    assert "Json" in str(dataset.features)
    clean, quarantine = validate(dataset, show=False)
    assert (len(clean), quarantine["reason"][:]) == (1, ["not_conversational"])
    clean, quarantine = validate(dataset, processing_class=build_tokenizer(CHATS["qwen3_vl"]), show=False)
    assert quarantine["reason"][:] == ["special_token", "not_conversational"]


# --- duplicates and contradictions


def test_the_first_of_equal_rows_stays():
    assert check([row(0), row(1), row(0), row(1), row(0)]) == (
        [0, 1],
        [
            (place, "duplicate_pair", f"it is the same pair as row {first}; keep one of them.")
            for place, first in ((2, 0), (3, 1), (4, 0))
        ],
    )


def test_no_row_of_a_contradiction_stays():
    rows = [row(0), row(1), swapped(row(0)), row(0), swapped(row(0))]
    message = "row {} prefers the other answer; keep the one that is right."
    others = {0: 2, 2: 0, 3: 2, 4: 0}
    assert check(rows) == (
        [1],
        [(place, "contradictory_pair", message.format(other)) for place, other in others.items()],
    )


def test_the_other_row_is_called_by_its_name():
    rows = [row(0, pair_id="a-7"), row(0), row(1), swapped(row(1, pair_id="a-9"))]
    assert [message for _, _, message in check(rows)[1]] == [
        "it is the same pair as a-7; keep one of them.",
        "a-9 prefers the other answer; keep the one that is right.",
        "row 2 prefers the other answer; keep the one that is right.",
    ]


def test_what_is_another_pair():
    two = preference("<image>\n<image>\nWhich?", "The first.", "The second.", PICTURES[:2])
    rows = [
        {**BLANK, **two},
        # The same pictures in the other order, and so the other answer: as `reformulate_t2i` gives both orders.
        {**BLANK, **swapped({**two, "images": two["images"][::-1]})},
        {**BLANK, **two, "images": [two["images"][0]] * 2},
        row(0),
        row(0, images=row(1)["images"]),
        row(0, prompt=row(1)["prompt"]),
        row(0, prompt=[{**row(0)["prompt"][0], "role": "system"}]),
        row(0, rejected=answer("A bird.")),
        row(0, chosen=answer("A bird.")),
    ]
    assert check(rows) == (list(range(len(rows))), [])


def test_what_is_the_same_pair():
    plain = {"prompt": "q ", "chosen": "a", "rejected": "b"}
    same = [
        (row(0), row(0, strength=3.0, pair_id="x", images=[{"bytes": PICTURES[0], "path": "b.png"}])),
        (
            row(0),
            {**row(0), "prompt": None, **{side: row(0)["prompt"] + row(0)[side] for side in ("chosen", "rejected")}},
        ),
        (row(0), row(0, videos=[], tools=None, chat_template_kwargs={})),
        (plain, {"chosen": "q a", "rejected": "q b"}),
        ({**plain, "chosen": answer("a"), "prompt": []}, {**plain, "chosen": answer("a"), "prompt": None}),
    ][:4]
    for one, other in same:
        assert pair_digest(one) == pair_digest(other)
        assert pair_digest(swapped(one)) == (pair_digest(one).key, not pair_digest(one).is_swapped)
    others = [
        row(0),
        row(0, tools=[{"type": "function"}]),
        row(0, tools='[{"type": "function"}]'),
        row(0, chat_template_kwargs={"enable_thinking": True}),
        row(0, videos=[["a.png"]]),
        row(0, videos=[{"frames": ["a.png"], "fps": 1.0}]),
        plain,
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    assert len({pair_digest(other).key for other in others}) == len(others)
    assert all(len(pair_digest(other).key) == 16 for other in others)


def test_a_bad_row_is_no_one_s_double():
    bad = row(0, strength=-1.0)
    kept, found = check([bad, row(0), swapped(bad)])
    assert kept == [1]
    assert [reason for _, reason, _ in found] == ["bad_strength", "bad_strength"]


def test_doubles_are_left_alone_if_asked():
    rows = [row(0), row(0), swapped(row(0))]
    assert check(rows, duplicates=False) == ([0, 1, 2], [])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.booleans(), st.booleans()), max_size=30))
def test_doubles_are_those_of_a_plain_search(drawn):
    high, low = (np.array([one[half] for one in drawn], dtype=np.uint64) for half in (0, 1))
    labels, is_bad = (np.array([one[part] for one in drawn], dtype=bool) for part in (2, 3))
    expected = []
    for place, (*key, label, bad) in enumerate(drawn):
        same = [other for other, one in enumerate(drawn) if list(one[:2]) == key and not one[3]]
        against = [other for other in same if drawn[other][2] != label]
        if not bad and (against or same[0] < place):
            expected.append((place, (against or same)[0], bool(against)))
    doubles = find_doubles(high, low, labels, is_bad)
    assert list(zip(*(part.tolist() for part in doubles), strict=True)) == expected


# --- options


def test_images_are_looked_at_as_deeply_as_asked(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    cut = png(Image.fromarray(noise))[:1000]
    rows = [row(0), row(1, images=[{"bytes": cut, "path": None}]), row(2, images=[{"bytes": b"", "path": None}])]
    assert [reason for _, reason, _ in check(rows, image_check="full")[1]] == ["image_corrupt"] * 2
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the pixels were decoded"))
    assert [place for place, _, _ in check(rows)[1]] == [2]
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("an image was opened"))
    assert check(rows, image_check="none") == ([0, 1, 2], [])


def test_too_long_is_one_token_more_than_allowed():
    processor = processor_of("qwen3_vl")
    rows = [row(0), row(0, rejected=answer("A dog. " * 9)), row(0, chosen=answer("A cat. " * 5))]
    lengths = []
    for one in rows:
        content = {key: [{"type": "image"}] if key == "i" else one[key] for key in ("prompt", "chosen", "rejected")}
        images = [Image.open(io.BytesIO(one["images"][0]["bytes"]))]
        for side in ("chosen", "rejected"):
            messages = [
                {**message, "content": [{k: v for k, v in b.items() if v is not None} for b in message["content"]]}
                for message in [*content["prompt"], *content[side]]
            ]
            text = processor.apply_chat_template(messages, tokenize=False)
            lengths.append(len(processor(text=[text], images=images)["input_ids"][0]))
    longest = sorted(set(lengths))
    assert len(longest) == 4 and longest[0] > 10
    options = {"processing_class": processor, "duplicates": False}
    assert check(rows, max_length=longest[3], **options)[1] == []
    assert [place for place, _, _ in check(rows, max_length=longest[3] - 1, **options)[1]] == [
        max(range(3), key=lambda place: max(lengths[2 * place : 2 * place + 2]))
    ]
    kept, found = check(rows, max_length=longest[1], **options)
    assert kept == [0] and check(rows, max_length=longest[1], num_proc=2, **options) == (kept, found)
    assert [reason for _, reason, _ in found] == ["too_long"] * 2
    assert found[0][2] == f"prompt and `rejected` have {lengths[3]} tokens, more than {longest[1]}; shorten the text."
    assert found[1][2] == f"prompt and `chosen` have {lengths[4]} tokens, more than {longest[1]}; shorten the text."


def test_a_processor_that_must_see_the_pixels_counts_too():
    cut = png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)))[:1000]
    rows = [row(0), row(1, images=[{"bytes": cut, "path": None}], pair_id="cut")]
    kept, found = check(rows, processing_class=processor_of("gemma3"), max_length=4000)
    assert kept == [0]
    assert found[0][1] == "image_corrupt" and not found[0][2].startswith("cut")


def test_a_template_that_refuses_a_conversation_is_a_reason():
    processor = processor_of("qwen3_vl")
    processor.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}x"
    system = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}]
    plain = row(0, images=[], prompt=[{"role": "user", "content": [{"type": "text", "text": "Who?"}]}])
    kept, found = check(
        [plain, {**plain, "prompt": system + plain["prompt"]}], processing_class=processor, max_length=9
    )
    assert kept == [0]
    assert found == [
        (1, "not_conversational", "the chat template refuses the conversation (No system.); mend its roles.")
    ]


def test_special_tokens_are_those_of_the_tokenizer_or_processor():
    rows = [row(0, chosen=answer("A cat.<|im_end|>")), row(1)]
    assert check(rows) == ([0, 1], [])
    for reader in (processor_of("qwen3_vl"), build_tokenizer(CHATS["qwen3_vl"])):
        kept, [(place, reason, message)] = check(rows, processing_class=reader)
        assert (kept, place, reason) == ([1], 0, "special_token")
        assert message.startswith("`chosen` message 0 contains the special token '<|im_end|>'")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"max_length": 9}, "give the model's processor"),
        ({"max_length": 0}, "at least 1"),
        ({"image_check": "all"}, "`image_check` is 'all'"),
    ],
)
def test_options_that_do_not_fit(options, part):
    with pytest.raises(ValueError, match=part):
        validate(dataset_of([row(0)]), **options)


def test_sets_that_do_not_fit():
    with pytest.raises(ValueError, match="it needs `chosen` and `rejected`"):
        validate(Dataset.from_list([{"caption": "a", "chosen_image": b"a", "rejected_image": b"b"}]))
    with pytest.raises(ValueError, match="a column `reason`"):
        validate(Dataset.from_list([{"chosen": "a", "rejected": "b", "reason": "c"}]))
    with pytest.raises(ValueError, match="not only its tokenizer"):
        validate(dataset_of([row(0)]), processing_class=build_tokenizer(CHATS["qwen3_vl"]), max_length=9)


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


# --- streams


def stream_of(rows, num_shards=1):
    return dataset_of(rows).to_iterable_dataset(num_shards)


def test_a_stream_is_divided_alike():
    good, bad = validate(stream_of(MIXED), show=False)
    clean, quarantine = validate(dataset_of(MIXED), show=False)
    assert isinstance(good, IterableDataset) and isinstance(bad, IterableDataset)
    assert good.features == clean.features and bad.features == quarantine.features
    for _ in range(2):  # a second reading is the first again
        assert list(bad) == quarantine.to_list()
        decoded = list(good)
        assert [one["source_id"] for one in decoded] == clean["source_id"][:]
        assert [np.asarray(one["images"][0]).tolist() for one in decoded] == [
            np.asarray(one["images"][0]).tolist() for one in clean
        ]


def test_a_stream_without_features():
    good, bad = validate(IterableDataset.from_generator(lambda: iter(MIXED)), show=False)
    assert [one["prompt"] for one in good] == [MIXED[place]["prompt"] for place in (0, 2, 5)]
    assert notes(bad) == EXPECTED


def test_of_a_contradiction_in_a_stream_the_later_row_is_set_aside():
    rows = [row(0, pair_id="a"), row(1), swapped(row(0)), row(0), swapped(row(0))]
    good, bad = validate(stream_of(rows), show=False)
    assert len(list(good)) == 2
    assert notes(bad) == [
        (2, "contradictory_pair", "a prefers the other answer; keep the one that is right."),
        (3, "duplicate_pair", "it is the same pair as a; keep one of them."),
        (4, "contradictory_pair", "a prefers the other answer; keep the one that is right."),
    ]


def test_two_readers_of_a_stream_do_not_take_each_other_s_rows_for_doubles():
    good, _ = validate(stream_of([row(number) for number in range(6)]), show=False)
    first, second = iter(good), iter(good)
    ahead = [next(first) for _ in range(4)]
    assert len(list(second)) == 6
    assert len(ahead) + len(list(first)) == 6


def test_a_shuffled_stream_begins_anew_in_each_epoch():
    stream = stream_of([row(number) for number in range(8)]).shuffle(seed=0, buffer_size=8)
    good, _ = validate(stream, show=False)
    orders = []
    for epoch in range(3):
        good.set_epoch(epoch)
        orders.append([one["prompt"][0]["content"][1]["text"] for one in good])
    assert [len(order) for order in orders] == [8, 8, 8] and orders[0] != orders[1]


def test_workers_of_a_loader_share_a_stream():
    rows = [row(number) for number in range(8)] + [row(0, strength=-1.0)]
    good, _ = validate(stream_of(rows, num_shards=4), show=False)
    names = [
        one["prompt"][0]["content"][1]["text"]
        for one in DataLoader(good.remove_columns("images"), batch_size=None, num_workers=2)
    ]
    assert Counter(names) == Counter(one["prompt"][0]["content"][1]["text"] for one in rows[:8])


def test_a_stream_says_what_it_leaves_out(caplog, monkeypatch):
    import logging

    from transformers.utils import logging as transformers_logging

    monkeypatch.setattr(transformers_logging.get_logger("trl_dt2it.data.validation_stream"), "level", logging.WARNING)
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    good, bad = validate(stream_of([row(0, strength=-1.0, pair_id=f"p-{n}") for n in range(11)]))
    assert list(good) == [] and len(list(bad)) == 11
    said = [record.getMessage() for record in caplog.records if "Set aside" in record.getMessage()]
    assert [line.split(",")[1].split()[0] for line in said] == ["1", "10"]
    assert "p-0, bad_strength" in said[0] and "p-9, bad_strength" in said[1]


def test_a_stream_has_no_files(tmp_path):
    for option in ("report_file", "quarantine_file"):
        with pytest.raises(ValueError, match="streamed set"):
            validate(stream_of([row(0)]), **{option: tmp_path / "a"})
