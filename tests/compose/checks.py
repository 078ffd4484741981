"""What the composed services shall do, each as one function that raises Failed where they do not."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
from openai import APIError, APIStatusError, AuthenticationError, OpenAI, Stream
from openai.types.chat import ChatCompletionChunk

from tests.compose.load import MODELS, client, stream_text
from tests.compose.panels import empty_queries
from tests.compose.stack import ROOT, Failed, Stack

FIRST_TOKEN_SECONDS = 60
OWN_SERVICES = ("gateway", "worker", "simulated")
KILLER = "import os, sys; print('ready', flush=True); sys.stdin.readline(); os.kill(int(sys.argv[1]), 9)"


def eventually(what: str, seconds: float, is_so: Callable[[], Any]) -> Any:
    """The first true value of `is_so`, asked twice a second; what it raised or returned last is told on failure."""
    ends_at, last = time.monotonic() + seconds, None
    while time.monotonic() < ends_at:
        try:
            if last := is_so():
                return last
        except (httpx.HTTPError, APIError, Failed) as error:
            last = error
        time.sleep(0.5)
    raise Failed(f"{what}: not within {seconds:.0f} s{f' ({last})' if last else ''}")


def expect(is_so: object, sentence: str) -> None:
    if not is_so:
        raise Failed(sentence)


# --- answers ----------------------------------------------------------------------------------------------------------


def both_models_answer(stack: Stack) -> str:
    with client(stack.api_port) as api:
        eventually("both models are listed", 30, lambda: set(MODELS) <= {model.id for model in api.models.list()})
        return "; ".join(f"{model} said {stream_text(api, model, 8)[:24]!r}" for model in MODELS)


def worker_uses_the_c_step(stack: Stack) -> str:
    """The libraries that ship in its image are found, by a user without a home, below a root that nobody can write to."""
    loaded = next((line for line in stack.logs("--no-log-prefix", "worker").splitlines() if " loaded in " in line), "")
    expect(" in int8 on cpu" in loaded, f"the worker does not compute with the C step: {loaded or 'it says nothing'}")
    expect("compiling" not in stack.logs("worker"), "the worker compiles the C step, which should be in its image")
    return loaded.partition(": ")[2]


# --- hardening --------------------------------------------------------------------------------------------------------


def containers_are_locked_down(stack: Stack) -> None:
    for service in stack.services:
        host = stack.inspect(service)["HostConfig"]
        expect(host["ReadonlyRootfs"], f"{service}: its root file system can be written")
        expect(host["CapDrop"] == ["ALL"] and not host["CapAdd"], f"{service}: it has capabilities")
        expect("no-new-privileges:true" in host["SecurityOpt"], f"{service}: it may gain privileges")
        expect(host["RestartPolicy"]["Name"] == "unless-stopped", f"{service}: it is not restarted")
        expect(host["PidsLimit"], f"{service}: processes are not bounded")
        expect(stack.inside(service, "id", "-u").strip() != "0", f"{service}: it runs as root")
    for service in OWN_SERVICES:
        told = stack.inside(service, "sh", "-c", "touch /opt/headgate/x", check=False)
        expect("Read-only file system" in told, f"{service}: could write to its root: {told}")
        expect(stack.inside(service, "id", "-u").strip() == "10001", f"{service}: not user 10001")


def gateway_image_is_lean(stack: Stack) -> str:
    imported = stack.inside("gateway", "python", "-c", "import torch", check=False)
    expect("ModuleNotFoundError" in imported, f"torch is in the gateway's image: {imported}")
    sizes = [image_bytes(stack, service) for service in ("gateway", "worker")]
    expect(sizes[0] < 400e6, f"the gateway's image has {sizes[0] / 1e6:.0f} MB")
    return ", ".join(f"{size / 1e6:.0f} MB" for size in sizes)


def image_bytes(stack: Stack, service: str) -> int:
    return int(stack.docker("image", "inspect", "--format", "{{.Size}}", stack.inspect(service)["Image"]).stdout)


def secrets_stay_in_their_volume(stack: Stack) -> None:
    secret = stack.inside("gateway", "cat", "/run/headgate/secret").strip()
    expect(re.fullmatch(r"[0-9a-f]{64}", secret), "the shared secret is not 32 bytes as hex")
    expect(stack.inside("worker", "cat", "/run/headgate/secret").strip() == secret, "the worker has another secret")
    mode = stack.inside("worker", "stat", "--format", "%a %u", "/run/headgate/secret").strip()
    expect(mode == "600 10001", f"the secret's file has mode and owner {mode}")
    told = stack.logs() + "".join(what_docker_tells(stack, service) for service in OWN_SERVICES)
    expect(secret not in told, "docker tells the shared secret")
    for path in ("/v1/models", "/readyz", "/metrics"):  # it does not leave by the API either
        expect(secret not in httpx.get(f"http://127.0.0.1:{stack.api_port}{path}").text, f"{path} tells the secret")
    for service in OWN_SERVICES:
        left = stack.inside(service, "sh", "-c", "cat /run/ca_bundle /etc/pip.conf 2>/dev/null", check=False)
        expect(not left, f"{service}: a build secret is in the image")


def what_docker_tells(stack: Stack, service: str) -> str:
    """Of a container and its image."""
    container = stack.inspect(service)
    image = container["Image"]
    history = stack.docker("history", "--no-trunc", image).stdout
    return json.dumps(container) + stack.docker("image", "inspect", image).stdout + history


# --- Prometheus and Grafana -------------------------------------------------------------------------------------------


def ask_prometheus(stack: Stack) -> Callable[..., Any]:
    def ask(path: str, **parameters: Any) -> Any:
        url = f"http://127.0.0.1:{stack.prometheus_port}/api/v1/{path}"
        answer = httpx.get(url, params=parameters, timeout=10).json()
        if answer["status"] != "success":
            raise ValueError(answer["error"])
        return answer["data"]

    return ask


def targets_are_up(stack: Stack) -> str:
    ask = ask_prometheus(stack)

    def all_up() -> list[str]:
        targets = ask("targets", state="active")["activeTargets"]
        down = [f"{t['scrapeUrl']}: {t['health']} {t['lastError']}" for t in targets if t["health"] != "up"]
        expect(not down, "; ".join(down))
        return [target["labels"]["instance"] for target in targets]

    found = eventually("all targets are up", 60, all_up)
    expect(set(found) >= {"gateway:9100", "worker:9000", "simulated:9000"}, f"only these are targets: {found}")
    return ", ".join(sorted(found))


def rules_are_loaded(stack: Stack) -> str:
    ask = ask_prometheus(stack)

    def all_well() -> list[str]:
        rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
        ill = [
            f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}" for rule in rules if rule["health"] != "ok"
        ]
        expect(not ill, "; ".join(ill))
        return [rule["type"] for rule in rules]

    kinds = eventually("all rules evaluate", 60, all_well)
    expect({"recording", "alerting"} <= set(kinds), f"rules of these kinds only: {set(kinds)}")
    return f"{kinds.count('recording')} recording, {kinds.count('alerting')} alerting"


def all_dashboards() -> list[dict[str, Any]]:
    files = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
    expect(files, "there are no dashboards")
    return [json.loads(file.read_text("utf-8")) for file in files]


def dashboards_show_something(stack: Stack) -> str:
    ask = ask_prometheus(stack)
    dashboards = all_dashboards()

    def all_filled() -> bool:
        empty = [fault for dashboard in dashboards for fault in empty_queries(dashboard, ask, time.time())]
        expect(not empty, "\n     ".join(["", *empty]))
        return True

    eventually("every query finds samples", 120, all_filled)
    return ", ".join(dashboard["title"] for dashboard in dashboards)


def grafana_shows_dashboards(stack: Stack) -> str:
    wanted = {dashboard["title"] for dashboard in all_dashboards()}
    found = httpx.get(f"http://127.0.0.1:{stack.grafana_port}/api/search", params={"type": "dash-db"}).json()
    expect(wanted <= {dashboard["title"] for dashboard in found}, f"Grafana has only {found}")
    return ", ".join(sorted(wanted))


# --- accidents and ends -----------------------------------------------------------------------------------------------


def killed_worker_comes_back(stack: Stack) -> str:
    demo, simulated = MODELS
    with client(stack.api_port) as api, InBackground(lambda: stream_text(api, simulated, 1500)) as bystander:
        told = killed_while_it_answers(stack, api, demo)
        killed_at = time.monotonic()
        eventually("503 while the worker is away", 20, lambda: status_of(api, demo) == 503)
        expect(bystander.answer(60), "the other model's answer is empty")
        eventually("the worker is back", 90, lambda: stream_text(api, demo, 8))
    count = stack.inspect("worker")["RestartCount"]
    expect(count == 1, f"the worker was restarted {count} times")
    return f"{told!r}; back after {time.monotonic() - killed_at:.1f} s"


def killed_while_it_answers(stack: Stack, api: OpenAI, model: str) -> str:
    """SIGKILL from outside, as for want of memory: `docker kill` would count as a wish, and nothing be restarted."""
    with start_killer(stack, stack.inspect("worker")["State"]["Pid"]) as killer:
        try:
            for number, _ in enumerate(chunks_of(api, model)):
                if number == 3:
                    killer.communicate("now\n", timeout=20)
        except APIStatusError as error:
            raise Failed(f"the request never ran: {error}") from error
        except APIError as error:
            return error.message
    raise Failed("the stream of a killed worker ended as if it were whole")


def start_killer(stack: Stack, process: int) -> subprocess.Popen[str]:
    """A container that sees the engine's processes, waits for a line, and kills one."""
    rights = ("--pid", "host", "--user", "0", "--cap-drop", "ALL", "--cap-add", "KILL", "--network", "none")
    image = stack.env["HEADGATE_GATEWAY_IMAGE"]
    command = ("docker", "run", "--rm", "--interactive", *rights, "--entrypoint", "python", image, "-c", KILLER)
    killer = subprocess.Popen(
        [*command, str(process)], env=stack.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert killer.stdout is not None
    expect(killer.stdout.readline() == "ready\n", "the container that shall kill the worker does not start")
    return killer


def chunks_of(api: OpenAI, model: str, tokens: int | None = None) -> Stream[ChatCompletionChunk]:
    """An answer of so many tokens, or as long as the context allows."""
    return api.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Document `textwrap.dedent`"}],
        max_completion_tokens=tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )


