"""The command as people meet it: what it says, what it returns, and what it does not import."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from headgate import serve
from headgate.settings import data_folder, read_settings
from headgate.supervisor import describe

NO_KEYS = os.path.join(tempfile.gettempdir(), "headgate-of-nobody")  # a folder that is never made
HEAVY = ("torch", "fastapi", "uvicorn", "numpy", "pydantic", "openai", "huggingface_hub")


def headgate(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs to its end."""
    return subprocess.run(
        [sys.executable, "-m", "headgate", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HEADGATE_DATA": NO_KEYS, **environ},
    )


def imported_by(code: str) -> list[str]:
    script = f"{code}\nimport sys, json\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["headgate.main", "headgate.settings", "headgate.serve", "headgate.supervisor"])
def test_the_supervisor_imports_no_framework(module: str) -> None:
    assert imported_by(f"import {module}") == []


def test_checking_the_model_imports_no_framework() -> None:
    code = 'from headgate import serve, settings\nassert serve.model_faults(settings.read_settings("serve", {}, {{}})) == []'
    assert imported_by(code.format([])) == []
    assert imported_by(code.format(["--engine", "simulated"])) == []


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_without_a_verb_it_names_them(arguments: list[str]) -> None:
    done = headgate(*arguments)
    assert done.returncode == 0
    assert "usage: headgate VERB" in done.stdout and "\n  serve " in done.stdout
    assert "\n  gateway " in done.stdout and "\n  worker " in done.stdout
    assert "child" not in done.stdout.split("usage:")[1]  # the internal ones are nobody's business


def test_an_unknown_verb_is_a_sentence_and_status_2() -> None:
    done = headgate("sevre")
    assert done.returncode == 2
    assert done.stderr.startswith("headgate: there is no verb sevre\n")


def test_faults_of_every_kind_come_in_one_message() -> None:
    """Flags nobody knows, values, contradictions and a model that is not there."""
    done = headgate("serve", "--prot", "1", "--kv-cache", "lots", "--host", "0.0.0.0", "--model", "no/such/model")
    assert done.returncode == 2
    for fault in ("--prot", "--kv-cache", "--host 0.0.0.0", "no/such/model"):
        assert fault in done.stderr


def test_a_host_that_is_no_address_is_a_sentence_about_the_host() -> None:
    done = headgate("serve", "--insecure", "--host", "nosuch.invalid")
    assert done.returncode == 2 and "choose another --host" in done.stderr


def test_what_kubernetes_sets_beside_a_service_of_this_name_is_passed_over() -> None:
    beside = {"HEADGATE_PORT": "tcp://10.0.0.1:80", "HEADGATE_PORT_80_TCP": "x", "HEADGATE_SERVICE_HOST": "10.0.0.1"}
    done = headgate("serve", "--threads", "many", **beside)
    assert "--threads" in done.stderr and "HEADGATE_" not in done.stderr


def test_faults_are_one_message_on_stderr_and_status_2() -> None:
    done = headgate("serve", "--port", "http", "--context=-1", HEADGATE_TREADS="1")
    assert done.returncode == 2 and done.stdout == ""
    first, *faults = done.stderr.splitlines()
    assert first == "headgate: the configuration cannot be used:"
    assert sorted(fault.split(":")[0].strip() for fault in faults) == ["--context", "--port", "HEADGATE_TREADS"]


@pytest.mark.parametrize("option", ["--port", "--metrics-port", "--gateway-metrics"])
def test_a_port_in_use_is_a_sentence_and_status_2(option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        value = f"127.0.0.1:{port}" if option == "--gateway-metrics" else port
        done = headgate("serve", "--engine", "simulated", "--port", "0", option, value)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"headgate: cannot listen on 127.0.0.1:{port} (")
    assert done.stderr.endswith(f"; choose another {option}\n")


def test_a_folder_too_deep_for_a_socket_is_a_sentence_and_status_2(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    done = headgate("serve", "--engine", "simulated", "--port", "0", TMPDIR=str(deep))
    assert done.returncode == 2
    assert "choose a shorter TMPDIR" in done.stderr and "None" not in done.stderr
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "no-such-folder"], "there is no folder no-such-folder"),
        (["--model", "./none/at/all"], "there is no folder ./none/at/all"),
        (["--model", "nonsense"], "nor of one that ships (headgate-demo,"),
        (["--random-weights", "./none.json"], "--random-weights ./none.json: there is no such config.json"),
        (["--engine", "simulated", "--model", "gpt-9"], "the simulated engine knows no model gpt-9; there are: "),
        (["--engine", "simulated", "--hardware", "z80"], "hardware z80 is neither a JSON file nor one of: "),
    ],
)
def test_a_model_that_is_not_there_is_a_sentence_and_status_2(arguments: list[str], sentence: str) -> None:
    done = headgate("serve", "--port", "0", *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr and "Traceback" not in done.stderr


def test_hardware_that_is_not_described_right_is_a_sentence_and_status_2(tmp_path: Path) -> None:
    hardware = tmp_path / "card.json"
    hardware.write_text('{"name": "card", "levels": []}')
    done = headgate("serve", "--port", "0", "--engine", "simulated", "--hardware", str(hardware))
    assert done.returncode == 2 and "not a device description" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--engine", "simulated", "--model", "llama-3.1-70b", "--hardware", "rtx-4090"], "does not fit rtx-4090"),
        (
            ["--model", "nobody/no-such-model"],
            "the hub model nobody/no-such-model could not be had: HF_HUB_OFFLINE is set",
        ),
    ],
)
def test_a_worker_that_cannot_start_ends_the_command_with_its_sentence_and_status_2(
    arguments: list[str], sentence: str
) -> None:
    with tempfile.TemporaryDirectory(prefix="hg-") as folder:  # pytest's own are too deep for a Unix socket on macOS
        done = headgate("serve", "--port", "0", *arguments, TMPDIR=folder)
        left = list(Path(folder).glob("headgate-*"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("headgate: worker: ") and sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert left == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gateway"], "--workers: say where they are, as HOST:PORT"),
        (
            ["gateway", "--workers", "127.0.0.1:9,gpu-1:9"],
            "--workers gpu-1:9: beyond this machine a worker wants a secret",
        ),
        (["gateway", "--workers", "[::1]:9", "--host", "0.0.0.0"], "--host 0.0.0.0: anybody who reaches this address"),
        (
            ["gateway", "--workers", "127.0.0.1:9", "--host", "0.0.0.0", "--published", "192.0.2.7"],
            "--published 192.0.2.7",
        ),
        (["gateway", "--workers", "127.0.0.1:9", "--secret-file", "/dev/null/no"], "--secret-file /dev/null/no: can"),
        (["worker", "--listen", "0.0.0.0:0"], "--listen 0.0.0.0:0: beyond this machine only gateways may come"),
        (["worker", "--engine", "simulated", "--model", "gpt-9"], "the simulated engine knows no model gpt-9"),
    ],
)
def test_parts_of_a_fleet_that_cannot_start_say_why_and_end_with_status_2(arguments: list[str], sentence: str) -> None:
    done = headgate(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["gateway", "worker"])
