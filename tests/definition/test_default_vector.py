"""Default MoE against its two equations, token by token, in fp64, over several batches."""

import multiprocessing

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moeify import MoE
from moeify.experts import FFN, Each
from moeify.routers import Capacity, DefaultVector
from moeify.train.activation_checkpointing import keep_decisions
from ranks import defaults, on_ranks
from strategies import agree, doubled, gradients, sharpen

T, D, E, O = 9, 6, 4, 3  # noqa: E741 (widths in and out)


def layer(**options) -> MoE:
    maps = Each([nn.Linear(D, O, bias=False) for _ in range(E)])
    moe = MoE(DefaultVector(D, E, width_out=O, **options), maps)
    sharpen(moe)
    return moe


def slow_batch(x, p, default, k, beta):
    """The outputs for one batch, and the default vectors after it."""
    experts = [p[f"experts.experts.{j}.weight"] for j in range(E)]
    pi = [torch.stack([torch.exp(w @ token) for w in p["router.weight"]]) for token in x]
    pi = [row / row.sum() for row in pi]
    chosen = [sorted(range(E), key=lambda j, row=row: -row[j].item())[:k] for row in pi]
    after = list(default)
    for j in range(E):
        said = [experts[j] @ token for token, best in zip(x, chosen, strict=True) if j in best]
        if said:
            after[j] = beta * default[j] + (1 - beta) * (sum(said) / len(said)).detach()
    out = [
        sum(row[j] * (experts[j] @ token if j in best else after[j]) for j in range(E))
        for token, row, best in zip(x, pi, chosen, strict=True)
    ]
    return torch.stack(out), after


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_experts_that_are_not_asked_answer_as_they_did_on_average(k, beta):
    moe = layer(k=k, beta=beta)
    p, default = doubled(moe), [torch.zeros(O, dtype=torch.float64)] * E
    for _ in range(3):
        x = torch.randn(T, D, requires_grad=True)
        x64 = x.detach().double().requires_grad_()
        slow, default = slow_batch(x64, p, default, k, beta)
        agree(moe(x), [x, *moe.parameters()], slow, [x64, *p.values()])
    torch.testing.assert_close(moe.router.default, torch.stack(default).float())


def test_the_router_gets_a_gradient_from_every_expert():
    moe = layer(k=1)
    moe(torch.randn(50, D))
    x = torch.randn(1, D)
    index = moe.router(x, moe.context).choices.indices
    row = torch.autograd.grad(moe(x).sum(), moe.router.weight)[0].abs().sum(-1)
    assert (row > 1e-6).all()
    assert index.numel() == 1


def test_evaluation_uses_the_defaults_and_leaves_them():
    moe = layer()
    moe(torch.randn(50, D))
    before = moe.router.default.clone()
    x = torch.randn(T, D)
    assert torch.equal(moe.eval()(x), moe(x))
    with torch.no_grad():
        moe.train()(x)
    assert torch.equal(moe.router.default, before)
    assert moe(x).isfinite().all()
    assert not torch.equal(moe.router.default, before)


def test_defaults_are_saved_and_stay_in_fp32():
    moe = layer().to(torch.bfloat16)
    assert moe.router.default.dtype == torch.float32
    assert "router.default" in moe.state_dict()
    assert moe(torch.randn(T, D, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_repeated_forward_pass_learns_nothing_and_decides_alike():
    x = torch.randn(T, D, requires_grad=True)
    found = []
    for repeat in (False, True):
        torch.manual_seed(0)
        moe = layer()
        y = checkpoint(moe, x, use_reentrant=False, context_fn=keep_decisions) if repeat else moe(x)
        found.append([y, *gradients(y, [x, *moe.parameters()]), moe.router.default])
    for plain, repeated in zip(*found, strict=True):
        torch.testing.assert_close(repeated, plain, rtol=0, atol=0)


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="a rank is forked off a server")
def test_two_ranks_learn_what_one_would_learn_from_both_batches():
    moe, x = layer(), torch.randn(2 * T, D)
    found = on_ranks(2, defaults, moe, x)
    moe(x)
    for learned in found:
        torch.testing.assert_close(torch.tensor(learned), moe.router.default)


def test_padding_gets_nothing_and_changes_nothing():
    moe = layer()
    x, mask = torch.randn(2, 5, D), torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1]]).bool()
    moe(x.masked_fill(~mask.unsqueeze(-1), float("nan"))[mask])
    moe.eval()
    alone = moe(x[mask])
    moe.context.mask(mask)
    y = moe(x)
    assert torch.equal(y[mask], alone)
    assert not y[~mask].any()


def test_every_backend_that_serves_it_agrees(monkeypatch):
    monkeypatch.setenv("MOEIFY_CHECK", "1")
    moe = MoE(Capacity(DefaultVector(D, E), factor=0.5), FFN(E, D, 4))
    x = torch.randn(T, D)
    moe(x)
    moe.eval()
    moe.backend = "compose"
    slow = moe(x)
    moe.backend = "auto"
    torch.testing.assert_close(moe(x), slow)
    moe.backend = "gather"
    with pytest.raises(ValueError, match="'gather' cannot run this layer"):
        moe(x)


def test_one_without_experts_says_so():
    with pytest.raises(ValueError, match="put it into a MoE"):
        DefaultVector(D, E)(torch.randn(T, D), None)


@pytest.mark.parametrize("beta", [-0.1, 1.0])
def test_a_mean_that_never_moves_is_refused(beta):
    with pytest.raises(ValueError, match="choose 0 <= beta < 1"):
        DefaultVector(D, E, beta=beta)
