"""Routing by similarity against its definition, and centroids against means that are taken by hand."""

from functools import partial

import pytest
import torch
from torch import nn

from moeify import Context, MoE, Recipe, record, sparsify
from moeify.compose import set_centroids
from moeify.experts import LoRA
from moeify.find import linears
from moeify.routers import Similarity
from moeify.sparsify import frozen, lora
from strategies import agree, doubled
from tiny_models import TINY, inputs

D, E, TAU = 6, 4, 0.3
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()


@pytest.mark.parametrize("per", ["sequence", "token"])
@pytest.mark.parametrize("k", [1, 2, None])
def test_the_layer_is_a_loop_over_sequences(k, per):
    moe = MoE(Similarity(D, E, k=k, temperature=TAU, per=per), LoRA(E, D, rank=3))
    nn.init.normal_(moe.experts.lora_B)
    moe.context.mask(MASK)
    x = torch.randn(3, 4, D, requires_grad=True)
    p, x64, c = doubled(moe), x.detach().double().requires_grad_(), moe.router.centroids.double()
    slow = torch.zeros(3, 4, D, dtype=torch.float64)
    for b in range(3):
        real = [n for n in range(4) if MASK[b, n]]
        for n in real:
            u = sum(x64[b, m] for m in real) / len(real) if per == "sequence" else x64[b, n]
            z = [(u @ c[j]) / (u.norm() * c[j].norm()) / TAU for j in range(E)]
            kept = sorted(range(E), key=lambda j: -z[j].item())[:k]
            for j in kept:
                w = z[j].exp() / sum(z[i].exp() for i in kept)
                slow[b, n] += w * p["experts.lora_B"][j] @ (p["experts.lora_A"][j] @ x64[b, n])
    agree(moe(x), [x, *moe.parameters()], slow, [x64, *p.values()])


def test_only_a_decision_per_token_looks_at_no_later_one():
    assert Similarity(D, E, per="token").causal
    assert not Similarity(D, E).causal


def library() -> nn.Module:
    recipe = Recipe(where=linears("query|value"), num_experts=2, router=Similarity, experts=lora, shared=frozen)
    return sparsify(TINY["bert"](), recipe, verbose=False)


def test_centroids_are_the_means_of_what_routers_read():
    model = library()
    examples = [[inputs(model, batch=1, seed=seed), inputs(model, batch=2, seed=seed + 9)] for seed in range(2)]
    set_centroids(model, examples)
    for e, own in enumerate(examples):
        read: dict[str, list] = {name: [] for name, part in model.named_modules() if isinstance(part, MoE)}
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(lambda m, a, rows=rows: rows.append(a[0].flatten(0, 1)))
            for name, rows in read.items()
        ]
        for example in own:
            model(**example)
        for hook in hooks:
            hook.remove()
        for name, rows in read.items():
            torch.testing.assert_close(model.get_submodule(name).router.centroids[e], torch.cat(rows).mean(0))


def test_a_sequence_goes_to_the_expert_whose_examples_it_is_like():
    model = library()
    own = [torch.full((1, 12), 5), torch.full((1, 12), 17)]
    set_centroids(model, [[ids] for ids in own])
    with record(model) as decisions:
        model(torch.cat([own[1], own[0]]))
    first = next(iter(decisions.values()))
    assert first.scores.argmax(-1).tolist() == [1, 0]


def test_examples_are_needed_for_every_expert():
    model = library()
    with pytest.raises(ValueError, match="2 experts need 2 lists of examples, none empty; got lists of 1, 0"):
        set_centroids(model, [[inputs(model)], []])
    with pytest.raises(ValueError, match="has no Similarity router"):
        set_centroids(TINY["bert"](), [])
    with pytest.raises(ValueError, match="temperature=-1 divides"):
        Similarity(D, E, temperature=-1)
    assert partial(Similarity, k=1)(D, E)(torch.randn(3, 4, D), Context()).counts.sum() == 12
