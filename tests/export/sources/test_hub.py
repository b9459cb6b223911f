"""Fetching from the hub: the real library against a small hub on loopback that can cut, refuse and vanish."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from export.errors import SourceError
from export.sources.hub import download
from export.sources.opening import open_checkpoint
from tests.tools.hf_checkpoints import write_llama

REPO = "people/model"
COMMIT = "c0ffee" + "0" * 34
WEIGHTS = "model.safetensors"


@dataclass
class Hub:
    """What the server holds and does.

    like_the_real_one: large files are tagged as xet's and come from another host. requests: those for files, (method,
    name, Range header). keys: the Authorization headers that the hub, and that the other host, was sent.
    """

    files: dict[str, bytes]
    like_the_real_one: bool = False
    keys: dict[str, set[str | None]] = field(default_factory=lambda: {"hub": set(), "cdn": set()})
    cut_after: int | None = None
    status: int | None = None
    error_code: str | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def gets(self, name: str) -> list[str | None]:
        """The Range headers of the requests for a file's bytes."""
        return [asked for method, path, asked in self.requests if method == "GET" and path == name]


class Handler(BaseHTTPRequestHandler):
    """The few endpoints that the library asks: a revision's commit, its files, a file."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Be quiet."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        is_cdn = path.startswith("/cdn/")
        self.hub.keys["cdn" if is_cdn else "hub"].add(self.headers.get("Authorization"))
        if self.hub.status is not None:
            self._send(self.hub.status, b"{}", {"X-Error-Code": self.hub.error_code or ""})
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self._revision(path.rpartition("/")[2])
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            self._send(200, json.dumps([self._entry(name) for name in self.hub.files]).encode())
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            self._resolve(path.removeprefix(f"/{REPO}/resolve/{COMMIT}/"), with_body)
        elif is_cdn:
            self._file(path.removeprefix("/cdn/"), with_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _revision(self, revision: str) -> None:
        if revision in ("main", COMMIT):
            self._send(200, json.dumps({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": []}).encode())
        else:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

    def _entry(self, name: str) -> dict[str, object]:
        data = self.hub.files[name]
        large = {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 134}} if is_large(name) else {}
        xet = {"xetHash": sha256(data)} if is_large(name) and self.hub.like_the_real_one else {}
        return {"type": "file", "path": name, "size": len(data), "oid": git_id(data), **large, **xet}

    def _resolve(self, name: str, with_body: bool) -> None:
        if not is_large(name) or not self.hub.like_the_real_one:
            self._file(name, with_body)
            return
        data, port = self.hub.files[name], self.headers["Host"].rpartition(":")[2]
        headers = {
            "Location": f"http://localhost:{port}/cdn/{name}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Size": str(len(data)),
            "X-Linked-Etag": f'"{sha256(data)}"',
            "X-Xet-Hash": sha256(data),
            "X-Xet-Refresh-Route": f"/api/models/{REPO}/xet-read-token/{COMMIT}",
        }
        self._send(302, b"", headers)

    def _file(self, name: str, with_body: bool) -> None:
        asked = self.headers.get("Range")
        self.hub.requests.append((self.command, name, asked))
        if name not in self.hub.files:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        data = self.hub.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(data) if is_large(name) else git_id(data)}"'}
        begin = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self._send(206 if begin else 200, data[begin:], headers, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body or self.command == "HEAD":
            return
        cut = self.hub.cut_after
        if cut is not None and len(body) > cut:
            self.wfile.write(body[:cut])
            # From now on the hub fails, so that the library's own attempts end at once.
            self.hub.cut_after, self.hub.status = None, 500
            self.close_connection = True
        else:
            self.wfile.write(body)


def is_large(name: str) -> bool:
    """Whether the hub keeps a file outside git."""
    return name.endswith(".safetensors")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small model's files, and some that are not for us."""
    folder = write_llama(tmp_path_factory.mktemp("model"))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"original/model.safetensors": b"x", "pytorch_model.bin": b"x", "model.gguf": b"x"}


