"""A Hugging Face Hub on 127.0.0.1, for tests that push and pull for real.

[`LoopbackHub`] answers over HTTP what `huggingface_hub` asks when it creates a repository, uploads a folder (small
files in the commit, others through git LFS with the `basic` transfer), reads a repository and downloads from it.
Branches and commits are kept, in memory; Xet, pull requests and private repositories are not there, and a new
repository is empty (the Hub puts a `.gitattributes` in it). `huggingface_hub` reads its endpoint from the environment
when it is imported, so the client has to be another process:

```python
with LoopbackHub() as hub:
    subprocess.run([sys.executable, "-c", code], env=hub.env(), check=True)
    assert "README.md" in hub.files("loopback/my-model")
```
"""

import base64
import hashlib
import json
import os
import re
import secrets
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit

import yaml


USER = "loopback"  # who every token belongs to: the namespace of a repository created without one

_REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_API = rf"/api/(?P<type>model|dataset|space)s/{_REPO}"
_SITE = rf"/(?:(?P<type>dataset|space)s/)?{_REPO}"
_ROUTES = {
    r"POST /api/repos/create": "create_repo",
    r"POST /api/validate-yaml": "validate_yaml",
    rf"POST {_API}/preupload/(?P<revision>[^/]+)": "preupload",
    rf"POST {_API}/commit/(?P<revision>[^/]+)": "commit",
    rf"POST {_API}/branch/(?P<revision>[^/]+)": "create_branch",
    rf"POST {_SITE}\.git/info/lfs/objects/batch": "lfs_batch",
    r"PUT /lfs/(?P<oid>[0-9a-f]{64})": "lfs_upload",
    r"GET /api/whoami-v2": "whoami",
    rf"GET {_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?": "tree",
    rf"GET {_API}(?:/revision/(?P<revision>[^/]+))?": "info",
    rf"GET {_SITE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "resolve",
}
_LFS_SUFFIXES = (".bin", ".gz", ".h5", ".onnx", ".parquet", ".pkl", ".pt", ".pth", ".safetensors", ".tar", ".zip")
_UNSET = ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE")


class HubError(Exception):
    """An answer other than 200: status, the `X-Error-Code` that `huggingface_hub` looks at, and a message."""


