"""Images: exact pixels of every mode and orientation, and nothing that a hostile data set names gets through."""

import io
import os
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from trl_dt2it.data.images import ImageOptions, check_image, load_image
from trl_dt2it.data.schema import RowError


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


def png(width, height, data=b""):
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
        (png(4, 4), "image_corrupt"),
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
    assert refusal(png(*size), function=function) == "image_too_large"


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_warning_turned_into_an_error_is_the_same_refusal():
    assert refusal(png(12000, 12000)) == "image_too_large"


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


def test_image_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "root-of-evil"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    for path in (root / "a.png", root / "sub" / "b.png", outside / "c.png"):
        path.write_bytes(encode(picture(UPRIGHT)))
    (root / "inner.png").symlink_to(root / "sub" / "b.png")
    (root / "escape.png").symlink_to(outside / "c.png")
    (root / "escape").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "alias").symlink_to(root)
    os.mkfifo(root / "pipe")

    for start in (root, tmp_path / "alias"):
        options = ImageOptions(image_root=str(start))
        for name in ("a.png", "sub/b.png", "sub/../a.png", "inner.png", str(root / "a.png"), str(start / "a.png")):
            assert load_image(name, options).size == (3, 2)
            assert check_image({"bytes": None, "path": name}, options) == (3, 2)
        for name in ("../root-of-evil/c.png", str(outside / "c.png"), "escape.png", "escape/c.png", "..", "/dev/zero"):
            for function in (load_image, check_image):
                assert refusal(name, options, function) == "image_outside_root"
        for name in ("gone.png", "loop", "pipe", "sub", "nul\0.png", "a" * 5000):
            assert refusal(name, options) == "image_missing"


def test_a_relative_path_starts_at_the_root(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(encode(picture(UPRIGHT)))
    assert refusal("a.png") == "image_missing"
    assert load_image("a.png", ImageOptions(image_root=str(tmp_path))).size == (3, 2)
    monkeypatch.chdir(tmp_path)
    assert load_image("a.png").size == (3, 2)
    assert load_image("a.png", ImageOptions(image_root=".")).size == (3, 2)


@pytest.fixture
def server(monkeypatch):
    """A server on this machine that writes down what it is asked."""
    seen, stop = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            status = {"/gone.png": 404, "/move": 302}.get(self.path, 200)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/a.png")
            self.end_headers()
            if self.path.startswith("/a.png"):
                self.wfile.write(encode(picture(UPRIGHT)))
            elif self.path == "/text":
                self.wfile.write(b"hello")
            try:
                while self.path in ("/endless", "/slow") and not stop.is_set():
                    self.wfile.write(b"x" * (65536 if self.path == "/endless" else 1))
                    stop.wait(0 if self.path == "/endless" else 0.02)
            except OSError:
                pass

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", seen
    stop.set()
    http.shutdown()
    thread.join()
    http.server_close()


def test_urls_are_refused_by_default(server):
    url, seen = server
    for value in (f"{url}/a.png", f"{url}/a.png".upper(), {"bytes": None, "path": f"{url}/a.png"}):
        for function in (load_image, check_image):
            assert refusal(value, function=function) == "image_url"
    port = url.rsplit(":", 1)[1]
    tricks = [f"http://good@127.0.0.1:{port}/", f"http://127.0.0.1:{port}\\@good/", f"http://good\\@127.0.0.1:{port}/"]
    for value in [*tricks, f"http://good.127.0.0.1:{port}/", f"http://good:80\t@127.0.0.1:{port}/"]:
        assert refusal(value, ImageOptions(allowed_hosts=("good",))) == "image_url"
    assert refusal(f"{url}/a.png", ImageOptions(allowed_hosts=("127.0.0",))) == "image_url"
    assert seen == []


def test_an_allowed_host_is_asked(server):
    url, seen = server
    options = ImageOptions(allowed_hosts=("127.0.0.1",), max_image_bytes=1_000_000)
    assert pixels(load_image(f"{url}/a.png?x=1", options))[0] == [list(A), list(B), list(C)]
    assert check_image(f"{url}/a.png", options) == (3, 2)
    assert seen == ["/a.png?x=1", "/a.png"]
    assert refusal(f"{url}/move", options) == "image_url"
    assert refusal(f"{url}/gone.png", options) == "image_missing"
    assert refusal(f"{url}/text", options) == "image_corrupt"
    assert refusal(f"{url}/endless", options) == "image_too_large"
    assert seen[2:] == ["/move", "/gone.png", "/text", "/endless"]
    assert refusal(f"{url}/a.png", ImageOptions(allowed_hosts=("127.0.0.1",), max_image_bytes=9)) == "image_too_large"


def test_a_server_that_drips_or_is_gone_is_missing(server):
    url, _ = server
    options = ImageOptions(allowed_hosts=("127.0.0.1",), timeout=0.3)
    assert refusal(f"{url}/slow", options) == "image_missing"
    assert refusal("http://127.0.0.1:1/a.png", options) == "image_missing"
    assert refusal("http://127.0.0.1:99999/a.png", options) == "image_missing"
    assert refusal("http://127.0.0.1/ü.png", options) == "image_missing"
