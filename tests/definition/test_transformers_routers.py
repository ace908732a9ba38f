"""Nearly every router that transformers ships is a setting of `TopK`."""

from __future__ import annotations

import importlib
import inspect
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from moeify.context import Context
from moeify.routers import ExpertGroups, TopK, sigmoid, softmax, sqrt_softplus

TOKENS, WIDTH, EXPERTS, K, SCALE = 64, 32, 16, 4, 2.5
MAX, TOP2 = ExpertGroups(4, 2, "max"), ExpertGroups(4, 2, "top2")

SETTINGS = {
    1: partial(TopK, score=softmax),
    2: partial(TopK, score=sigmoid, selection_bias=True, expert_groups=TOP2, scale=SCALE),
    3: partial(TopK, score=sigmoid, selection_bias=True, scale=SCALE),
    4: partial(TopK, score=sigmoid, selection_bias=True),
    5: partial(TopK, score=softmax, expert_groups=MAX, normalize=False, scale=SCALE),
    6: partial(TopK, score=sigmoid),
    7: partial(TopK, score=sqrt_softplus, selection_bias=True, scale=SCALE),
    8: partial(TopK, score=softmax, selection_bias=True),
    9: partial(TopK, score=softmax, expert_groups=TOP2, scale=SCALE),
    10: partial(TopK, score=sigmoid, selection_bias=True, expert_groups=TOP2),
    11: partial(TopK, score=softmax, normalize=False),
    12: partial(TopK, score=sigmoid, select="logit", selection_bias=True),
    13: partial(TopK, score=softmax, selection_bias=True, normalize=False, scale=SCALE),
    14: partial(TopK, score=softmax, scale=1 / K),
}

SETTING_OF = {
    "AXK1TopkRouter": 2,
    "AXK2TopkRouter": 2,
    "AfmoeTokenChoiceRouter": 3,
    "AriaTextTopKRouter": 1,
    "BailingHybridTopkRouter": 2,
    "BeamTopKRouter": 10,
    "Cohere2MoeTopKRouter": 6,
    "DeepseekOcr2TextTopkRouter": 5,
    "DeepseekV2TopkRouter": 5,
    "DeepseekV32TopkRouter": 2,
    "DeepseekV3TopkRouter": 2,
    "DeepseekV4TopKRouter": 7,
    "Dots1TopkRouter": 2,
    "Dots3NoteTextTopkRouter": 2,
    "Dots3NoteVisionTopKRouter": 3,
    "Ernie4_5_MoeTopKRouter": 8,
    "Ernie4_5_VLMoeMoeTopKRouter": 8,
    "ExaoneMoeTopkRouter": 2,
    "FlexOlmoTopKRouter": 1,
    "FlintTopKRouter": 6,
    "Glm4MoeLiteTopkRouter": 2,
    "Glm4MoeTopkRouter": 2,
    "Glm4vMoeTextTopkRouter": 2,
    "Glm5NextTextTopkRouter": 2,
    "GlmMoeDsaTopkRouter": 2,
    "GptOssTopKRouter": 1,
    "GraniteMoeHybridTopKRouter": 1,
    "GraniteMoeSWATopKRouter": 1,
    "GraniteMoeSharedTopKRouter": 1,
    "GraniteMoeTopKRouter": 1,
    "HYV3TopKRouter": 3,
    "HYV4TopkRouter": 2,
    "HYV4VLTopkRouter": 2,
    "HunYuanMoEV1Gate": 1,
    "Inkling2LoopTopKRouter": 7,
    "Inkling2TopKRouter": 7,
    "JambaTopKRouter": 11,
    "KimiLinearTopkRouter": 2,
    "Kolibri1TopKRouter": 12,
    "LagunaTopKRouter": 4,
    "LaraMiniTopKRouter": 1,
    "Lfm2MoeTopKRouter": 3,
    "LongcatFlashTopkRouter": 13,
    "MellumTopKRouter": 1,
    "MiMoV2FlashTopkRouter": 2,
    "MiniMaxM2TopKRouter": 4,
    "MiniMaxM3VLTopKRouter": 4,
    "MiniMaxTopKRouter": 1,
    "Mistral4TopkRouter": 9,
    "MistralLarge4TextTopkRouter": 9,
    "MixtralTopKRouter": 1,
    "MuseSparkTopkRouter": 3,
    "NemotronHTopkRouter": 2,
    "OlmoeTopKRouter": 1,
    "OpenAIPrivacyFilterTopKRouter": 14,
    "Qwen2MoeTopKRouter": 1,
    "Qwen3MoeTopKRouter": 1,
    "Qwen3NextTopKRouter": 1,
    "Qwen3OmniMoeTalkerTextTopKRouter": 1,
    "Qwen3OmniMoeTextTopKRouter": 1,
    "Qwen3OmniMoeThinkerTextTopKRouter": 1,
    "Qwen3VLMoeTextTopKRouter": 1,
    "Qwen3_5MoeTopKRouter": 1,
    "Qwen4ExpTextTopKRouter": 1,
    "SolarOpenTopkRouter": 2,
    "Step3p7TopKRouter": 4,
    "UnlimitedOcrTextTopkRouter": 5,
}

