"""Preference rows for tests: photographs, questions and answers, with and without images, strengths and sources."""

import io
import random

import numpy as np
from datasets import Dataset, Features, Image, List
from PIL import Image as PILImage

from trl_dt2it.data.mixing import swap_pairs, with_columns

from .families import example_images


WORDS = (
    "the picture shows a red flower among green leaves and one old temple beside still water under blue sky".split()
)


def sentence(rng: random.Random, low: int = 1, high: int = 9) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high))) + "."


def png(image: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def make_rows(num_rows: int, *, seed: int = 0, num_images=(1, 2, 0), **columns) -> list[dict]:
    """Row i has `num_images[i % len(num_images)]` images; `columns` are lists with a value for each row."""
    rng = random.Random(seed)
    rows = []
    for index in range(num_rows):
        count = num_images[index % len(num_images)]
        images = example_images(count, seed=seed * 1000 + index) if count else []
        question = [{"type": "image"}] * count + [{"type": "text", "text": sentence(rng)}]
        chosen, rejected = sentence(rng), sentence(rng)
        while rejected == chosen:
            rejected = sentence(rng)
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": chosen}]}],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": rejected}]}],
                "images": [{"bytes": png(image), "path": None} for image in images],
                **{name: values[index] for name, values in columns.items()},
            }
        )
    return rows


def video_rows(num_frames=(4, 4), *, seed: int = 0) -> list[dict]:
    """Rows with a video each, of so many frames of one size; the first at 2 frames a second, the others at 1."""
    rows = make_rows(len(num_frames), seed=seed, num_images=(0,))
    for index, (row, count) in enumerate(zip(rows, num_frames, strict=True)):
        frames = [png(frame.resize((40, 32))) for frame in example_images(count, seed=seed * 100 + index)]
        row["prompt"][0]["content"].insert(0, {"type": "video"})
        row["videos"] = [frames if index == 0 else {"frames": frames, "fps": 1.0}]
    return rows


def make_dataset(num_rows: int, **kwargs) -> Dataset:
    rows = make_rows(num_rows, **kwargs)
    features = Dataset.from_list([{k: v for k, v in row.items() if k != "images"} for row in rows]).features
    return Dataset.from_list(rows, features=Features({**features, "images": List(Image())}))


def text_rows(num_rows: int, *, seed: int = 0, implicit: bool = False, plain: bool = False) -> list[dict]:
    """Rows without images, as text models take them."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        prompt, chosen, rejected = sentence(rng), sentence(rng), sentence(rng, 10, 14)
        if plain:
            row = {"prompt": prompt + " ", "chosen": chosen, "rejected": rejected}
        else:
            row = {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        if implicit:
            first = row.pop("prompt")
            row = {side: first + row[side] for side in ("chosen", "rejected")}
        rows.append(row)
    return rows


def flip_preferences(dataset: Dataset, rate: float, seed: int = 42) -> Dataset:
    """Flip the labels of an exact share of the pairs, to plant mistakes at known positions; `strength` stays."""
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"`rate` must be between 0 and 1, got {rate}.")
    count, features = len(dataset), dataset.features
    flipped = np.zeros(count, dtype=bool)
    # The tolerance keeps 0.29 * 100 = 28.999999999999996 from losing a row.
    flipped[np.random.default_rng(seed).permutation(count)[: int(rate * count + 1e-9)]] = True
    columns = {"is_flipped": np.array(dataset["is_flipped"]) ^ flipped if "is_flipped" in features else flipped}
    if "true_strength" in features:
        columns["true_strength"] = np.where(flipped, -1.0, 1.0) * np.array(dataset["true_strength"])
    return with_columns(swap_pairs(dataset, flipped), columns)
