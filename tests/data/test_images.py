"""Images: the exact pixels of every mode, every orientation and every kind of value."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.data.image_files import STORED, UPRIGHT, A, B, deep, encode, palette_image, picture, pixels, refusal, single
from trl_dt2it.data.images import check_image, load_image


MODES = {
    "bilevel": (single("1", 1), [(255, 255, 255)]),
    "grey": (single("L", 100), [(100, 100, 100)]),
    "grey alpha": (single("LA", (100, 51)), [(224, 224, 224)]),
    "grey premultiplied": (single("LA", (100, 51)).convert("La"), [(224, 224, 224)]),
    "rgb": (single("RGB", (1, 2, 3)), [(1, 2, 3)]),
    "rgba": (single("RGBA", (200, 100, 0, 51)), [(244, 224, 204)]),
    "rgba clear": (single("RGBA", (200, 100, 0, 0)), [(255, 255, 255)]),
    "cmyk": (single("CMYK", (0, 255, 255, 0)), [(255, 0, 0)]),
    "palette": (palette_image(), [(10, 20, 30), (40, 50, 60)]),
    "palette index": (palette_image(transparency=1), [(10, 20, 30), (255, 255, 255)]),
    "palette bytes": (palette_image(transparency=b"\x00\x33"), [(255, 255, 255), (212, 214, 216)]),
    "16 bit": (deep([0, 255, 256, 0x8000, 0x80FF, 65535], np.uint16), [(v,) * 3 for v in (0, 0, 1, 128, 128, 255)]),
    "32 bit as 16": (deep([0, 256, 65535], np.int32), [(v,) * 3 for v in (0, 1, 255)]),
    "32 bit as 8": (deep([0, 7, 255], np.int32), [(v,) * 3 for v in (0, 7, 255)]),
    "32 bit wide": (deep([-100000, 0, 100000], np.int32), [(v,) * 3 for v in (0, 128, 255)]),
    "32 bit flat": (deep([-5, -5], np.int32), [(0, 0, 0), (0, 0, 0)]),
    "float unit": (deep([0.0, 0.2, 1.0], np.float32), [(v,) * 3 for v in (0, 51, 255)]),
    "float as 8": (deep([0.0, 7.0, 255.0], np.float32), [(v,) * 3 for v in (0, 7, 255)]),
    "float as 16": (deep([0.0, 512.0, 65535.0], np.float32), [(v,) * 3 for v in (0, 2, 255)]),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(name):
    image, expected = MODES[name]
    result = load_image(image)
    assert result.mode == "RGB"
    assert pixels(result) == [[list(pixel) for pixel in expected]]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(deep([256, 65535], np.uint16)), [1, 255]),
        (encode(deep([256, 65535], np.uint16), "TIFF"), [1, 255]),
        (b"P5 2 1 65535\n\x01\x00\xff\xff", [1, 255]),
        (encode(single("L", 9), transparency=9), [255]),
        (encode(Image.fromarray(np.array([[9, 8]], dtype=np.uint8)), transparency=9), [255, 8]),
        (encode(single("1", 1), "TIFF"), [255]),
        (encode(single("L", 77), "BMP"), [77]),
    ],
)
def test_grey_files(data, expected):
    assert pixels(load_image(data)) == [[[value] * 3 for value in expected]]


def test_floats_without_value_are_refused():
    assert refusal(deep([0.0, float("nan")], np.float32)) == "image_corrupt"


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("format", "kwargs"),
    [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_orientation_is_applied_once(orientation, format, kwargs):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(STORED[orientation]), format, exif=exif, **kwargs)
    result = load_image(data)
    assert pixels(result) == [[list(pixel) for pixel in row] for row in UPRIGHT]
    assert check_image(data) == (3, 2)
    assert dict(result.getexif()) == {} and result.info == {}
    assert pixels(load_image(result)) == pixels(result)


def test_orientation_of_an_open_jpeg_that_is_not_loaded():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (16, 8), (255, 255, 255)), "JPEG", exif=exif)
    assert load_image(Image.open(io.BytesIO(data))).size == (8, 16)
    assert check_image(Image.open(io.BytesIO(data))) == (8, 16)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_turns_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixels(load_image(encode(picture(UPRIGHT), exif=exif)))[0][0] == [255, 0, 0]


def test_every_kind_of_value(tmp_path):
    image = picture(UPRIGHT)
    data, array = encode(image), np.array(UPRIGHT, dtype=np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    values = [image, data, bytearray(data), memoryview(data), str(path), path, array, array.transpose(1, 0, 2).copy()]
    values += [{"bytes": data, "path": "gone.png"}, {"bytes": None, "path": str(path)}, {"path": path}]
    for value in values:
        is_turned = value is values[7]
        assert pixels(load_image(value)) == (array.transpose(1, 0, 2) if is_turned else array).tolist()
        assert check_image(value) == ((2, 3) if is_turned else (3, 2))
    assert pixels(load_image(np.array([[5, 6]], dtype=np.uint8))) == [[[5] * 3, [6] * 3]]
    assert pixels(load_image(array[:, ::-1])) == array[:, ::-1].tolist()


def test_the_result_is_independent_of_the_value():
    for value in (Image.new("RGB", (1, 1), (1, 2, 3)), np.full((1, 1, 3), 7, dtype=np.uint8)):
        before = pixels(value)
        load_image(value).putpixel((0, 0), (9, 9, 9))
        assert pixels(value) == before


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_is_taken(format):
    frames = [Image.new("RGB", (2, 2), color) for color in (A, B)]
    kwargs = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **kwargs)
    assert pixels(load_image(data)) == [[list(A)] * 2] * 2


def test_the_first_picture_of_an_mpo_file_is_taken():
    frames = [Image.new("RGB", (8, 8), color) for color in ((0, 0, 0), (255, 255, 255))]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert pixels(load_image(data)) == [[[0] * 3] * 8] * 8