def status_of(api: OpenAI, model: str) -> int:
    try:
        stream_text(api, model, 1)
    except APIStatusError as error:
        return error.status_code
    return 200


class InBackground:
    """Something that runs beside the block, and its result."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self._do = do
        self._result: Any = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> InBackground:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)

    def _run(self) -> None:
        try:
            self._result = self._do()
        except Exception as error:  # told by answer(), in the thread that asks
            self._error = error

    def answer(self, seconds: float) -> Any:
        self._thread.join(seconds)
        expect(not self._thread.is_alive(), f"no answer within {seconds:.0f} s")
        expect(self._error is None, f"a request beside it failed: {self._error}")
        return self._result


def stopped_gateway_lets_answers_end(stack: Stack) -> str:
    with client(stack.api_port) as api:
        stream = chunks_of(api, MODELS[1], tokens=800)
        begun = [next(iter(stream)) for _ in range(3)]
        with InBackground(lambda: [*begun, *stream]) as running:
            begun_at = time.monotonic()
            stack.compose("stop", "gateway")
            took = time.monotonic() - begun_at
            chunks = running.answer(10)
    expect(chunks[-1].choices[0].finish_reason == "length", f"the answer broke off after {len(chunks)} chunks")
    code = stack.inspect("gateway")["State"]["ExitCode"]
    expect(code == 0, f"the gateway ended with {code}")
    stack.up("gateway")
    begun_at = time.monotonic()
    stack.compose("stop", *OWN_SERVICES)
    idle = time.monotonic() - begun_at
    expect(idle < 15, f"idle services took {idle:.1f} s to stop")
    codes = {service: stack.inspect(service)["State"]["ExitCode"] for service in OWN_SERVICES}
    expect(not any(codes.values()), f"services ended with {codes}")
    stack.up(*OWN_SERVICES)
    return f"stopped after {took:.1f} s with an answer under way, all of them after {idle:.1f} s idle"


def wider_without_keys_is_refused(stack: Stack) -> str:
    stack.compose("up", "--detach", "--no-deps", "gateway", HEADGATE_PUBLISH="0.0.0.0")
    codes = eventually("the gateway ends", 60, lambda: exit_codes(stack, stack.inspect("gateway")["Id"]))
    expect(set(codes) == {"2"}, f"the gateway ended with {codes}")
    told = stack.logs("--no-log-prefix", "gateway")
    sentence = next((line.strip() for line in told.splitlines() if "0.0.0.0" in line and "keys" in line), "")
    expect(sentence, f"the gateway does not say why it does not start:\n{told[-1000:]}")
    stack.up("gateway")  # on loopback again
    return sentence


def exit_codes(stack: Stack, container: str) -> list[str]:
    """Of all its ends so far, from docker's events: its state is `restarting` for a tenth of a second only."""
    of_it = ("--filter", f"container={container}", "--filter", "event=die")
    told = stack.docker("events", "--since", "10m", "--until", "0s", *of_it, "--format", "{{json .Actor.Attributes}}")
    return [json.loads(line)["exitCode"] for line in told.stdout.splitlines()]


def wider_with_a_key_is_served(stack: Stack) -> str:
    made = stack.inside("gateway", "headgate", "keys", "create", "--tenant", "acme")
    match = re.search(r"\bhg-\S+", made)
    expect(match, f"no key in what `headgate keys create` prints:\n{made}")
    assert match is not None
    stack.up("gateway", HEADGATE_PUBLISH="0.0.0.0")
    with client(stack.api_port) as stranger, client(stack.api_port, match[0]) as acme:
        try:
            stream_text(stranger, MODELS[0], 1)
        except AuthenticationError as error:
            told = f"{error.status_code} {error.code} without it"
        else:
            raise Failed("published wider, it answers without a key")
        eventually("it answers with the key", 20, lambda: stream_text(acme, MODELS[0], 8))
    expect(match[0] not in stack.logs(), "the key is in a log")
    return told
