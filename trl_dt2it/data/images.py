"""Images read safely: where they may lie, how large they may be, and how they are decoded.

A data set is written by strangers: its paths may point anywhere, its URLs into the network of the machine, and a few
bytes may claim to be a picture of many gigabytes. All that is not plainly fine is a [`RowError`], never a crash.
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
from PIL import Image, UnidentifiedImageError

from .rows import RowError, encoded_content


# Raster formats of photographs and screenshots. Pillow reads some forty more, EPS through an external program. MPO, of
# which phones make JPEG files with two pictures, goes with JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# Two letters at least, because `C:` is a drive.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")

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


@dataclass(frozen=True)
class ImageOptions:
    """
    Limits on where images may come from and how large they may be.

    Parameters:
        image_root (`str`, *optional*):
            Folder that relative paths start from. With it, no file outside of the folder is read, be it through `..`,
            an absolute path or a symbolic link. Without it, only relative paths with `..` are refused, because a
            user's own files lie anywhere.
        max_image_pixels, max_image_bytes (`int`, *optional*):
            Largest width times height, read from the header (8192 x 8192 by default: 192 MiB as RGB), and largest size
            of an encoded image (64 MiB by default).
        allowed_hosts (`tuple[str, ...]`, *optional*, defaults to `()`):
            Hosts from which `http` and `https` URLs may be fetched, exactly as in the URL, without port. Redirects are
            not followed.
        timeout (`float`, *optional*, defaults to `10.0`):
            Seconds for a fetch: for the server to answer, and again for the body to arrive.
        max_aspect_ratio (`float`, *optional*, defaults to `200.0`):
            Largest ratio of the sides. The image processors of Qwen-VL and GLM-4V raise an error above 200.
    """

    image_root: str | None = None
    max_image_pixels: int = 64 * 1024 * 1024
    allowed_hosts: tuple[str, ...] = ()
    max_image_bytes: int = 64 * 1024 * 1024
    timeout: float = 10.0
    max_aspect_ratio: float = 200.0


_DEFAULTS = ImageOptions()


def with_image_root(options: ImageOptions | None, image_root: str | os.PathLike | None) -> ImageOptions:
    """Set `image_root` in image options, after a check that it is a folder and the only one."""
    options = options or ImageOptions()
    if image_root is None:
        return options
    if options.image_root not in (None, os.fspath(image_root)):
        raise ValueError("`image_root` and `image_options` name different folders; pass one of them.")
    if not Path(image_root).is_dir():
        raise ValueError(f"`image_root` is {image_root}, but there is no such folder.")
    return replace(options, image_root=os.fspath(image_root))


@contextmanager
def open_encoded(value: Any, options: ImageOptions) -> Iterator[tuple[BinaryIO, str]]:
    """Open an encoded image as a stream, with a name for it in errors."""
    is_dict, value = isinstance(value, Mapping), encoded_content(value)
    if is_dict and not isinstance(value, (bytes, bytearray, memoryview, str, os.PathLike, type(None))):
        raise RowError("image_type", f"an image dict holds a {type(value).__name__}; give bytes or a path.")
    if value is None:
        raise RowError("image_missing", "an image is None; give it, or remove it from the row.")
    if isinstance(value, (bytes, bytearray, memoryview)):
        _check_bytes(memoryview(value).nbytes, "the image", options)
        yield io.BytesIO(value), "the image"
    elif not isinstance(value, (str, os.PathLike)):
        raise RowError(
            "image_type", f"an image is of type {type(value).__name__}; give a PIL image, bytes, a path or an array."
        )
    elif _SCHEME.match(text := os.fsdecode(value)):
        yield io.BytesIO(_fetch(text, options)), f"the image {_shown_url(text)}"
    else:
        path, name = allowed_path(text, options), f"the image {text!r:.300}"
        try:
            # Only files: a device never ends, and a pipe never starts.
            file = path.open("rb") if path.is_file() else None
        except (OSError, ValueError) as error:
            raise RowError("image_missing", f"{name} cannot be read ({type(error).__name__}).") from error
        if file is None:
            raise RowError("image_missing", f"{name} is not a file; check the path and `image_root`.")
        with file:
            _check_bytes(os.fstat(file.fileno()).st_size, name, options)
            yield file, name


def _check_bytes(size: int, name: str, options: ImageOptions) -> None:
    if size > options.max_image_bytes:
        limit = f"more than {options.max_image_bytes}; scale it down or raise `max_image_bytes`."
        raise RowError("image_too_large", f"{name} has {size} bytes, {limit}")


def change_images(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change each image in a cell of images, or of videos as their frames."""
    if isinstance(value, (list, tuple)):
        return [change_images(item, change) for item in value]
    if isinstance(value, Mapping) and not {"bytes", "path"} & set(value):
        return {name: change_images(item, change) if name == "frames" else item for name, item in value.items()}
    return change(value)


