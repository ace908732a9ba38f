"""A machine is measured, alone and with others."""

import itertools
import multiprocessing
import os
import time

import pytest
import torch

from moeify.parallel import Cluster, ModelShape, measure, plan
from ranks import on_ranks

SHAPE = ModelShape(
    name="small", width=64, blocks=2, sparse_layers=2, num_experts=4, k=2.0, hidden=64.0, dense_parameters=1e5,
    embedding=1e5, dense_flops=2e5, head_flops=1e5, attention_flops=1e2, vocabulary=100,
)  # fmt: skip


def measured(rank, ranks):
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # as if each rank had a node of its own
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    found = measure("cpu", size=128, clock=time.process_time)
    return found.size, found.nodes, found.device.flops, found.inter.bandwidth, found.inter.latency, found.device.fixed


def test_a_machine_alone_can_be_planned_for(tmp_path):
    found = measure("cpu", size=128)
    found.write(tmp_path / "here.json")
    assert Cluster.read(tmp_path / "here.json") == found
    assert found.size == 1
    assert 1e8 < found.device.flops < 1e14
    assert 1e8 < found.device.bandwidth < 1e13
    assert plan(SHAPE, found, length=32, sequences=4).best.layout.world == 1


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="ranks are forked off a server")
def test_two_ranks_agree_on_what_they_measured():
    first, second = on_ranks(2, measured)
    assert first == second
    size, nodes, _, bandwidth, latency, fixed = first
    assert (size, nodes) == (2, 2)
    assert 1e6 < bandwidth < 1e12
    assert 0 < latency < 1
    assert fixed.gather > 0


def test_a_machine_can_be_measured_in_cpu_time():
    """In which a process that sleeps takes none."""
    ticks = itertools.count()
    slow = measure("cpu", size=128, clock=lambda: 1e-3 * next(ticks))
    assert slow.device.flops == pytest.approx(2 * 128**3 / 1e-3)
    assert 1e8 < measure("cpu", size=128, clock=time.process_time).device.flops < 1e14


def test_what_no_token_changes_is_measured_and_makes_micro_batches_dear():
    found = measure("cpu", size=128, clock=time.process_time)
    fixed = found.device.fixed
    assert 1e-5 < fixed.block < 0.1
    assert fixed.gather == fixed.exchange == 0  # nobody to share with
    half = plan(SHAPE, found, length=32, sequences=4)
    by_count = {choice.layout.accumulation: choice.cost for choice in half.choices if not choice.layout.recompute}
    assert by_count[4].seconds["fixed"] == pytest.approx(4 * by_count[1].seconds["fixed"])
    assert by_count[4].seconds["fixed"] == pytest.approx(4 * (fixed.micro_batch + 6 * fixed.block))
    assert by_count[1].step < by_count[4].step
