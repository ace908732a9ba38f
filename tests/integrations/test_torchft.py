"""Replicas under torchft: one that dies costs a step, one that joins becomes equal, a step that fails moves nothing."""

from __future__ import annotations

import copy
import datetime
import itertools
import pickle
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

from killing import forks
from moeify.balance import Quantile, Sign, SparsityTarget
from moeify.losses import z
from moeify.routers import DefaultVector
from moeify.sparsify import Recipe, fresh, sparsify
from moeify.train import SparseArguments
from replicas import CASES, Training, digests, llama
from tiny_models import VOCABULARY, causal_lm

pytest.importorskip("torchft", reason="it comes with the extra moeify[torchft]")
made = pytest.importorskip("moeify.integrations.torchft")
healing = pytest.importorskip("moeify.integrations.replicas.healing")

SPARSE = SparseArguments(balance=0.1, controller=Sign(0.01))
IDS = torch.randint(3, VOCABULARY, (24, 10), generator=torch.Generator().manual_seed(0))
BATCHES = made.Batches([{"input_ids": row, "labels": row} for row in IDS], size=2, micro_batches=4)


@pytest.fixture(scope="module")
def lighthouse():
    from torchft.coordination import LighthouseServer

    server = LighthouseServer("[::]:0", 1, join_timeout_ms=100, quorum_tick_ms=10, heartbeat_timeout_ms=500)
    yield server.address()
    server.shutdown()


@pytest.fixture
def replica(lighthouse):
    replicas = []

    def make(model=None, sparse=SPARSE, **options):
        model = llama() if model is None else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        limits = {"timeout": 10.0, "patience": 10.0, "lighthouse": lighthouse}
        replicas.append(made.Replica(model, optimizer, sparse, **limits | options))
        return replicas[-1]

    yield make
    for each in replicas:
        each.close()


def failing_in(replica, calls):
    """Has the sums over replicas fail in some calls of the loss, as they do where another replica dies."""
    count, own = itertools.count(), replica._loss

    def loss(model, batch):
        if next(count) in calls:
            replica._manager.report_error(RuntimeError("connection reset by peer"))
        return own(model, batch)

    replica._loss = loss
    return replica


@forks
def test_a_killed_replica_costs_a_step_and_is_equal_to_the_others_once_it_is_back(tmp_path):
    with Training(tmp_path, "sign", 2) as run:
        run.wait_for(["replica0", "replica1"], 2)
        run.kill("replica1")
        lives = len(run.rows("replica0"))
        run.wait_for(["replica0"], 2)
        assert sum(not row["committed"] for row in run.rows("replica0")[lives:]) <= 1
        run.start("replica1")
        run.wait_for(["replica0", "replica1"], 2)
        assert run.different() == []
        both = [row for row in run.committed("replica1") if row["replicas"] == 2]
        assert both[-1]["number"] > 3
        assert set(both[-1]["digests"]) == {
            "balance", "biases", "experts", "loads", "numbers", "optimizer", "random", "rest",
        }  # fmt: skip


def test_parts_that_took_a_step_apart_from_each_other_become_equal(replica):
    """torchft alone compares the number of steps only, and would sum the gradients of unequal weights."""
    one, apart = replica(min_replicas=2), replica(min_replicas=2)
    for name, each in enumerate((one, apart), 1):
        each._manager.load_state_dict({"step": 2, "batches_committed": 2})
        each._last = name
    with torch.no_grad():
        apart.model.lm_head.weight += 1
    with ThreadPoolExecutor(2) as both:
        first, second = both.map(lambda each: list(each.train(BATCHES, 4)), (one, apart))
    assert [step for step in first if step.committed] == [step for step in second if step.committed]
    assert [step.number for step in first if step.committed] == [2, 3]
    assert not first[0].committed
    assert {**digests(one), "random": None} == {**digests(apart), "random": None}


@pytest.mark.parametrize("case", ["sign", "quantile", "smebu", "native"])
def test_a_step_that_fails_moves_nothing_and_its_repetition_is_the_step(replica, case):
    build, sparse = CASES[case][0], lambda: copy.deepcopy(CASES[case][1])  # which holds weights that adapt
    whole = replica(build(), sparse())
    expected = [whole.step(BATCHES) for _ in range(3)]
    whole.close()
    broken = failing_in(replica(build(), sparse()), calls={6})
    broken.step(BATCHES)
    before = digests(broken)
    failed = broken.step(BATCHES)
    assert not failed.committed
    assert failed.loss != failed.loss
    assert digests(broken) == before
    assert [broken.step(BATCHES) for _ in range(2)] == expected[1:]
    assert {**digests(broken), "numbers": None} == {**digests(whole), "numbers": None}  # names of steps are drawn


