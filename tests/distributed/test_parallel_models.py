"""A sharded model trains as it does in one process: losses, gradients and weights, for every router and all experts."""

from itertools import cycle, product

import pytest
import torch

from distributed.parity import ONE_BATCH, ROUNDED, differences
from test_matrix import EXPERTS, ROUTERS

LAYOUTS = {
    "2 processes, ep 2": (2, {"ep": 2}),
    "2 processes, fsdp": (2, {"ep": 1}),
    "2 processes, replicas": (2, {"ep": 1, "fsdp": False}),
    "4 processes, ep 2 x fsdp 2": (4, {"ep": 2}),
    "4 processes, ep 2 x replicas": (4, {"ep": 2, "fsdp": False}),
    "4 processes, ep 4": (4, {"ep": 4}),
}
SHARED_OUT = {"replay"}  # its decisions are for one batch, and here every process has its own
PAIRS = [(router, "swiglu") for router in ROUTERS if router not in SHARED_OUT] + [("softmax", e) for e in EXPERTS]
RUN_BY_ROUTERS = [("mole", "blocks"), ("default vector", "blocks")]  # of which one process holds no parameter


def tolerance(router, dtype):
    return 1e-5 if dtype == torch.float32 else ROUNDED if router in ONE_BATCH else 1e-12


def agree(ranks, layout, router, experts, limit=None, **settings):
    processes, how = LAYOUTS[layout]
    found = differences(ranks, processes, how | {"limit": limit}, router, experts, **settings)
    within = tolerance(router, settings.get("dtype"))
    return {} if max(found.values()) <= within else {f"{router} of {experts} by {layout}": found}


def test_every_router_and_all_experts_train_as_in_one_process(ranks):
    layouts = cycle(list(LAYOUTS)[:3] * 4 + list(LAYOUTS)[3:])
    differing = {}
    for (router, experts), layout in zip(PAIRS, layouts, strict=False):
        differing |= agree(ranks, layout, router, experts)
    for router, experts in RUN_BY_ROUTERS:
        differing |= agree(ranks, "2 processes, ep 2", router, experts)
    assert not differing


CASES = {
    "starved": {"shapes": [(3, 4), (0, 4)]},
    "one token": {"shapes": [(1, 1), (0, 1)]},
    "collapse": {"collapse": True},
    "steps": {"steps": 3},
    "single": {"dtype": torch.float32, "steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_a_process_without_tokens_and_experts_without_rows_change_nothing(ranks, case):
    differing = {}
    differing |= agree(ranks, "2 processes, ep 2", "softmax", "each", limit=3, **CASES[case])
    differing |= agree(ranks, "4 processes, ep 2 x fsdp 2", "softmax", "swiglu", **CASES[case])
    assert not differing


@pytest.mark.nightly
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_full_product_trains_as_in_one_process(ranks, layout):
    differing = {}
    for router, experts in product(ROUTERS.keys() - SHARED_OUT, EXPERTS):
        if LAYOUTS[layout][1]["ep"] != 4 or experts != "constant":  # two experts of a stack cannot lie in four places
            differing |= agree(ranks, layout, router, experts)
    assert not differing
