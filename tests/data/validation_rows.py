"""Rows to validate, good ones by their number and some with faults, and what becomes of them."""

from datasets import Dataset

from tests.families import FAMILIES, build_tokenizer, example_images
from tests.families_chat import CHATS
from tests.rows import png
from trl_dt2it.data.messages import FEATURES, preference
from trl_dt2it.data.validation import validate


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


def stream_of(rows, num_shards=1):
    return dataset_of(rows).to_iterable_dataset(num_shards)
