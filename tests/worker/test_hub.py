"""Hub models: against a small hub on loopback, and against the cache that it fills. Nothing here leaves the machine."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from worker.hub import HubName

COMMIT, OLDER = "c" * 40, "b" * 40
SCRIPT = """
import sys
from worker.files import ModelNotFound, find_model
try:
    print("found", find_model(sys.argv[1], say=lambda line: print("said", line)))
except ModelNotFound as error:
    print("refused", error)
"""


class Hub:
    """Repositories as dictionaries of files, and everything that was asked for. Answers as the real one, for models."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.refused: dict[str, tuple[int, str]] = {}  # repository -> status and error code of its files
        self.down = False
        self.asked: list[str] = []
        self.served: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        path = request.path.partition("?")[0].strip("/")
        self.asked.append(path)
        status, headers, body = self.reply(path)
        request.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if with_body:
            if "/resolve/" in path and status == 200:
                self.served.append(path.rpartition("/")[2])
            request.wfile.write(body)

    def reply(self, path: str) -> tuple[int, dict[str, str], bytes]:
        is_api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repository = f"{owner}/{name}"
        if self.down:
            return 503, {}, b""
        if repository not in self.files:
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", "old", COMMIT, OLDER):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit = OLDER if revision in ("old", OLDER) else COMMIT
        files = self.files[repository]
        if not is_api:
            return self._file(repository, files, "/".join(rest[2:]), commit)
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in files.items()]
            return _json(tree)
        return _json({"id": repository, "sha": commit, "siblings": [{"rfilename": path} for path in files]})

    def _file(
        self, repository: str, files: dict[str, bytes], path: str, commit: str
    ) -> tuple[int, dict[str, str], bytes]:
        if repository in self.refused:
            status, code = self.refused[repository]
            return status, {"X-Error-Code": code}, b""
        if path not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        content = files[path]
        return 200, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit}, content


