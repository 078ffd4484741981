"""The worker's front on real sockets, with a real loop behind it in a thread."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import worker.app
import worker.submission
from scheduler.messages import (
    Accept,
    Finish,
    FrameReader,
    Reason,
    Refuse,
    Request,
    StepFrame,
    WorkerInfo,
    decode_decision,
)
from worker.app import EngineProcess, StepStream, serve
from worker.config import WorkerConfig
from worker.core import Core
from worker.guard import METRICS_ONLY, Guard, guard_with
from worker.link import Answer, EngineLink, LinkClosed, encode_answer, encode_json_answer, link_pair

PATIENCE_SECONDS = 20.0


class ThreadEngine(EngineProcess):
    """The engine process as a thread of this one: `built` is what it runs, None a start that fails."""

    built: Any = None
    core: Core
    thread: threading.Thread

    async def start(self) -> None:
        front, self.engine_end = link_pair()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        front.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=front)

    def _run(self) -> None:
        with self.engine_end:
            link = EngineLink(self.engine_end)
            if self.built is None:
                link.send(encode_json_answer(Answer.FAILED, {"sentence": "this model does not fit"}))
                return
            try:
                type(self).core = Core(link, self.built)
                threading.Thread(target=self.core.stepper.run, daemon=True).start()
                link.send(encode_answer(Answer.INFO, self.built.info.encode()))
                self.core.run()
            except LinkClosed:
                pass


class Front:
    """A front that serves, in a thread with a loop of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, built: Any, guard: Guard = METRICS_ONLY) -> None:
        self.guard = guard
        self.kind = type("BuiltEngine", (ThreadEngine,), {"built": built})
        self.engines: list[ThreadEngine] = []
        monkeypatch.setattr(worker.app, "EngineProcess", self._make)
        self.folder = tempfile.TemporaryDirectory(prefix="hg-")
        self.path = str(Path(self.folder.name) / "worker")
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(self.path)
        tcp = socket.socket()
        tcp.bind(("127.0.0.1", 0))
        self.port = tcp.getsockname()[1]
        for sock in (unix, tcp):
            sock.listen()
        self.sockets = [unix, tcp]
        self.status: int | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.http = httpx.Client(
            transport=httpx.HTTPTransport(uds=self.path), base_url="http://worker", timeout=PATIENCE_SECONDS
        )

    def _make(self, *arguments: Any) -> ThreadEngine:
        self.engines.append(self.kind(*arguments))
        return self.engines[-1]

    def _run(self) -> None:
        self.status = asyncio.run(serve(WorkerConfig(), self.sockets, self.guard))

    @property
    def gate(self) -> Any:
        return self.kind.core.gate

    def post(self, body: bytes, gateway: int | str = 7) -> httpx.Response:
        return self.http.post(f"/requests?gateway={gateway}", content=body)

    def submit(self, asked: Request) -> Any:
        answer = self.post(asked.encode(), asked.gateway)
        assert answer.status_code == 200, answer.text
        return decode_decision(answer.content)

    @contextmanager
    def steps(self, gateway: int = 7) -> Iterator[Steps]:
        with self.http.stream("GET", f"/steps?gateway={gateway}") as response:
            assert response.status_code == 200
            yield Steps(response)

    def close(self) -> None:
        self.http.close()
        for engine in self.engines:  # as if the engine process died: the front ends
            try:
                engine.engine_end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        self.thread.join(PATIENCE_SECONDS)
        assert not self.thread.is_alive()
        for engine in self.engines:
            engine.thread.join(PATIENCE_SECONDS)
        for sock in self.sockets:
            sock.close()
        self.folder.cleanup()


class Steps:
    """A step stream, read frame by frame."""

    def __init__(self, response: httpx.Response) -> None:
        self._pieces = response.iter_raw()
        self._reader = FrameReader()
        self.frames: list[Any] = []

    def read_until(self, what: Callable[[], Any]) -> Any:
        while not (found := what()):
            self.frames += self._reader.feed(next(self._pieces))
        return found

    def tokens(self, id: int) -> list[int]:
        got: list[int] = []
        for frame in self.frames:
            if isinstance(frame, StepFrame):
                at = 0
                for other, word in zip(frame.ids, frame.info, strict=True):
                    if other == id and word >> 16 < Finish.REFUSED:
                        got += frame.tokens[at : at + (word & 0xFFFF)]
                    at += word & 0xFFFF
        return got

    def finish(self, id: int) -> Finish:
        for frame in self.frames:
            if isinstance(frame, StepFrame) and id in frame.ids:
                finish = Finish(frame.info[frame.ids.index(id)] >> 16)
                if finish:
                    return finish
        return Finish.RUNNING


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch, engine: Any, tools: Any) -> Iterator[Front]:
    made = Front(monkeypatch, tools.build_with(engine, sequences=2))
    tools.wait_until(lambda: made.http.get("/readyz").status_code == 200)
    yield made
    engine.may_go.set()
    made.close()


