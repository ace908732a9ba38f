"""LoRAMoE: all experts for every token, and its localized balancing constraint, in slow loops in fp64."""

from statistics import fmean

import pytest
import torch
from torch import nn

from moeify import MoE, record
from moeify.context import extra_inputs
from moeify.experts import LoRA
from moeify.losses import localized
from moeify.routers import AllExperts
from moeify.sparsify import recipes, sparsify
from strategies import agree, doubled, route, sharpen
from tiny_models import causal_lm, inputs

B, N, D, OUT, E, S = 3, 4, 6, 5, 4, 8.0
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
TYPES = torch.tensor([1, 0, 1])


def layer() -> MoE:
    moe = MoE(AllExperts(D, E), LoRA(E, D, OUT, rank=2, scale=S), shared=nn.Linear(D, OUT))
    sharpen(moe)
    nn.init.normal_(moe.experts.lora_B)
    return moe


def test_loramoe_is_the_papers_formula():
    moe = layer()
    x = torch.randn(B, N, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = []
    for token in x64.flatten(0, 1):
        w = torch.softmax(p["router.weight"] @ token, -1)
        change = sum(w[j] * S * p["experts.lora_B"][j] @ p["experts.lora_A"][j] for j in range(E))
        slow.append((p["shared.weight"] + change) @ token + p["shared.bias"])
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow).view(B, N, OUT), [x64, *p.values()])


@pytest.mark.parametrize("delta", [0.0, 0.3, -0.3])
def test_the_localized_constraint_is_the_papers_formula_and_padding_does_not_count(delta):
    router = AllExperts(D, E)
    sharpen(router)
    x = torch.randn(B, N, D)
    weight = router.weight.detach().double().requires_grad_()
    z = []
    for b in range(B):
        real = [x[b, n].double() for n in range(N) if MASK[b, n]]
        for j in range(E):
            own = (0 if j < E // 2 else 1) == TYPES[b]
            z.append((1 + delta if own else 1 - delta) * sum(torch.softmax(weight @ t, -1)[j] for t in real))
    mean = sum(z) / len(z)
    slow = sum((value - mean) ** 2 for value in z) / (len(z) - 1) / mean**2
    moe = MoE(router, LoRA(E, D))
    moe.context.mask(MASK)
    moe.context.call.inputs["task_type"] = TYPES
    agree(localized(router(x, moe.context), delta), [router.weight], slow, [weight])


def learnt(delta: float) -> float:
    """The weight of a sample's own half of the experts after learning the constraint alone."""
    torch.manual_seed(0)
    router = AllExperts(D, E)
    moe, x = MoE(router, LoRA(E, D)), torch.randn(2, 6, D) + torch.tensor([3.0, -3.0]).view(2, 1, 1)
    moe.context.call.inputs["task_type"] = torch.tensor([0, 1])
    optimizer = torch.optim.Adam(router.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        localized(router(x, moe.context), delta).backward()
        optimizer.step()
    weight = router(x, moe.context).scores.view(2, 6, 2, 2).sum(-1).mean(1)
    return fmean([weight[0, 0].item(), weight[1, 1].item()])


@pytest.mark.parametrize("delta", [0.0, 0.3, -0.3])
def test_minimising_it_gives_a_samples_own_experts_less_if_delta_is_positive(delta):
    assert learnt(delta) == pytest.approx((1 - delta) / 2, abs=0.02)


def test_the_types_of_experts_may_be_others_than_halves():
    moe = layer()
    moe.context.call.inputs["task_type"] = TYPES
    routing = moe.router(torch.randn(B, N, D), moe.context)
    halves = torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(localized(routing, 0.2, halves), localized(routing, 0.2))
    assert (localized(routing, 0.2, 1 - halves) - localized(routing, 0.2)).abs() > 1e-3


def test_a_model_is_told_the_types_of_its_samples_and_all_layers_keep_them():
    model = sparsify(causal_lm("llama"), recipes["loramoe"], verbose=False)
    with extra_inputs(model, task_type=[1, 0]), record(model) as decisions:
        model(**inputs(model))
    assert len(decisions) == 2 * 3
    for routing in decisions.values():
        assert routing.evidence.label.tolist() == [1] * 12 + [0] * 12
        assert localized(routing, 0.5) > localized(routing, 0.0)


def test_without_types_there_is_no_localized_constraint_and_the_model_runs():
    routing = route(AllExperts(D, E), torch.randn(B, N, D))
    with pytest.raises(
        ValueError, match=r"route by AllExperts, and call the model inside extra_inputs\(model, task_type"
    ):
        localized(routing)
