"""`shard`: balance over all processes, norms, dtypes, names, what it refuses, and programs that torchrun starts."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from distributed.parity import Net, part_of
from moeify import MoE, losses
from moeify.balance import PID, SMEBU, Quantile, Sign, control
from moeify.experts import FFN, Blocks, Identity, Sequences
from moeify.parallel import clip_grad_norm_, names_in_one_process, shard
from moeify.ranks import all_reduce
from moeify.record import record
from moeify.routers import TopK, sigmoid
from moeify.train import SparseArguments, balance_hook
from test_matrix import D, E

RULES = {"sign": Sign(1e-2), "quantile": Quantile(), "smebu": SMEBU(1e-2), "pid": PID()}
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_on_several_processes.py"


class Balanced(nn.Module):
    """Called with rows as models of transformers are, by name."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        router = partial(TopK, D, E, score=sigmoid, selection_bias=True, init_std=1.0)
        self.layers = nn.ModuleList(MoE(router(), FFN(E, D, 6), backend="compose") for _ in range(2))
        self.to(dtype)
        for layer in self.layers:
            layer.router.selection_bias.data = layer.router.selection_bias.data.float()

    def forward(self, rows):
        for layer in self.layers:
            rows = rows + layer(rows)
        return rows


def balanced(model, rule, mine, batches, of):
    """Biases, weights and the balance gradient after three steps that are cut into micro-batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    moved = control(model, optimizer, RULES[rule])
    hook = balance_hook(model, SparseArguments(balance=0.5, z=0.1))
    for step in range(3):
        rows = [batches[step][i] for i in mine]
        hook.begin([{"rows": x} for x in rows])
        for x in rows:
            (model(rows=x).square().mean() / of).backward()
        optimizer.step()
        optimizer.zero_grad()
        hook.end()
    memory = {f"{name} {key}": v for name, kept in moved.memory.items() for key, v in kept.items()}
    return dict(model.named_parameters()) | dict(model.named_buffers()) | memory


def batches_of(ranks):
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(2, 3, D, dtype=torch.float64, generator=generator) for _ in range(4)] for _ in range(3)]


def balance_on_ranks(rank, ranks, rule, expected, ep):
    model = shard(Balanced(), ep=ep)
    mine = range(rank, 4, ranks)
    found = balanced(model, rule, mine, batches_of(ranks), 4 / ranks)
    plain, worst = names_in_one_process(model), {}
    for name, value in found.items():
        want, got = part_of(expected[plain.get(name, name)], value.detach())
        worst[name] = max([0.0, *(got.double() - want.double()).abs().flatten().tolist()])
    return worst


def test_controllers_and_balance_losses_are_those_of_one_process(ranks):
    for rule in RULES:
        expected = {n: t.detach() for n, t in balanced(Balanced(), rule, range(4), batches_of(1), 4).items()}
        assert any(t.abs().max() > 1e-3 for n, t in expected.items() if n.endswith("selection_bias"))
        for size, ep in ((2, 1), (2, 2), (4, 2)):
            for worst in ranks(size, balance_on_ranks, rule, expected, ep):
                assert max(worst.values()) < 1e-6, (rule, size, worst)  # losses and biases are fp32


def balance_of_all(rank, ranks, expected):
    net = Balanced()
    with record(net) as decisions:
        net(rows=batches_of(ranks)[0][rank])
    mean = [losses.balance(r, assigned=all_reduce(r.assigned.clone())).detach() for r in decisions.values()]
    return [abs(all_reduce(loss).item() / ranks - want) for loss, want in zip(mean, expected, strict=True)]


def test_the_balance_of_all_loads_is_that_of_one_batch(ranks):
    net = Balanced()
    with record(net) as decisions:
        net(rows=torch.cat(batches_of(4)[0]))
    expected = [losses.balance(routing).item() for routing in decisions.values()]
    assert max(max(found) for found in ranks(4, balance_of_all, expected)) < 1e-6


def norms(rank, ranks, how):
    torch.manual_seed(0)
    model = Net("softmax", "constant", torch.float64)
    one = Net("softmax", "constant", torch.float64)
    x, ids = torch.randn(3, 4, D, dtype=torch.float64), torch.arange(12).view(3, 4)
    one(x, ids).square().sum().backward()
    want = nn.utils.clip_grad_norm_(one.parameters(), 0.5)
    shard(model, **how)(x, ids).square().sum().backward()
    norm = clip_grad_norm_(model, 0.5)
    plain, wanted = names_in_one_process(model), {n: p.grad for n, p in one.named_parameters()}
    pairs = [part_of(wanted[plain[n]], p.grad) for n, p in model.named_parameters()]
    return abs(norm - want).item(), max([0.0, *torch.cat([(a - b).abs().flatten() for a, b in pairs]).tolist()])


def test_gradients_are_clipped_by_the_norm_of_all(ranks):
    hows = {2: [{"ep": 2}, {"ep": 1, "fsdp": False}], 4: [{"ep": 2}, {"ep": 2, "fsdp": False}]}
    for size, of_size in hows.items():
        for answers in ranks.each(size, [(norms, how) for how in of_size]):
            for norm, gradient in answers:
                assert norm < 1e-9
                assert gradient < 1e-6  # torch's divides by the norm plus 1e-6 too


def half(rank, ranks):
    net = Net("softmax", "swiglu", torch.float32)
    seen = []
    net.layers[0].moe.router.register_forward_hook(lambda module, args, routing: seen.append(module.weight.dtype))
    net.layers[0].moe.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    shard(net, ep=2, policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    x, ids = torch.randn(3, 4, D), torch.arange(12).view(3, 4)
    for _ in range(2):
        net(x, ids).float().square().sum().backward()
    router = net.layers[0].moe.router.weight
    return seen[:2], router.grad.dtype, bool(router.grad.full_tensor().count_nonzero())


def test_routers_keep_their_dtype_under_mixed_precision(ranks):
    assert ranks(2, half) == [([torch.float32, torch.bfloat16], torch.float32, True)] * 2


def alike(rank, ranks):
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(D, D), MoE(TopK(D, E), FFN(E, D, 6)))
    shard(net, ep=2)
    held = {name: p.full_tensor() for name, p in net.named_parameters()}
    return held, sorted(names_in_one_process(net).values()), all(isinstance(p, DTensor) for p in net.parameters())


def test_all_start_from_the_weights_of_the_first_process(ranks):
    (first, names, all_distributed), (second, _, _) = ranks(2, alike)
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(D, D), MoE(TopK(D, E), FFN(E, D, 6)))
    assert names == sorted(name for name, _ in (*one.named_parameters(), *one.named_buffers()))
    assert all_distributed
    for (name, a), b, want in zip(first.items(), second.values(), one.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, want), name


def refusal(rank, ranks, what):
    ffn = FFN(3 if what == "experts" else 4, D, 6)
    experts = {
        "sequences": Sequences([nn.Linear(D, D) for _ in range(4)]),
        "groups": Blocks([FFN(1, D, 6), FFN(3, D, 6)]),
    }
    experts["some"] = Blocks([FFN(2, D, 6), Identity(2)])
    layer = MoE(TopK(D, ffn.num_experts), experts.get(what, ffn))
    model = nn.Sequential(nn.Linear(D, D), layer)
    try:
        if what == "twice":
            shard(model, ep=2)
        shard(model, ep=3 if what == "processes" else 4 if what == "some" else 2)
    except ValueError as error:
        return str(error)


def test_what_cannot_be_placed_is_refused_with_the_way_out(ranks):
    said = {what: ranks(2, refusal, what)[0] for what in ("processes", "experts", "twice", "sequences", "groups")}
    assert said["processes"] == "2 processes cannot be divided into groups of ep=3; choose ep from [1, 2]"
    assert said["experts"] == "3 experts of 1 cannot be divided evenly among ep=2 processes; choose ep from [1, 3]"
    assert "sharded already" in said["twice"]
    assert "ep=1" in said["sequences"]
    assert "choose ep so that groups" in said["groups"]
    assert "choose ep so that groups" in ranks(4, refusal, "some")[0]
    with pytest.raises(ValueError, match=r"no process group.*torchrun"):
        shard(nn.Sequential(MoE(TopK(D, E), FFN(E, D, 6))))


def example(rank, ranks):
    """Case: what the example prints; its group is the one of the pool."""
    dist.init_process_group = dist.destroy_process_group = lambda *settings: None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return printed.getvalue()


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_the_example_prints_on_two_processes_what_it_prints_on_one(ranks, capsys):
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    first, second = ranks(2, example)
    ranks.end(2)
    assert len(numbers(first)) == 12
    assert numbers(first) == pytest.approx(numbers(capsys.readouterr().out), abs=3e-6)
    assert not second


@pytest.mark.nightly
def test_forty_short_runs_exit_cleanly():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    run = partial(subprocess.run, command, env=settings, capture_output=True, text=True, timeout=600)
    ended = [run() for _ in range(40)]
    assert not [done.stderr for done in ended if done.returncode or len(numbers(done.stdout)) != 12]
