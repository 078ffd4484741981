"""A running gateway with a scripted worker behind it, and what tests say to both."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
from scripted_worker import ScriptedWorker
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from scheduler.messages import WorkerInfo
from service.config import GatewayConfig
from service.detokenize import byte_alphabet
from service.keys import Key, digest_of, id_of, mint
from service.server import create_server
from service.store import KEYS, PEPPER, SqliteObjects, make_secret

MODEL = "acme/tiny-chat"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, this is a small tokenizer",
    "grüße 한국어 日本語 😀👩‍👩‍👧",
]
PATIENCE_SECONDS = 10.0


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE with all 256 bytes and a few merges, some of them across characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>", "<|eot|>")])
    return tokenizer


class Ids:
    """Writes scripts: text to deliveries of token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.end = tokenizer.token_to_id("<|im_end|>")

    def of(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def one_by_one(self, text: str) -> list[list[int]]:
        return [[id] for id in self.of(text)]

    def bytewise(self, text: str) -> list[list[int]]:
        """A token per byte."""
        alphabet = {byte: char for char, byte in byte_alphabet().items()}
        return [[self.tokenizer.token_to_id(alphabet[byte])] for byte in text.encode()]

    def answer(self, text: str) -> list[list[int]]:
        """Ends by itself."""
        return [*self.one_by_one(text), [self.end]]


def read_events(lines: Iterable[bytes]) -> Iterator[str]:
    """The data of the events in a chunked body, up to [DONE]; the connection stays open."""
    for line in lines:
        if line.startswith(b"data: "):
            yield line[6:-1].decode()
            if line == b"data: [DONE]\n":
                return


def join_deltas(events: Iterable[str]) -> str:
    """The text of a chat stream."""
    chunks = [json.loads(event) for event in events]
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def raw_post(path: str, body: dict[str, Any], key: str = "none") -> bytes:
    """A whole HTTP request, for a socket."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {key}\r\n"
    return head.encode() + f"content-length: {len(content)}\r\n\r\n".encode() + content


class Cabinet:
    """A folder with keys, written as the command writes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self._objects = SqliteObjects(folder)

    def make(self, **fields: Any) -> str:
        """A key that is there from now on: acme's, where nothing else is said."""
        id, secret = mint()
        digest = digest_of(secret, make_secret(Path(self.folder) / PEPPER))
        self.put(Key(**{"id": id, "tenant": "acme", "digest": digest, "created_at": time.time(), **fields}))
        return secret

    def put(self, key: Key) -> None:
        self._objects.put(KEYS, key.id, key.encode())

    def change(self, secret: str, **fields: Any) -> None:
        text = self._objects.get(KEYS, id_of(secret))
        assert text is not None
        self.put(replace(Key.decode(text), **fields))

    def revoke(self, secret: str) -> None:
        self.change(secret, revoked_at=time.time())

    def rotate(self, secret: str) -> str:
        """The new secret; the old one is good no more."""
        _, new = mint(id_of(secret))
        self.change(secret, digest=digest_of(new, make_secret(Path(self.folder) / PEPPER)))
        return new

    def close(self) -> None:
        self._objects.close()


class Gateway:
    """A running gateway, and the worker behind it."""

    def __init__(
        self,
        directory: Path,
        worker_info: WorkerInfo,
        start_worker: bool = True,
        wait: bool = True,
        has_metrics_socket: bool = False,
        **settings: Any,
    ) -> None:
        self.worker = ScriptedWorker(str(directory / "worker.sock"), worker_info)
        if start_worker:
            self.worker.start()
        self._started_worker = start_worker
        sockets = [socket.socket() for _ in range(1 + has_metrics_socket)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        self.port = sockets[0].getsockname()[1]
        self.metrics_url = f"http://127.0.0.1:{sockets[-1].getsockname()[1]}"
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_SECONDS)
        config = GatewayConfig(workers=(self.worker.path,), version="1.2.3", **settings)
        self.server = create_server(config, *sockets)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": sockets})
        self._thread.start()
        self.sdk = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_SECONDS)
        self.wait_until(lambda: self.server.started)
        if start_worker and wait:
            self.wait_until(lambda: self.http.get("/readyz").status_code == 200)

    @staticmethod
    def wait_until(condition: Callable[[], bool]) -> None:
        ends_at = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < ends_at, "did not become true in time"
            time.sleep(0.005)

    def post(self, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
        """A small valid request, with these fields changed."""
        prompt = {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
        return self.http.post(path, json={"model": MODEL, **prompt, **fields})

    def events(self, path: str = "/v1/chat/completions", **fields: Any) -> list[str]:
        """The data of a stream's events, after a look at its framing."""
        response = self.post(path, stream=True, **fields)
        assert response.status_code == 200, response.text
        assert response.text.endswith("\n\n")
        events = [event for event in response.text.split("\n\n")[:-1] if not event.startswith(":")]
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        return [event.removeprefix("data: ") for event in events]

    def chunks(self, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
        """The chunks of a stream that ends well."""
        *chunks, done = self.events(path, **fields)
        assert done == "[DONE]"
        return [json.loads(chunk) for chunk in chunks]

    @contextmanager
    def stream(self, path: str = "/v1/chat/completions", key: str = "none", **fields: Any) -> Iterator[Iterator[str]]:
        """A stream read event by event; comments are passed over. Leaving it early hangs up."""
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "hi"}],
            "prompt": "hi",
            "stream": True,
            **fields,
        }
        sock = self.connect()
        with sock, sock.makefile("rb") as lines:
            sock.sendall(raw_post(path, body, key))
            yield read_events(lines)

    def become(self, port: int) -> None:
        """Speaks to another gateway from now on, one with the same worker."""
        self.http.close()
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_SECONDS)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECONDS)

    def metric(self, line_start: str) -> float:
        """The value of the sample that starts so; 0 when there is none."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(line_start):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def outcome(self, outcome: str) -> float:
        """Requests that ended so, of any model and tier."""
        lines = [line for line in self.http.get("/metrics").text.splitlines() if f'outcome="{outcome}"' in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def join(self) -> None:
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.http.close()
        self.sdk.close()
        self.server.should_exit = True
        self.join()
        if self._started_worker:
            self.worker.stop()
