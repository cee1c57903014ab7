"""The loopback Hub against the real clients, `huggingface_hub` and `transformers`, each in a process of its own."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from .hub_server import LoopbackHub


README = """---
library_name: transformers
pipeline_tag: text-classification
tags:
- reward-model
- trl
---

# A model
"""


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


def run(hub: LoopbackHub, code: str, *args: str) -> dict:
    """Runs `code` with the Hub as its endpoint; it prints its result, as JSON, on the last line."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    result = subprocess.run(command, env=hub.env(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_folder_goes_up_and_comes_back(hub, tmp_path):
    header = json.dumps({"w": {"dtype": "U8", "shape": [2**20], "data_offsets": [0, 2**20]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + os.urandom(2**20)
    source = {
        "README.md": README.encode(),
        "model.safetensors": weights,
        "sub/notes é.txt": b"notes\n",
        "empty.json": b"",
    }
    for name, data in {**source, "secret.log": b"secret"}.items():
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).write_bytes(data)

    info = run(
        hub,
        """
        import json, sys
        from huggingface_hub import HfApi, snapshot_download

        api = HfApi()
        repo_id = api.create_repo("my-model", private=True).repo_id
        assert repo_id == api.create_repo("my-model", exist_ok=True).repo_id == f"{api.whoami()['name']}/my-model"
        patterns = ["*.md", "*.safetensors", "*.txt", "*.json"]
        commit = api.upload_folder(repo_id=repo_id, folder_path=sys.argv[1], allow_patterns=patterns)
        same = api.upload_folder(repo_id=repo_id, folder_path=sys.argv[1], allow_patterns=patterns)
        assert same.oid == commit.oid  # nothing has changed: no second commit
        snapshot_download(repo_id, local_dir=sys.argv[2])
        info = api.model_info(repo_id)
        assert info.sha == commit.oid and [s.rfilename for s in info.siblings] == api.list_repo_files(repo_id)
        top = [entry.path for entry in api.list_repo_tree(repo_id)]
        print(json.dumps({"tags": info.tags, "library": info.library_name, "card": info.card_data.tags, "top": top}))
        """,
        tmp_path / "up",
        tmp_path / "down",
    )
    assert hub.files("loopback/my-model") == source
    assert {name: (tmp_path / "down" / name).read_bytes() for name in source} == source
    assert info["tags"] == ["transformers", "text-classification", "reward-model", "trl"]
    assert info["library"] == "transformers" and info["card"] == ["reward-model", "trl"]
    assert info["top"] == ["README.md", "empty.json", "model.safetensors", "sub"]
    # One file took the way through git LFS, the others came in the commit; nothing but these went over the wire.
    assert [path.split("/")[1] for method, path in hub.requests if method == "PUT"] == ["lfs"]
    assert sum(path.endswith("/commit/main") for _, path in hub.requests) == 1


def test_errors_are_those_of_the_hub(hub, tmp_path):
    errors = run(
        hub,
        """
        import json, sys
        from huggingface_hub import HfApi, hf_hub_download

        api = HfApi()
        api.create_repo("me/model")
        api.upload_file(path_or_fileobj=b"{}", path_in_repo="a.json", repo_id="me/model")
        api.create_branch("me/model", branch="dev")
        api.upload_file(path_or_fileobj=b"[]", path_in_repo="b.json", repo_id="me/model", revision="dev")
        api.delete_file("a.json", "me/model", revision="dev")
        calls = {
            "repository": lambda: api.model_info("me/other"),
            "revision": lambda: api.model_info("me/model", revision="other"),
            "file": lambda: hf_hub_download("me/model", "other.json"),
            "again": lambda: api.create_repo("me/model"),
            "token": lambda: HfApi(token=False).create_repo("me/new"),
            "metadata": lambda: api.upload_file(
                path_or_fileobj=b"---\\ntags: [a\\n---\\n", path_in_repo="README.md", repo_id="me/model"
            ),
            "upload": lambda: api.upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="me/other"),
        }
        names = {}
        for name, call in calls.items():
            try:
                call()
            except Exception as error:
                names[name] = type(error).__name__
        print(json.dumps(names))
        """,
    )
    assert errors == {
        "repository": "RepositoryNotFoundError",
        "revision": "RevisionNotFoundError",
        "file": "RemoteEntryNotFoundError",
        "again": "HfHubHTTPError",
        "token": "HfHubHTTPError",
        "metadata": "ValueError",
        "upload": "RepositoryNotFoundError",
    }
    assert hub.files("me/model") == {"a.json": b"{}"} and hub.files("me/model", "dev") == {"b.json": b"[]"}


def test_transformers_pushes_and_loads(hub):
    result = run(
        hub,
        """
        import json
        from transformers import AutoConfig, Qwen3Config

        Qwen3Config(hidden_size=48).push_to_hub("loopback/config")
        print(json.dumps({"hidden_size": AutoConfig.from_pretrained("loopback/config").hidden_size}))
        """,
    )
    assert result == {"hidden_size": 48}
    assert json.loads(hub.files("loopback/config")["config.json"])["model_type"] == "qwen3"
    assert any(method == "GET" and path.endswith("/config.json") for method, path in hub.requests)
