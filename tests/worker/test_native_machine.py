"""Measuring the machine: what is read of it, and that a measurement is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from worker.native.machine import (
    DEFAULT_CACHES,
    available_cpus,
    cgroup_cpus,
    choose_threads,
    cpu_caches,
    matmul_rate,
    parse_cpu_list,
    read_bandwidth,
)

CPU = torch.device("cpu")


def write(root: Path, **files: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text + "\n")


def test_caches_are_read_and_private_ones_count_once_per_thread(tmp_path: Path) -> None:
    write(tmp_path / "index0", level="1", type="Data", size="32K", shared_cpu_list="0")
    write(tmp_path / "index1", level="1", type="Instruction", size="32K", shared_cpu_list="0")
    write(tmp_path / "index2", level="2", type="Unified", size="1024K", shared_cpu_list="0")
    write(tmp_path / "index3", level="3", type="Unified", size="32M", shared_cpu_list="0-7,16-23")
    assert cpu_caches(4, tmp_path) == {"L2": 4 << 20, "L3": 32 << 20}


def test_a_machine_that_tells_nothing_gets_the_usual_caches(tmp_path: Path) -> None:
    write(tmp_path / "index2", level="2")
    assert cpu_caches(4, tmp_path) == DEFAULT_CACHES


@pytest.mark.parametrize(("text", "count"), [("0", 1), ("0-3", 4), ("0-3,8,10-11\n", 7)])
def test_cpu_lists(text: str, count: int) -> None:
    assert len(parse_cpu_list(text)) == count


def test_the_strictest_quota_on_the_way_to_the_root_counts(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    groups.write_text("0::/outer/inner\n")
    root = tmp_path / "root"
    assert cgroup_cpus(root, groups) == float("inf")
    write(root / "outer", cpu__max="150000 100000")
    write(root / "outer" / "inner", cpu__max="max 100000")
    assert cgroup_cpus(root, groups) == 1.5


def test_quota_of_the_first_version(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    groups.write_text("4:memory:/x\n3:cpu,cpuacct:/x\n")
    write(tmp_path / "root" / "cpu,cpuacct" / "x", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    assert cgroup_cpus(tmp_path / "root", groups) == 2.0
    assert cgroup_cpus(tmp_path / "root", tmp_path / "absent") == float("inf")


def test_at_least_one_cpu_is_available() -> None:
    assert available_cpus() >= 1


def test_more_threads_must_gain_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 1.0, 4: 0.0}
    current = [1]
    monkeypatch.setattr(torch, "set_num_threads", lambda count: current.__setitem__(0, count))
    monkeypatch.setattr("worker.native.machine._round_seconds", lambda *_: seconds[current[0]])
    for four, expected in ((0.5, 4), (0.9, 1), (1.5, 1)):
        seconds[4] = four
        assert choose_threads(lambda: None, 4, budget_seconds=0) == expected == current[0]
    assert choose_threads(lambda: None, 1) == 1


def test_rates_are_of_a_plausible_size() -> None:
    assert 1e8 < read_bandwidth(1 << 20, CPU) < 1e13
    assert 1e8 < matmul_rate(128, CPU, torch.float32) < 1e15
