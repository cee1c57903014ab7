"""Photographs that libraries bring, and pieces of them."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


LEAST_CONTRAST = 15  # standard deviation of grey levels; below are pieces of plain sky
SCIKIT_IMAGE = (
    "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png hubble_deep_field.jpg "
    "ihc.png moon.png motorcycle_left.png retina.jpg rocket.jpg"
).split()


def photographs() -> dict[str, dict[str, Image.Image]]:
    """Photographs by the library that brings them and by the name of their file."""
    bunch = load_sample_images()
    names = [Path(name).name for name in bunch.filenames]
    found = {"scikit-learn": dict(zip(names, map(Image.fromarray, bunch.images), strict=True))}
    places = {
        "matplotlib": ("mpl-data/sample_data", ["grace_hopper.jpg"]),
        "scikit-image": ("data", SCIKIT_IMAGE),
    }
    for library, (folder, names) in places.items():
        spec = find_spec({"scikit-image": "skimage"}.get(library, library))
        if spec is not None and spec.origin is not None:
            paths = [Path(spec.origin).parent / folder / name for name in names]
            found[library] = {path.name: Image.open(path).convert("RGB") for path in paths if path.is_file()}
    return found


def pieces(images: list[Image.Image], size: int, whole: bool) -> list[Image.Image]:
    """Square pieces, row by row, and the photographs themselves."""
    made = []
    for image in images:
        made += [image] if whole else []
        for top in range(0, image.height - size + 1, size):
            for left in range(0, image.width - size + 1, size):
                made.append(image.crop((left, top, left + size, top + size)))
    return made


def has_contrast(image: Image.Image) -> bool:
    return bool(np.asarray(image.convert("L")).std() >= LEAST_CONTRAST)
