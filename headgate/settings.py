"""The settings of every verb that serves: one table of options, read from the command line, the environment and a TOML file.

The command line wins over the environment, the environment over the file, the file over the default. Everything is checked
before anything starts, and all faults are told in one message.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import textwrap
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

PREFIX = "HEADGATE_"
TENANTS = "tenants"  # the table of a file that is not an option
DEFAULT_MODEL = "headgate-demo"


class Fault(ValueError):
    """A value that cannot be used; the text says what would do."""


# --- kinds of values --------------------------------------------------------------------------------------------------


def _text(value: str) -> str:
    if not value:
        raise Fault("must not be empty")
    return value


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in names:
            raise Fault(f"must be one of {', '.join(names)}")
        return value

    return parse


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise Fault("must be auto, cpu, cuda or cuda:N")
    return value


def _number(least: int, most: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"-?\d+", value) or not least <= int(value) <= most:
            raise Fault(f"must be a whole number from {least} to {most}")
        return int(value)

    return parse


def _seconds(value: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", value) or float(value) > 86400:
        raise Fault("must be a number of seconds, at most 86400")
    return float(value)


def _bytes(value: str) -> int:
    """A number of bytes: 4GiB, 512MB, 1000000; 0 leaves the choice to the worker."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?", value)
    if not match:
        raise Fault("must be a size such as 4GiB, 512MB or 1000000")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(unit.replace("K", "k") or " "))


def _switch(value: str) -> bool:
    if value.lower() in ("1", "true", "yes", "on"):
        return True
    if value.lower() in ("0", "false", "no", "off"):
        return False
    raise Fault("must be true or false")


