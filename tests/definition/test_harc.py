"""HARC's routers (arXiv 2606.03391) against its linear system, written out token by token."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.compose.router_calibration import calibrate_routers, nearest_router
from moeify.experts import FFN
from moeify.routers import TopK
from tiny_models import causal_lm, mixtral, tokens

E, D, T = 3, 4, 50


def solved(inputs, routers, regularization):
    """The matrix of the system as a sum over models and tokens, and its solution."""
    matrix, wanted = torch.zeros(E * D, E * D).double(), torch.zeros(E * D).double()
    for x, weight in zip(inputs, routers, strict=True):
        for token in x:
            p = (weight @ token).softmax(0)
            hessian = torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(token, token)) / len(x)
            hessian = regularization * hessian + (1 - regularization) * torch.diag(hessian.diagonal())
            matrix += hessian
            wanted += hessian @ weight.flatten()
    return torch.linalg.solve(matrix, wanted).view(E, D)


@pytest.mark.parametrize("regularization", [0.5, 0.9])
def test_the_router_solves_the_system_of_the_paper(regularization):
    torch.manual_seed(0)
    inputs = [torch.randn(T, D).double(), 2 * torch.randn(T // 2, D).double() + 1]
    routers = [torch.randn(E, D).double() for _ in inputs]
    found = nearest_router(inputs, routers, torch.zeros(E, D), regularization, tolerance=1e-12)
    assert torch.allclose(found, solved(inputs, routers, regularization), atol=1e-8)


def test_equal_routers_are_found_again_from_anywhere():
    weight, x = torch.randn(E, D).double(), torch.randn(T, D).double()
    found = nearest_router([x, x + 1], [weight, weight], torch.randn(E, D), tolerance=1e-12)
    assert torch.allclose(found, weight, atol=1e-7)


@pytest.mark.parametrize("build", [mixtral, lambda: MoE(TopK(32, 4), FFN(4, 32, 8))])
def test_routers_of_a_merged_model_decide_more_like_their_sources(build):
    torch.manual_seed(0)
    sources = {"a": build(), "b": build()}
    routers = {name: [m for n, m in s.named_modules() if n.endswith(("gate", "router"))] for name, s in sources.items()}
    for parts in routers.values():
        for router in parts:
            router.weight.data += 0.3 * torch.randn_like(router.weight)
    merged = copy.deepcopy(sources["a"])
    for target, *values in zip(merged.parameters(), *(s.parameters() for s in sources.values()), strict=True):
        target.data = torch.stack([value.data for value in values]).mean(0)
    if isinstance(merged, MoE):
        data = {"a": [torch.randn(2, 40, 32) + 1], "b": [torch.randn(2, 40, 32) - 1]}
    else:
        data = {"a": [{"input_ids": tokens(4)}], "b": [tokens(8)[4:]]}
    before = [p.clone() for n, p in merged.named_parameters()]
    wrong = divergence(merged, sources, data)
    calibrate_routers(merged, sources, data)
    assert divergence(merged, sources, data) < 0.9 * wrong
    changed = [n for (n, p), b in zip(merged.named_parameters(), before, strict=True) if not torch.equal(p, b)]
    assert changed
    assert all(n.endswith(("gate.weight", "router.weight")) for n in changed)


def divergence(merged, sources, data):
    """Of what the first router of every source would decide from what the merged model decides, on the same tokens."""
    (name, router), *_ = ((n, m) for n, m in merged.named_modules() if n.endswith(("gate", "router")))
    total = 0.0
    for source, batches in data.items():
        kept: list[torch.Tensor] = []
        handle = router.register_forward_pre_hook(lambda module, args, to=kept: to.append(args[0].flatten(0, -2)))
        for batch in batches:
            merged(batch) if torch.is_tensor(batch) else merged(**batch)
        handle.remove()
        x = torch.cat(kept)
        theirs = (x @ sources[source].get_submodule(name).weight.T).log_softmax(-1)
        ours = (x @ router.weight.T).log_softmax(-1)
        total += nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean").item()
    return total


def test_what_cannot_be_calibrated_is_refused():
    model = mixtral()
    with pytest.raises(ValueError, match="give batches of every model"):
        calibrate_routers(model, {"a": model}, {"b": []})
    with pytest.raises(ValueError, match="no sparse layer"):
        calibrate_routers(causal_lm("llama"), {"a": model}, {"a": []})
    with pytest.raises(ValueError, match="the sparse layers of 'a' are"):
        calibrate_routers(model, {"a": mixtral(num_hidden_layers=1)}, {"a": []})
