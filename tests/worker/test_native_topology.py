"""CPUs, caches and memory nodes: what is read of them, in made-up trees, and what is made of it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from worker.native.topology import (
    DEFAULT_CACHES,
    PASSIVE,
    Node,
    allowed_cpus,
    available_cpus,
    bind_to,
    cgroup_cpus,
    cgroup_free_bytes,
    choose_node,
    cpu_caches,
    memory_nodes,
    parse_cpu_list,
    physical_cores,
    thread_counts,
    wait_passively,
)

GIGABYTE = 10**9


def write(root: Path, **files: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text + "\n")


def test_caches_are_read_and_count_as_often_as_the_threads_fill_the_cpus_that_share_one(tmp_path: Path) -> None:
    write(tmp_path / "index0", level="1", type="Data", size="32K", shared_cpu_list="0")
    write(tmp_path / "index1", level="1", type="Instruction", size="32K", shared_cpu_list="0")
    write(tmp_path / "index2", level="2", type="Unified", size="1024K", shared_cpu_list="0")
    write(tmp_path / "index3", level="3", type="Unified", size="32M", shared_cpu_list="0-7,16-23")
    assert cpu_caches(4, tmp_path) == {"L2": 4 << 20, "L3": 32 << 20}
    assert cpu_caches(40, tmp_path)["L3"] == 3 * 32 << 20, "of several core complexes"
    write(tmp_path / "index2", shared_cpu_list="0,64")
    assert cpu_caches(128, tmp_path) == {"L2": 64 << 20, "L3": 8 * 32 << 20}
    assert cpu_caches(1, tmp_path)["L2"] == 1 << 20


def test_a_machine_that_tells_nothing_gets_the_usual_caches(tmp_path: Path) -> None:
    write(tmp_path / "index2", level="2")
    assert cpu_caches(4, tmp_path) == DEFAULT_CACHES


@pytest.mark.parametrize(("text", "count"), [("0", 1), ("0-3", 4), ("0-3,8,10-11\n", 7), ("\n", 0)])
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


def test_the_tightest_memory_limit_on_the_way_to_the_root_counts_and_files_can_go_but_for_a_tmpfs(
    tmp_path: Path,
) -> None:
    groups = tmp_path / "groups"
    groups.write_text("0::/outer/inner\n")
    root = tmp_path / "root"
    assert cgroup_free_bytes(root, groups) == float("inf")
    held = {"memory__current": "3000000", "memory__stat": "anon 1\nfile 1000000\nshmem 400000"}
    write(root / "outer" / "inner", memory__max="max", **held)
    assert cgroup_free_bytes(root, groups) == float("inf")
    write(root / "outer", memory__max="5000000", **held)
    assert cgroup_free_bytes(root, groups) == 5000000 - 3000000 + 600000
    write(root / "outer", memory__max="2000000")
    assert cgroup_free_bytes(root, groups) == 0


def test_memory_limit_of_the_first_version_also_where_only_the_host_knows_the_path(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    groups.write_text("4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    write(
        tmp_path / "root" / "memory",
        memory__limit_in_bytes="5000000",
        memory__usage_in_bytes="3000000",
        memory__stat="cache 1\nshmem 1\ntotal_cache 1000000\ntotal_shmem 400000",
    )
    assert cgroup_free_bytes(tmp_path / "root", groups) == 2600000
    assert cgroup_free_bytes(tmp_path / "root", tmp_path / "absent") == float("inf")


def test_at_least_one_cpu_is_available() -> None:
    assert available_cpus() >= 1


def test_threads_of_a_core_count_as_one_and_unknown_cores_as_one_each(tmp_path: Path) -> None:
    for cpu, (package, core) in enumerate([(0, 0), (0, 1), (0, 0), (1, 0)]):
        write(tmp_path / f"cpu{cpu}" / "topology", physical_package_id=str(package), core_id=str(core))
    assert physical_cores({0, 1, 2, 3}, tmp_path) == 3
    assert physical_cores({0, 2}, tmp_path) == 1
    assert physical_cores({0, 7, 8}, tmp_path) == 3


@pytest.mark.parametrize(
    ("available", "cores", "counts"), [(1, 1, [1]), (2, 2, [2, 1]), (64, 32, [64, 32, 1]), (6, 6, [6, 3, 1])]
)
def test_the_numbers_of_threads_worth_timing(available: int, cores: int, counts: list[int]) -> None:
    assert thread_counts(available, cores) == counts


# --- memory nodes -----------------------------------------------------------------------------------------------------


def node(root: Path, number: int, cpus: str, free: int, cached: int = 0) -> None:
    rows = {"MemTotal": 10**9, "MemFree": free // 1024, "FilePages": cached // 1024, "Shmem": 0}
    meminfo = "\n".join(f"Node {number} {name}: {amount:>10} kB" for name, amount in rows.items())
    write(root / f"node{number}", cpulist=cpus, meminfo=meminfo + f"\nNode {number} HugePages_Total:     0")


@pytest.fixture
def two_nodes(tmp_path: Path) -> Path:
    """The CPUs of this process on node 1, others on node 0; a third node has memory only."""
    here = ",".join(map(str, sorted(allowed_cpus())))
    node(tmp_path, 0, "9000-9063", 64 * GIGABYTE)
    node(tmp_path, 1, here, 8 * GIGABYTE, cached=8 * GIGABYTE)
    node(tmp_path, 2, "", 512 * GIGABYTE)
    write(tmp_path, online="0-2")
    return tmp_path


def test_the_node_with_most_allowed_cpus_comes_first_then_the_one_with_most_memory(tmp_path: Path) -> None:
    node(tmp_path, 0, "0-3,8-11", 10 * GIGABYTE)
    node(tmp_path, 1, "4-7,12-15", 20 * GIGABYTE)
    node(tmp_path, 2, "", 500 * GIGABYTE)
    assert [found.number for found in memory_nodes(range(16), tmp_path)] == [1, 0]
    assert [found.number for found in memory_nodes(range(6), tmp_path)] == [0, 1]
    assert memory_nodes({5}, tmp_path)[0].cpus == {5}
    assert memory_nodes({99}, tmp_path) == []


def test_memory_that_only_caches_files_can_be_had(two_nodes: Path) -> None:
    found = memory_nodes(allowed_cpus(), two_nodes)
    assert found[0].free_bytes == pytest.approx(16 * GIGABYTE, rel=1e-5)


def test_one_node_means_that_nothing_happens(two_nodes: Path, tmp_path: Path) -> None:
    assert choose_node(GIGABYTE, 0, two_nodes) == (None, ""), "all allowed CPUs are on one node already"
    assert choose_node(GIGABYTE, 0, tmp_path / "absent") == (None, "")


@pytest.mark.skipif(len(allowed_cpus()) < 2, reason="needs two CPUs")
def test_the_node_is_chosen_that_holds_the_model_and_has_the_threads(tmp_path: Path) -> None:
    first, *others = sorted(allowed_cpus())
    node(tmp_path, 0, str(first), 8 * GIGABYTE)
    node(tmp_path, 1, ",".join(map(str, others)), 16 * GIGABYTE)
    too_large = "on all 2 NUMA nodes: node 1 has 16.0 GB free, the model takes 20.0 GB"
    assert choose_node(20 * GIGABYTE, 0, tmp_path) == (None, too_large)
    assert choose_node(GIGABYTE, 999, tmp_path) == (None, f"on all 2 NUMA nodes: node 1 has {len(others)} CPUs")
    assert choose_node(GIGABYTE, 1, tmp_path) == (memory_nodes(allowed_cpus(), tmp_path)[0], "on NUMA node 1")


@pytest.mark.skipif(len(allowed_cpus()) < 2, reason="needs two CPUs")
def test_this_thread_and_those_it_starts_are_bound_to_a_node() -> None:
    own = frozenset(sorted(allowed_cpus())[1:])
    seen: list[set[int]] = []

    def settle() -> None:
        bind_to(Node(1, own, GIGABYTE))
        started = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        started.start()
        started.join()

    thread = threading.Thread(target=settle)  # affinity belongs to a thread: that of the tests stays as it is
    thread.start()
    thread.join()
    assert seen == [own]


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_threads_wait_passively_unless_the_user_said_how() -> None:
    environ = {"HOME": "/"}
    wait_passively(environ)
    assert environ == {"HOME": "/"} | PASSIVE
    for name in PASSIVE:
        environ = {name: "1"}
        wait_passively(environ)
        assert environ == {name: "1"}
