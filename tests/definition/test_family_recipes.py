"""The sparse layer that a recipe makes is the MoE block of its family in transformers: same output, same gradients."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig

from moeify import MoE
from moeify.experts import FFN, ClampedSwiGlu, Glu
from moeify.find import DenseFFN
from moeify.routers import CappedSigmoid, ExpertGroups, Lookup, Router, TopK, sigmoid
from moeify.sparsify import Recipe, dense, fresh, nothing, recipes

WIDTH, HIDDEN = 16, 24


@dataclass(frozen=True)
class Native:
    """An MoE block of transformers.

    Attributes:
        recipe: whose layers compute the same.
        module: the folder of its file.
        name: its class.
        config: fields beside those that the recipe sets.
        arguments: of its constructor, after the configuration.
        model_type: of its configuration, if it is not the folder.
    """

    recipe: Recipe
    module: str
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    arguments: tuple = ()
    model_type: str | None = None


def of(recipe: str, module: str, name: str, *arguments: Any, model_type: str | None = None, **config: Any) -> Native:
    return Native(recipes[recipe], module, name, config, arguments, model_type)


def also(native: Native, **changes: Any) -> Native:
    return replace(native, recipe=replace(native.recipe, **changes))


TOP2 = ExpertGroups(4, 2, "top2")
SPARSE = {"mlp_layer_types": ["moe", "moe"], "num_hidden_layers": 2}
BLOCKS = [
    of("deepseek_v4", "deepseek_v4", "DeepseekV4SparseMoeBlock", 0, **SPARSE),
    of("glm4", "glm4_moe", "Glm4MoeMoE"),
    of("glm5", "hy_v3", "HYV3MoE"),
    of("glm5", "glm_moe_dsa", "GlmMoeDsaMoE"),
    of("glm5", "glm4_moe_lite", "Glm4MoeLiteMoE"),
    of("glm5", "dots1", "Dots1MoE"),
    of("glm5", "exaone_moe", "ExaoneMoeSparseMoEBlock"),
    of("glm5", "solar_open", "SolarOpenMoE"),
    also(
        of("glm5", "glm5_next", "Glm5NextTextMoE", model_type="glm5_next_text", num_key_value_heads=2),
        experts=partial(fresh, activation=ClampedSwiGlu()),
    ),
    of("kimi", "kimi_linear", "KimiLinearMoE"),
    of("ling", "bailing_hybrid", "BailingHybridMoE"),
    of("deepseek", "deepseek_v3", "DeepseekV3MoE"),
    of("deepseek", "deepseek_v32", "DeepseekV32MoE"),
    of("minimax_m2", "minimax_m2", "MiniMaxM2SparseMoeBlock", router_jitter_noise=0.0),
    of("lfm2", "lfm2_moe", "Lfm2MoeSparseMoeBlock"),
    of("gpt_oss", "gpt_oss", "GptOssMLP"),
    of("qwen3_next", "qwen3_next", "Qwen3NextSparseMoeBlock"),
    of("qwen3_next", "qwen2_moe", "Qwen2MoeSparseMoeBlock"),
    of("qwen3_next", "qwen3_5_moe", "Qwen3_5MoeSparseMoeBlock", model_type="qwen3_5_moe_text"),
    of("qwen3", "qwen3_moe", "Qwen3MoeSparseMoeBlock"),
    of("mixtral", "mixtral", "MixtralSparseMoeBlock"),
    of("olmoe", "olmoe", "OlmoeSparseMoeBlock"),
    of("llama4", "llama4", "Llama4TextMoe", model_type="llama4_text"),
    of("mistral_large4", "mistral_large4", "MistralLarge4TextMoE", model_type="mistral_large4_text"),
    also(
        of("mistral_large4", "mistral4", "Mistral4MoE"),
        router=partial(TopK, k=4, expert_groups=TOP2, scale=1.5),
    ),
    of("granite", "granitemoehybrid", "GraniteMoeHybridMoE", mamba_n_heads=4, mamba_d_head=8),
    of("granite", "granitemoeshared", "GraniteMoeSharedMoE"),
    of("hunyuan", "hunyuan_v1_moe", "HunYuanMoEV1Moe", 0),
    of("ernie", "ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock"),
    of("flex_olmo", "flex_olmo", "FlexOlmoSparseMoeBlock"),
    of("jamba", "jamba", "JambaSparseMoeBlock"),
    of("glm4", "afmoe", "AfmoeSparseMoeBlock"),
    of("glm5", "axk2", "AXK2MoE"),
    of("glm5", "hy_v4", "HYV4MoE"),
    of("glm5", "glm4v_moe", "Glm4vMoeTextMoE", model_type="glm4v_moe_text"),
    of("granite", "aria", "AriaTextMoELayer", model_type="aria_text"),
    of("qwen3", "mellum", "MellumSparseMoeBlock"),
    of("qwen3", "qwen3_vl_moe", "Qwen3VLMoeTextSparseMoeBlock", model_type="qwen3_vl_moe_text"),
    of("qwen3_next", "qwen4_exp", "Qwen4ExpTextSparseMoeBlock", model_type="qwen4_exp_text"),
    of("minimax_m2", "mimo_v2_flash", "MiMoV2FlashMoE"),
    of("mixtral", "minimax", "MiniMaxSparseMoeBlock"),
    of("glm5", "laguna", "LagunaSparseMoeBlock", moe_routed_scaling_factor=2.5),
    also(
        of("glm5", "laguna", "LagunaSparseMoeBlock", moe_routed_scaling_factor=2.5, moe_router_logit_softcapping=0.3),
        router=partial(TopK, k=4, score=CappedSigmoid(0.3), selection_bias=True, scale=2.5),
    ),
    also(of("minimax_m2", "flint", "FlintSparseMoeBlock"), router=partial(TopK, k=4, score=sigmoid), shared=dense),
    also(
        of("glm4", "kolibri1", "Kolibri1SparseMoeBlock"),
        router=partial(TopK, k=4, score=sigmoid, select="logit", selection_bias=True),
    ),
    also(of("gemma4", "gemma4", "Gemma4TextRouter", model_type="gemma4_text"), shared=nothing),
    also(
        of("gemma4", "diffusion_gemma", "DiffusionGemmaTextRouter", model_type="diffusion_gemma_text"), shared=nothing
    ),
    of("jetmoe", "jetmoe", "JetMoeMoE", activation_function="silu"),
]


def ids(native: Native) -> str:
    return f"{native.module}-{native.name}"


def layer(recipe: Recipe) -> tuple[MoE, TopK]:
    """The layer that a recipe makes of a dense network, without a shared module, and its token choice."""
    dense = DenseFFN(
        [nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2)], nn.Linear(HIDDEN, WIDTH, bias=False), Glu(F.silu)
    )
    moe = MoE(recipe.router(WIDTH, recipe.num_experts), recipe.experts(dense, recipe.num_experts))
    router = moe.router
    while isinstance(inside := getattr(router, "router", None), Router):
        router = inside
    return moe, router


def block(native: Native, experts: FFN, router: TopK) -> nn.Module:
    """A block of the same sizes, with random weights; every family finds the fields it reads."""
    groups = router.expert_groups or ExpertGroups(1, 1)
    sizes = [
        "intermediate_size",
        "moe_intermediate_size",
        "shared_intermediate_size",
        "shared_expert_intermediate_size",
    ]
    counts = ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"]
    ks = ["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"]
    fields = {"hidden_size": WIDTH, "num_attention_heads": 2, "hidden_act": "silu", "norm_topk_prob": router.normalize}
    fields["hidden_activation"] = "silu"
    fields |= dict.fromkeys(sizes, experts.hidden) | dict.fromkeys(counts, experts.num_experts)
    fields |= dict.fromkeys(ks, router.k) | dict.fromkeys(["n_group", "num_expert_group"], groups.count)
    fields |= {"topk_group": groups.keep} | dict.fromkeys(
        ["n_shared_experts", "num_shared_experts", "moe_num_shared_experts"], 1
    )
    fields |= dict.fromkeys(["routed_scaling_factor", "router_scaling_factor"], router.scale)
    config = AutoConfig.for_model(native.model_type or native.module, **fields | native.config)
    config._experts_implementation = "eager"
    module = importlib.import_module(f"transformers.models.{native.module}.modeling_{native.module}")
    made = getattr(module, native.name)(config, *native.arguments)
    if native.name.endswith("TextRouter"):
        experts_class = getattr(module, native.name.replace("Router", "Experts"))
        made = GemmaLayer(made, experts_class(config))
    if native.module == "jetmoe":
        made = JetMoeLayer(made)
    if native.module.startswith("granite"):
        made = GraniteLayer(made, getattr(module, native.name.removesuffix("MoE") + "MLP")(config))
    for tensor in made.parameters():
        nn.init.normal_(tensor, std=0.3)
    if hasattr(experts.activation, "limit"):
        made.experts.gate_up_proj.data.mul_(20)  # so that many values are clamped
    return made.eval()


class GraniteLayer(nn.Module):
    """A block and the shared network, which its decoder layer adds."""

    def __init__(self, routed: nn.Module, shared_mlp: nn.Module) -> None:
        super().__init__()
        self.routed, self.shared_mlp = routed, shared_mlp
        self.router, self.experts = routed.router, routed.experts

    def forward(self, x: Tensor) -> Tensor:
        return self.routed(x) + self.shared_mlp(x)


class GemmaLayer(nn.Module):
    """A router and experts that read the same tokens; their decoder layer normalises those of the experts."""

    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x: Tensor) -> Tensor:
        _, weights, chosen = self.router(x.flatten(0, 1))
        return self.experts(x.flatten(0, 1), chosen, weights)


class JetMoeLayer(nn.Module):
    """A block with the names that others have; its vector lies where others have a shared expert."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.router, self.experts, self.shared_expert = block, block.router, nn.Module(), nn.Module()
        self.experts.gate_up_proj = block.input_linear.weight
        self.experts.down_proj = block.output_linear.weight
        self.shared_expert.bias = block.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def same(moe: MoE, router: nn.Module, theirs: nn.Module) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Our parameters with theirs, and whether theirs are transposed."""
    gate = theirs.gate if hasattr(theirs, "gate") else theirs.router
    by_shape = {p.shape: p for p in gate.parameters() if p.requires_grad}
    for ours in moe.router.parameters():
        yield ours, by_shape[ours.shape], False
    for name, ours in moe.experts.named_parameters():
        other = getattr(theirs.experts, name)
        yield ours, other, other.shape != ours.shape
    if hasattr(theirs, "shared_expert_gate"):
        yield moe.shared.gate.weight, theirs.shared_expert_gate.weight, False
    if moe.shared is not None:
        inside = getattr(moe.shared, "dense", moe.shared)
        others = dict(shared_of(theirs).named_parameters())
        yield from ((ours, others[name], False) for name, ours in inside.named_parameters())


def shared_of(theirs: nn.Module) -> nn.Module | None:
    found = [getattr(theirs, name, None) for name in ("shared_experts", "shared_expert", "shared_mlp")]
    return next((module for module in found if module is not None), None)


def selection_biases(module: nn.Module) -> list[Tensor]:
    named = [*module.named_buffers(), *module.named_parameters()]
    return [t for name, t in named if name.endswith(("correction_bias", "expert_bias", "selection_bias"))]


def run(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Output and input gradient; the gradients of the parameters are left in the module."""
    x = torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = module(x)
    y = (y[0] if isinstance(y, tuple) else y).view(x.shape)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    return y.detach(), x.grad


