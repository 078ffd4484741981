"""What can be said of the images and of docker-compose.yml without an engine; with one, `make compose-test` says the rest."""

import ast
import json
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES = COMPOSE["services"]
DOCKERFILES = sorted(ROOT.glob("deploy/*.Dockerfile")) + sorted(ROOT.glob("tests/compose/*.Dockerfile"))
OWN_IMAGES = [ROOT / "deploy/gateway.Dockerfile", ROOT / "deploy/worker.Dockerfile"]
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")  # its builds for CUDA name exact versions
IN_THE_GATEWAY = ("headgate", "scheduler", "service")


def lines_of(path):
    lines = (ROOT / path).read_text("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def modules_imported(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def imported_by(*modules):
    """All modules that these import, and those import in turn, lazily or not, as far as they are ours."""
    found, left = set(), list(modules)
    while left:
        module = left.pop()
        if module in found:
            continue
        found.add(module)
        path = ROOT / (module.replace(".", "/") + ".py")
        if module.startswith(IN_THE_GATEWAY) and path.exists():
            left += modules_imported(path)
    return found


def with_dependencies(names):
    """The distributions that pip would install for these."""
    found, left = set(), [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        needed = map(Requirement, requires(name) or [])
        left += [canonicalize_name(r.name) for r in needed if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def test_gateway_image_has_what_the_gateway_imports():
    modules = imported_by("headgate.main", "headgate.gateway", "headgate.keys")
    assert {"service.app", "headgate.settings"} <= modules
    ours = {*IN_THE_GATEWAY, "worker"}
    foreign = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - ours
    owners = {canonicalize_name(packages_distributions()[name][0]) for name in foreign}
    missing = owners - with_dependencies(lines_of("deploy/gateway-requirements.txt"))
    assert not missing


def test_gateway_image_has_neither_torch_nor_numpy():
    assert not with_dependencies(lines_of("deploy/gateway-requirements.txt")) & {"torch", "numpy", "transformers"}


def test_gateway_requirements_are_some_of_the_package_s_own():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(lines_of("deploy/gateway-requirements.txt")) <= {Requirement(d).name for d in project["dependencies"]}


def test_every_version_in_the_images_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pinned = {canonicalize_name(Requirement(line).name) for line in lines_of("constraints.txt")}
    wanted = with_dependencies([Requirement(d).name for d in project["dependencies"]] + ["setuptools"])
    assert {name for name in wanted if not name.startswith(PINNED_BY_TORCH)} <= pinned


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_needs_no_frontend_from_a_registry(path):
    text = path.read_text("utf-8")
    assert not re.search(r"^#\s*syntax\s*=", text, re.M | re.I)
    assert "<<" not in text


@pytest.mark.parametrize("path", OWN_IMAGES, ids=lambda path: path.name)
def test_image_runs_headgate_itself_and_not_as_root(path):
    last_stage = path.read_text("utf-8").split("\nFROM ")[-1]
    assert 'ENTRYPOINT ["headgate"]' in last_stage
    assert "\nUSER 10001:10001\n" in last_stage
    assert "\nHEALTHCHECK " in last_stage
    assert "pip" not in last_stage and "apt-get" not in last_stage


@pytest.mark.parametrize("path", OWN_IMAGES, ids=lambda path: path.name)
def test_what_an_image_copies_reaches_the_build(path):
    allowed = {line[1:] for line in lines_of(".dockerignore") if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", path.read_text("utf-8"), re.M)
    missing = [source for sources in copied for source in sources.split() if not is_below(allowed, source)]
    assert copied and not missing


def is_below(folders, path):
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_locked_down(name):
    service = SERVICES[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert service["pids_limit"]


@pytest.mark.parametrize("name", SERVICES)
def test_image_is_a_variable_with_a_pinned_default(name):
    assert re.fullmatch(r"\$\{[A-Z_]+_IMAGE:-[\w/-]+:v?\d[\w.-]+\}", SERVICES[name]["image"])


def test_ports_are_published_on_loopback():
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith(("127.0.0.1:", "${HEADGATE_PUBLISH:-127.0.0.1}:")) for port in ports)
    assert SERVICES["gateway"]["environment"]["HEADGATE_PUBLISHED"] == "${HEADGATE_PUBLISH:-127.0.0.1}"


def test_prometheus_scrapes_the_services_there_are():
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))["scrape_configs"]
    targets = {target for job in scraped for group in job["static_configs"] for target in group["targets"]}
    assert targets == {"gateway:9100", "worker:9000", "simulated:9000"}
    assert {target.split(":")[0] for target in targets} <= set(SERVICES)


def test_folders_that_are_mounted_exist():
    mounts = [
        volume for service in SERVICES.values() for volume in service.get("volumes", []) if volume.startswith("./")
    ]
    assert mounts
    for mount in mounts:
        assert (ROOT / mount.split(":")[0]).is_dir(), mount


def test_grafana_finds_its_dashboards_and_prometheus():
    folder = ROOT / "deploy/grafana/provisioning"
    (providers,) = (yaml.safe_load(file.read_text("utf-8")) for file in folder.glob("dashboards/*.y*ml"))
    (sources,) = (yaml.safe_load(file.read_text("utf-8")) for file in folder.glob("datasources/*.y*ml"))
    mounted = {volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]}
    assert providers["providers"][0]["options"]["path"] in mounted
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "deploy/grafana/dashboards" / Path(home).name).exists() and str(Path(home).parent) in mounted
    (source,) = sources["datasources"]
    assert source["url"] == "http://prometheus:9090"
    for file in (ROOT / "deploy/grafana/dashboards").glob("*.json"):
        for panel in json.loads(file.read_text("utf-8"))["panels"]:
            assert panel.get("datasource", {}).get("uid", source["uid"]) == source["uid"], panel.get("title")