class Address(NamedTuple):
    """Where something listens on TCP."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _address(value: str) -> Address:
    host, _, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise Fault("must be HOST:PORT, such as 127.0.0.1:9000 or [::1]:9000")
    return Address(host, int(port))


def _addresses(value: str) -> tuple[Address, ...]:
    return tuple(_address(part.strip()) for part in value.split(",") if part.strip())


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Option:
    """One setting: `name` is its attribute, `--name` its flag, HEADGATE_NAME its variable, `name` its key in the file."""

    name: str
    metavar: str
    parse: Callable[[str], Any]
    default: Any
    help: str
    verbs: frozenset[str] = frozenset({"serve"})  # who takes it; a variable or a file may hold those of all verbs

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()


WORKERS = frozenset({"serve", "worker"})
GATEWAYS = frozenset({"serve", "gateway"})
OPTIONS = {
    "What is served": (
        Option(
            "model",
            "NAME",
            _text,
            DEFAULT_MODEL,
            "A model that ships (headgate-demo, headgate-demo-draft; wall and llama-3.2-1b, which have random weights), a "
            "folder with a checkpoint in Hugging Face form, or a hub id (OWNER/NAME or OWNER/NAME@REVISION), which is "
            "downloaded. For the simulated engine: the name of a shape, such as llama-3.1-8b.",
            WORKERS,
        ),
        Option(
            "random_weights",
            "CONFIG",
            str,
            "",
            "Instead of --model: a config.json, or a folder that holds one. It is served with weights made up on the "
            "spot: speed and memory are those of the model, the text is random.",
            WORKERS,
        ),
        Option(
            "served_name",
            "NAME",
            str,
            "",
            "What clients call the model. By default its own name; simulated-HARDWARE for the simulated engine.",
            WORKERS,
        ),
        Option(
            "engine",
            "native|simulated",
            _one_of("native", "simulated"),
            "native",
            "native computes with torch. simulated reads no weights: it takes the time a named device would take, so "
            "that a laptop shows how a GPU behaves under load.",
            WORKERS,
        ),
        Option(
            "hardware",
            "NAME",
            _text,
            "h100",
            "The device that the simulated engine stands for: a name of the catalogue (a100, h100, h200, b200, l4, l40s, "
            "rtx-3090, rtx-4090, rtx-5090, mi300x, laptop-cpu) or a JSON file that describes one.",
            WORKERS,
        ),
    ),
    "Where it computes": (
        Option(
            "device",
            "auto|cpu|cuda[:N]",
            _device,
            "auto",
            "Where the native engine computes. auto takes a GPU where there is one.",
            WORKERS,
        ),
        Option(
            "dtype",
            "NAME",
            _one_of("auto", "float32", "bfloat16", "float16", "int8", "int4"),
            "auto",
            "The number format of weights and KV cache. auto is the checkpoint's own; on a CPU int8 for any of 16 bits. int8 "
            "and int4 are for a CPU with a C compiler; without one, auto is bfloat16 or float32, whichever is faster there.",
            WORKERS,
        ),
        Option(
            "threads",
            "N",
            _number(0, 1024),
            0,
            "CPU threads of the native engine. 0 measures whether more than one pays.",
            WORKERS,
        ),
        Option(
            "kv_cache",
            "SIZE",
            _bytes,
            0,
            "Memory for the KV cache, such as 4GiB. 0 takes a sensible share of what is free.",
            WORKERS,
        ),
        Option(
            "context",
            "TOKENS",
            _number(0, 1 << 24),
            0,
            "The longest context that is served. 0 is the model's own.",
            WORKERS,
        ),
        Option(
            "shared_prefix",
            "",
            _switch,
            False,
            "Tenants share the prefix cache: what one has sent is computed for none of the others, and whoever times "
            "answers learns what others have sent. Otherwise each has its own.",
            WORKERS,
        ),
    ),
    "How much at once": (
        Option("max_sequences", "N", _number(1, 4096), 256, "Requests in the running batch at most.", WORKERS),
        Option(
            "max_waiting",
            "N",
            _number(0, 1 << 20),
            16384,
            "Requests that may wait; further ones are told when to come back.",
            WORKERS,
        ),
    ),
    "Where it listens": (
        Option(
            "host",
            "ADDRESS",
            _text,
            "127.0.0.1",
            "The address of the API. Beyond loopback only with keys (headgate keys create), or with --insecure.",
            GATEWAYS,
        ),
        Option(
            "port",
            "N",
            _number(0, 65535),
            8000,
            "The port of the API. 0 takes a free one, which is printed.",
            GATEWAYS,
        ),
        Option(
            "published",
            "ADDRESS",
            str,
            "",
            "In a container: the host's address on which the port is published. What holds for --host, loopback or not, "
            "then holds for this address.",
            GATEWAYS,
        ),
        Option(
            "gateway_metrics",
            "HOST:PORT",
            _address,
            Address("127.0.0.1", 0),
            "Where the gateway's /metrics and /healthz are, too: once there are keys, those of the API's port want an "
            "admin's. Port 0 takes a free one, which is printed.",
            GATEWAYS,
        ),
        Option(
            "metrics_port",
            "N",
            _number(0, 65535),
            0,
            "The worker's own port for /metrics and /healthz, on loopback. 0 takes a free one.",
        ),
        Option(
            "listen",
            "HOST:PORT",
            _address,
            Address("127.0.0.1", 9000),
            "Where the worker listens for gateways and scrapers.",
            frozenset({"worker"}),
        ),
        Option(
            "insecure",
            "",
            _switch,
            False,
            "Serve beyond loopback although anybody who reaches the port may use the API.",
            GATEWAYS,
        ),
    ),
    "Who works for whom": (
        Option(
            "workers",
            "HOST:PORT,…",
            _addresses,
            (),
            "The workers behind this gateway.",
            frozenset({"gateway"}),
        ),
        Option(
            "secret_file",
            "FILE",
            str,
            "",
            "What gateways and workers prove with that they belong together. Made up when it is not there.",
            frozenset({"gateway", "worker"}),
        ),
    ),
    "Who may come in": (
        Option(
            "data",
            "FOLDER",
            str,
            "",
            "Where keys and what else must last is kept. By default headgate in $XDG_DATA_HOME or ~/.local/share.",
            frozenset({"serve", "gateway", "keys"}),
        ),
    ),
    "How it ends": (
        Option(
            "drain_seconds",
            "SECONDS",
            _seconds,
            30.0,
            "How long running requests may go on after SIGTERM or Ctrl-C.",
            GATEWAYS,
        ),
    ),
}
ALL_OPTIONS = tuple(option for group in OPTIONS.values() for option in group)


@dataclass(frozen=True, slots=True)
class Settings:
    """The checked values; one attribute per option."""

    model: str
    random_weights: str
    served_name: str
    engine: str
    hardware: str
    device: str
    dtype: str
    threads: int
    kv_cache: int
    context: int
    shared_prefix: bool
    max_sequences: int
    max_waiting: int
    host: str
    port: int
    published: str
    gateway_metrics: Address
    metrics_port: int
    listen: Address
    insecure: bool
    workers: tuple[Address, ...]
    secret_file: str
    data: str
    drain_seconds: float
    config: str  # the file it was read from

    @property
    def reached_at(self) -> str:
        """The address under which the API can be reached from outside the process's own container."""
        return self.published or self.host


