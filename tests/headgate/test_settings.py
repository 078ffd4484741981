"""Every option by flag, variable and file; what wins; and every fault told at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headgate.settings import (
    ALL_OPTIONS,
    ConfigurationError,
    Option,
    Settings,
    exposure_faults,
    is_loopback,
    read_settings,
)

# one value per option that is not its default: as text, and as what it becomes
VALUES: dict[str, tuple[str, Any]] = {
    "model": ("acme/tiny", "acme/tiny"),
    "random_weights": ("config.json", "config.json"),
    "served_name": ("tiny", "tiny"),
    "engine": ("simulated", "simulated"),
    "hardware": ("h200", "h200"),
    "device": ("cuda:1", "cuda:1"),
    "dtype": ("bfloat16", "bfloat16"),
    "threads": ("2", 2),
    "kv_cache": ("4GiB", 4 << 30),
    "context": ("2048", 2048),
    "shared_prefix": ("true", True),
    "max_sequences": ("17", 17),
    "max_waiting": ("0", 0),
    "host": ("127.0.0.2", "127.0.0.2"),
    "port": ("0", 0),
    "published": ("192.0.2.1", "192.0.2.1"),
    "gateway_metrics": ("[::1]:9100", ("::1", 9100)),
    "metrics_port": ("9101", 9101),
    "listen": ("0.0.0.0:9001", ("0.0.0.0", 9001)),
    "insecure": ("true", True),
    "workers": ("gpu-1:9000, gpu-2:9000", (("gpu-1", 9000), ("gpu-2", 9000))),
    "secret_file": ("secret", "secret"),
    "data": ("state", "state"),
    "drain_seconds": ("1.5", 1.5),
}
VERBS = ("serve", "gateway", "worker")


def faults_of(arguments: list[str], environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigurationError) as raised:
        read_settings("serve", arguments, environ or {})
    return str(raised.value).splitlines()


def verb_of(name: str) -> str:
    """One that takes the option."""
    option: Option = next(option for option in ALL_OPTIONS if option.name == name)
    return next(verb for verb in VERBS if verb in option.verbs)


def a_file(folder: Path, text: str) -> str:
    path = folder / "headgate.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_nothing_given_means_every_default() -> None:
    defaults = Settings(**{option.name: option.default for option in ALL_OPTIONS}, config="")
    assert all(read_settings(verb, [], {}) == defaults for verb in VERBS)


def test_the_values_of_these_tests_cover_every_option() -> None:
    assert list(VALUES) == [option.name for option in ALL_OPTIONS]
    assert all(value != option.default for option, (_, value) in zip(ALL_OPTIONS, VALUES.values(), strict=True))


@pytest.mark.parametrize("name", VALUES)
def test_an_option_can_be_a_flag(name: str) -> None:
    text, value = VALUES[name]
    assert getattr(read_settings(verb_of(name), ["--" + name.replace("_", "-"), text], {}), name) == value


@pytest.mark.parametrize("name", VALUES)
def test_an_option_can_be_a_variable(name: str) -> None:
    text, value = VALUES[name]
    assert getattr(read_settings(verb_of(name), [], {"HEADGATE_" + name.upper(): text}), name) == value


@pytest.mark.parametrize("name", VALUES)
def test_an_option_can_be_a_key_of_the_file(name: str, tmp_path: Path) -> None:
    text, value = VALUES[name]
    config = a_file(tmp_path, f'{name} = "{text}"')
    assert getattr(read_settings(verb_of(name), ["--config", config], {}), name) == value


def test_the_file_takes_plain_numbers_switches_and_dashes(tmp_path: Path) -> None:
    config = a_file(tmp_path, "port = 9000\ninsecure = true\ndrain-seconds = 2.5\nkv-cache = 1000000\n")
    settings = read_settings("serve", ["--config", config], {})
    assert (settings.port, settings.insecure, settings.drain_seconds, settings.kv_cache) == (9000, True, 2.5, 1000000)


def test_the_file_can_be_named_by_a_variable(tmp_path: Path) -> None:
    assert read_settings("serve", [], {"HEADGATE_CONFIG": a_file(tmp_path, "port = 9000")}).port == 9000


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    config = a_file(tmp_path, "port = 1\nthreads = 1\ncontext = 1\n")
    environ = {"HEADGATE_CONFIG": config, "HEADGATE_PORT": "2", "HEADGATE_THREADS": "2"}
    settings = read_settings("serve", ["--port", "3"], environ)
    assert (settings.port, settings.threads, settings.context) == (3, 2, 1)


def test_a_fault_of_a_losing_source_does_not_matter() -> None:
    assert read_settings("serve", ["--port", "3"], {"HEADGATE_PORT": "many"}).port == 3


def test_a_switch_needs_no_value() -> None:
    assert read_settings("serve", ["--insecure"], {}).insecure
    assert not read_settings("serve", ["--insecure", "false"], {"HEADGATE_INSECURE": "true"}).insecure


def test_an_empty_variable_does_not_switch_protection_off() -> None:
    """Compose files pass `${HEADGATE_INSECURE:-}` on as an empty string."""
    assert faults_of([], {"HEADGATE_INSECURE": ""}) == ["HEADGATE_INSECURE: must be true or false, not ''"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000000", 1000000),
        ("512MB", 512_000_000),
        ("512 MiB", 512 << 20),
        ("4GiB", 4 << 30),
        ("4G", 4_000_000_000),
        ("1.5GiB", 3 << 29),
        ("2k", 2000),
        ("2KiB", 2048),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert read_settings("serve", ["--kv-cache", text], {}).kv_cache == size


@pytest.mark.parametrize(
    ("flag", "text", "sentence"),
    [
        ("--port", "65536", "must be a whole number from 0 to 65535"),
        ("--port", "-1", "must be a whole number from 0 to 65535"),
        ("--max-sequences", "0", "must be a whole number from 1 to 4096"),
        ("--threads", "two", "must be a whole number from 0 to 1024"),
        ("--kv-cache", "lots", "must be a size such as 4GiB, 512MB or 1000000"),
        ("--kv-cache", "-4GiB", "must be a size such as 4GiB, 512MB or 1000000"),
        ("--drain-seconds", "-1", "must be a number of seconds, at most 86400"),
        ("--drain-seconds", "nan", "must be a number of seconds, at most 86400"),
        ("--drain-seconds", "86401", "must be a number of seconds, at most 86400"),
        ("--device", "tpu", "must be auto, cpu, cuda or cuda:N"),
        ("--dtype", "int3", "must be one of auto, float32, bfloat16, float16, int8, int4"),
        ("--engine", "magic", "must be one of native, simulated"),
        ("--model", "", "must not be empty"),
        ("--insecure", "perhaps", "must be true or false"),
    ],
)
def test_a_value_that_cannot_be_used_is_told_with_what_would_do(flag: str, text: str, sentence: str) -> None:
    assert faults_of([f"{flag}={text}"]) == [f"{flag}: {sentence}, not {text!r}"]


def test_all_faults_are_told_at_once_each_with_its_source(tmp_path: Path) -> None:
    config = a_file(tmp_path, 'context = "far"\ncolour = "red"\n')
    environ = {"HEADGATE_THREADS": "all", "HEADGATE_TREADS": "2", "HOME": "/root"}
    assert sorted(faults_of(["--port", "http", "--config", config], environ)) == sorted(
        [
            f"{config}: there is no option 'colour'",
            "HEADGATE_TREADS: there is no such option",
            "--port: must be a whole number from 0 to 65535, not 'http'",
            "HEADGATE_THREADS: must be a whole number from 0 to 1024, not 'all'",
            f"{config}: context: must be a whole number from 0 to 16777216, not 'far'",
        ]
    )


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.toml")
    assert faults_of(["--config", missing])[0].startswith(f"{missing}: cannot be read: ")
    broken = a_file(tmp_path, "port = = 1")
    assert faults_of(["--config", broken])[0].startswith(f"{broken}: not TOML: ")


@pytest.mark.parametrize("option", ["--host", "--published"])
def test_beyond_loopback_only_with_keys_or_insecure(option: str) -> None:
    settings = read_settings("serve", [option, "0.0.0.0"], {})
    (fault,) = exposure_faults(settings, has_keys=False)
    assert fault.startswith(f"{option} 0.0.0.0: ") and "--insecure" in fault and "headgate keys create" in fault
    assert exposure_faults(settings, has_keys=True) == []
    assert exposure_faults(read_settings("serve", [option, "0.0.0.0", "--insecure"], {}), has_keys=False) == []


def test_what_counts_is_the_address_that_a_container_is_published_on() -> None:
    settings = read_settings("gateway", ["--host", "0.0.0.0", "--published", "127.0.0.1"], {})
    assert exposure_faults(settings, has_keys=False) == []


def test_tenants_are_checked_with_everything_else(tmp_path: Path) -> None:
    good = a_file(tmp_path, "port = 1\n[tenants.acme]\nrequests_per_minute = 60\n")
    assert read_settings("serve", ["--config", good], {}).config == good
    bad = a_file(tmp_path, "[tenants.acme]\nrequests_per_minute = 0\nspeed = 1\n")
    assert sorted(faults_of(["--config", bad])) == [
        f"{bad}: tenants.acme.requests_per_minute: must be a whole number from 1, not 0",
        f"{bad}: tenants.acme.speed: there is no such limit",
    ]


def test_a_file_may_list_workers(tmp_path: Path) -> None:
    config = a_file(tmp_path, 'workers = ["gpu-1:9000", "[::1]:9000"]')
    assert read_settings("gateway", ["--config", config], {}).workers == (("gpu-1", 9000), ("::1", 9000))


def test_a_verb_refuses_flags_of_another_but_not_their_variables() -> None:
    with pytest.raises(ConfigurationError, match="--model=x: there is no such option"):
        read_settings("gateway", ["--model=x"], {})
    assert read_settings("gateway", [], {"HEADGATE_MODEL": "x"}).model == "headgate-demo"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_addresses_are_known(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org"])
def test_other_addresses_are_not_loopback(address: str) -> None:
    assert not is_loopback(address)


def test_a_simulated_engine_on_a_real_device_is_a_contradiction() -> None:
    (fault,) = faults_of(["--engine", "simulated", "--device", "cuda"])
    assert "--hardware" in fault


def test_random_weights_beside_a_model_or_a_simulated_engine_are_a_contradiction() -> None:
    (fault,) = faults_of(["--random-weights", "c.json", "--model", "wall"])
    assert "--random-weights c.json" in fault and "--model wall" in fault
    (fault,) = faults_of(["--random-weights", "c.json", "--engine", "simulated"])
    assert "the simulated engine has no weights" in fault
    assert read_settings("serve", [], {"HEADGATE_RANDOM_WEIGHTS": ""}).random_weights == ""


@pytest.mark.parametrize("columns", ["60", "80", "200"])
@pytest.mark.parametrize("verb", VERBS)
def test_help_mentions_every_option_of_the_verb(
    verb: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as ended:
        read_settings(verb, ["--help"], {})
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all((f"  {option.flag} " in text) == (verb in option.verbs) for option in ALL_OPTIONS)
    assert "--config" in text and "HEADGATE_KV_CACHE" in text and "example" in text
    assert all(len(line) <= max(116, int(columns)) for line in text.splitlines())


def test_an_unknown_flag_an_abbreviation_and_a_stray_word_are_refused() -> None:
    for argument in ("--colour=red", "--por=1", "stray"):
        with pytest.raises(ConfigurationError, match=argument):
            read_settings("serve", [argument], {})
