"""Cases for ranks: a model that transformers' engine shards has the losses and gradients of the same model on one."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import distributed as dist

from moeify import Recipe, sparsify
from moeify.parallel import distribute
from moeify.routers import Capacity, Soft, TopK
from moeify.sparsify import fresh, read_recipe
from tiny_models import causal_lm, deepseek_v3, gpt2, inputs, mixtral, qwen3_moe, vit

NATIVE = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3}
OURS = {
    "llama": (partial(causal_lm, "llama"), Recipe(num_experts=4)),
    "qwen3": (partial(causal_lm, "qwen3"), Recipe(num_experts=4, router=partial(TopK, k=1, normalize=False))),
    "biases": (gpt2, Recipe(num_experts=4)),
    "capacity": (
        partial(causal_lm, "llama"),
        Recipe(num_experts=4, router=lambda d, e: Capacity(TopK(d, e), eval_factor=0.5), experts=fresh),
    ),
    "soft": (vit, Recipe(num_experts=4, router=Soft)),
}


def build(name):
    """A tiny model of transformers, or one that is sparsified by a recipe of `OURS` or of the catalogue."""
    torch.manual_seed(0)
    if name in NATIVE:
        return NATIVE[name]()
    dense, recipe = OURS.get(name, (partial(causal_lm, "llama"), None))
    try:
        return sparsify(dense(), recipe or read_recipe(name), verbose=False)
    except ValueError:  # not causal
        torch.manual_seed(0)
        return sparsify(vit(), read_recipe(name), verbose=False)


def batch(model, shares):
    """Samples of a batch for every share, and of texts some padding; the last share is nothing but padding but once."""
    made = inputs(model, batch=2 * shares)
    if "input_ids" in made:
        mask = torch.ones_like(made["input_ids"])
        mask[0, 9:], mask[-2:, 2:] = 0, 0
        made |= {"attention_mask": mask, "labels": made["labels"].where(mask.bool(), -100)}
    return made


def whole(tensor):
    """A tensor of which every rank holds a part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def difference(rank, ranks, name, sizes, limit=None):
    """Case: how far the loss is from that of one process, and the worst gradient, relative to its norm."""
    warnings.simplefilter("ignore")
    one, placed = build(name), distribute(build(name), sizes)
    if limit is not None:
        for sender in _senders(placed):
            sender.limit = limit
    replicas = sizes.get("tp_size", 1)
    shares = ranks // replicas
    parts = [{key: value.chunk(shares)[i] for key, value in batch(one, shares).items()} for i in range(shares)]
    expected = sum(one(**part).loss for part in parts) / shares
    expected.backward()
    loss = placed(**parts[rank // replicas]).loss
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    wanted = {key: p.grad for key, p in one.named_parameters()}
    worst = {key: _relative(p.grad, wanted[key]) for key, p in placed.named_parameters()}
    return abs(total.item() / ranks / expected.item() - 1), max(worst.values()), max(worst, key=worst.__getitem__)


def _senders(model):
    from moeify.hf.expert_parallel import implementation_of

    return [sender for module in model.modules() if (sender := implementation_of(module)) is not None]


def most_rows(rank, ranks, name, sizes, limit):
    """Case: what `difference` returns, and the most rows that this rank computes at once."""
    from moeify.hf.expert_parallel import RowsToExperts

    seen, local = [], RowsToExperts._local
    RowsToExperts._local = lambda self, rows, *rest: (seen.append(len(rows)), local(self, rows, *rest))[1]
    try:
        return *difference(rank, ranks, name, sizes, limit)[:2], max(seen)
    finally:
        RowsToExperts._local = local


def _relative(found, wanted):
    if found is None or wanted is None:
        return 0.0 if all(g is None or whole(g).norm() == 0 for g in (found, wanted)) else float("inf")
    error = (whole(found) - wanted).norm().item()
    return error / wanted.norm().item() if wanted.norm() > 1e-6 else error


def rows_sent(rank, ranks, name):
    """Case: the rows that this rank sends to all ranks in a forward pass, and the real tokens that it has."""
    from moeify.hf.expert_parallel import Exchange

    placed = distribute(build(name), {"fsdp_size": ranks, "ep_size": ranks})
    part = {key: value.chunk(ranks)[rank] for key, value in batch(placed, ranks).items()}
    sent, apply = [], Exchange.apply
    Exchange.apply = lambda rows, receive, send, group: (sent.append(sum(send)), apply(rows, receive, send, group))[1]
    try:
        with torch.no_grad():
            placed(**part)
    finally:
        del Exchange.apply
    return sent[::2], int(part["attention_mask"].sum())


def refused(rank, ranks, name, sizes):
    """Case: what `distribute` raises."""
    try:
        distribute(build(name), sizes)
    except ValueError as error:
        return type(error).__name__, str(error)
    return None


def other_weights(rank, ranks):
    """Case: what `distribute` raises where ranks hold different models."""
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3, rank] += rank
    try:
        distribute(model, {"fsdp_size": ranks})
    except ValueError as error:
        return str(error)
    return None


def forgotten(rank, ranks):
    """Case: what `distribute` raises where a rule of the plan is missing."""
    from moeify.parallel import distribute as module

    model = mixtral()
    del model.model._ep_plan["layers.*.mlp.experts.down_proj"]
    del model._ep_plan["model.layers.*.mlp.experts.down_proj"]
    try:
        module(model, {"fsdp_size": ranks, "ep_size": ranks})
    except RuntimeError as error:
        return str(error)
    return None


def sizes_kept(rank, ranks):
    """Case: what a placed layer says of its experts, and what one rank holds of them."""
    placed = distribute(build("llama"), {"fsdp_size": ranks, "ep_size": ranks})
    experts = placed.model.layers[0].mlp.experts
    return experts.num_experts, tuple(experts.down_proj.shape), tuple(experts.down_proj.to_local().shape)