def test_the_model_is_told_as_the_engine_process_told_it(front: Front) -> None:
    info = WorkerInfo.decode(front.http.get("/model").content)
    assert info == front.kind.built.info


def test_a_request_is_decided_and_its_tokens_come_over_the_step_stream(front: Front, tools: Any) -> None:
    with front.steps() as steps:
        assert isinstance(front.submit(tools.request(1, prompt=(10,), max_tokens=3)), Accept)
        steps.read_until(lambda: steps.finish(1))
        assert steps.tokens(1) == [11, 12, 13] and steps.finish(1) == Finish.LENGTH


def test_snapshots_reach_every_gateway_and_tokens_their_own(front: Front, tools: Any) -> None:
    with front.steps(7) as seven, front.steps(8) as eight:
        front.submit(tools.request(1, gateway=8, prompt=(10,)))
        eight.read_until(lambda: eight.finish(1))
        for steps in (seven, eight):
            steps.read_until(lambda steps=steps: [frame for frame in steps.frames if isinstance(frame, dict)])
        assert seven.tokens(1) == []


def test_a_request_can_be_withdrawn(front: Front, tools: Any, engine: Any) -> None:
    engine.may_go.clear()
    with front.steps():
        front.submit(tools.request(1))
        answer = front.http.delete("/requests/7/1")
        assert (answer.status_code, answer.content) == (204, b"")
        tools.wait_until(lambda: not front.gate.running)
        assert front.http.delete("/requests/7/1").status_code == 204, "twice does no harm"


@pytest.mark.parametrize(
    "path", ["/requests/7", "/requests/7/x", "/requests/-1/1", "/requests/7/4294967296", "/requests/"]
)
def test_a_withdrawal_without_a_key_is_refused(front: Front, path: str) -> None:
    assert front.http.delete(path).status_code == 400


def test_a_gateway_that_hangs_up_takes_its_requests_along(front: Front, tools: Any, engine: Any) -> None:
    engine.may_go.clear()
    with front.steps(8) as other:
        with front.steps(7):
            for id in (1, 2, 3):
                front.submit(tools.request(id, gateway=7))
            front.submit(tools.request(1, gateway=8))
        tools.wait_until(lambda: {key >> 32 for key in [*front.gate.running, *front.gate.waiting]} == {8})
        engine.may_go.set()
        other.read_until(lambda: other.finish(1))
    assert front.engines[0].streams.keys() <= {8}


def test_a_gateway_that_connects_again_has_lost_what_it_had(front: Front, tools: Any, engine: Any) -> None:
    engine.may_go.clear()
    with front.steps(7) as first:
        front.submit(tools.request(1))
        tools.wait_until(lambda: engine.plans)
        with front.steps(7) as second:
            with pytest.raises(StopIteration):
                first.read_until(lambda: False)  # the old stream ends
            tools.wait_until(lambda: not front.gate.running)
            assert isinstance(front.submit(tools.request(2, prompt=(50,), max_tokens=2)), Accept)
            engine.may_go.set()
            second.read_until(lambda: second.finish(2))
            assert second.tokens(1) == [] and second.tokens(2) == [51, 52]


def test_a_request_of_a_gateway_without_a_step_stream_is_not_taken(front: Front, tools: Any) -> None:
    """Its gateway may have died since; nobody would ever cancel it."""
    answer = front.post(tools.request(1, gateway=9).encode(), gateway=9)
    assert answer.status_code == 409
    assert not front.gate.running and not front.gate.waiting


@pytest.mark.parametrize("gateway", ["", "x", "0", "-7"])
def test_a_request_of_nobody_is_not_taken(front: Front, tools: Any, gateway: str) -> None:
    assert 400 <= front.post(tools.request(1).encode(), gateway).status_code < 500


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]\n", b"\xff\xff\n", b'{"v": 99, "gateway": 7}\n'])
def test_what_is_no_request_of_this_version_is_refused_by_the_engine_process(front: Front, body: bytes) -> None:
    with front.steps(7):
        answer = front.post(body)
        assert decode_decision(answer.content) == Refuse(Reason.BAD_REQUEST, 0.0)