assert [f.name for f in fields(Settings)] == [*(option.name for option in ALL_OPTIONS), "config"]


def default_data_folder(environ: Mapping[str, str]) -> str:
    """Where lasting things are kept when nobody says where; '' for who has no home."""
    shared = environ.get("XDG_DATA_HOME", "")
    if not Path(shared).is_absolute():  # as that convention wants it
        shared = str(Path(environ.get("HOME") or os.path.expanduser("~"), ".local", "share"))
    return str(Path(shared, "headgate")) if Path(shared).is_absolute() else ""


class ConfigurationError(Exception):
    """Everything that is wrong with the configuration; `settings` has defaults in place of what could not be read."""

    def __init__(self, faults: Sequence[str], settings: Settings) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)
        self.settings = settings


def read_settings(verb: str, arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """What `verb` was told; options of other verbs have their defaults.

    Raises ConfigurationError with all faults; SystemExit after --help or a flag without its value, as argparse does.
    """
    parsed, unknown = _parser(verb).parse_known_args(arguments)
    given = vars(parsed)
    config = given.pop("config") or environ.get(PREFIX + "CONFIG") or ""
    faults = [f"{argument}: there is no such option" for argument in unknown if argument.startswith("-")]
    if unknown and not faults:
        faults.append(f"{unknown[0]}: options begin with --")
    from_file = _read_file(config, faults) if config else {}
    faults += _unknown_variables(environ)
    values: dict[str, Any] = {"config": config}
    for option in ALL_OPTIONS:
        source, text = _given(option, given, environ, from_file, config) if verb in option.verbs else ("", None)
        if text is None:
            values[option.name] = option.default
            continue
        try:
            values[option.name] = option.parse(text)
        except Fault as fault:
            faults.append(f"{source}: {fault}, not {text!r}")
            values[option.name] = option.default
    settings = Settings(**values)
    faults += _contradictions(settings)
    if faults:
        raise ConfigurationError(faults, settings)
    return settings


def _given(
    option: Option, flags: Mapping[str, str | None], environ: Mapping[str, str], file: Mapping[str, str], config: str
) -> tuple[str, str | None]:
    """Where the value comes from, and its text; None where nobody gave one."""
    if (text := flags[option.name]) is not None:
        return option.flag, text
    text = environ.get(option.variable)
    if text is not None and not text.startswith("tcp://"):  # HEADGATE_PORT, as Kubernetes means it
        return option.variable, text
    if (text := file.get(option.name)) is not None:
        return f"{config}: {option.name}", text
    return "", None


def _read_file(config: str, faults: list[str]) -> dict[str, str]:
    try:
        data = tomllib.loads(Path(config).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        faults.append(f"{config}: cannot be read: {error}")
        return {}
    except tomllib.TOMLDecodeError as error:
        faults.append(f"{config}: not TOML: {error}")
        return {}
    known = {option.name for option in ALL_OPTIONS}
    faults += _tenant_faults(config, data.pop(TENANTS, {}))
    faults += [f"{config}: there is no option {name!r}" for name in data if name.replace("-", "_") not in known]
    return {name.replace("-", "_"): _as_text(value) for name, value in data.items()}


def _as_text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _tenant_faults(config: str, table: object) -> list[str]:
    """Gateways read it themselves, and again when they are told to; here it is checked before anything starts."""
    from service.keys import FaultyTenants, read_tenants

    try:
        read_tenants(table)
    except FaultyTenants as error:
        return [f"{config}: {fault}" for fault in error.faults]
    return []


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """But for those that Kubernetes sets beside a service called headgate, the tests' own, and a client's key."""
    known = {option.variable for option in ALL_OPTIONS} | {PREFIX + name for name in ("CONFIG", "TRACES", "API_KEY")}
    foreign = (PREFIX + "SERVICE_", PREFIX + "PORT_")
    names = [name for name in environ if name.startswith(PREFIX) and not name.startswith(foreign)]
    return [f"{name}: there is no such option" for name in names if name not in known]


def _contradictions(settings: Settings) -> list[str]:
    faults = []
    if settings.engine == "simulated" and settings.device != "auto":
        faults.append(f"--device {settings.device}: the simulated engine computes nothing; choose --hardware")
    if settings.random_weights and settings.model != DEFAULT_MODEL:
        faults.append(f"--random-weights {settings.random_weights} stands for --model {settings.model}: give only one")
    if settings.random_weights and settings.engine == "simulated":
        faults.append("--random-weights: the simulated engine has no weights; its model is the name of a shape")
    return faults


def exposure_faults(settings: Settings, has_keys: bool) -> list[str]:
    """Without keys the API is open: then only to this machine."""
    if is_loopback(settings.reached_at) or has_keys or settings.insecure:
        return []
    option = "--published" if settings.published else "--host"
    return [
        f"{option} {settings.reached_at}: anybody who reaches this address could use the API, for there are no keys; "
        "make one (headgate keys create), keep to 127.0.0.1, or say --insecure"
    ]


def data_folder(settings: Settings, environ: Mapping[str, str]) -> str:
    """Where what must last is kept."""
    return settings.data or default_data_folder(environ)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- help -------------------------------------------------------------------------------------------------------------


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"headgate {verb}",
        description=DESCRIPTIONS[verb],
        epilog=EPILOG + EXAMPLES[verb],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for title, options in OPTIONS.items():
        own = [option for option in options if verb in option.verbs]
        group = parser.add_argument_group(title) if own else parser
        for option in own:
            default = "" if option.default in ("", False, 0, ()) else f" Default: {option.default}."
            text = "\n".join(textwrap.wrap(option.help + default, 80, break_on_hyphens=False)).replace("%", "%%")
            if option.parse is _switch:
                group.add_argument(option.flag, nargs="?", const="true", metavar="BOOL", help=text)
            else:
                group.add_argument(option.flag, metavar=option.metavar, help=text)
    parser.add_argument("--config", metavar="FILE", help="A TOML file with any of these options as keys.")
    return parser


DESCRIPTIONS = {
    "serve": "Serves a model with an OpenAI-compatible API. Without options: the model that ships, on this\n"
    "machine, at http://127.0.0.1:8000/v1.",
    "gateway": "Serves an OpenAI-compatible API in front of workers that run elsewhere (headgate worker).",
    "worker": "Runs a model for gateways that run elsewhere (headgate gateway).",
    "keys": "Makes, lists, revokes and rotates API keys. As soon as one was made, the API wants keys. Running gateways\n"
    "notice every change within a second.",
}

EPILOG = """
Every option can also be given as an environment variable (--kv-cache as HEADGATE_KV_CACHE) or as a key of a
TOML file (kv_cache = "4GiB"). The command line wins over the environment, the environment over the file.
"""

EXAMPLES = {
    "serve": """
examples:
  headgate serve
  headgate serve --model ./Qwen3-0.6B --port 9000
  headgate serve --model wall
  headgate serve --random-weights ./Qwen3-0.6B/config.json
  headgate serve --engine simulated --hardware h200 --model llama-3.1-70b
""",
    "gateway": """
example:
  headgate gateway --workers gpu-1:9000,gpu-2:9000 --secret-file /run/headgate/secret
""",
    "worker": """
example:
  headgate worker --listen 0.0.0.0:9000 --secret-file /run/headgate/secret --model ./Qwen3-0.6B
""",
    "keys": """
examples:
  KEY=$(headgate keys create --tenant acme)
  headgate keys create --tenant acme --name "nightly jobs" --tiers flex --tokens-per-minute 200000 --expires 90d
  headgate keys list
  headgate keys rotate 5f0c2d1e9a7b --grace 24h
""",
}
