"""A training keeps the memory that its steps free, where the C library is glibc and the user did not tune it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from moeify.cli import memory
from moeify.cli.train import Train

FAULTS = """
import resource
import torch
from moeify.cli.memory import keep_freed

def step():
    blocks = [torch.ones(2**22) for _ in range(3)] + [torch.ones(2**24)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del blocks
    blocks = [torch.ones(2**22) for _ in range(3)] + [torch.ones(2**24)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = [step() for _ in range(3)][-1]
print(keep_freed(), before, [step() for _ in range(3)][-1])
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these thresholds")


@pytest.fixture
def tuned(monkeypatch):
    """What malloc is told."""
    said = {}
    monkeypatch.setattr(memory, "_mallopt", lambda: lambda name, value: said.update({name: value}) or 1)
    return said


@glibc
def test_a_step_that_allocates_what_another_freed_has_no_page_faults():
    environment = {name: value for name, value in os.environ.items() if name not in memory.TUNED}
    ended = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=environment)
    kept, before, after = map(int, ended.stdout.split())
    assert kept in memory.KEPT
    assert before > 2**14  # 64 MiB in pages of 4 KiB
    assert after < 2**10 or kept < 2**26


def test_blocks_and_the_end_of_the_heap_are_kept(tuned):
    assert memory.keep_freed({}) == 2**28
    assert tuned == {-3: 2**28, -1: 2**31 - 1}
    assert memory.describe({}).startswith("a training keeps freed blocks of up to 256 MiB, or 32 ")


def test_a_glibc_that_takes_no_such_threshold_gets_a_smaller_one(monkeypatch):
    monkeypatch.setattr(memory, "_mallopt", lambda: lambda name, value: int(name == -1 or value <= 2**25))
    assert memory.keep_freed({}) == 2**25


@pytest.mark.parametrize("name", memory.TUNED)
def test_what_the_user_tuned_wins(tuned, name):
    assert not memory.keep_freed({name: "65536"})
    assert tuned == {}
    assert memory.describe({name: "65536"}) == f"as {name} says"


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_mallopt", lambda: None)
    assert not memory.keep_freed({})
    assert memory.describe({}) == "as the C library decides"


def test_a_training_keeps_memory_from_its_beginning(monkeypatch):
    done = []
    monkeypatch.setattr(memory, "keep_freed", lambda: done.append("kept"))
    monkeypatch.setattr(Train, "job", lambda self: done.append("job") or type("Job", (), {"run": lambda self: None})())
    Train().run()
    assert done[:2] == ["kept", "job"]