def test_a_body_over_the_limit_is_refused(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.submission, "BODY_LIMIT_BYTES", 1000)
    assert front.post(b"x" * 1001).status_code == 413


def test_a_body_that_was_cut_short_is_no_request(front: Front, tools: Any) -> None:
    asked = tools.request(1, prompt=tuple(range(1000))).encode()
    with front.steps(7):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(front.path)
            sock.sendall(
                f"POST /requests?gateway=7 HTTP/1.1\r\nhost: w\r\ncontent-length: {len(asked)}\r\n\r\n".encode()
            )
            sock.sendall(asked[:-400])  # whole words are missing, so what is there could be read
        assert isinstance(front.submit(tools.request(2, max_tokens=1)), Accept)
        tools.wait_until(lambda: not front.gate.has_work)
    assert front.kind.built.engine.plans[0].start[0].id == 2


@pytest.mark.parametrize("gateway", ["", "0", "x", "-1", "4294967295", "99999999999"])
def test_a_step_stream_needs_a_gateways_number(front: Front, gateway: str) -> None:
    assert front.http.get(f"/steps?gateway={gateway}").status_code == 400


def test_other_paths_are_not_found(front: Front) -> None:
    assert front.http.get("/").status_code == 404
    assert front.http.put("/requests").status_code == 404


def test_the_public_port_answers_only_probes_and_metrics(front: Front) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{front.port}", timeout=PATIENCE_SECONDS) as public:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert public.get(path).status_code == 200
        assert "headgate_requests_running" in public.get("/metrics").text
        for path in ("/model", "/steps?gateway=7", "/"):
            assert public.get(path).status_code == 404
        assert public.post("/requests", content=b"{}").status_code == 404
        assert public.delete("/requests/7/1").status_code == 404


SECRET = "not-guessed-by-anybody-0123456789"
GUARDED = [("GET", "/model"), ("GET", "/steps?gateway=7"), ("POST", "/requests?gateway=7"), ("DELETE", "/requests/7/1")]


@pytest.fixture
def far_front(monkeypatch: pytest.MonkeyPatch, engine: Any, tools: Any) -> Iterator[Callable[[str], Front]]:
    """Makes fronts with this secret."""
    made: list[Front] = []

    def make(secret: str) -> Front:
        made.append(Front(monkeypatch, tools.build_with(engine, sequences=2), guard_with(secret)))
        tools.wait_until(lambda: made[-1].http.get("/readyz").status_code == 200)
        return made[-1]

    yield make
    engine.may_go.set()
    for front in made:
        front.close()


def over_tcp(front: Front, **headers: str) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{front.port}", timeout=PATIENCE_SECONDS, headers=headers)


@pytest.mark.parametrize("header", ["", "Bearer", f"Bearer {SECRET[:-1]}", f"bearer {SECRET}", SECRET])
def test_over_tcp_nothing_but_metrics_and_probes_without_the_secret(
    far_front: Callable[[str], Front], tools: Any, header: str
) -> None:
    front = far_front(SECRET)
    body = tools.request(1).encode()
    with over_tcp(front, **({"authorization": header} if header else {})) as stranger, front.steps(7):
        for method, path in GUARDED:
            answer = stranger.request(method, path, content=body if method == "POST" else None)
            assert answer.status_code == 401, (method, path)
            assert SECRET not in answer.text
        for path in ("/metrics", "/healthz", "/readyz"):
            assert stranger.get(path).status_code == 200
    assert not front.gate.running and not front.gate.waiting


def test_over_tcp_a_gateway_with_the_secret_gets_its_tokens(far_front: Callable[[str], Front], tools: Any) -> None:
    front = far_front(SECRET)
    with over_tcp(front, authorization=f"Bearer {SECRET}") as gateway:
        assert gateway.get("/model").status_code == 200
        with gateway.stream("GET", "/steps?gateway=7") as response:
            steps = Steps(response)
            asked = tools.request(1, prompt=(10,), max_tokens=3)
            answer = gateway.post("/requests?gateway=7", content=asked.encode())
            assert isinstance(decode_decision(answer.content), Accept)
            steps.read_until(lambda: steps.finish(1))
            assert steps.tokens(1) == [11, 12, 13]
        assert gateway.delete("/requests/7/1").status_code == 204


def test_the_unix_socket_of_a_worker_with_a_secret_needs_none(far_front: Callable[[str], Front]) -> None:
    assert far_front(SECRET).http.get("/model").status_code == 200


