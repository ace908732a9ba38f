"""Every router with all experts, every backend and every dtype: one row to add per new member."""

from copy import deepcopy
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from moeify import Context, MoE, kernels
from moeify.backends import compose
from moeify.experts import (
    FFN,
    Blocks,
    ClampedGlu,
    ClampedSwiGlu,
    Constant,
    Each,
    Glu,
    Identity,
    Latent,
    LoRA,
    LoRAFFN,
    Masked,
    MultiplicativeBias,
    OfInputs,
    Plain,
    Scaled,
    Zero,
)
from moeify.experts.quantized import quantize
from moeify.kernels.cpu import cpp
from moeify.routers import (
    AllExperts,
    BalancedAssignment,
    Capacity,
    Cluster,
    Compete,
    Conditional,
    Cosine,
    DefaultVector,
    DepthAveraged,
    ExpertChoice,
    ExpertGroups,
    ExpertScale,
    ExpertThreshold,
    Extraction,
    FinalMask,
    Frozen,
    GShard,
    Labelled,
    Lookup,
    MoLE,
    MultiGate,
    NoisyTopK,
    NormalizedInput,
    PerGroup,
    Phatgoose,
    ProductKeys,
    ReLU,
    Replay,
    Residual,
    SharedRouting,
    Similarity,
    Sinkhorn,
    Soft,
    SparseMixer,
    SparseMultiGate,
    Threshold,
    TokenRounding,
    TopAny,
    TopK,
    TopP,
    Uniform,
    WeightedInputs,
    sigmoid,
    sqrt_softplus,
)
from moeify.testing import check_backend, check_experts, check_router
from moeify.testing.routers import LAWS
from nights import nightly
from strategies import agree, route, sharpen

D, E = 8, 4

ROUTERS = {
    "softmax": partial(TopK, D, E),
    "switch": partial(TopK, D, E, k=1, normalize=False),
    "sigmoid": partial(
        TopK, D, E, k=3, score=sigmoid, selection_bias=True, expert_groups=ExpertGroups(2, 2, "top2"), scale=2.5
    ),
    "per group of experts": partial(TopK, D, E, k=2, expert_groups=PerGroup(2), normalize=False),
    "sqrt softplus": partial(TopK, D, E, score=sqrt_softplus),
    "logit": partial(TopK, D, E, select="logit", bias=True),
    "per group": partial(TopK, D, E, per="sequence"),
    "capacity": lambda: Capacity(TopK(D, E), factor=0.7),
    "priority": lambda: Capacity(TopK(D, E), factor=0.7, priority="score", overflow="renormalize"),
    "prefix": lambda: Capacity(TopK(D, E), factor=0.7, eval_factor=0.7, per="prefix"),
    "groups of 2": lambda: Capacity(TopK(D, E), factor=0.7, eval_factor=0.7, per=2),
    "labelled": lambda: Labelled(TopK(D, E, per="sequence"), key="input_ids"),
    "noisy": partial(NoisyTopK, D, E),
    "v-moe": partial(NoisyTopK, D, E, noise=1 / E, order="softmax"),
    "llama-moe": partial(NoisyTopK, D, E, hidden=True, floor=0.01),
    "gshard": partial(GShard, D, E),
    "cosine": partial(Cosine, D, E, k=2, dimensions=3),
    "compete": partial(Compete, D, E),
    "top-p": partial(TopP, D, E),
    "threshold": partial(Threshold, D, E),
    "relu": partial(ReLU, D, E),
    "top-any": partial(TopAny, D, E, start=3),
    "expert choice": partial(ExpertChoice, D, E),
    "soft": partial(Soft, D, E, slots=2),
    "sinkhorn": partial(Sinkhorn, D, E, k=2),
    "balanced assignment": partial(BalancedAssignment, D, E),
    "hash": partial(Lookup, D, E, size=12),
    "cluster": partial(Cluster, D, E, key="input_ids", clusters=258, temperature=1.0, dimensions=3),
    "cluster alone": partial(
        Cluster, D, E, key="input_ids", clusters=258, temperature=1.0, dimensions=3, universal=False, gate="twice"
    ),
    "all": partial(AllExperts, D, E),
    "learned hash": partial(Lookup, D, E, size=5, k=3, learned=True, scale=1.5),
    "mmoe": partial(MultiGate, D, E, gates=2),
    "cgc": partial(MultiGate, D, E, gates=2, private=1),
    "ple": partial(Extraction, D, E, tasks=3),
    "bounded union": partial(SparseMultiGate, D, E, gates=2, k=2, union=3),
    "sparsemixer": partial(SparseMixer, D, E, k=3, epsilon=1.0),
    "product keys": partial(ProductKeys, D, E, heads=2, k=2, dimensions=3, init_std=1.0),
    "frozen": partial(Frozen, D, E, k=3),
    "default vector": partial(DefaultVector, D, E),
    "expert threshold": partial(ExpertThreshold, D, E),
    "shared routing": lambda: SharedRouting(TopK(D, E)),
    "residual": partial(Residual, D, E),
    "moe++": partial(Residual, D, E, k=3, zero_experts=1, hidden=6),
    "phatgoose": partial(Phatgoose, D, E),
    "similarity": partial(Similarity, D, E, k=3),
    "mole": partial(MoLE, D, E),
    "uniform": partial(Uniform, D, E),
    "weights": partial(Uniform, D, E, weights=(0.5, -1.0, 0.0, 2.0)),
    "weighted inputs": lambda: WeightedInputs(TopK(D, E, k=1, score=sigmoid, normalize=False)),
    "gemma": lambda: ExpertScale(NormalizedInput(TopK(D, E), D), E),
    "depth averaged": partial(DepthAveraged, D, E, k=2, state=5, init_std=1.0),
    "final mask": lambda: FinalMask(TopK(D, E), 0.4),
    "conditional": lambda: Conditional(TopK(D, E - 1), D, p=0.3),
    "next": lambda: Capacity(TopK(D, E), factor=0.7, overflow="next"),
    "token rounding": lambda: TokenRounding(TopK(D, E), tile=4),
    "replay": lambda: Replay(TopK(D, E), [route(TopK(D, E), torch.randn(3, 4, D))], weights="recomputed"),
}


