"""Laws of routers beside those of `moeify.testing`, which `test_matrix.py` checks."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moeify import Context, losses, routers
from moeify.documents import Packing
from moeify.experts import FFN, LoRA
from moeify.moe import MoE
from moeify.routers import (
    AllExperts,
    BalancedAssignment,
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
    TopAny,
    TopK,
    TopP,
    Uniform,
)
from moeify.testing import check_router
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
    "top-any": TopAny,
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
    "balanced assignment": BalancedAssignment,
    "hash": partial(Lookup, size=7),
    "all experts": AllExperts,
    "learned hash": partial(Lookup, size=7, k=2, learned=True),
}
BY_GROUP = {
    "similarity": Similarity,
    "expert choice": ExpertChoice,
    "soft": partial(Soft, slots=2),
    "mobile v-moe": partial(TopK, per="sequence"),
    "slots of a sequence": lambda *sizes: Capacity(
        TopK(*sizes), factor=0.7, eval_factor=0.7, priority="score", per="sequence"
    ),
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


@pytest.mark.parametrize("name", BY_GROUP)
@pytest.mark.parametrize("tells", ["position_ids", "attention_mask"])
@given(rows=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=2), seed=seeds)
def test_documents_in_packed_rows_are_routed_as_each_is_alone(name, tells, rows, seed):
    torch.manual_seed(seed)
    moe, longest = layer(name), max(sum(lengths) for lengths in rows)
    x = torch.randn(len(rows), longest, D)
    told = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in ("position_ids", "attention_mask")}
    mask = torch.arange(longest) < torch.tensor([sum(lengths) for lengths in rows]).unsqueeze(1)
    for row, lengths in enumerate(rows):
        told["position_ids"][row, : sum(lengths)] = torch.cat([torch.arange(length) for length in lengths])
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        told["attention_mask"][row, : sum(lengths)] = 1 + numbers  # 0 is padding
    moe.context.call.packing = Packing.of({tells: told[tells]}, (len(rows), longest))
    moe.context.mask(mask)
    together = moe(x)
    for row, lengths in enumerate(rows):
        moe.context = Context()
        for document, y in zip(x[row, mask[row]].split(lengths), together[row, mask[row]].split(lengths), strict=True):
            torch.testing.assert_close(y, moe(document.unsqueeze(0))[0])


@pytest.mark.parametrize("name", [name for name in ROUTERS if "capacity" in name or "batch" in name])
def test_routers_that_see_the_batch_keep_the_laws(name):
    check_router(ROUTERS[name], sees="batch")


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
