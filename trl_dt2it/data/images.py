"""Safe decoding: from what a data set calls an image to an upright RGB image.

A data set is written by strangers. Its paths may point anywhere, its URLs may ask the machine to talk to its own
network, and a few bytes may claim to be a picture of many gigabytes. Everything is refused that is not plainly fine,
always with a [`RowError`], never with a crash.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .errors import RowError
from .locations import ImageOptions, open_encoded


__all__ = ["FORMATS", "ImageOptions", "check_image", "load_image"]

# Raster formats of photographs and screenshots. Pillow reads some forty more, EPS through an external program. MPO, of
# which phones make JPEG files with two pictures, goes with JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_DEFAULTS = ImageOptions()


def load_image(value: Any, options: ImageOptions = _DEFAULTS) -> Image.Image:
    """
    Reads an image: the first frame, upright, as RGB.

    Transparent images are laid on white. Grey of more than 8 bits is scaled to 8, not clipped. The orientation is the
    one stored ahead of the pixels, and no metadata is kept, so that nothing turns the image a second time.

    Args:
        value (`PIL.Image.Image`, `bytes`, `dict`, `str`, `PathLike` or `np.ndarray`):
            The image, an encoded image, `{"bytes": ..., "path": ...}` as `datasets` gives it (the bytes win), a path,
            a URL on an allowed host, or a `uint8` array of shape `(height, width)` or `(height, width, 3)`.
        options ([`ImageOptions`], *optional*):
            What is allowed.

    Returns:
        `PIL.Image.Image`: in mode `"RGB"`, independent of `value`.

    Raises:
        [`RowError`]: with one of the reasons `image_missing`, `image_corrupt`, `image_too_large`,
            `image_too_narrow`, `image_outside_root`, `image_url`, `image_type`.
    """
    with _opened(value, options) as (image, name):
        orientation = _orientation(image)
        try:
            rgb = _to_rgb(image)
            if orientation in _UPRIGHT:
                rgb = rgb.transpose(_UPRIGHT[orientation])
        except MemoryError:
            raise
        except Exception as error:  # on hostile bytes, Pillow's plugins raise nearly anything
            raise RowError("image_corrupt", f"{name} does not decode ({error}); replace it.") from error
    rgb.info.clear()
    return rgb


def check_image(value: Any, options: ImageOptions = _DEFAULTS) -> tuple[int, int]:
    """
    Applies the checks of [`load_image`] to all but the pixels, which stay undecoded.

    Args:
        value (`PIL.Image.Image`, `bytes`, `dict`, `str`, `PathLike` or `np.ndarray`):
            As in [`load_image`]. A URL is fetched.
        options ([`ImageOptions`], *optional*):
            What is allowed.

    Returns:
        `tuple[int, int]`: width and height of the upright image.

    Raises:
        [`RowError`]: as in [`load_image`]; a truncated image passes, as long as its header is whole.
    """
    with _opened(value, options) as (image, _):
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


@contextmanager
def _opened(value: Any, options: ImageOptions) -> Iterator[tuple[Image.Image, str]]:
    """The image with its header read and its size checked, and how to call it in an error."""
    if isinstance(value, (Image.Image, np.ndarray)):
        image, name = (value, "the image") if isinstance(value, Image.Image) else (_from_array(value), "the array")
        _check_size(image, name, options)
        yield image, name
        return
    with open_encoded(value, options) as (stream, name):
        try:
            image = Image.open(stream, formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            # Far above its own limit, Pillow does not even tell the size.
            raise RowError("image_too_large", f"{name} is too large ({error}); scale it down.") from error
        except UnidentifiedImageError as error:
            kinds = ", ".join(FORMATS)
            raise RowError("image_corrupt", f"{name} is not an image in a known format ({kinds}).") from error
        except MemoryError:
            raise
        except Exception as error:  # on hostile bytes, Pillow's plugins raise nearly anything
            raise RowError("image_corrupt", f"{name} does not decode ({error}); replace it.") from error
        _check_size(image, name, options)
        yield image, name


def _check_size(image: Image.Image, name: str, options: ImageOptions) -> None:
    width, height = image.size
    if width * height > options.max_image_pixels:
        raise RowError(
            "image_too_large",
            f"{name} is {width} x {height} pixels, more than {options.max_image_pixels}; scale it down or raise "
            "`max_image_pixels`.",
        )
    if width * height == 0:
        raise RowError("image_corrupt", f"{name} is {width} x {height} pixels; replace it.")
    if max(width, height) > options.max_aspect_ratio * min(width, height):
        raise RowError(
            "image_too_narrow",
            f"{name} is {width} x {height} pixels, a ratio of more than {options.max_aspect_ratio:g}, which image "
            "processors refuse; crop it or raise `max_aspect_ratio`.",
        )


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns the pixels itself, and says so in the size from the start
        return 1
    try:
        # Not the override of PNG files, which decodes them in search of more metadata behind the pixels.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # metadata that cannot be read turns nothing
        return 1
    return value if value in _UPRIGHT else 1


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise RowError(
            "image_type",
            f"an array has dtype {array.dtype} and shape {array.shape}; give uint8 of shape (height, width) or "
            "(height, width, 3).",
        )
    if array.size == 0:
        raise RowError("image_corrupt", f"an array has shape {array.shape}, which is no pixel; replace it.")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode == "La":  # Pillow converts premultiplied grey to nothing but LA
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bit(grey: np.ndarray) -> np.ndarray:
    """Pillow clips grey of more than 8 bits, so that most of a depth map or an X-ray would become white."""
    if grey.dtype.itemsize == 2:
        return (grey >> 8).astype(np.uint8)
    if not np.isfinite(grey).all():
        raise ValueError("a pixel is not finite")
    # 32 bits have no fixed range; take the smallest customary one that holds all values.
    low, high = float(grey.min()), float(grey.max())
    if low >= 0 and high <= 1 and grey.dtype.kind == "f":
        return np.rint(grey * 255).astype(np.uint8)
    if low >= 0 and high <= 255:
        return grey.astype(np.uint8)
    if low >= 0 and high <= 65535:
        return (grey.astype(np.uint16) >> 8).astype(np.uint8)
    return np.rint((grey.astype(np.float64) - low) * (255 / ((high - low) or 1))).astype(np.uint8)
