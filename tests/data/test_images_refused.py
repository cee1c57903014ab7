"""What is no image, or too large, or damaged: each refused with its reason, and nothing of it decoded."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from tests.data.image_files import encode, png_header, refusal
from trl_dt2it.data.images import ImageOptions, check_image, load_image
from trl_dt2it.data.rows import RowError


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "image_missing"),
        ({"bytes": None, "path": None}, "image_missing"),
        ({}, "image_missing"),
        ("/no/such/file.png", "image_missing"),
        ("nul\0.png", "image_missing"),
        ("a" * 5000, "image_missing"),
        ("/dev/zero", "image_missing"),
        (os.sep, "image_missing"),
        (b"", "image_corrupt"),
        (b"not an image", "image_corrupt"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image_corrupt"),
        (encode(Image.new("RGB", (16, 16)), "ICO"), "image_corrupt"),
        (png_header(4, 4), "image_corrupt"),
        (Image.new("RGB", (0, 3)), "image_corrupt"),
        (np.zeros((0, 3), dtype=np.uint8), "image_corrupt"),
        (7, "image_type"),
        ([1, 2], "image_type"),
        ({"bytes": 7}, "image_type"),
        ({"path": [1]}, "image_type"),
        (np.zeros((2, 2)), "image_type"),
        (np.zeros((2, 2, 4), dtype=np.uint8), "image_type"),
        (np.zeros(3, dtype=np.uint8), "image_type"),
        ("../a.png", "image_outside_root"),
        (Path("a/../../b.png"), "image_outside_root"),
        ({"bytes": None, "path": "../a.png"}, "image_outside_root"),
        ("file:///etc/hostname", "image_url"),
        ("FILE:/etc/hostname", "image_url"),
        ("data:image/png;base64,AAAA", "image_url"),
        ("s3://bucket/a.png", "image_url"),
        ("hf://datasets/a/b.png", "image_url"),
        ("ftp://host/a.png", "image_url"),
        ("zip://a.png::b.zip", "image_url"),
        ("http:///a.png", "image_url"),
        ("http://[::1/a.png", "image_url"),
    ],
)
def test_what_is_refused(value, reason):
    assert refusal(value) == reason


def test_errors_name_the_path_and_no_bytes_and_no_secrets():
    def message(value):
        with pytest.raises(RowError) as caught:
            load_image(value)
        return str(caught.value)

    assert "'/no/such/file.png'" in message("/no/such/file.png")
    assert "SECRET" not in message(b"SECRET")
    assert "SECRET" not in message("data:image/png;base64,SECRET")
    assert "SECRET" not in message("https://me:SECRET@host/a.png")
    assert "SECRET" not in message("s3://SECRET@bucket/a.png")
    assert "'https://host/a.png'" in message("https://host/a.png?token=SECRET")
    assert "SECRET" not in message("https://host/a.png?token=SECRET")


@pytest.mark.parametrize("size", [(8193, 8192), (9000, 9000), (12000, 12000), (100_000, 100_000), (2**31 - 1, 2)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("function", [load_image, check_image])
def test_a_bomb_is_refused_by_its_header(monkeypatch, size, function):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the pixels were decoded"))
    assert refusal(png_header(*size), function=function) == "image_too_large"


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_warning_turned_into_an_error_is_the_same_refusal():
    assert refusal(png_header(12000, 12000)) == "image_too_large"


def test_the_limits_are_exact(tmp_path):
    image = Image.new("RGB", (5, 4))
    data = encode(image)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for value in (image, data, path, np.asarray(image)):
        assert load_image(value, ImageOptions(max_image_pixels=20)).size == (5, 4)
        assert refusal(value, ImageOptions(max_image_pixels=19)) == "image_too_large"
    for value in (data, path):
        assert check_image(value, ImageOptions(max_image_bytes=len(data))) == (5, 4)
        assert refusal(value, ImageOptions(max_image_bytes=len(data) - 1), check_image) == "image_too_large"


def test_check_image_decodes_nothing(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the pixels were decoded"))
    for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        assert check_image(encode(Image.new("RGB", (5, 4)), format)) == (5, 4)


NOISE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_truncated_file_is_corrupt(format, tmp_path):
    data = encode(Image.fromarray(NOISE), format)
    (tmp_path / "half").write_bytes(data[: len(data) // 2])
    assert refusal(data[: len(data) // 2]) == "image_corrupt"
    assert refusal(tmp_path / "half") == "image_corrupt"
    assert refusal(Image.open(io.BytesIO(data[:-60])) if format == "JPEG" else data[:-60]) == "image_corrupt"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]), st.data())
def test_damaged_bytes_raise_nothing_but_row_errors(format, draw):
    data = bytearray(encode(Image.fromarray(NOISE), format))
    for _ in range(draw.draw(st.integers(1, 6))):
        data[draw.draw(st.integers(0, min(len(data) - 1, 200)))] = draw.draw(st.integers(0, 255))
    data = data[: draw.draw(st.integers(1, len(data)))]
    options = ImageOptions(max_image_pixels=1_000_000)
    for function in (load_image, check_image):
        try:
            function(bytes(data), options)
        except RowError as error:
            assert error.reason in ("image_corrupt", "image_too_large", "image_too_narrow")
