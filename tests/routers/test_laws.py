"""Laws that every router keeps, whatever its paper says."""

from functools import partial

import pytest
import torch
from hypothesis import given
from torch import nn

from moeify import Context, losses, routers
from moeify.experts import FFN, LoRA
from moeify.moe import MoE
from moeify.routers import (
    AllExperts,
    Capacity,
    Conditional,
    Cosine,
    ExpertChoice,
    ExpertThreshold,
    GShard,
    Lookup,
    NoisyTopK,
    Phatgoose,
    ReLU,
    Residual,
    SharedRouting,
    Similarity,
    Sinkhorn,
    Soft,
    SparseMultiGate,
    Threshold,
    TopK,
    TopP,
    Uniform,
)
from strategies import gradients, masks, seeds, sharpen

D, E = 8, 4

TOKEN_BY_TOKEN = {
    "noisy": NoisyTopK,
    "v-moe": partial(NoisyTopK, noise=1 / E, order="softmax"),
    "gshard": GShard,
    "gshard with capacity": lambda *sizes: Capacity(GShard(*sizes), factor=0.5, eval_factor=0.5, priority="choice"),
    "cosine": partial(Cosine, k=2),
    "top-p": TopP,
    "threshold": Threshold,
    "relu": ReLU,
    "relu with capacity": lambda *sizes: Capacity(
        ReLU(*sizes), factor=0.5, eval_factor=0.5, priority="score", overflow="renormalize"
    ),
    "capacity that sends on": lambda *sizes: Capacity(
        TopK(*sizes, k=1, normalize=False), eval_factor=0.6, priority="score", overflow="next"
    ),
    "expert threshold": ExpertThreshold,
    "residual": Residual,
    "conditional": lambda width, experts: Conditional(Capacity(TopK(width, experts - 1), factor=0.7), width),
    "shared routing": lambda *sizes: SharedRouting(TopK(*sizes)),
    "expert choice of the batch": partial(ExpertChoice, per="batch"),
    "phatgoose": Phatgoose,
    "uniform": Uniform,
    "sinkhorn": Sinkhorn,
    "hash": partial(Lookup, size=7),
    "all experts": AllExperts,
    "learned hash": partial(Lookup, size=7, k=2, learned=True),
}
BY_GROUP = {
    "similarity": Similarity,
    "expert choice": ExpertChoice,
    "soft": partial(Soft, slots=2),
    "mobile v-moe": partial(TopK, per="sequence"),
}
ROUTERS = TOKEN_BY_TOKEN | BY_GROUP


def layer(name: str) -> MoE:
    moe = MoE(ROUTERS[name](D, E), FFN(E, D, 6))
    sharpen(moe)
    return moe


def run(moe: MoE, x: torch.Tensor, mask: torch.Tensor | None, ids: torch.Tensor) -> list[torch.Tensor]:
    """Outputs and gradients of the real tokens, under the same noise every time."""
    x = x.clone().requires_grad_()
    moe.context = Context()
    moe.context.mask(mask)
    moe.context.call.inputs["input_ids"] = ids
    torch.manual_seed(7)
    y = moe(x)
    real = ... if mask is None else mask
    y = y[real]
    for_x, *others = gradients(y, [x, *moe.parameters()])
    return [y, for_x[real], *others]


@pytest.mark.parametrize("name", TOKEN_BY_TOKEN)
@given(mask=masks(), seed=seeds)
def test_padding_changes_no_bit_of_any_token_or_gradient(name, mask, seed):
    torch.manual_seed(seed)
    moe, x, ids = layer(name), torch.randn(*mask.shape, D), torch.randint(30, mask.shape)
    padded, alone = run(moe, x, mask, ids), run(moe, x[mask], None, ids[mask])
    assert all(torch.equal(a, b) for a, b in zip(padded, alone, strict=True))


