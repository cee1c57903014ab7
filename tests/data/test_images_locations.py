"""Where images may lie: under the image root, and on allowed hosts, with every way out tried."""

import inspect
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from datasets import Dataset

from tests.data.image_files import UPRIGHT, A, B, C, encode, picture, pixels, refusal
from trl_dt2it.data import (
    RowError,
    decontaminate,
    readmit,
    reformulate_t2i,
    split_t2i,
    to_dpo,
    validate,
    write_parquet,
)
from trl_dt2it.data.columns import leave_images_encoded
from trl_dt2it.data.images import ImageOptions, check_image, load_image
from trl_dt2it.data.messages import FEATURES, preference


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


def test_one_image_root_everywhere(tmp_path):
    """The same paths are read, and the same is refused, wherever the folder is named."""
    root = tmp_path / "root"
    root.mkdir()
    for number in range(2):
        (root / f"{number}.png").write_bytes(encode(picture(UPRIGHT).rotate(90 * number, expand=True)))
    (tmp_path / "2.png").write_bytes(encode(picture(UPRIGHT)))
    captions = [
        {"caption": "a cat", "chosen_image": path, "rejected_image": "1.png"} for path in ("0.png", "../2.png")
    ]
    raw_pairs = Dataset.from_list(captions)

    made = reformulate_t2i(raw_pairs, image_root=root)
    assert len(made) == 1 and split_t2i(raw_pairs, image_root=root)[1]["reason"][:] == ["image_outside_root"]
    stream = raw_pairs.to_iterable_dataset()
    assert len(list(reformulate_t2i(stream, image_root=root))) == len(list(split_t2i(stream, image_root=root)[0])) == 1

    def rows(path):
        row = {**dict.fromkeys(FEATURES), **preference("What?", "Yes.", "No.", [path])}
        return Dataset.from_list([row], features=FEATURES)

    good, bad = rows("0.png"), rows("../2.png")
    assert [validate(one, image_root=root, show=False)[1]["reason"][:] for one in (good, bad)] == [
        [],
        ["image_outside_root"],
    ]
    assert len(readmit(good, good.select([]), image_root=root, show=False)[0]) == 1
    benchmark = [{"question": "what", "image": "0.png"}]
    assert len(decontaminate(good, benchmark, image_root=root)[1]) == 1
    assert len(decontaminate(bad, benchmark, image_root=root)[1]) == 0
    assert to_dpo(good, image_root=root)[0]["images"][0].size == (3, 2)
    with pytest.raises(RowError, match="is not inside `image_root`"):
        to_dpo(bad, image_root=root)
    write_parquet(good, tmp_path / "good.parquet", image_root=root)
    (written,) = leave_images_encoded(Dataset.from_parquet(str(tmp_path / "good.parquet"), cache_dir=str(tmp_path)))
    assert [image["bytes"] for image in written["images"]] == [(root / "0.png").read_bytes()]
    with pytest.raises(RowError, match="is not inside `image_root`"):
        write_parquet(bad, tmp_path / "bad.parquet", image_root=root)
    for function in (validate, decontaminate, to_dpo, write_parquet, reformulate_t2i):
        with pytest.raises(ValueError, match="`image_root` is .*/nowhere, but there is no such folder"):
            function(*[good, benchmark][: 2 if function is decontaminate else 1], **path_of(function, tmp_path))
    with pytest.raises(ValueError, match="`image_root` and `image_options` name different folders"):
        validate(good, image_root=root, image_options=ImageOptions(image_root=str(tmp_path)))


def path_of(function, tmp_path):
    return {"image_root": tmp_path / "nowhere", **({"path": tmp_path / "x"} if function is write_parquet else {})}


def test_all_that_reads_images_of_rows_takes_an_image_root():
    from trl_dt2it import MultimodalRewardConfig, RewardScorer, curation, data, debias, evaluation, judge
    from trl_dt2it.curation.judging import judge_pairs

    takes = [data.load_preferences, data.reformulate_t2i, data.split_t2i, data.validate, data.readmit]
    takes += [data.decontaminate, data.to_dpo, data.write_parquet, evaluation.read_benchmark, evaluation.evaluate]
    takes += [debias.distill, curation.push_curated, judge_pairs, RewardScorer.from_pretrained]
    for function in (*takes, MultimodalRewardConfig):
        assert "image_root" in inspect.signature(function).parameters, function
    for package in (data, debias, evaluation, curation, judge):
        for name in package.__all__:
            parameters = inspect.signature(one).parameters if inspect.isfunction(one := getattr(package, name)) else {}
            assert "image_root" in parameters or "image_options" not in parameters or name == "prepare_shard", name