def as_image(image: Any) -> Any:
    """Turn an encoded image or a path into `{"bytes": ..., "path": ...}`, as Arrow holds it; any other image stays."""
    if isinstance(image, (bytes, bytearray, memoryview)):
        return {"bytes": bytes(image), "path": None}
    if isinstance(image, str):
        return {"bytes": None, "path": image}
    if isinstance(image, Mapping):
        return {"bytes": image.get("bytes"), "path": image.get("path")}
    return image


def placed_image(image: Any, options: ImageOptions) -> Any:
    """Make a relative path absolute, so that it needs no `image_root`, in the form of [`as_image`]."""
    image = as_image(image)
    if options.image_root is None or not isinstance(image, Mapping) or image["bytes"] is not None:
        return image
    if not image["path"]:
        raise RowError("image_missing", "an image has neither bytes nor a path; give it, or remove it from the row.")
    if is_address(image["path"]):
        return image
    return {"bytes": None, "path": str(allowed_path(image["path"], options))}


def allowed_path(text: str, options: ImageOptions) -> Path:
    """Resolve a path to open; [`RowError`] if it leaves `image_root`."""
    path = Path(text)
    if options.image_root is None:
        if ".." in path.parts and not path.is_absolute():
            message = f"the image {text!r:.300} is a relative path with `..`; set `image_root`."
            raise RowError("image_outside_root", message)
        return path
    try:
        root = Path(options.image_root).resolve()
        path = (root / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a name too long, a loop of links
        raise RowError("image_missing", f"the image {text!r:.300} is not a path ({type(error).__name__}).") from error
    if not path.is_relative_to(root):
        raise RowError("image_outside_root", f"the image {text!r:.300} is not inside `image_root`; move it there.")
    return path


def is_address(text: str) -> bool:
    """Tell an address such as `https:...`, `file:...` or `data:...` from a path."""
    return bool(_SCHEME.match(text))


class _NoRedirect(HTTPRedirectHandler):
    """Handler that makes a redirect an error: it could lead from an allowed host to any other."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def check_address(url: str, options: ImageOptions) -> None:
    """Raise [`RowError`] unless an address is plain `http` or `https` on an allowed host. Nothing is fetched."""
    name = f"the image {_shown_url(url)}"
    try:
        parts = urlsplit(url)
        scheme, host = parts.scheme.lower(), parts.hostname
        # Parsers disagree on where the host ends in URLs such as `http://a\@b`.
        is_plain = "@" not in parts.netloc and not re.search(r"[\\\s\x00-\x1f\x7f]", url)
    except ValueError:
        scheme, host, is_plain = "", None, False
    if scheme not in ("http", "https") or not host or not is_plain:
        raise RowError("image_url", f"{name} is not a plain path or http URL; store the image in the data set.")
    if host not in options.allowed_hosts:
        message = f"{name} is a URL on a host that is not allowed; store the image in the data set, or allow it."
        raise RowError("image_url", message)


def _fetch(url: str, options: ImageOptions) -> bytes:
    check_address(url, options)
    name = f"the image {_shown_url(url)}"
    body = bytearray()
    try:
        with build_opener(_NoRedirect).open(Request(url), timeout=options.timeout) as response:
            deadline = time.monotonic() + options.timeout
            while chunk := response.read1(65536):
                body += chunk
                if len(body) > options.max_image_bytes:
                    message = f"{name} has more than {options.max_image_bytes} bytes; scale it down."
                    raise RowError("image_too_large", message)
                if time.monotonic() > deadline:
                    raise TimeoutError
    except HTTPError as error:
        error.close()
        if 300 <= error.code < 400:
            raise RowError("image_url", f"{name} redirects, which is not followed; give the final address.") from error
        raise RowError("image_missing", f"{name} could not be fetched (status {error.code}).") from error
    except RowError:
        raise
    except (OSError, HTTPException, ValueError) as error:
        raise RowError("image_missing", f"{name} could not be fetched ({type(error).__name__}).") from error
    return bytes(body)


def _shown_url(url: str) -> str:
    """Show a URL without secrets (user, query) and without the data of a `data:` URL."""
    scheme, rest = url.split(":", 1)
    if not rest.startswith("//") or "@" in rest:
        return f"'{scheme}:...'"
    return repr(f"{scheme}:{re.split('[?#]', rest)[0]}"[:200])


def load_image(value: Any, options: ImageOptions = _DEFAULTS) -> Image.Image:
    """
    Read an image: the first frame, upright, as RGB.

    Transparent images are laid on white. Gray of more than 8 bits is scaled to 8, not clipped. The orientation is the
    one stored ahead of the pixels, and no metadata is kept, so that nothing turns the image a second time.

    Args:
        value (`PIL.Image.Image`, `bytes`, `dict`, `str`, `PathLike` or `np.ndarray`):
            Decoded or encoded image, `{"bytes": ..., "path": ...}` as in `datasets` (the bytes win), path, URL on an
            allowed host, or `uint8` array of shape `(height, width)` or `(height, width, 3)`.
        options ([`ImageOptions`], *optional*):
            Limits on origin and size.

    Returns:
        `PIL.Image.Image` in mode `"RGB"`, independent of `value`.

    Raises:
        [`RowError`]: with one of the reasons that begin with `image_`.
    """
    with _opened(value, options) as (image, name):
        orientation = _orientation(image)
        with _decoding(name):
            rgb = _to_rgb(image)
            if orientation in _UPRIGHT:
                rgb = rgb.transpose(_UPRIGHT[orientation])
    rgb.info.clear()
    return rgb


def check_image(value: Any, options: ImageOptions = _DEFAULTS) -> tuple[int, int]:
    """
    Apply the checks of [`load_image`] to all but the pixels, which stay undecoded.

    Args:
        value, options (*optional*):
            As in [`load_image`]; a URL is fetched.

    Returns:
        `tuple[int, int]`: width and height of the upright image.

    Raises:
        [`RowError`]: as in [`load_image`]; a truncated image with a whole header passes.
    """
    with _opened(value, options) as (image, _):
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


@contextmanager
def _opened(value: Any, options: ImageOptions) -> Iterator[tuple[Image.Image, str]]:
    """Read the header of an image, check its size, and yield it with a name for it in errors."""
    if isinstance(value, (Image.Image, np.ndarray)):
        image, name = (value, "the image") if isinstance(value, Image.Image) else (_from_array(value), "the array")
        _check_size(image, name, options)
        yield image, name
        return
    with open_encoded(value, options) as (stream, name):
        with _decoding(name):
            image = Image.open(stream, formats=FORMATS)
        _check_size(image, name, options)
        yield image, name


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn errors of Pillow's plugins, which raise nearly anything on hostile bytes, into a [`RowError`]."""
    try:
        yield
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Far above its own limit, Pillow does not even tell the size.
        raise RowError("image_too_large", f"{name} is too large ({error}); scale it down.") from error
    except UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise RowError("image_corrupt", f"{name} is not an image in a known format ({kinds}).") from error
    except Exception as error:
        raise RowError("image_corrupt", f"{name} does not decode ({error}); replace it.") from error


def _check_size(image: Image.Image, name: str, options: ImageOptions) -> None:
    width, height = image.size
    size = f"{name} is {width} x {height} pixels"
    if width * height > options.max_image_pixels:
        limit = f"more than {options.max_image_pixels}; scale it down or raise `max_image_pixels`."
        raise RowError("image_too_large", f"{size}, {limit}")
    if width * height == 0:
        raise RowError("image_corrupt", f"{size}; replace it.")
    if max(width, height) > options.max_aspect_ratio * min(width, height):
        limit = f"a ratio of more than {options.max_aspect_ratio:g}, which image processors refuse"
        raise RowError("image_too_narrow", f"{size}, {limit}; crop it or raise `max_aspect_ratio`.")


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns the pixels itself, and the size from the start
        return 1
    try:
        # Not the override of PNG files, which decodes them in search of more metadata behind the pixels.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # metadata that cannot be read turns nothing
        return 1
    return value if value in _UPRIGHT else 1


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        message = f"an array has dtype {array.dtype} and shape {array.shape}; give uint8 of shape (height, width)"
        raise RowError("image_type", f"{message} or (height, width, 3).")
    if array.size == 0:
        raise RowError("image_corrupt", f"an array has shape {array.shape}, which is no pixel; replace it.")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode == "La":  # Pillow converts premultiplied gray to nothing but LA
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bit(gray: np.ndarray) -> np.ndarray:
    """Scale gray of more than 8 bits, which Pillow clips: most of a depth map or an X-ray would become white."""
    if gray.dtype.itemsize == 2:
        return (gray >> 8).astype(np.uint8)
    if not np.isfinite(gray).all():
        raise ValueError("a pixel is not finite")
    # 32 bits have no fixed range; take the smallest customary one that holds all values.
    low, high = float(gray.min()), float(gray.max())
    if low >= 0 and high <= 1 and gray.dtype.kind == "f":
        return np.rint(gray * 255).astype(np.uint8)
    if low >= 0 and high <= 255:
        return gray.astype(np.uint8)
    if low >= 0 and high <= 65535:
        return (gray.astype(np.uint16) >> 8).astype(np.uint8)
    return np.rint((gray.astype(np.float64) - low) * (255 / ((high - low) or 1))).astype(np.uint8)