@pytest.mark.parametrize("name", ROUTERS)
@given(mask=masks(), seed=seeds)
def test_what_stands_in_the_padding_is_never_read(name, mask, seed):
    torch.manual_seed(seed)
    moe, x, ids = layer(name), torch.randn(*mask.shape, D), torch.randint(30, mask.shape)
    mask[-1] &= len(mask) == 1  # a sequence may be nothing but padding
    hidden = x.masked_fill(~mask.unsqueeze(-1), float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(run(moe, x, mask, ids), run(moe, hidden, mask, ids), strict=True))
    assert moe(hidden)[~mask].count_nonzero() == 0


@pytest.mark.parametrize("name", BY_GROUP)
@given(seed=seeds)
def test_groups_do_not_see_each_other_however_their_tokens_are_laid_out(name, seed):
    torch.manual_seed(seed)
    moe, x = layer(name), torch.randn(3, 5, D)
    y = moe(x)
    for b in range(3):
        torch.testing.assert_close(moe(x[b : b + 1]), y[b : b + 1])
    moe.context.call.batch_first = False
    torch.testing.assert_close(moe(x.transpose(0, 1)).transpose(0, 1), y)
    moe.context.call.batch_first = True
    moe.context.call.inputs["input_ids"] = torch.zeros(3, 5, dtype=torch.int64)
    torch.testing.assert_close(moe(x.flatten(0, 1)).view(3, 5, D), y)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_causal_router_decides_by_no_later_token_and_others_say_that_they_do(name):
    moe = layer(name).eval()
    x, ids = torch.randn(1, 12, D), torch.arange(12).view(1, 12)
    changed = False
    for seed in range(20):
        torch.manual_seed(seed)
        other = torch.cat([x[:, :6], 3 * torch.randn(1, 6, D)], dim=1)
        before, after = run(moe, x, None, ids)[0], run(moe, other, None, ids)[0]
        changed |= not torch.allclose(before[:, :6], after[:, :6], atol=1e-5)
    assert changed is not (moe.router.causal or name == "sinkhorn")  # sinkhorn looks ahead in training only


@pytest.mark.parametrize("name", ROUTERS)
def test_identical_experts_act_as_one_under_a_router_that_says_so(name):
    moe = layer(name)
    for parameter in moe.experts.parameters():
        parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    x, ids = torch.randn(2, 6, D), torch.arange(12).view(2, 6)
    dense = moe.experts(x.flatten(0, 1), torch.tensor([12, 0, 0, 0])).view(2, 6, D)
    assert torch.allclose(run(moe, x, None, ids)[0], dense, atol=1e-5) is moe.router.weights_sum_to_one


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_work_in_half_precision_and_decide_in_fp32(name):
    moe = layer(name).to(torch.bfloat16)
    x, ids = torch.randn(2, 6, D, dtype=torch.bfloat16), torch.arange(12).view(2, 6)
    y, *others = run(moe, x, None, ids)
    assert y.dtype == torch.bfloat16
    assert all(part.isfinite().all() for part in others)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = moe.router(x, moe.context)
    assert routing.scores is None or routing.scores.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(ROUTERS.keys() - {"soft", "hash", "similarity", "uniform"}))
def test_every_decision_has_a_finite_balance_loss_with_a_gradient(name):
    moe = layer(name)
    moe.context.call.inputs["input_ids"] = torch.arange(12).view(2, 6)
    routing = moe.router(torch.randn(2, 6, D), moe.context)
    loss = losses.balance(routing) + losses.importance(routing) + losses.z(routing)
    loss.backward()
    assert loss.isfinite()
    assert nn.utils.get_total_norm([p.grad for p in moe.router.parameters() if p.grad is not None]) > 0


@pytest.mark.parametrize("kind", [part for part in vars(routers).values() if getattr(part, "settable_k", False)])
def test_a_k_that_is_declared_settable_is_the_number_of_experts_of_the_next_decision(kind):
    layer = MoE(kind(D, E, k=2), LoRA(E, D)).eval()
    for k in (2, 4, 3):
        layer.router.k = k
        assert layer.router(torch.randn(5, D), layer.context).choices.k == k


@pytest.mark.parametrize("kind", [GShard, Lookup, AllExperts, Uniform, SparseMultiGate])
def test_a_number_of_experts_that_belongs_to_the_method_is_not_settable(kind):
    assert not kind.settable_k