def test_a_step_that_fails_undoes_what_its_forward_passes_did_to_buffers(replica):
    recipe = Recipe(num_experts=4, router=partial(DefaultVector, k=2), experts=fresh)
    model = sparsify(causal_lm("llama"), recipe, verbose=False)
    broken = failing_in(replica(model, SparseArguments(balance=0.1)), calls={5})
    default = model.model.layers[0].mlp.router.default
    broken.step(BATCHES)
    before = default.clone()
    assert before.any()
    assert not broken.step(BATCHES).committed
    torch.testing.assert_close(default, before, rtol=0, atol=0)
    broken.step(BATCHES)
    assert not torch.equal(default, before)


def test_a_replica_heals_from_all_that_another_one_has(replica):
    target = SparsityTarget(2.5)
    ahead = replica(sparse=SparseArguments(balance=0.1, controller=Quantile(0.5), losses=[(target, z)]), seed=5)
    for _ in ahead.train(BATCHES, 3):
        pass
    behind = replica(sparse=SparseArguments(balance=0.1, controller=Quantile(0.5), losses=[(SparsityTarget(2.5), z)]))
    assert digests(behind) != digests(ahead)
    sender, receiver = behind._manager._checkpoint_transport, ahead._manager._checkpoint_transport
    receiver.send_checkpoint([1], 3, ahead._manager._manager_state_dict(), None)
    got = sender.recv_checkpoint(0, receiver.metadata(), 3, datetime.timedelta(seconds=5))
    behind._heal(got["user"]["moeify"])
    assert got["torchft"]["step"] == 3
    assert behind.seed == 5
    random = "random"  # is set when a step ends
    assert {**digests(behind), random: None} == {**digests(ahead), random: None}


def test_no_pickle_is_sent_or_read(replica, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickled")

    one = replica()
    transport = one._manager._checkpoint_transport
    for name in ("dumps", "dump", "loads", "load", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    transport.send_checkpoint([1], 0, one._manager._manager_state_dict(), None)
    assert transport.recv_checkpoint(0, transport.metadata(), 0, datetime.timedelta(seconds=5))["torchft"]["step"] == 0


def test_a_state_that_is_over_is_not_sent(replica):
    one = replica()
    transport = one._manager._checkpoint_transport
    transport.send_checkpoint([1], 0, one._manager._manager_state_dict(), None)
    transport.disallow_checkpoint()
    with pytest.raises(urllib.error.HTTPError, match="over"):
        transport.recv_checkpoint(0, transport.metadata(), 0, datetime.timedelta(seconds=5))


def test_another_model_is_refused_and_nothing_is_overwritten():
    live = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"b is \(3,\) here and \(4,\)"):
        healing.overwrite(live, {"a": torch.ones(2), "b": torch.ones(4)})
    with pytest.raises(ValueError, match="c is in the model of only one"):
        healing.overwrite(live, {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)})
    assert not any(tensor.any() for tensor in live.values())


def test_a_replica_with_another_optimizer_or_schedule_is_refused(replica):
    one, other = replica(), replica()
    state = one.state()
    with pytest.raises(ValueError, match="only one of two replicas has a scheduler"):
        other._heal(healing.State(state.tensors, state.numbers | {"schedule": {}}))
    other.optimizer.param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match="groups other parameters"):
        other._heal(state)


def test_an_expert_without_a_token_on_one_replica_gets_the_gradient_of_the_others():
    from moeify.integrations.replicas.sums import sum_gradients

    experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    experts[0](torch.ones(1, 2)).sum().backward()

    def add_another(tensor):
        """Another replica, in which the first two experts have a token."""
        if tensor.numel() == 6:  # whether each of the 6 parameters has a gradient
            tensor += torch.tensor([1.0, 1, 1, 1, 0, 0])
        else:
            tensor += 1

    sum_gradients(experts, add_another)
    assert [p.grad is not None for p in experts.parameters()] == [True, True, True, True, False, False]
    assert (experts[0].weight.grad == 2).all()
    assert (experts[1].weight.grad == 1).all()


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(replica):
    one = replica()
    before = one.model.lm_head.weight.clone()
    one.model.model.layers[1].mlp.router.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match=r"router.weight is not finite in step 1; the optimizer has not"):
        one.step(BATCHES)
    assert torch.equal(one.model.lm_head.weight, before)


def test_what_cannot_work_is_refused_with_the_way_out(replica, monkeypatch):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    with pytest.raises(ValueError, match="torchft_lighthouse --min_replicas 1"):
        made.Replica(model, optimizer)
    with pytest.raises(ValueError, match="leave dropout out"):
        made.Replica(model, optimizer, SparseArguments(dropout=0.1), lighthouse="http://localhost:1")
    with pytest.raises(ValueError, match="is dense"):
        made.Replica(causal_lm("llama"), optimizer, lighthouse="http://localhost:1")
    with pytest.raises(ValueError, match="0 micro-batches for 1 replicas"):
        replica().step(lambda step: [])
    with pytest.raises(TypeError, match="a set in the state"):
        made._plain({"state": {1}})