def learned(experts: nn.Module) -> nn.Module:
    """Low-rank experts start as nothing, and no router learns from that."""
    for name, parameter in experts.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return experts


EXPERTS = {
    "swiglu": partial(FFN, E, D, 6),
    "plain": partial(FFN, E, D, 6, activation=Plain(nn.functional.gelu), bias=True, width_out=D),
    "clamped": partial(FFN, E, D, 6, activation=ClampedGlu(), bias=True),
    "clamped swiglu": partial(FFN, E, D, 6, activation=ClampedSwiGlu()),
    "each": lambda: Each([nn.Sequential(nn.Linear(D, 3 + e), nn.Tanh(), nn.Linear(3 + e, D)) for e in range(E)]),
    "blocks": lambda: Blocks([FFN(1, D, 12), FFN(1, D, 2, activation=Glu(nn.functional.gelu)), Identity(), Zero()]),
    "quantised": lambda: quantize(FFN(E, D, 6, bias=True), 4),
    "scaled": lambda: Scaled(FFN(E, D, 6), 0.5),
    "masked": lambda: Masked(FFN(E, D, 6), 0.4).eval(),  # its draws would differ where a router asks the experts
    "lora": lambda: learned(LoRA(E, D, rank=3, scale=0.5)),
    "adapted": lambda: learned(
        LoRAFFN(nn.Linear(D, 12), nn.Linear(6, D), Glu(nn.functional.silu), LoRA(E, D, 12), LoRA(E, 6, D))
    ),
    "constant": lambda: Blocks([FFN(2, D, 6), Constant(2, D)]),
    "multiplicative bias": lambda: MultiplicativeBias(FFN(E, D, 6, bias=True)),
    "latent": lambda: Latent(FFN(E, 3, 6, bias=True), D, 3),
    "of inputs": lambda: OfInputs(FFN(E, D // 2, 6, width_out=D), [0, 1, 1, 0], 2),
}
UNEVEN = {"prefix", "capacity", "priority", "gshard", "top-p", "threshold", "relu", "expert choice", "soft"}
UNEVEN |= {"groups of 2", "default vector", "expert threshold", "next", "final mask", "mmoe", "cgc", "ple"}
UNEVEN |= {"bounded union", "token rounding", "top-any", "weighted inputs"}
IDS = torch.arange(12).view(3, 4)
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 6e-2}


def combinations():
    """Every router with all experts, run by `auto` or by a backend that is named; by the others, and twice, at night.

    The dtypes and backends take turns, so that every router, and all experts, meet every backend in every dtype.
    """
    settings = list(product(["auto", "compose", "gather"], DTYPES))
    for (i, router), (j, experts) in product(enumerate(ROUTERS), enumerate(EXPERTS)):
        for shift, case in ((0, pytest.param), (4, nightly)):
            backend, dtype = settings[(i + j + shift) % 9]
            yield case(router, experts, backend, dtype)


@pytest.mark.parametrize(("router", "experts", "backend", "dtype"), list(combinations()))
def test_every_combination_is_its_definition(router, experts, backend, dtype, monkeypatch):
    moe = MoE(ROUTERS[router](), EXPERTS[experts](), backend=backend).to(dtype)
    sharpen(moe)
    moe.context.call.inputs["input_ids"] = IDS
    exact = deepcopy(moe).double()
    x = torch.randn(3, 4, D, dtype=dtype, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    if router in UNEVEN and backend == "gather":
        with pytest.raises(ValueError, match="'gather' cannot run this layer"):
            moe(x)
        return

    torch.manual_seed(1)
    y = moe(x)
    monkeypatch.setattr("moeify.experts.ffn.grouped_linear", kernels.naive_grouped_linear)
    torch.manual_seed(1)
    slow = compose(x64, exact.router(x64, moe.context), exact.experts)
    assert y.dtype == dtype
    agree(y, [x, *moe.parameters()], slow, [x64, *exact.parameters()], rtol=DTYPES[dtype], atol=DTYPES[dtype])


SEES = dict.fromkeys(["prefix", "labelled", "per group", "expert choice", "soft", "similarity"], "sequence")
SEES |= dict.fromkeys(
    ["capacity", "groups of 2", "priority", "next", "gshard", "token rounding", "sinkhorn", "balanced assignment"],
    "batch",
)
OUTSIDE = {"mole": ["decisions_are_computed_in_fp32"]}  # its logits are those of experts, which compute in bf16
OUTSIDE["product keys"] = ["a_decision_is_a_map_to_sorted_rows_and_back"]  # two heads may choose one expert


@pytest.mark.parametrize("name", sorted(ROUTERS.keys() - {"replay"}))  # its decisions are for the recorded tokens
def test_every_router_keeps_the_laws(name):
    check_router(lambda *sizes: ROUTERS[name](), sees=SEES.get(name, "token"), without=OUTSIDE.get(name, ()))


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_tells_whether_its_decisions_keep_scores(name):
    layer = MoE(ROUTERS[name](), EXPERTS["swiglu"]())
    layer.context.call.inputs["input_ids"] = IDS
    routing = layer.router(torch.randn(3, 4, D), layer.context)
    assert layer.router.keeps_scores == (routing.scores is not None)


@pytest.mark.parametrize("name", ["expert choice", "soft", "cluster", "uniform"])
def test_routers_of_every_kind_compile_into_one_graph(name):
    others = {law.__name__ for law in LAWS}
    check_router(lambda *sizes: ROUTERS[name](), sees="batch", compiles=True, without=others)


@pytest.mark.parametrize("kind", [Sinkhorn, BalancedAssignment])
def test_decisions_that_take_as_many_rounds_as_they_need_are_one_operator(kind):
    router, x, context = kind(D, E), torch.randn(6, D), Context()
    compiled = torch.compile(router, fullgraph=True, backend="eager")(x, context)
    assert torch.equal(compiled.source, router(x, context).source)


def test_routers_that_start_at_zero_choose_the_first_experts():
    for name in ("softmax", "sigmoid", "logit", "noisy", "gshard", "cosine", "frozen", "phatgoose", "residual"):
        router = ROUTERS[name]().eval()
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.data.zero_()
        indices = router(torch.randn(5, D), Context()).choices.indices
        assert indices.tolist() == [list(range(indices.shape[1]))] * 5, name


@pytest.mark.parametrize("name", EXPERTS)
def test_every_kind_of_experts_keeps_the_laws(name):
    check_experts(lambda *sizes: EXPERTS[name]())


@pytest.mark.parametrize(
    "name", ["compose", "gather", "low_rank", "onednn", "recompute", *([] if cpp.why_not() else ["cpp"])]
)
def test_every_backend_of_a_cpu_keeps_the_laws(name):
    check_backend(name)
