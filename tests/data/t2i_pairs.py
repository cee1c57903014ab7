"""Text-to-image pairs whose images say which one is better, and reading off what became of them."""

import io

import numpy as np
from datasets import Dataset, Features, Image, IterableDataset, Value
from PIL import Image as PILImage

from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.t2i import CHINESE, ENGLISH


PAIRS = Features(
    {
        "caption": Value("string"),
        "chosen_image": Image(),
        "rejected_image": Image(),
        "strength": Value("float64"),
        "pair_id": Value("string"),
        "group_id": Value("string"),
        "source": Value("string"),
    }
)


def png(value):
    buffer = io.BytesIO()
    PILImage.new("RGB", (2, 1), (value % 256, value // 256, 7)).save(buffer, format="PNG")
    return buffer.getvalue()


def pairs(num_rows, captions=None, sources=None, **changes):
    """Row i has the images 2i (better) and 2i + 1."""
    columns = {
        "caption": captions or [f"caption {i}" for i in range(num_rows)],
        "chosen_image": [{"bytes": png(2 * i), "path": None} for i in range(num_rows)],
        "rejected_image": [{"bytes": png(2 * i + 1), "path": None} for i in range(num_rows)],
        "strength": [float(i) for i in range(num_rows)],
        "pair_id": [f"p{i}" for i in range(num_rows)],
        "group_id": [f"g{i % 3}" for i in range(num_rows)],
        "source": sources or ["s"] * num_rows,
        **changes,
    }
    features = Features({name: PAIRS.get(name, Value("string")) for name in columns})
    return Dataset.from_dict(columns, features=features)


def stream_of(rows, features=None):
    """A stream that knows nothing but what it yields."""
    return IterableDataset.from_generator(lambda: iter(rows), features=features)


def raw(dataset):
    """The rows with their images as bytes and paths."""
    return list(leave_images_encoded(dataset))


def text(messages):
    return "".join(block["text"] or "" for message in messages for block in message["content"])


def first_is_chosen(row):
    """Read off the answer, and checked against the images: even ones are the better ones."""
    numbers = []
    for image in row["images"]:
        red, green, _ = PILImage.open(io.BytesIO(image["bytes"])).getpixel((0, 0))
        numbers.append(red + 256 * green)
    assert abs(numbers[0] - numbers[1]) == 1 and min(numbers) % 2 == 0
    is_first = numbers[0] % 2 == 0
    verdicts = {
        answer for t in (*ENGLISH, *CHINESE) for answer in [(t.first_is_better, t.second_is_better)[not is_first]]
    }
    assert text(row["chosen"]) in verdicts and text(row["rejected"]) not in verdicts
    return is_first


def mixed(num_rows=250):
    """Rows of three sources, some of them bad."""
    dataset = pairs(num_rows, sources=[("a", "b", "b")[i % 3] for i in range(num_rows)])
    table = dataset.with_format("arrow")[:].to_pylist()
    for i in range(0, num_rows, 7):
        table[i]["caption"] = " "
    for i in range(3, num_rows, 11):
        table[i]["rejected_image"] = table[i]["chosen_image"]
    for i in range(5, num_rows, 13):
        table[i]["strength"] = -1.0
    return Dataset.from_list(table, features=PAIRS).add_column("weight", np.linspace(0, 1, num_rows))