@pytest.fixture
def hub(model_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback, and a library that knows no other and has an empty cache."""
    hub = Hub(dict(model_files))
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_at(f"http://127.0.0.1:{server.server_address[1]}", tmp_path / "cache", monkeypatch)
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what HF_ENDPOINT, HF_HOME and the like set when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.close_session()


def test_a_model_is_fetched_whole_and_without_what_nobody_reads(hub: Hub, model_files: dict[str, bytes]) -> None:
    folder = download(REPO)
    got = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert got == {name: model_files[name] for name in got}
    assert got.keys() == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}


def test_a_checkpoint_on_the_hub_has_the_hubs_name(hub: Hub) -> None:
    checkpoint = open_checkpoint(REPO)
    assert (checkpoint.name, checkpoint.architecture) == (REPO, "LlamaForCausalLM")


def test_all_shards_that_the_index_names_are_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "sharded", max_shard_size="100KB")
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(path.name for path in download(REPO).iterdir()) == sorted(hub.files)


@pytest.mark.parametrize("like_the_real_one", [False, True])
def test_a_download_that_broke_off_goes_on_where_it_stopped(
    hub: Hub, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, like_the_real_one: bool
) -> None:
    hub.like_the_real_one = like_the_real_one
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not like_the_real_one)
    hub.cut_after = 100_000
    with pytest.raises(SourceError, match=r"goes on where it stopped"):
        download(REPO)
    hub.status = None
    hub.requests.clear()
    folder = download(REPO)
    (asked,) = hub.gets(WEIGHTS)
    assert asked is not None
    assert 0 < int(asked.removeprefix("bytes=").removesuffix("-")) <= 100_000
    assert (folder / WEIGHTS).read_bytes() == model_files[WEIGHTS]


def test_a_token_is_shown_to_the_hub_and_to_no_other_host(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.like_the_real_one = True
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(REPO)
    assert hub.keys == {"hub": {"Bearer hf_secret"}, "cdn": {None}}


def test_what_was_left_damaged_is_noticed_and_fetched_anew(hub: Hub, model_files: dict[str, bytes]) -> None:
    part = partial_file(model_files)
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\0" * 1000)
    with pytest.raises(SourceError, match=r"model\.safetensors did not arrive as the hub has it"):
        download(REPO)
    assert (download(REPO) / WEIGHTS).read_bytes() == model_files[WEIGHTS]


def test_more_than_the_file_has_is_no_beginning_of_it(hub: Hub, model_files: dict[str, bytes]) -> None:
    part = partial_file(model_files)
    part.parent.mkdir(parents=True)
    part.write_bytes(model_files[WEIGHTS] + b"x")
    assert (download(REPO) / WEIGHTS).read_bytes() == model_files[WEIGHTS]


def test_two_exports_do_not_write_into_one_file(hub: Hub, model_files: dict[str, bytes]) -> None:
    part = partial_file(model_files)
    part.parent.mkdir(parents=True)
    with part.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SourceError, match=r"being fetched .* by another export"):
            download(REPO)


def partial_file(files: dict[str, bytes]) -> Path:
    """Where an earlier run leaves what it has of the weights."""
    blobs = Path(constants.HF_HUB_CACHE) / f"models--{REPO.replace('/', '--')}" / "blobs"
    return blobs / f"{sha256(files[WEIGHTS])}.resumable.incomplete"


def test_a_model_in_the_cache_needs_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert download(REPO) == folder
    assert hub.requests == []


def test_offline_the_sentence_says_how_to_go_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"not in the cache .*; connect, set HF_ENDPOINT .* or name a local folder"):
        download(REPO)


def test_a_hub_that_is_gone_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    with pytest.raises(SourceError, match=r"cannot be reached and people/model is not in the cache"):
        download(REPO)


def test_a_hub_that_goes_away_between_two_files_is_reported_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = hub.files.pop(WEIGHTS)
    with pytest.raises(SourceError, match=r"has neither"):
        download(REPO)
    hub.files[WEIGHTS] = weights
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match=r"cannot be reached"):
        download(REPO)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "GatedRepo", "is gated: accept its terms on .* and set HF_TOKEN"),
        (403, "GatedRepo", "is gated"),
        (401, "RepoNotFound", "There is no model people/model on .* HF_TOKEN if the model is private"),
        (404, "RepoNotFound", "There is no model people/model on .* nor a file or folder of that name here"),
    ],
)
def test_a_model_that_is_closed_or_not_there_is_said_so(hub: Hub, status: int, code: str, words: str) -> None:
    hub.status, hub.error_code = status, code
    with pytest.raises(SourceError, match=words):
        download(REPO)


def test_an_unknown_revision_is_named(hub: Hub) -> None:
    with pytest.raises(SourceError, match=r"has no revision 'v9'; name a branch, tag or commit"):
        open_checkpoint(f"{REPO}@v9")


def test_a_commit_can_be_named(hub: Hub) -> None:
    assert open_checkpoint(f"{REPO}@{COMMIT}").name == REPO


def test_a_repository_without_safetensors_is_refused(hub: Hub) -> None:
    del hub.files[WEIGHTS]
    with pytest.raises(SourceError, match=r"has neither model.safetensors nor model.safetensors.index.json"):
        download(REPO)


def test_a_name_that_the_hub_cannot_have_is_refused(hub: Hub) -> None:
    with pytest.raises(SourceError, match=r"no name of a model; it is organisation/name"):
        download("people/model--..")


def test_a_disk_that_is_too_small_is_noticed_before_the_first_byte(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(SourceError, match=r"GB more in .* make room, or set HF_HOME"):
        download(REPO)
    assert hub.gets(WEIGHTS) == []


def test_a_disk_that_fills_up_on_the_way_is_said_so(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("export.sources.hub.http_get", fill)
    with pytest.raises(SourceError, match=r"No space left on device.*; make room, or set HF_HOME"):
        download(REPO)