def test_without_a_secret_gateways_of_this_machine_come_in_and_web_pages_do_not(
    far_front: Callable[[str], Front],
) -> None:
    front = far_front("")
    with over_tcp(front, host="worker") as gateway, over_tcp(front) as page:
        assert gateway.get("/model").status_code == 200
        for method, path in GUARDED:
            assert page.request(method, path).status_code == 401


def test_a_gateway_that_lags_too_far_is_forgotten_although_it_takes_no_byte(
    front: Front, tools: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.app, "STREAM_LIMIT_BYTES", 64 << 10)
    engine.tokens_each = 500
    with socket.socket(socket.AF_UNIX) as lagging, front.steps(8) as other:
        lagging.connect(front.path)
        lagging.sendall(b"GET /steps?gateway=7 HTTP/1.1\r\nhost: w\r\n\r\n")
        tools.wait_until(lambda: 7 in front.engines[0].streams)

        def flood() -> bool:
            """Two kilobytes a step, for as long as somebody is there to get them."""
            id = front.kind.core.gate._step + 1
            answer = front.post(tools.request(id, gateway=7, max_tokens=4000).encode())
            return bool(answer.status_code == 409)

        tools.wait_until(flood)
        tools.wait_until(lambda: not front.gate.running and not front.gate.waiting)
        assert 7 not in front.engines[0].streams
        front.submit(tools.request(1, gateway=8, prompt=(10,), max_tokens=3))
        other.read_until(lambda: other.finish(1))
        assert other.tokens(1) == [11, 12, 13]


def test_a_stream_over_its_bound_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.app, "STREAM_LIMIT_BYTES", 100)

    async def lag() -> None:
        stream = StepStream()
        stream.put(b"x" * 60)
        assert await stream.take() == b"x" * 60
        stream.put(b"x" * 60)
        stream.put(b"x" * 60)
        assert stream.is_closed and stream._frames == []
        assert await stream.take() == b""

    asyncio.run(lag())


def test_frames_that_gather_leave_together() -> None:
    async def gather() -> bytes:
        stream = StepStream()
        for frame in (b"one ", b"two ", b"three"):
            stream.put(frame)
        return await stream.take()

    assert asyncio.run(gather()) == b"one two three"


def test_the_front_ends_when_the_engine_process_dies(front: Front, engine: Any, capfd: Any) -> None:
    with front.steps(7) as steps:
        front.engines[0].engine_end.shutdown(socket.SHUT_RDWR)
        with pytest.raises(StopIteration):
            steps.read_until(lambda: False)
    front.thread.join(PATIENCE_SECONDS)
    assert front.status == 1
    said = capfd.readouterr().err
    assert "headgate: worker: the engine process died" in said and "Traceback" not in said


def test_the_front_ends_with_the_sentence_of_a_start_that_failed(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    front = Front(monkeypatch, None)
    front.thread.join(PATIENCE_SECONDS)
    assert front.status == 2
    assert "headgate: worker: this model does not fit" in capfd.readouterr().err
    front.close()


def test_before_the_engine_is_ready_everything_says_so(
    monkeypatch: pytest.MonkeyPatch, engine: Any, tools: Any
) -> None:
    may_start = threading.Event()
    run = ThreadEngine._run

    def late(self: ThreadEngine) -> None:
        assert may_start.wait(PATIENCE_SECONDS)
        run(self)

    monkeypatch.setattr(ThreadEngine, "_run", late)
    front = Front(monkeypatch, tools.build_with(engine))
    try:
        assert front.http.get("/healthz").status_code == 200
        assert front.http.get("/metrics").status_code == 200
        for path in ("/readyz", "/model", "/steps?gateway=7"):
            assert front.http.get(path).status_code == 503
        assert front.post(tools.request(1).encode()).status_code == 503
        may_start.set()
        tools.wait_until(lambda: front.http.get("/readyz").status_code == 200)
    finally:
        may_start.set()
        front.close()


def generated(front: Front) -> list[str]:
    """The values of all samples that count tokens."""
    lines = front.http.get("/metrics").text.splitlines()
    return [line.rsplit(" ", 1)[1] for line in lines if line.startswith("headgate_generation_tokens_total{")]


def test_metrics_are_rendered_from_what_the_engine_process_told(front: Front, tools: Any) -> None:
    with front.steps() as steps:
        front.submit(tools.request(1, max_tokens=3))
        steps.read_until(lambda: steps.finish(1))
        tools.wait_until(lambda: generated(front) == ["3.0"])
    assert json.loads(front.http.get("/model").content)["model"] == "tiny"
