"""Starting: in any folder, with a model that is of no use, and being ended before it has come to an end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from worker.files import DEMO, find_model

LONGEST_REFUSAL_SECONDS = 60.0  # of which importing torch is the most


def test_a_folder_with_modules_of_our_names_is_not_looked_into(
    quick: tuple[str, ...], simulated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("worker", "service", "scheduler", "headgate"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user\\'s own module was imported')")
    monkeypatch.chdir(tmp_path)
    server = type(simulated)(*quick)
    try:
        assert server.post(max_tokens=3).status_code == 200
    finally:
        server.close()


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_whoever_is_ended_while_it_loads_leaves_nothing(
    simulated: Any, until: Callable[..., Any], number: signal.Signals
) -> None:
    server = type(simulated)(wait=False)
    try:
        until(lambda: server.pids("engine"))
        os.kill(server.process.pid, number)
        server.process.wait(30.0)
        until(lambda: not server.pids())
    finally:
        server.close()


# --- models that are of no use ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """How a start ended that could not succeed."""

    status: int
    stdout: str
    stderr: str
    answers: set[int]  # HTTP statuses of /readyz until then; 0 where nobody answered
    port: int


def refused(*arguments: str) -> Refusal:
    """Runs `headgate serve` to its end, asking all the while whether it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HEADGATE_")}
    with tempfile.TemporaryDirectory(prefix="hg-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "headgate", "serve", "--port", str(port), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**clean, "TMPDIR": folder, "HEADGATE_DATA": f"{folder}/none", "HF_HUB_OFFLINE": "1"},
        )
        try:
            answers = watched(process, port)
        finally:
            process.kill()
            stdout, stderr = process.communicate()
        assert list(Path(folder).glob("headgate-*")) == []
    return Refusal(process.returncode, stdout, stderr, answers, port)


def watched(process: subprocess.Popen[str], port: int) -> set[int]:
    """What /readyz answered until the process ended."""
    answers = set()
    ends_at = time.monotonic() + LONGEST_REFUSAL_SECONDS
    while process.poll() is None:
        assert time.monotonic() < ends_at, "it neither started nor ended"
        answers.add(readiness(port))
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    return answers


def readiness(port: int) -> int:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5.0).status_code
    except httpx.TransportError:
        return 0


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1_000_000])


def put_nan(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    header_bytes = int.from_bytes(content[:8], "little")
    begin = json.loads(content[8 : 8 + header_bytes])["model.layers.2.mlp.down_proj.weight"]["data_offsets"][0]
    at = 8 + header_bytes + begin
    content[at : at + 2] = b"\xc0\x7f"  # NaN in bfloat16
    path.write_bytes(content)


# One that is found before torch is imported, one by the files' headers, one while weights are read. All the others are told
# in the same way, and are tested where they are found: tests/worker/test_build.py.
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a template that does not compile": (
        lambda folder: (folder / "chat_template.jinja").write_text("{% for %}"),
        r"chat_template\.jinja, line 1: the chat template does not compile",
    ),
    "truncated weights": (cut, r"model\.safetensors is truncated: model\.\S+ would end at"),
    "weights that are no numbers": (put_nan, r"model\.layers\.2\.mlp\.down_proj\.weight in model\.safetensors has NaN"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_model_that_is_of_no_use_is_refused_in_one_line_and_never_served(fault: str, tmp_path: Path) -> None:
    break_it, sentence = BROKEN[fault]
    folder = tmp_path / "broken"
    shutil.copytree(find_model(DEMO), folder)
    break_it(folder)
    refusal = refused("--model", str(folder), "--threads", "1")
    assert_refused(refusal, sentence)
    assert str(folder) in refusal.stderr or "model.safetensors" in refusal.stderr


def test_a_model_that_does_not_fit_is_refused_with_the_arithmetic_before_anything_is_allocated(tmp_path: Path) -> None:
    config = {**json.loads((find_model(DEMO) / "config.json").read_text()), "num_hidden_layers": 4096}
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 65536, "intermediate_size": 262144}))
    refusal = refused("--random-weights", str(tmp_path))
    arithmetic = (
        r"needs [\d.]+ GB for its weights in \w+ \([\d.]+ B parameters x [\d.]+ bytes\), [\d.]+ GB for a KV cache"
    )
    assert_refused(refusal, arithmetic + r".* GB are free; choose a smaller model")


def assert_refused(refusal: Refusal, sentence: str) -> None:
    """One line, exit status 2, and nobody was ever told that it is ready."""
    assert refusal.status == 2, refusal
    (line,) = refusal.stderr.splitlines()
    assert line.startswith("headgate: worker: ") and re.search(sentence, line), line
    assert "starting it again" not in refusal.stdout
    assert refusal.answers <= {0, 503} and readiness(refusal.port) == 0
