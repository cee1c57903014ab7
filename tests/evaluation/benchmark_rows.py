"""Rows of the three benchmarks with invented content, in the layouts and with the names of the real ones."""

import io
import random
from pathlib import Path

from PIL import Image


def png(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (32, 28)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


# How ids begin, and the group that the definition puts them into.
VL_PREFIXES = {
    "RLAIF-V-": "hallucination",
    "RLHF-V-": "hallucination",
    "hallucination_pair-": "hallucination",
    "wildvision-battle-": "general",
    "svit-": "general",
    "VLFeedback_": "general",
    "mathverse_": "reasoning",
    "mmmu_validation_Art_": "reasoning",
}


def vl_rows(rng: random.Random, count: int) -> list[dict]:
    """Some ids occur twice, and one answer in ten is the second."""
    prefixes = list(VL_PREFIXES)
    return [
        {
            "id": f"{rng.choice(prefixes)}{rng.randrange(count)}",
            "query": f"What is in picture {index}?",
            "response": [f"A cup, {index}.", f"A hat, {index}."],
            "human_ranking": [0, 1] if rng.random() < 0.9 else [1, 0],
            "image": png((index % 256, 40, 90)),
        }
        for index in range(count)
    ]


MM_KINDS = [
    ("visitbench_{}", "images/visitbench/{}.jpg", "open_generation/correctness_task"),
    ("nocaps_{}", "images/nocaps/{}.jpg", "open_generation/preference_task"),
    ("mmmu_pro_{}", "images/mmmu_pro/{}.png", "knowledge"),
    ("mathvista_{}", "images/mathvista/{}.png", "reasoning"),
    ("emma_coding_{}", "images/EMMA-Coding/{}.png", "reasoning"),
    ("i2s_{}", "images/image2struct/{}.png", "reasoning"),
    ("pairs_{}", "images/pairs/{}.png", "safety"),
    ("realworldqa_{}", "images/realworldqa/{}.png", "vqa"),
]


def mm_rows(rng: random.Random, count: int) -> list[dict]:
    rows = []
    for index in range(count):
        name, image, category = rng.choice(MM_KINDS)
        rows.append(
            {
                "ID": name.format(index),
                "Image": image.format(index),
                "Category": category,
                "Text": f"What is in picture {index}?",
                "Output1": f"A cup, {index}.",
                "Output2": f"A hat, {index}.",
                "Better": rng.choice(["Output1", "Output2"]),
            }
        )
    return rows


def mm_rlhf_rows(rng: random.Random, num_prompts: int) -> list[dict]:
    """Two to six pairs a prompt, out of order."""
    rows = []
    for prompt in range(num_prompts):
        category = rng.choice(["mcq", "long", "short", "safety", "video"])
        media = {"video": f"video/v_{prompt}"} if category == "video" else {"image": f"{category}/{prompt}.png"}
        rows += [
            {
                "id": f"{prompt}_x",
                **media,
                "prompt": f"What is in picture {prompt}?",
                "chosen": "A cup.",
                "rejected": f"A hat, {pair}.",
            }
            for pair in range(rng.randint(2, 6))
        ]
    rng.shuffle(rows)
    return rows


def paper_rows(rng: random.Random, count: int, images: Path) -> dict[str, list[dict]]:
    """Rows of the paper's three benchmarks by their names, the files of images that they name under `images`; of
    MM-RLHF-RewardBench so many prompts, those about videos left out."""
    rows = {
        "vl-rewardbench": vl_rows(rng, count),
        "multimodal-rewardbench": mm_rows(rng, count),
        "mm-rlhf-rewardbench": [row for row in mm_rlhf_rows(rng, count) if "image" in row],
    }
    for name, column in (("multimodal-rewardbench", "Image"), ("mm-rlhf-rewardbench", "image")):
        for index, row in enumerate(rows[name]):
            path = images / row[column]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png((index % 256, 90, 40)))
    return rows
