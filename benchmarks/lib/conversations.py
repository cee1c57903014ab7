"""Conversations with images of all kinds that people send, as files: many sizes, formats, places and numbers."""

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images


WORDS = (
    "the image shows a large temple beside water with people trees flowers petals red green stone roof sky "
    "reflection yellow bright detail left right several visible"
).split()
# Width and height: smaller than a processor takes, odd, beyond the limit of 512 x 512 pixels, and very wide or high.
SIZES = (
    *((12, 20), (48, 48), (64, 96), (97, 61), (211, 333), (256, 256), (333, 217), (448, 448)),
    *((500, 380), (512, 512), (513, 512), (640, 427), (800, 600), (1024, 768), (1600, 1200), (1500, 70), (60, 900)),
)
FORMATS = ("png", "jpg", "webp", "grey.png", "transparent.png", "palette.png", "turned.jpg")


@dataclass
class Conversation:
    """Messages with `{"type": "image"}` for each image, the answer to score, and the files of the images."""

    prompt: list[dict]
    answer: str
    images: list[Path]


def make_conversations(folder: Path, count: int, seed: int = 0) -> list[Conversation]:
    """
    Writes images and makes conversations about them.

    Args:
        folder (`Path`):
            Receives the images.
        count (`int`):
            Number of conversations. Each has one to three images, and some have a system message, two turns, images
            between texts, or texts with line breaks and letters that are not Latin.
        seed (`int`, *optional*, defaults to `0`):
            Seed of crops and words.

    Returns:
        `list[Conversation]`
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    conversations, written = [], 0
    for index in range(count):
        images = []
        for _ in range(1 + (index % 4 == 1) + 2 * (index % 8 == 3)):
            size, kind = SIZES[written % len(SIZES)], FORMATS[written % len(FORMATS)]
            images.append(write_image(folder / f"{written}.{kind}", size, rng))
            written += 1
        question = {"type": "text", "text": "What is shown? " + sentence(rng, rng.randint(1, 60))}
        blocks: list[dict] = [{"type": "image"} for _ in images]
        content = [*blocks, question] if index % 3 else [blocks[0], question, *blocks[1:]]
        prompt = [{"role": "user", "content": content}]
        if index % 5 == 2:
            prompt.insert(0, {"role": "system", "content": [{"type": "text", "text": "Be exact."}]})
        if index % 7 == 4:
            reply = {"role": "assistant", "content": [{"type": "text", "text": sentence(rng, 12)}]}
            prompt += [reply, {"role": "user", "content": [{"type": "text", "text": "And\nto the left?"}]}]
        answer = sentence(rng, (1, 8, 40, 120, 400)[index % 5]) + ("", "\n", " Café Über 寺。")[index % 3]
        conversations.append(Conversation(prompt, answer, images))
    return conversations


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choices(WORDS, k=length))


def write_image(path: Path, size: tuple[int, int], rng: random.Random) -> Path:
    """A piece of a photograph, in the size and in the format that the name says."""
    photograph = Image.fromarray(rng.choice(load_sample_images().images))
    left, top = rng.randint(0, photograph.width // 2), rng.randint(0, photograph.height // 2)
    image = photograph.crop((left, top, left + photograph.width // 2, top + photograph.height // 2)).resize(size)
    options: dict = {}
    if ".grey." in path.name:
        image = image.convert("L")
    elif ".palette." in path.name:
        image = image.quantize(64)
    elif ".transparent." in path.name:
        image.putalpha(Image.linear_gradient("L").resize(size))
    elif ".turned." in path.name:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6  # to be turned by a right angle
    image.save(path, **options)
    return path