def test_an_address_in_use_is_a_sentence_and_status_2(verb: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = {
            "gateway": ["--workers", "127.0.0.1:9", "--port", str(port)],
            "worker": ["--engine", "simulated", "--listen", f"127.0.0.1:{port}"],
        }[verb]
        done = headgate(verb, *arguments)
    assert done.returncode == 2 and f"cannot listen on 127.0.0.1:{port} (" in done.stderr


def test_a_clients_key_in_the_environment_is_no_option() -> None:
    done = headgate("serve", "--threads", "many", HEADGATE_API_KEY="hg-x-y")
    assert "--threads" in done.stderr and "HEADGATE_API_KEY" not in done.stderr


def test_what_must_last_lies_where_the_desktop_wants_it_unless_told() -> None:
    def folder(*arguments: str, **environ: str) -> str:
        return data_folder(read_settings("serve", arguments, {}), environ)

    assert folder("--data", "/keys", XDG_DATA_HOME="/x") == "/keys"
    assert folder(XDG_DATA_HOME="/x") == "/x/headgate"
    assert folder() == os.path.expanduser("~/.local/share/headgate")


def test_bound_sockets_are_listening_and_on_loopback(tmp_path: Path) -> None:
    settings = read_settings("serve", ["--port", "0", "--engine", "simulated"], {})
    sockets = serve.bind(settings, tmp_path)
    for listener in (sockets.api, sockets.gateway_metrics, sockets.metrics):
        with listener:
            assert listener.getsockname()[0] == "127.0.0.1"
            socket.create_connection(listener.getsockname(), timeout=5).close()
    with sockets.worker, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "worker"))


def test_how_a_child_ended_is_told_in_words() -> None:
    assert describe(3) == "exit status 3"
    assert describe(-9) == "killed by SIGKILL"