NOT_A_SETTING = {
    "DbrxRouter": "returns logits only: its block normalises by a p-norm",
    "DeepseekV4HashRouter": "looks experts up by token id",
    "DiffusionGemmaTextRouter": "normalises its input and scales each expert",
    "Gemma4TextRouter": "normalises its input and scales each expert",
    "InklingTopkRouter": "normalises over routed and shared experts together",
    "JetMoeTopKGating": "returns sorted rows instead of choices",
    "Llama4Router": "weights what experts read, not what they compute",
    "NllbMoeTop2Router": "limits capacity inside the router",
    "PhimoeTopKRouter": "samples by SparseMixer",
    "SwitchTransformersTop1Router": "limits capacity inside the router; see test_transformers_blocks",
    "ZayaRouter": "an MLP that reads the previous layer's decision",
}

RETURNED_ANOTHER_TUPLE_BEFORE_5_23 = {
    "GraniteMoeHybridTopKRouter",
    "GraniteMoeSharedTopKRouter",
    "GraniteMoeTopKRouter",
    "LongcatFlashTopkRouter",
}

NO_ROUTER = {
    "BailingHybridForgetGate",
    "DFineGate",
    "Deimv2Gate",
    "Glm5NextTextForgetGate",
    "GraniteDoclingDensityRouter",
    "Inkling2LoopMessageGate",
    "KimiLinearForgetGate",
    "MuseSparkResidualGate",
}


def _shipped() -> dict[str, str]:
    """The family of every class that is called a router or gate, read from the sources."""
    models = Path(transformers.__file__).parent / "models"
    return {
        name: source.parent.name
        for source in sorted(models.glob("*/modeling_*.py"))
        for name in re.findall(r"^class (\w*(?:Router|Gate|Gating))\(nn\.", source.read_text(), re.MULTILINE)
    }


SHIPPED = _shipped()
RECENT = Version(transformers.__version__) >= Version("5.23")
COMPARED = [
    name for name in SETTING_OF if name in SHIPPED and (RECENT or name not in RETURNED_ANOTHER_TUPLE_BEFORE_5_23)
]


def _config() -> SimpleNamespace:
    """One configuration that all families can read: each finds the names it uses."""
    experts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS)
    k = dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), K)
    scale = dict.fromkeys(("routed_scaling_factor", "router_scaling_factor", "route_scale"), SCALE)
    return SimpleNamespace(
        **experts,
        **k,
        **scale,
        hidden_size=WIDTH,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        norm_topk_prob=True,
        moe_norm_min=1e-12,
        scoring_func="sqrtsoftplus",
        expert_selection_fn="sigmoid",
        use_expert_bias=True,
        moe_router_logit_softcapping=0.0,
        output_multiplier=1.0,
        zero_expert_num=0,
    )


def _build(name: str) -> nn.Module:
    family = SHIPPED[name]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    router = getattr(module, name)(_config())
    for tensor in (*router.parameters(), *router.buffers()):
        is_bias = tensor.numel() == EXPERTS
        torch.nn.init.normal_(tensor, std=0.1 if is_bias else 0.3)
    return router


def _twin(router: nn.Module, setting: int, selection_bias: Tensor) -> TopK:
    """Our router with the weights of theirs."""
    tensors = dict(router.named_parameters())
    ours = SETTINGS[setting](WIDTH, EXPERTS, k=K, bias="bias" in tensors)
    with torch.no_grad():
        ours.weight.copy_(next(t for t in tensors.values() if t.shape == (EXPERTS, WIDTH)))
        if ours.bias is not None:
            ours.bias.copy_(tensors["bias"])
        if ours.selection_bias is not None:
            ours.selection_bias.copy_(selection_bias)
    return ours


def _dense(index: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros(TOKENS, EXPERTS).scatter(1, index, weights.float())


def test_every_router_of_transformers_is_a_setting_or_has_a_reason():
    assert SHIPPED.keys() - SETTING_OF.keys() - NOT_A_SETTING.keys() - NO_ROUTER == set()


def test_at_least_62_router_classes_are_compared():
    assert len(SETTING_OF) >= 62
    assert len(COMPARED) >= (62 if RECENT else 40)


@pytest.mark.parametrize("name", COMPARED)
@torch.no_grad()
def test_topk_chooses_and_weighs_as_the_router_of_transformers_in_this_setting_only(name: str):
    torch.manual_seed(0)
    router = _build(name)
    tensors = (*router.named_parameters(), *router.named_buffers())
    held = [t for n, t in tensors if n.endswith("e_score_correction_bias")]
    given = [parameter for parameter in inspect.signature(router.forward).parameters if parameter.endswith("bias")]
    selection_bias = held[0].flatten() if held else torch.randn(EXPERTS) * 0.1
    x = torch.randn(TOKENS, WIDTH)

    theirs_x = x.unsqueeze(0) if name == "AfmoeTokenChoiceRouter" else x
    _, weights, index = router(theirs_x, *[selection_bias for _ in given])
    theirs = _dense(index, weights)
    difference = {}
    for setting in SETTINGS:
        routing = _twin(router, setting, selection_bias)(x, Context())
        difference[setting] = (_dense(routing.choices.indices, routing.choices.weights) - theirs).abs().max().item()

    agreeing = [setting for setting, error in difference.items() if error <= 2e-6]
    assert agreeing == [SETTING_OF[name]], difference