def repository(*names: str) -> dict[str, bytes]:
    """Each file has another content: files of the same content are downloaded once."""
    return {name: name.encode() for name in names}


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _json(content: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.files["acme/tiny"] = repository("config.json", "tokenizer.json", "model.safetensors")
    yield hub
    hub.close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def find(name: str, url: str, cache: Path, **environ: str) -> dict[str, str]:
    """What `find_model` found, said or refused, in a process of its own: the library reads its settings when imported."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ours = {"HF_ENDPOINT": url, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache / "home"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name],
        capture_output=True,
        text=True,
        timeout=60,
        env={**clean, **ours, "HF_HUB_DISABLE_TELEMETRY": "1", **environ},
    )
    assert done.returncode == 0, done.stderr
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    return {verb: rest for verb, _, rest in lines}


def nobody() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_model_is_downloaded_once_and_lies_in_the_cache_layout(hub: Hub, cache: Path) -> None:
    folder = cache / "models--acme--tiny" / "snapshots" / COMMIT
    assert find("acme/tiny", hub.url, cache) == {"found": str(folder)}
    assert (folder / "model.safetensors").read_bytes() == b"model.safetensors"
    assert (cache / "models--acme--tiny" / "refs" / "main").read_text() == COMMIT
    assert sorted(hub.served) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert find("acme/tiny", hub.url, cache) == {"found": str(folder)}
    assert len(hub.served) == 3


def test_only_what_serves_is_downloaded(hub: Hub, cache: Path) -> None:
    settings = (
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    )
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    wanted = ("config.json", "tokenizer.json", *settings, *shards)
    others = ("README.md", "pytorch_model.bin", "tokenizer.model", "onnx/config.json", "original/model.safetensors")
    others += ("optimizer.safetensors", "consolidated.safetensors", "trainer_state.json")
    hub.files["acme/large"] = repository(*wanted, *others)
    assert "found" in find("acme/large", hub.url, cache)
    assert sorted(hub.served) == sorted(wanted)


def test_a_revision_can_be_named(hub: Hub, cache: Path) -> None:
    assert find("acme/tiny@old", hub.url, cache)["found"].endswith(OLDER)
    assert find(f"acme/tiny@{OLDER}", hub.url, cache)["found"].endswith(OLDER)
    assert find("acme/tiny", hub.url, cache)["found"].endswith(COMMIT)
    assert find("acme/tiny@new", hub.url, cache) == {
        "refused": "the hub model acme/tiny@new could not be had: it has no revision new"
    }


@pytest.mark.parametrize("offline", ["by wish", "no connection", "out of order"])
def test_without_the_hub_the_cache_serves_and_says_so(offline: str, hub: Hub, cache: Path) -> None:
    folder = find("acme/tiny", hub.url, cache)["found"]
    hub.down = True
    environ = {"HF_HUB_OFFLINE": "1"} if offline == "by wish" else {}
    url = nobody() if offline == "no connection" else hub.url
    reason = {
        "by wish": "HF_HUB_OFFLINE is set",
        "no connection": f"{url} could not be reached (",
        "out of order": f"{url} answers 503",
    }[offline]
    told = find("acme/tiny", url, cache, **environ)
    assert told["found"] == folder
    assert told["said"].startswith(f"the hub model acme/tiny is served from the cache: {reason}")


@pytest.mark.parametrize("offline", ["by wish", "no connection", "out of order"])
def test_without_the_hub_and_the_cache_a_sentence_says_what_to_do(offline: str, hub: Hub, cache: Path) -> None:
    hub.down = True
    environ = {"HF_HUB_OFFLINE": "1"} if offline == "by wish" else {}
    told = find("acme/tiny", nobody() if offline == "no connection" else hub.url, cache, **environ)
    assert list(told) == ["refused"]
    assert told["refused"].startswith("the hub model acme/tiny could not be had: ")
    assert f"and the cache {cache} does not hold all of it" in told["refused"]
    assert "give --model a folder" in told["refused"]


def test_a_cache_that_lacks_a_file_is_not_served(hub: Hub, cache: Path) -> None:
    folder = Path(find("acme/tiny", hub.url, cache)["found"])
    (folder / "model.safetensors").unlink()
    told = find("acme/tiny", hub.url, cache, HF_HUB_OFFLINE="1")
    assert "does not hold all of it" in told["refused"]


def test_a_cache_that_another_program_left_with_only_a_config_is_told_as_that(hub: Hub, cache: Path) -> None:
    for path, content in (("refs/main", COMMIT), (f"snapshots/{COMMIT}/config.json", "{}")):
        file = cache / "models--acme--tiny" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    told = find("acme/tiny", hub.url, cache, HF_HUB_OFFLINE="1")
    assert list(told) == ["refused"]
    assert "does not hold all of it" in told["refused"] and "try again with a connection" in told["refused"]


def test_a_model_that_the_hub_does_not_know_is_told(hub: Hub, cache: Path) -> None:
    assert find("acme/other", hub.url, cache) == {
        "refused": f"the hub model acme/other could not be had: {hub.url} knows no such model (a private one needs HF_TOKEN)"
    }


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_is_told_with_what_to_do(status: int, hub: Hub, cache: Path) -> None:
    hub.refused["acme/tiny"] = (status, "GatedRepo")
    assert find("acme/tiny", hub.url, cache) == {
        "refused": "the hub model acme/tiny could not be downloaded: it is gated; "
        f"accept its terms at {hub.url}/acme/tiny and set HF_TOKEN"
    }


def test_a_model_without_safetensors_is_told(hub: Hub, cache: Path) -> None:
    hub.files["acme/old"] = repository("config.json", "pytorch_model.bin")
    assert find("acme/old", hub.url, cache) == {
        "refused": "the hub model acme/old has no model.safetensors; other forms of weights are not read"
    }
    assert hub.served == ["config.json"]


@pytest.mark.parametrize("name", ["wall", "a/b/c", "./a", "a b/c", "/a", "~/a", "../a", "a/", "@main", "a/@main"])
def test_what_is_no_hub_name_is_none(name: str) -> None:
    assert HubName.parse(name) is None


def test_a_hub_name_has_an_owner_a_name_and_perhaps_a_revision() -> None:
    assert HubName.parse("Qwen/Qwen2.5-0.5B") == HubName("Qwen/Qwen2.5-0.5B", None)
    assert HubName.parse("acme/tiny@refs/pr/1") == HubName("acme/tiny", "refs/pr/1")
    assert str(HubName("acme/tiny", "v1")) == "acme/tiny@v1"
