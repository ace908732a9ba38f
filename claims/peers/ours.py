"""Our answers to the inputs that `claims/independent.py` gives to its peers, under the names of their answers."""

from __future__ import annotations

import itertools
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeify import MoE, losses
from moeify.capacity import per_choice_by_4, per_token
from moeify.experts import FFN, Each, Glu, MultiplicativeBias, Plain
from moeify.ple import ple
from moeify.routers import Capacity, ExpertChoice, GShard, MultiGate, NoisyTopK, Router, Soft
from moeify.routers.noisy import of_all
from moeify.routing import Assignment, Mixture

B, N, D, E, H, SLOTS = 4, 32, 16, 4, 24, 2
Values = dict[str, Tensor]


def inputs() -> Values:
    torch.manual_seed(0)
    grid = itertools.product([0.5, 1.0, 1.05, 1.25, 2.0, 4.0], [16, 49, 197, 1024], [2, 8, 32], [1, 2, 3, 4])
    return {
        "x": torch.randn(B, N, D), "direction": torch.randn(B, N, D), "mask": torch.rand(B, N) < 0.7,
        "router": torch.randn(E, D) * 0.5, "noise": torch.randn(N, E), "draws": torch.rand(B, N),
        "slots": torch.randn(E, SLOTS, D), "scale": torch.tensor(3.0),
        "up": torch.randn(E, H, D) * 0.2, "up_bias": torch.randn(E, H), "down": torch.randn(E, D, H) * 0.2,
        "down_bias": torch.randn(E, D),
        "gate_up": torch.randn(E, 2 * H, D) * 0.2, "gate_up_bias": torch.randn(E, 2 * H),
        "capacity": torch.tensor(list(grid), dtype=torch.float64), "multiplicative_bias": 1 + 0.3 * torch.randn(E, H),
    }  # fmt: skip


