"""`Parallel` is the experts that it divides: outputs and gradients, with starved and flooded processes."""

from copy import deepcopy

import pytest
import torch
from torch import distributed as dist
from torch import nn

from distributed.pool import RankFailed
from moeify import Context, MoE
from moeify import ranks as everyone
from moeify.experts import FFN, Blocks, Experts, Identity, Latent, Plain, Sequences, cut
from moeify.experts.slices import slice_parameter
from moeify.parallel import Parallel, spread
from moeify.routers import Soft, TopK
from moeify.testing import check_experts
from test_matrix import EXPERTS, D, E, learned

ROWS = {
    "random": lambda ranks: [(3, 0, 5, 2), (1, 4, 0, 1)] * (ranks // 2),
    "one process has all": lambda ranks: [(2, 1, 7, 3)] + [(0, 0, 0, 0)] * (ranks - 1),
    "one expert has all": lambda ranks: [(0, 0, 6, 0)] * ranks,
    "one row": lambda ranks: [(0, 0, 0, 0)] * (ranks - 1) + [(0, 1, 0, 0)],
    "none": lambda ranks: [(0, 0, 0, 0)] * ranks,
}


def made(name):
    torch.manual_seed(0)
    return learned(EXPERTS[name]()).double()


def part_of(whole, mine, rank):
    """The part of a gradient that belongs to a tensor of this rank."""
    return whole if len(mine) == len(whole) else whole[rank * len(mine) % len(whole) :][: len(mine)]


def compared(rank, size, names, rows, limit):
    """Case: the largest difference of outputs and gradients from those of one process."""
    worst, counts = 0.0, torch.tensor(ROWS[rows](size))
    for name in names:
        one = made(name)
        divided = spread(deepcopy(one), limit=limit)
        generator = torch.Generator().manual_seed(1)
        every = [torch.randn(int(c.sum()), D, dtype=torch.float64, generator=generator) for c in counts]
        outputs = [one(x.requires_grad_(), c) for x, c in zip(every, counts, strict=True)]
        loss = sum((y * y.detach().cos()).sum() for y in outputs)
        if loss.requires_grad:  # quantised experts without rows have no graph
            loss.backward()
        x = every[rank].detach().requires_grad_()
        y = divided(x, counts[rank])
        (y * y.detach().cos()).sum().backward()
        pairs = [(y, outputs[rank]), (x.grad, torch.zeros_like(x) if every[rank].grad is None else every[rank].grad)]
        wanted = dict(one.named_parameters())
        inside = "experts.experts." if isinstance(divided, Latent) else "experts."
        for key, parameter in divided.named_parameters():
            if not parameter.requires_grad:
                continue
            whole = wanted[key.replace(inside, inside.removeprefix("experts."), 1)]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if isinstance(divided, Latent) and not key.startswith(inside):
                dist.all_reduce(gradient)  # the projections of Latent are like any layer outside the experts
                gradient = gradient / size
            want = torch.zeros_like(whole) if whole.grad is None else whole.grad
            pairs.append((gradient * size, part_of(want, parameter, rank)))
        worst = max([worst, *((a - b).abs().max().item() for a, b in pairs if a.numel())])
    return worst


@pytest.mark.parametrize("size", [2, 4])
def test_divided_experts_are_the_experts_with_their_gradients(ranks, size):
    cases = [(compared, list(EXPERTS)[i % 2 :: 2], rows, None) for i, rows in enumerate(ROWS)]
    cases += [(compared, list(EXPERTS)[size // 2 % 2 :: 2], rows, 3) for rows in ("random", "one expert has all")]
    assert max(max(worst) for worst in ranks.each(size, cases)) < 1e-12


def flooded(rank, size, limit):
    """Case: the most rows that the experts of this process ran at once, when all tokens choose one."""
    torch.manual_seed(rank)
    divided, seen = Parallel(FFN(E, D, 6), limit=limit), []
    divided.experts.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    x = torch.randn(40, D, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = divided(x, torch.tensor([0, 40, 0, 0]))
    forward = list(seen)
    y.sum().backward()
    return max(seen), len(seen) - len(forward), sum(saved)


def test_a_process_that_all_tokens_choose_never_has_more_rows_than_its_limit(ranks):
    bounded, free = ranks.each(4, [(flooded, 20), (flooded, 1000)])
    assert max(most for most, _, _ in free) == 160
    assert max(most for most, _, _ in bounded) == 20
    assert all(again == 8 for _, again, _ in bounded)  # the backward pass computes 40 / 5 rounds again
    assert all(saved <= 2 * 40 * D for _, _, saved in bounded)  # and keeps no more than the process's own rows
    assert max(saved for _, _, saved in free) > 160 * D


def defaults(rank, size):
    divided, seen = Parallel(FFN(8, D, 6)), []
    divided.experts.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    counts = torch.zeros(8, dtype=torch.int64)
    counts[5] = 8
    with torch.no_grad():
        divided(torch.randn(8, D), counts)
    return max(seen)


def test_without_a_limit_rows_are_at_most_four_times_an_even_share(ranks):
    assert max(ranks(4, defaults)) == 32  # 4 x 8: all rows of four processes, which are four times the share


def counted(rank, size, learns):
    """Case: the collectives of a layer of 64 experts on 64 processes that do not exist."""
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
        layer = MoE(TopK(D, 64, k=64), Parallel(FFN(64, D, 6)))  # the processes send what this one sends
        x = torch.randn(5, D, requires_grad=learns)
        with CommDebugMode() as forward:
            y = layer(x)
        with CommDebugMode() as backward:
            y.sum().backward()
        held = layer.experts.experts.num_experts
        counts = [{str(op): n for op, n in mode.get_comm_counts().items()} for mode in (forward, backward)]
    finally:
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=rank, world_size=size)
    return held, counts


def test_a_layer_costs_one_gather_and_two_exchanges_forward_and_two_backward(ranks):
    ((held, (forward, backward)),) = ranks(1, counted, True)
    assert held == 1
    assert forward == {"c10d.allgather_": 1, "c10d.alltoall_base_": 2}
    assert backward == {"c10d.alltoall_base_": 2}
    ((_, (forward, backward)),) = ranks(1, counted, False)
    assert (forward["c10d.alltoall_base_"], backward) == (2, {"c10d.alltoall_base_": 1})


class Own(Experts):
    """Experts of a user."""

    def __init__(self, num_experts, dividable):
        super().__init__()
        self.num_experts, self.dividable = num_experts, dividable
        self.scale = nn.Parameter(torch.ones(num_experts, D))
        self.norm = nn.LayerNorm(D)

    def common_modules(self):
        return (self.norm,) if self.dividable else ()

    def part(self, first, last):
        return cut(self, first, last)

    def forward(self, rows, counts):
        return self.norm(rows) * self.scale.repeat_interleave(counts, dim=0, output_size=len(rows))


def test_experts_of_a_user_are_cut_by_their_tensors_and_say_what_does_not_fit():
    check_experts(lambda experts, width: Own(experts, True))
    part = Own(E, True).part(1, 3)
    assert (part.num_experts, len(part.scale), part.norm.weight.shape) == (2, 2, (D,))
    with pytest.raises(ValueError, match=r"weight of Own has the shape \(8,\).*common_modules"):
        Own(E, False).part(1, 3)


def test_experts_that_cannot_be_divided_say_why():
    class Whole(Own):
        part = Experts.part

    trained_apart = FFN(E, D, 6)
    slice_parameter(trained_apart, "down_proj", [lambda stack: stack[1]])
    with pytest.raises(ValueError, match=r"Whole cannot be divided.*does not define `part`.*ep=1"):
        Whole(E, True).part(0, 2)
    with pytest.raises(ValueError, match=r"read sequences.*ep=1"):
        Sequences([nn.Linear(D, D) for _ in range(E)]).part(0, 2)
    with pytest.raises(ValueError, match="join_experts"):
        trained_apart.part(0, 2)


@pytest.mark.parametrize("name", EXPERTS)
def test_parts_of_experts_are_their_experts(name):
    experts, counts = made(name), torch.tensor([3, 1, 0, 2])
    rows = torch.randn(6, D, dtype=torch.float64)
    parts = [experts.part(0, 1), experts.part(1, 4).part(0, 1), experts.part(2, 4)]
    assert [part.num_experts for part in parts] == [1, 1, 2]
    outputs = [part(r, c) for part, r, c in zip(parts, rows.split([3, 1, 2]), counts.split([1, 1, 2]), strict=True)]
    torch.testing.assert_close(torch.cat(outputs), experts(rows, counts), rtol=1e-12, atol=1e-12)


def test_names_of_low_rank_experts_are_cut_too():
    experts = EXPERTS["lora"]()
    experts.names = ("a", "b", "c", "d")
    assert experts.part(1, 3).names == ("b", "c")


def refused(rank, size, experts, limit):
    try:
        Parallel(experts, limit=limit)
    except ValueError as error:
        return str(error)


def test_numbers_that_do_not_divide_are_refused(ranks):
    said = ranks.each(2, [(refused, FFN(5, D, 6), None), (refused, FFN(4, D, 6), 0)])
    assert "5 experts cannot be divided evenly among 2 processes" in said[0][0]
    assert "limit=0" in said[1][1]


def whole_layers(rank, size, backend):
    layer = MoE(TopK(D, E), Parallel(FFN(E, D, 6)), backend=backend)
    return layer(torch.randn(3, D)).shape


def test_backends_that_read_all_weights_refuse_divided_experts(ranks):
    for backend in ("cpp", "onednn", "triton"):
        with pytest.raises(RankFailed, match=f"'{backend}' cannot run this layer.*Parallel"):
            ranks(2, whole_layers, backend)
    assert ranks.each(2, [(whole_layers, "auto"), (whole_layers, "gather")]) == [[(3, D)] * 2] * 2


def slots(rank, size):
    """Case: Soft MoE, whose rows are slots and no tokens."""
    torch.manual_seed(0)
    layer = MoE(Soft(D, E, slots=2), FFN(E, D, 6)).double()
    x = torch.randn(size, 3, D, dtype=torch.float64)
    want = layer(x)[rank]
    layer.replace(experts=Parallel(layer.experts))
    return (layer(x[rank : rank + 1])[0] - want).abs().max().item()


def test_slots_of_soft_moe_travel_as_rows(ranks):
    assert max(ranks(2, slots)) < 1e-6  # a mixture computes in fp32


def narrow(rank, size):
    sizes = []
    layer = MoE(TopK(D, E), spread(Latent(FFN(E, 3, 6), D, 3)))
    layer.experts.experts.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    layer(torch.randn(5, D))
    return sizes


def test_rows_of_latent_experts_travel_at_the_latent_width(ranks):
    assert ranks(2, narrow) == [[(10, 3)]] * 2


def loads(rank, size):
    routing = TopK(D, E)(torch.randn(5, D), Context())
    return everyone.all_reduce(routing.assigned.clone()).sum().item()


def test_loads_can_be_summed_over_processes(ranks):
    assert ranks(2, loads) == [20, 20]


def copied(rank, size):
    layer = MoE(TopK(D, E), Parallel(Blocks([FFN(3, D, 6, activation=Plain(nn.functional.relu)), Identity()])))
    other = deepcopy(layer)
    x = torch.randn(3, D)
    return torch.equal(layer(x), other(x)) and other.experts.experts is not layer.experts.experts


def test_a_layer_of_divided_experts_can_be_copied(ranks):
    assert ranks(2, copied) == [True, True]
