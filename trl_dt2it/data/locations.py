"""Where an image's bytes come from: memory, a file under the image root, or a URL on an allowed host."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from .errors import RowError


# Two letters at least, because `C:` is a drive.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


@dataclass(frozen=True)
class ImageOptions:
    """
    Where images may come from and how large they may be.

    Parameters:
        image_root (`str`, *optional*):
            Folder that relative paths start from. With it, no file outside of the folder is read, be it through `..`,
            an absolute path or a symbolic link. Without it, paths are taken as they are, because a user's own files
            lie anywhere; only relative paths with `..` are refused, which no one needs.
        max_image_pixels (`int`, *optional*, defaults to `67108864`):
            Largest width times height, read from the header before anything is decoded. The default is 8192 x 8192:
            more than cameras make, 192 MiB as RGB, and less than the size at which Pillow warns.
        allowed_hosts (`tuple[str, ...]`, *optional*, defaults to `()`):
            Hosts from which `http` and `https` URLs may be fetched, exactly as in the URL, without port. Redirects are
            not followed.
        max_image_bytes (`int`, *optional*, defaults to `67108864`):
            Largest size of an encoded image, wherever it comes from.
        timeout (`float`, *optional*, defaults to `10.0`):
            Seconds for a fetch: for the server to answer, and again for the body to arrive.
        max_aspect_ratio (`float`, *optional*, defaults to `200.0`):
            Largest ratio of the longer to the shorter side. The image processors of Qwen-VL and GLM-4V raise an error
            above 200.
    """

    image_root: str | None = None
    max_image_pixels: int = 64 * 1024 * 1024
    allowed_hosts: tuple[str, ...] = ()
    max_image_bytes: int = 64 * 1024 * 1024
    timeout: float = 10.0
    max_aspect_ratio: float = 200.0


def with_image_root(options: ImageOptions | None, image_root: str | os.PathLike | None) -> ImageOptions:
    """
    Image options with the folder that a caller named by `image_root`.

    Args:
        options ([`ImageOptions`], *optional*):
            Other options; the defaults by default.
        image_root (`str` or `os.PathLike`, *optional*):
            The folder, as in [`ImageOptions`]; that of `options` by default.

    Returns:
        [`ImageOptions`]

    Raises:
        `ValueError`: if there is no such folder, or if `options` names another one.
    """
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
    """The encoded image as a stream, of which no more was read than needed, and how to call it in an error."""
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        value = path if content is None else content
        if value is not None and not isinstance(value, (bytes, bytearray, memoryview, str, os.PathLike)):
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
        raise RowError(
            "image_too_large",
            f"{name} has {size} bytes, more than {options.max_image_bytes}; scale it down or raise `max_image_bytes`.",
        )


def placed_image(image: Any, options: ImageOptions) -> Any:
    """An image as `{"bytes": ..., "path": ...}` with a relative path made whole, so that it needs no `image_root`."""
    if options.image_root is None or image["bytes"] is not None or _SCHEME.match(image["path"] or ""):
        return image
    if not image["path"]:
        raise RowError("image_missing", "an image has neither bytes nor a path; give it, or remove it from the row.")
    return {"bytes": None, "path": str(allowed_path(image["path"], options))}


def embedded_url(image: Any, options: ImageOptions) -> Any:
    """The same with the bytes of what is an address, on an allowed host."""
    if image["bytes"] is not None or not _SCHEME.match(image["path"]):
        return image
    with open_encoded(image, options) as (stream, _):
        return {"bytes": stream.read(), "path": None}


def allowed_path(text: str, options: ImageOptions) -> Path:
    """A path as it is to be opened, or [`RowError`] if it leaves `image_root`."""
    path = Path(text)
    if options.image_root is None:
        if ".." in path.parts and not path.is_absolute():
            raise RowError(
                "image_outside_root", f"the image {text!r:.300} is a relative path with `..`; set `image_root`."
            )
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
    """Makes a redirect an error: it could lead from an allowed host to any other."""

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
        raise RowError(
            "image_url",
            f"{name} is a URL on a host that is not allowed; store the image in the data set, or allow it.",
        )


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
                    raise RowError(
                        "image_too_large", f"{name} has more than {options.max_image_bytes} bytes; scale it down."
                    )
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
    """A URL without what may be secret (user, query) and without the data of a `data:` URL."""
    scheme, rest = url.split(":", 1)
    if not rest.startswith("//") or "@" in rest:
        return f"'{scheme}:...'"
    return repr(f"{scheme}:{re.split('[?#]', rest)[0]}"[:200])