class LoopbackHub:
    """The server, as a context manager. `endpoint` is its address; `requests` are the method and path (without the
    query) of every request, in order."""

    def __enter__(self) -> "LoopbackHub":
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self._home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._branches: dict[tuple[str, str], dict[str, str]] = {}  # (type, repository): branch -> commit
        self._commits: dict[str, dict[str, bytes]] = {}
        self._lfs: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._home.cleanup()

    def env(self) -> dict[str, str]:
        """The environment of a client process: this one's, pointed at this server, with an empty cache of its own
        (the same one at every call)."""
        env = {name: value for name, value in os.environ.items() if name not in _UNSET}
        env |= {f"HF_HUB_DISABLE_{what}": "1" for what in ("PROGRESS_BARS", "TELEMETRY", "UPDATE_CHECK", "XET")}
        env |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": self._home.name, "HF_TOKEN": "hf_loopback"}
        return env | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """Path and content of every file of a repository, as the branch or commit `revision` has them."""
        return dict(self._commits[self._commit((repo_type, repo_id), revision)])

    def add_dataset(self, repo_id: str, files: dict[str, bytes]) -> None:
        """A data set that is there already."""
        self._branches["dataset", repo_id] = {}
        self._add_commit(("dataset", repo_id), "main", files)

    def _commit(self, key: tuple[str, str], revision: str) -> str:
        if key not in self._branches:
            raise HubError(404, "RepoNotFound", f"{key[0]} {key[1]} not found")
        commit = self._branches[key].get(revision, revision)
        if commit not in self._commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _add_commit(self, key: tuple[str, str], branch: str, files: dict[str, bytes]) -> str:
        self._branches[key][branch] = commit = secrets.token_hex(20)
        self._commits[commit] = files
        return commit

    # What follows answers one request each: `body` as sent, and the groups of the route.

    def whoami(self, body):
        return {"type": "user", "id": USER, "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create_repo(self, body):
        body = json.loads(body)
        key = (body.get("type") or "model", f"{body.get('organization') or USER}/{body['name']}")
        url = f"{self.endpoint}/{'' if key[0] == 'model' else key[0] + 's/'}{key[1]}"
        if key in self._branches:
            raise HubError(409, "", "You already created this repo", {"url": url})
        self._branches[key] = {}
        self._add_commit(key, "main", {})
        return {"url": url}

    def create_branch(self, body, type, repo, revision):
        start = json.loads(body or b"{}").get("startingPoint", "main")
        self._branches[type, repo][revision] = self._commit((type, repo), start)
        return {}

    def validate_yaml(self, body):
        _card_data(json.loads(body)["content"].encode())
        return {"errors": [], "warnings": []}

    def preupload(self, body, type, repo, revision):
        files = self._commits[self._commit((type, repo), revision)]
        answer = []
        for file in json.loads(body)["files"]:
            lfs = _is_lfs(path := file["path"], base64.b64decode(file["sample"]), file["size"])
            oid = _oid(files[path], lfs) if path in files else None
            answer.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def lfs_batch(self, body, type, repo):
        self._commit((type or "model", repo), "main")
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self._lfs:
                item["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "", "the content does not have the announced sha256")
        self._lfs[oid] = body
        return {}

    def commit(self, body, type, repo, revision):
        files = dict(self._commits[self._commit((type, repo), revision)])
        for key, value in ((line["key"], line["value"]) for line in map(json.loads, body.splitlines())):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self._lfs[value["oid"]]
            elif key != "header":  # "deletedFile" or "deletedFolder"
                folder = value["path"].rstrip("/") + "/"
                files = {path: data for path, data in files.items() if not (path + "/").startswith(folder)}
        commit = self._add_commit((type, repo), revision, files)
        return {"commitOid": commit, "commitUrl": f"{self.endpoint}/{repo}/commit/{commit}"}

    def info(self, body, type, repo, revision):
        commit = self._commit((type, repo), revision or "main")
        files = self._commits[commit]
        card = _card_data(files.get("README.md", b""))
        named = {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
        tags = [*named.values(), *card.get("tags", [])]
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {"id": repo, "sha": commit, "cardData": card, "tags": tags, "siblings": siblings, **named}

    def tree(self, body, type, repo, revision, path=None, recursive=False):
        root, entries = f"{path}/" if path else "", {}
        for name, data in sorted(self._commits[self._commit((type, repo), revision)].items()):
            if name.startswith(root):
                parts = name.removeprefix(root).split("/")
                for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                    folder = root + "/".join(parts[:depth])
                    entries[folder] = {"type": "directory", "path": folder, "oid": _oid(folder.encode(), False)}
                if len(parts) == 1 or recursive:
                    entries[name] = {"type": "file", "path": name, "size": len(data), "oid": _oid(data, False)}
                    if _is_lfs(name, data[:512], len(data)):
                        entries[name]["lfs"] = {"oid": _oid(data, True), "size": len(data), "pointerSize": 128}
        if root and not entries:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        return list(entries.values())

    def resolve(self, body, type, repo, revision, path):
        commit = self._commit((type or "model", repo), revision)
        files = self._commits[commit]
        if path not in files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        data = files[path]
        etag = _oid(data, _is_lfs(path, data[:512], len(data)))
        return data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}


def _is_lfs(path: str, sample: bytes, size: int) -> bool:
    return size > 0 and (path.endswith(_LFS_SUFFIXES) or b"\0" in sample or size > 10 * 1024**2)


def _oid(data: bytes, lfs: bool) -> str:
    return hashlib.sha256(data).hexdigest() if lfs else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _card_data(readme: bytes) -> dict:
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", readme.decode(), re.DOTALL)
    try:
        return yaml.safe_load(match[1]) or {} if match else {}
    except yaml.YAMLError as error:
        raise HubError(400, "", "Invalid metadata", {"errors": [{"message": str(error)}]}) from error


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def answer(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            with self.hub.lock:
                self.hub.requests.append((self.command, unquote(url.path)))
                answer = self.dispatch(url.path, url.query, body)
            data, headers = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
            self.respond(200, data, headers)
        except HubError as error:
            status, code, message, content = (*error.args, {})[:4]
            headers = {"X-Error-Message": quote(message, " "), **({"X-Error-Code": code} if code else {})}
            self.respond(status, json.dumps({"error": message, **content}).encode(), headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def dispatch(self, path: str, query: str, body: bytes):
        if self.command == "POST" and path != "/api/validate-yaml" and "Authorization" not in self.headers:
            raise HubError(401, "", "Invalid username or password.")
        for pattern, name in _ROUTES.items():
            if match := re.fullmatch(pattern, f"{self.command.replace('HEAD', 'GET')} {path}"):
                groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
                more = {"recursive": "recursive=true" in query.lower()} if name == "tree" else {}
                return getattr(self.hub, name)(body, **groups, **more)
        raise HubError(404, "", f"no such endpoint: {self.command} {path}")

    def respond(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data)

    def log_message(self, *_) -> None: ...
