"""Collectives change nothing in one process, and sum over several."""

import hashlib
import multiprocessing
import threading
import time
from pathlib import Path

import pytest
import torch

from moeify import ranks
from moeify.ranks import all_reduce, anywhere, broadcast, join, several
from ranks import collectives, joined, on_ranks


def test_in_one_process_a_collective_is_the_identity():
    assert not several()
    tensor = torch.tensor([1.0, 2.0])
    assert all_reduce(tensor) is tensor
    assert broadcast(tensor) is tensor
    assert tensor.tolist() == [1, 2]
    assert anywhere(True) is True
    assert anywhere(False) is False


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="ranks are forked off a server")
def test_over_two_processes_it_sums_copies_and_asks_every_rank():
    assert on_ranks(2, collectives) == [(3.0, 1.0, True, False)] * 2


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="ranks are forked off a server")
def test_a_group_waits_no_longer_than_it_was_told():
    assert "imed out" in on_ranks(2, joined, 1)[0]
    with pytest.raises(ValueError, match="timeout=0 seconds; choose a positive number"):
        join(0)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="Linux alone tells what a thread does")
def test_the_end_of_a_process_waits_until_the_threads_of_gloo_rest(monkeypatch):
    asked, rest = threading.Event(), threading.Event()
    before = time.monotonic()
    ranks._wait_for_gloo()
    alone = time.monotonic() - before

    def work():
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text("pt_gloo_runloop")
        asked.set()
        hashlib.sha256(bytes(100_000_000))  # which does not hold Python's lock
        ended.append(time.monotonic())
        rest.wait()

    ended = []
    thread = threading.Thread(target=work)
    thread.start()
    try:
        asked.wait()
        ranks._wait_for_gloo()
        assert ended
        assert alone < 0.5
    finally:
        rest.set()
        thread.join()
