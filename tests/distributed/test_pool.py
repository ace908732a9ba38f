import os
import signal
import time

import pytest
import torch
from torch import distributed as dist

from distributed.pool import RankFailed, group


def total(rank, size, value):
    """Case: the sum over all ranks, and what a random number is."""
    mine = torch.full((2,), value * (rank + 1), dtype=torch.bfloat16)
    dist.all_reduce(mine)
    return mine, torch.rand(()).item(), os.getpid()


def pair(rank, size):
    """Case: the sum over each half of four ranks."""
    halves = [group(2), group(2, 2)]
    mine = torch.tensor(float(rank))
    dist.all_reduce(mine, group=halves[rank // 2])
    return mine.item(), id(halves[0])


def broken(rank, size, how):
    """Case: one rank fails while the others wait for it."""
    if rank == 1:
        if how == "raise":
            raise LookupError("no expert here")
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(1)
    dist.barrier()


def test_a_pool_keeps_its_ranks_from_case_to_case(ranks):
    first = ranks(2, total, 1)
    began = time.perf_counter()
    second = ranks.each(2, [(total, 1), (total, 2)])
    assert time.perf_counter() - began < 2  # seconds of a start
    assert [answer[0].tolist() for answer in first] == [[3, 3]] * 2
    assert [answer[0].tolist() for answer in second[1]] == [[6, 6]] * 2
    assert [a[1:] for a in first] == [a[1:] for a in second[0]] == [a[1:] for a in second[1]]  # random numbers, pids
    assert ranks(1, total, 1)[0][0].tolist() == [1, 1]


def test_groups_are_made_once(ranks):
    first, second = ranks(4, pair), ranks(4, pair)
    assert [value for value, _ in first] == [1, 1, 5, 5]
    assert first == second


@pytest.mark.parametrize(
    ("how", "said"),
    [("raise", "rank 1 of 2: LookupError: no expert here"), ("SIGKILL", "rank 1 of 2: the process died")],
)  # fmt: skip
def test_a_rank_that_fails_is_named_and_all_are_replaced(ranks, how, said):
    before = ranks(2, total, 1)
    with pytest.raises(RankFailed, match=said):
        ranks(2, broken, how)
    after = ranks(2, total, 1)
    assert [a[0].tolist() for a in after] == [[3, 3]] * 2
    assert not {a[2] for a in before} & {a[2] for a in after}


def test_a_rank_that_hangs_is_found(ranks):
    with pytest.raises(RankFailed, match=r"rank 1 of 2: no answer within 1.0 seconds"):
        ranks(2, broken, "SIGSTOP", timeout=1.0)