def close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-6 of the largest number of a tensor."""
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("native", BLOCKS, ids=ids)
def test_a_recipe_makes_the_block_of_its_family(native: Native):
    torch.manual_seed(0)
    moe, router = layer(native.recipe)
    theirs = block(native, moe.experts, router)
    shared = shared_of(theirs)
    moe.shared = native.recipe.shared(shared if shared is not None else nn.Identity(), WIDTH)
    assert (moe.shared is None) == (shared is None)
    pairs = list(same(moe, router, theirs))
    assert len(pairs) == len(list(moe.parameters())) == len([p for p in theirs.parameters() if p.requires_grad])
    with torch.no_grad():
        for ours, other, transposed in pairs:
            ours.copy_(other.transpose(1, 2) if transposed else other)
        bias = torch.randn(moe.experts.num_experts) * 0.1
        for buffer in (biases := selection_biases(theirs) + selection_biases(moe)):
            buffer.copy_(bias.view(buffer.shape))
        assert len(biases) in (0, 2)
    (y, dx), (their_y, their_dx) = run(moe), run(theirs)
    close(y, their_y)
    close(dx, their_dx)
    for ours, other, transposed in pairs:
        close(ours.grad, other.grad.transpose(1, 2) if transposed else other.grad)


def test_the_hash_layers_of_deepseek_v4_are_lookups():
    config = {"mlp_layer_types": ["hash_moe", "moe"], "num_hidden_layers": 2, "vocab_size": 40}
    native = of("deepseek_v4", "deepseek_v4", "DeepseekV4SparseMoeBlock", 0, **config)
    torch.manual_seed(0)
    moe, router = layer(native.recipe)
    theirs = block(native, moe.experts, router)
    hashed = Lookup(WIDTH, moe.experts.num_experts, size=40, k=router.k, learned=True, scale=router.scale)
    moe.replace(router=hashed)
    moe.shared = native.recipe.shared(theirs.shared_experts, WIDTH)
    token_ids = torch.randint(40, (2, 6))
    moe.context.call.inputs["input_ids"] = token_ids
    with torch.no_grad():
        for ours, other, _ in same(moe, hashed, theirs):
            ours.copy_(other)
        theirs.gate.tid2eid.copy_(hashed.table)
    x = torch.randn(2, 6, WIDTH)
    close(moe(x), theirs(x, token_ids))
