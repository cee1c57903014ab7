"""Small images of known pixels, files of them, and the reason why a value is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from trl_dt2it.data.images import ImageOptions, load_image
from trl_dt2it.data.rows import RowError


A, B, C, D, E, F = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (40, 80, 120)
UPRIGHT = [[A, B, C], [D, E, F]]
# What a camera stores, from the meaning of the tag: 6 says "row 0 is the right side, column 0 the top".
STORED = {
    1: [[A, B, C], [D, E, F]],
    2: [[C, B, A], [F, E, D]],
    3: [[F, E, D], [C, B, A]],
    4: [[D, E, F], [A, B, C]],
    5: [[A, D], [B, E], [C, F]],
    6: [[C, F], [B, E], [A, D]],
    7: [[F, C], [E, B], [D, A]],
    8: [[D, A], [E, B], [F, C]],
}


def picture(rows):
    return Image.fromarray(np.array(rows, dtype=np.uint8))


def encode(image, format="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def pixels(image):
    return np.asarray(image).tolist()


def palette_image(**info):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.info.update(info)
    return image


def single(mode, value):
    return Image.new(mode, (1, 1), value)


def deep(values, dtype):
    return Image.fromarray(np.array([values], dtype=dtype))


def png_header(width, height, data=b""):
    """A PNG file that says that it is so large, with `data` for pixels, by default none."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def refusal(value, options=None, function=load_image):
    options = options or ImageOptions()
    with pytest.raises(RowError) as caught:
        function(value, options)
    assert str(caught.value).endswith(".")
    return caught.value.reason
