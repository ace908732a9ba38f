"""Threads keep to the cores that a process may use, and wait passively, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from moeify.cli import threads


@pytest.fixture
def before_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")


def machine(root, siblings, **files):
    for processor, cores in enumerate(siblings):
        folder = root / f"sys/devices/system/cpu/cpu{processor}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(cores + "\n")
    for path, content in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    return root


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def test_two_threads_of_a_core_count_once(tmp_path):
    assert threads.usable_cores(machine(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2)) == 4


def test_affinity_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6}, raising=False)
    assert threads.usable_cores(machine(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2)) == 2


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000",
          "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 3),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/docker/x", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"proc/self/cgroup": "4:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"proc/self/cgroup": "4:cpuset:/"}, 8),
        ({}, 8),
    ],
)  # fmt: skip
def test_the_quota_of_a_container_is_respected(tmp_path, files, cores):
    assert threads.usable_cores(machine(tmp_path, map(str, range(8)), **files)) == cores


def test_what_is_not_set_is_set(before_torch):
    environment = {}
    threads.prepare(environment)
    cores = str(threads.usable_cores())
    assert environment == {"OMP_NUM_THREADS": cores, "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
    assert threads.describe(environment).endswith(
        f"; OMP_NUM_THREADS={cores}, OMP_WAIT_POLICY=PASSIVE, GOMP_SPINCOUNT=1000"
    )


@pytest.mark.parametrize("count", threads.COUNTS)
@pytest.mark.parametrize("wait", threads.WAITS)
def test_what_the_user_set_wins(before_torch, count, wait):
    environment = {count: "7", wait: "3"}
    threads.prepare(environment)
    assert environment == {count: "7", wait: "3"}
    assert f"{count}=7, {wait}=3" in threads.describe(environment)


def test_once_torch_is_loaded_nothing_is_pretended():
    environment = {}
    threads.prepare(environment)
    assert environment == {}


@pytest.mark.skipif(sys.platform != "linux", reason="affinity and GNU's OpenMP are of Linux")
def test_the_command_line_tells_openmp_before_torch_loads_it():
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "import sys; sys.argv = ['moeify', 'doctor']; from moeify.cli import main; main()"
    )
    kept = {name: value for name, value in os.environ.items() if name not in (*threads.COUNTS, *threads.WAITS)}
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=kept | {"OMP_DISPLAY_ENV": "verbose", "COLUMNS": "200"},
    )  # fmt: skip
    assert "OMP_NUM_THREADS = '1'" in ended.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in ended.stderr
    assert "GOMP_SPINCOUNT = '1000'" in ended.stderr
    assert "1 processors" in ended.stdout
    assert "OMP_NUM_THREADS=1, OMP_WAIT_POLICY=PASSIVE, GOMP_SPINCOUNT=1000" in ended.stdout