def multi_task_inputs() -> Values:
    """Features of rows, weights of three levels of PLE (all experts of tasks, then the shared ones), MMoE's gates."""
    torch.manual_seed(1)
    tasks, private, out = 3, 2, 12
    experts = (tasks + 1) * private
    given = {
        "features": torch.randn(N, D), "ple direction": torch.randn(N, tasks, out),
        "private": torch.tensor([tasks, private]),
    }  # fmt: skip
    for level, width in enumerate((D, out, out)):
        shapes = {
            "up": (experts, H, width), "up_bias": (experts, H), "down": (experts, out, H), "down_bias": (experts, out),
            "gates": (tasks, 2 * private, width), "shared_gate": (1, experts, width),
        }  # fmt: skip
        given |= {f"ple {level} {name}": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    return given | {"mmoe gates": torch.randn(tasks, experts, D) * 0.3}


def run(moe: MoE, x: Tensor, direction: Tensor, named: dict[str, str]) -> tuple[Assignment | Mixture, Values]:
    """The decision; output and gradients under the peer's names, given the name of each of our parameters there."""
    seen = []
    moe.router.register_forward_hook(lambda module, args, routing: seen.append(routing))
    x = x.clone().requires_grad_()
    y = moe(x)
    leaves = {"x": x} | {theirs: moe.get_parameter(ours) for theirs, ours in named.items()}
    found = torch.autograd.grad((y * direction[: len(y)]).sum(), list(leaves.values()))
    return seen[0], {"y": y} | {f"grad {name}": g for name, g in zip(leaves, found, strict=True)}


def build(router: Router, experts: FFN, **values: Tensor) -> MoE:
    moe = MoE(router, experts, backend="compose").train()
    with torch.no_grad():
        for name, value in values.items():
            parameter = moe.get_parameter(name.replace("__", "."))
            parameter.copy_(value.reshape(parameter.shape))
    return moe


def table(routing: Assignment) -> Tensor:
    """The weight of every expert for every token, (B, N, E)."""
    weights = torch.zeros(routing.shape.numel(), E)
    return weights.index_put((routing.source, routing.expert), routing.weight).view(*routing.shape, E)


def against_vmoe(given: Values) -> Values:
    """Our answers under the names of `peers/vmoe_jax.py`; after a bar, how else the quantity can be had."""
    noisy = partial(NoisyTopK, D, E, noise="1/E", order="softmax", expected_load=of_all)
    limited = partial(Capacity, factor=0.7, capacity=per_choice_by_4, priority="choice")
    routers = {
        "top-2": limited(noisy(k=2)),
        "top-1": limited(noisy(k=1), factor=0.5),
        "top-1 batch priority": limited(noisy(k=1), factor=0.5, priority="batch"),
        "top-2 batch priority": limited(noisy(k=2), priority="batch"),
        "top-2 of groups": limited(noisy(k=2), per="sequence"),
        "top-2 of groups of 2": limited(noisy(k=2), per=2),
        "noisy top-2": limited(noisy(k=2)),
        "expert choice": ExpertChoice(D, E, factor=1.7),
        "expert choice by 4": ExpertChoice(D, E, factor=1.7),
    }
    answers: Values = {}
    experts = partial(FFN, E, D, H, activation=Plain(F.gelu))
    stacked = {"experts__up_proj": given["up"], "experts__down_proj": given["down"]}
    names = {"up": "experts.up_proj", "down": "experts.down_proj"}
    for case, router in routers.items():
        inner = "router.router.weight" if isinstance(router, Capacity) else "router.weight"
        moe = build(router, experts(), **{inner.replace(".", "__"): given["router"]}, **stacked)
        moe.train(case == "noisy top-2")
        if isinstance(router, Capacity):
            router.eval_factor = router.factor
        x = given["x"] if case.startswith("expert choice") or "of groups" in case else given["x"][:1]
        with patch("torch.randn_like", return_value=given["noise"]):
            routing, found = run(moe, x, given["direction"], names | {"router": inner})
        answers |= {f"{case}/weights": table(routing)} | {f"{case}/{name}": value for name, value in found.items()}
        if case in ("top-1", "noisy top-2"):
            first = torch.bincount(routing.scores.argmax(-1), minlength=E)
            answers[f"{case}/gshard_loss"] = losses.balance(routing)
            answers[f"{case}/gshard_loss | balance(demand=first choices)"] = losses.balance(routing, assigned=first)
            answers[f"{case}/importance_loss"] = losses.score_importance(routing)
        if case == "noisy top-2":
            answers[f"{case}/load_loss"] = losses.load_loss(routing)

    mixing = {"router__queries": given["slots"], "router__scale": given["scale"]}
    moe = build(Soft(D, E, slots=SLOTS), experts(), **mixing, **stacked)
    names |= {"slots": "router.queries", "scale": "router.scale"}
    for case in ("soft", "soft as shipped"):
        routing, found = run(moe, given["x"], given["direction"], names)
        answers |= {f"{case}/into": routing.into, f"{case}/out_of": routing.out_of}
        answers |= {f"{case}/{name}": value for name, value in found.items()}
    answers["capacity"] = torch.tensor([
        per_choice_by_4(factor, int(tokens), int(experts), int(k))
        for factor, tokens, experts, k in given["capacity"].tolist()
    ])  # fmt: skip
    return answers


def against_deepctr(given: Values) -> Values:
    """Our answers under the names of `peers/deepctr.py`, whose experts end in an activation."""
    tasks, private = given["private"].tolist()
    count, out = len(given["ple 0 up"]), given["ple 0 down"].shape[1]

    def experts(number: int, width: int) -> Each:
        layers = [(nn.Linear(width, H), nn.ReLU(), nn.Linear(H, out), nn.ReLU()) for _ in range(number)]
        return Each(nn.Sequential(*each) for each in layers)

    gated = MoE(MultiGate(D, count, gates=tasks), experts(count, D), backend="compose")
    leaves = of_each("ple 0", gated.experts, given)
    with torch.no_grad():
        gated.router.weight.copy_(given["mmoe gates"])
    answers = features("mmoe", gated, leaves, given)
    answers["mmoe/grad mmoe gates"] = gated.router.weight.grad

    shared = range(tasks * private, count)
    sees = torch.tensor([[*range(k * private, (k + 1) * private), *shared] for k in range(tasks)])
    for levels in (1, 2, 3):
        model = ple(D, out, experts, tasks=tasks, levels=levels, private=private, shared=private)
        leaves = {}
        for number, level in enumerate(model.levels):
            gates, name = level.router.weight, f"ple {number}"
            leaves |= of_each(name, level.experts.experts, given)
            with torch.no_grad():
                gates[:tasks].scatter_(1, sees.unsqueeze(-1).expand(-1, -1, gates.shape[-1]), given[f"{name} gates"])
                gates[tasks:] = given[f"{name} shared_gate"][: len(gates) - tasks]
        case = f"ple of {levels} level{'s' * (levels > 1)}"
        answers |= features(case, model, leaves, given)
        for number, level in enumerate(model.levels):
            grad = level.router.weight.grad
            answers[f"{case}/grad ple {number} gates"] = torch.stack([grad[k][sees[k]] for k in range(tasks)])
            if len(grad) > tasks:
                answers[f"{case}/grad ple {number} shared_gate"] = grad[tasks:]
    return answers


def of_each(name: str, experts: Each, given: Values) -> dict[str, list[Tensor]]:
    """The parameters of experts by their names in the inputs, whose values they get."""
    each = experts.experts
    leaves = {
        f"{name} up": [e[0].weight for e in each], f"{name} up_bias": [e[0].bias for e in each],
        f"{name} down": [e[2].weight for e in each], f"{name} down_bias": [e[2].bias for e in each],
    }  # fmt: skip
    with torch.no_grad():
        for part, parameters in leaves.items():
            for parameter, value in zip(parameters, given[part], strict=True):
                parameter.copy_(value)
    return leaves


def features(case: str, model: nn.Module, leaves: dict[str, list[Tensor]], given: Values) -> Values:
    """The features of the tasks, and their gradients."""
    x = given["features"].clone().requires_grad_()
    y = model(x)
    (y * given["ple direction"]).sum().backward()
    gradients = {name: torch.stack([parameter.grad for parameter in leaf]) for name, leaf in leaves.items()}
    return {f"{case}/y": y} | {f"{case}/grad {name}": grad for name, grad in {"x": x.grad, **gradients}.items()}


def against_lucidrains(given: Values) -> Values:
    """Our answers under the names of `peers/lucidrains.py`."""
    answers: Values = {}
    soft = build(
        Soft(D, E, slots=SLOTS), FFN(E, D, H, activation=Plain(F.gelu), bias=True),
        router__queries=given["slots"], router__scale=torch.tensor(float(D)),
        experts__up_proj=given["up"], experts__up_proj_bias=given["up_bias"],
        experts__down_proj=given["down"], experts__down_proj_bias=given["down_bias"],
    )  # fmt: skip
    for case, mask in (("soft", None), ("soft with padding", given["mask"])):
        x = given["x"].clone().requires_grad_()
        soft.context.mask(mask)
        real = slice(None) if mask is None else mask
        y = soft(F.normalize(x, dim=-1) * D**0.5)[real]
        leaves = {"x": x, "slots": soft.router.queries, "up": soft.experts.up_proj}
        found = torch.autograd.grad((y * given["direction"][real]).sum(), list(leaves.values()))
        answers |= {f"{case}/y": y} | {f"{case}/grad {name}": g for name, g in zip(leaves, found, strict=True)}
    soft.context.clear()
    answers["soft/y | of the tokens as they are"] = soft(given["x"])

    names = {"router": "router.router.weight", "gate_up": "experts.gate_up_proj"}
    for case in ("top-2", "top-2 straight-through", "top-2 of groups", "top-2 multiplicative bias"):
        moe = build(
            Capacity(GShard(D, E), factor=0.8, capacity=per_token, priority="choice", per="sequence"),
            FFN(E, D, H, activation=Glu(F.gelu), bias=True),
            router__router__weight=given["router"],
            experts__gate_up_proj=given["gate_up"], experts__gate_up_proj_bias=given["gate_up_bias"],
            experts__down_proj=given["down"], experts__down_proj_bias=given["down_bias"],
        )  # fmt: skip
        if case == "top-2 multiplicative bias":
            moe.replace(experts=MultiplicativeBias(moe.experts))
            moe.experts.multiplicative_bias.data.copy_(given["multiplicative_bias"])
            names |= {"gate_up": "experts.experts.gate_up_proj", "multiplicative_bias": "experts.multiplicative_bias"}
        x = given["x"] if case.endswith("groups") else given["x"][:1]
        with patch("torch.rand_like", return_value=given["draws"][: len(x)].flatten()):
            routing, found = run(moe, x, given["direction"], names)
        answers |= {f"{case}/{name}": value for name, value in found.items()} | {f"{case}/z": losses.z(routing)}
        if case == "top-2":
            first = torch.bincount(routing.scores.argmax(-1), minlength=E)
            answers[f"{case}/balance"] = losses.balance(routing)
            answers[f"{case}/balance | balance(demand=first choices)"] = losses.balance(routing, assigned=first)
            kept = torch.bincount(routing.expert[routing.rank == 0], minlength=E)
            share = kept.sum() / len(routing.scores)
            answers[f"{case}/balance | first choices kept, per token"] = share * losses.balance(routing, assigned=kept)
    return answers
