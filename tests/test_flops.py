from functools import partial

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from moeify import Recipe, sparsify
from moeify.experts import FFN, Blocks, Constant, Each, Glu, Identity, Plain, Zero
from moeify.find import last_half
from moeify.flops import Count, count
from moeify.moe import MoE
from moeify.multihead import MultiHead
from moeify.routers import Capacity, ExpertChoice, ReLU, Router, Soft, TopK, TopP
from moeify.sparsify import fresh, recipes
from test_matrix import IDS as MATRIX_IDS
from test_matrix import ROUTERS, D, E

MIXTRAL = partial(
    hf.MixtralConfig, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=32000, num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False,
)  # fmt: skip
QWEN3 = partial(
    hf.Qwen3MoeConfig, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
    num_key_value_heads=4, head_dim=128, vocab_size=151936, num_experts=128, num_experts_per_tok=8,
    tie_word_embeddings=False,
)  # fmt: skip
OLMOE = partial(
    hf.OlmoeConfig, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
    num_key_value_heads=16, vocab_size=50304, num_experts=64, num_experts_per_tok=8, tie_word_embeddings=False,
)  # fmt: skip
DEEPSEEK = partial(
    hf.DeepseekV3Config, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
    first_k_dense_replace=3, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512,
    qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, vocab_size=129280, n_routed_experts=256,
    n_shared_experts=1, num_experts_per_tok=8, tie_word_embeddings=False,
)  # fmt: skip
GPT_OSS = partial(
    hf.GptOssConfig, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64,
    num_key_value_heads=8, head_dim=64, vocab_size=201088, num_local_experts=32, num_experts_per_tok=4,
    tie_word_embeddings=False,
)  # fmt: skip


JETMOE = partial(
    hf.JetMoeConfig, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_key_value_heads=16,
    kv_channels=128, vocab_size=32000, num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=True,
)  # fmt: skip
MAVERICK = partial(
    hf.Llama4TextConfig, hidden_size=5120, intermediate_size=8192, intermediate_size_mlp=16384, num_hidden_layers=48,
    num_attention_heads=40, num_key_value_heads=8, head_dim=128, vocab_size=202048, num_local_experts=128,
    num_experts_per_tok=1, interleave_moe_layer_step=2, tie_word_embeddings=False,
)  # fmt: skip
DBRX = partial(
    hf.DbrxConfig, d_model=6144, n_heads=48, n_layers=40, vocab_size=100352, tie_word_embeddings=False,
    ffn_config={"hidden_size": 6144, "ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    attn_config={"kv_n_heads": 8, "rope_theta": 5e5, "clip_qkv": 8.0},
)  # fmt: skip
SWITCH = partial(
    hf.SwitchTransformersConfig, d_model=768, d_ff=3072, d_kv=64, num_heads=12, num_layers=12, num_decoder_layers=12,
    num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, num_experts=128,
)  # fmt: skip


def on_meta(model, config):
    with torch.device("meta"):
        return model(config)


@pytest.mark.parametrize(
    ("model", "config", "total", "active"),
    [
        (hf.MixtralForCausalLM, MIXTRAL, 46.7, 12.9),
        (hf.OlmoeForCausalLM, OLMOE, 6.92, 1.28),
        (hf.Qwen3MoeForCausalLM, QWEN3, 30.5, 3.35),  # the model card cuts it to 3.3
        (hf.JetMoeForCausalLM, JETMOE, 8.52, 2.33),  # published as 8 and 2.2
        (hf.Llama4ForCausalLM, MAVERICK, 400.7, 17.17),  # published as 400 and 17
        (hf.DbrxForCausalLM, DBRX, 131.6, 36.5),  # published as 132 and 36
        (hf.SwitchTransformersForConditionalGeneration, SWITCH, 7.415, 0.224),  # T5 base, which it matches, has 0.223
    ],
)
def test_published_sizes_include_the_input_embedding(model, config, total, active):
    counted = count(on_meta(model, config()))
    assert counted.parameters / 1e9 == pytest.approx(total, rel=2e-3)
    assert counted.active_parameters / 1e9 == pytest.approx(active, rel=2e-3)


@pytest.mark.parametrize(
    ("model", "config", "total", "active"),
    [
        (hf.DeepseekV3ForCausalLM, DEEPSEEK, 671.0, 36.6),  # published as 37; with the input embedding it is 37.6
        (hf.GptOssForCausalLM, GPT_OSS, 20.91, 3.61),
    ],
)
def test_published_sizes_without_the_input_embedding_are_half_the_flops(model, config, total, active):
    model = on_meta(model, config())
    counted = count(model)
    lookups = model.get_input_embeddings().weight.numel()
    assert counted.parameters / 1e9 == pytest.approx(total, rel=1e-3)
    assert (counted.active_parameters - lookups) / 1e9 == pytest.approx(active, rel=1e-3)
    assert counted.flops / 2e9 == pytest.approx(active, rel=2e-3)


def test_latent_attention_has_queries_wider_than_its_values():
    model = on_meta(hf.DeepseekV3ForCausalLM, DEEPSEEK())
    attention = count(model, tokens=4096).flops - count(model).flops
    assert attention == 61 * 2 * 128 * (192 + 128) * 4096


def test_zero_experts_are_chosen_and_cost_nothing():
    """12 of 512 FFN and 256 zero experts: 8 FFN experts on average (LongCat-Flash, 560 B, about 27 B active)."""
    model = on_meta(hf.LongcatFlashForCausalLM, hf.LongcatFlashConfig())
    counted = count(model)
    unused = 28 * 256 * 2 * 2048 * 6144  # transformers stacks first maps for the zero experts, without a second one
    assert (counted.parameters - unused) / 1e9 == pytest.approx(560, rel=2e-3)
    assert counted.flops / 2e9 == pytest.approx(27, rel=6e-3)
    ffn = 3 * 2048 * 6144
    assert counted.dense_flops - counted.flops == 2 * 28 * (512 - 8) * ffn


@pytest.mark.parametrize(
    ("width", "layers", "heads", "parameters", "dense", "sparse"),
    [(384, 12, 6, 933, 9.2, 8.6), (768, 12, 12, 3700, 35.1, 32.0), (1024, 24, 16, 13100, 122.9, 111.1)],
    ids=["S/16", "B/16", "L/16"],
)
def test_soft_moe_costs_what_is_published(width, layers, heads, parameters, dense, sparse):
    """128 experts of one slot in the last half of a ViT for JFT, GFLOPs per image of 196 patches (arXiv 2308.00951)."""
    config = hf.ViTConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads
    )
    model, patches, head = on_meta(partial(hf.ViTModel, add_pooling_layer=False), config), 196, 29593 * (width + 1)

    def per_image(model):
        return (count(model, tokens=patches).flops * patches + 2 * head) / 1e9

    assert per_image(model) == pytest.approx(dense, rel=6e-3)
    sparsify(model, Recipe(where=last_half, num_experts=128, router=Soft, experts=fresh), verify=False, verbose=False)
    assert (count(model).parameters + head) / 1e6 == pytest.approx(parameters, rel=3e-3)
    assert per_image(model) == pytest.approx(sparse, rel=6e-3)


TOKENS = 12
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "attn_implementation": "eager"}
IDS = torch.arange(2 * TOKENS).reshape(2, TOKENS)
LANGUAGE_MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(intermediate_size=48, num_key_value_heads=2, vocab_size=64, **SMALL)
    ),
    "gpt2, lm_head tied": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_positions=TOKENS, **SMALL)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(intermediate_size=48, vocab_size=64, **SMALL)),
    "t5, encoder and decoder": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0,
            attn_implementation="eager",
        )
    ),
}  # fmt: skip


def measured(model, **inputs):
    """FLOPs that ran, without the outer product by which rotary angles are made."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(**inputs)
    rotary = sum(sum(ops.values()) for name, ops in counter.flop_counts.items() if name.endswith(".rotary_emb"))
    return counter.get_total_flops() - rotary


@pytest.mark.parametrize("build", LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def test_dense_language_models_run_what_is_counted(build):
    model = build()
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    counted = count(model, tokens=TOKENS)
    assert counted.flops * IDS.numel() == measured(model, **inputs)
    assert counted.flops == counted.dense_flops
    assert counted.parameters == counted.active_parameters == model.num_parameters()


def test_a_vision_transformer_runs_what_is_counted_but_for_its_class_token():
    model = hf.ViTModel(
        hf.ViTConfig(intermediate_size=48, image_size=16, patch_size=4, **SMALL), add_pooling_layer=False
    )
    patches, into_patches = 16, 32 * 3 * 4 * 4
    ran = measured(model, pixel_values=torch.zeros(1, 3, 16, 16))
    assert count(model, tokens=patches + 1).flops * (patches + 1) == ran + 2 * into_patches


def test_a_native_sparse_model_in_which_every_expert_is_asked_runs_what_is_counted():
    config = hf.MixtralConfig(
        intermediate_size=48, num_key_value_heads=2, vocab_size=64, num_local_experts=3, num_experts_per_tok=3, **SMALL
    )
    model = hf.MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    assert count(model, tokens=TOKENS).flops * IDS.numel() == measured(model, input_ids=IDS)


@settings(max_examples=15, deadline=None)
@given(num_experts=st.integers(1, 4), activation=st.sampled_from([Plain(F.relu), Glu(F.silu)]), bias=st.booleans())
def test_a_layer_in_which_every_expert_is_asked_runs_what_is_counted(num_experts, activation, bias):
    layer = MoE(TopK(8, num_experts, k=num_experts), FFN(num_experts, 8, 12, activation=activation, bias=bias))
    maps = 2 * layer.experts.up[0].numel() + 2 * layer.experts.down[0].numel()
    counted = count(layer)
    assert counted.flops == counted.dense_flops == maps + 2 * 8 * num_experts
    assert counted.parameters == counted.active_parameters == sum(p.numel() for p in layer.parameters())


def test_experts_that_are_modules_run_what_is_counted():
    layer = MoE(TopK(8, 3, k=3), Each(nn.Sequential(nn.Linear(8, h), nn.Linear(h, 8)) for h in (4, 8, 16)))
    assert count(layer).flops * 10 == measured(layer, x=torch.randn(10, 8))


AT_MOST = ["top-p", "threshold", "relu", "top-any", "expert threshold", "bounded union", "prefix", "groups of 2"]
CHEAPER = [
    "per group",
    "labelled",
    "similarity",
    "noisy",
    "llama-moe",
]  # one decision per image or sequence; noise in training only


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in AT_MOST + CHEAPER])
def test_a_layer_runs_what_is_counted_whatever_its_router(name):
    layer = MoE(ROUTERS[name](), Each(nn.Linear(D, D) for _ in range(E)))
    layer.context.call.inputs["input_ids"] = MATRIX_IDS
    assert count(layer, tokens=4).flops * 12 == measured(layer, x=torch.randn(3, 4, D))


@pytest.mark.parametrize("name", AT_MOST)
def test_where_the_number_of_experts_varies_the_most_is_counted(name):
    layer = MoE(ROUTERS[name](), Each(nn.Linear(D, D) for _ in range(E)))
    assert count(layer, tokens=4).flops * 12 >= measured(layer, x=torch.randn(3, 4, D))
    assert count(MoE(TopP(D, E, max_k=2), FFN(E, D, 6))).flops == count(MoE(TopK(D, E), FFN(E, D, 6))).flops
    assert count(MoE(ReLU(D, E), FFN(E, D, 6))).flops == count(MoE(ReLU(D, E), FFN(E, D, 6))).dense_flops


@settings(max_examples=30, deadline=None)
@given(slots=st.integers(1, 3), tokens=st.integers(1, 40), heads=st.sampled_from([1, 2]))
def test_soft_experts_read_slots_however_many_the_tokens_are(slots, tokens, heads):
    """E · p rows per image, and 2 · 2 · E · p · D FLOPs per token to mix them and back; logits as many as one way."""
    soft = MoE(Soft(8, 4, slots=slots), FFN(4, 8, 12))
    layer = MultiHead(soft, 8 * heads, heads)
    rows, length = 4 * slots, heads * tokens
    maps = 2 * (8 * heads) ** 2 * 2
    per_image = tokens * maps + length * 3 * 2 * rows * 8 + rows * 2 * 3 * 8 * 12
    assert count(layer, tokens=tokens).flops == round(per_image / tokens)
    active = min(1, heads * rows / length / 4) * 4 * 3 * 8 * 12
    others = sum(p.numel() for part in (layer.head, layer.merge, soft.router) for p in part.parameters())
    assert count(layer, tokens=tokens).active_parameters == round(active + others)


def test_soft_experts_have_as_many_slots_as_tokens_where_these_are_not_counted():
    soft, top = MoE(Soft(8, 4, slots=2), FFN(4, 8, 12)), MoE(TopK(8, 4, k=1, normalize=False), FFN(4, 8, 12))
    assert count(soft).flops - 3 * 2 * 8 * 8 == count(top).flops - 2 * 4 * 8
    assert count(soft).flops == count(soft, tokens=8).flops


def test_expert_choice_costs_its_factor_and_what_is_rounded_up():
    layer = MoE(ExpertChoice(8, 4, factor=1.5), FFN(4, 8, 12))
    one, router = 2 * 3 * 8 * 12, 2 * 4 * 8
    assert count(layer).flops == count(layer, tokens=16).flops == 1.5 * one + router
    assert count(layer, tokens=6).flops == 4 * 3 / 6 * one + router  # 2.25 of six, rounded up
    batch = MoE(ExpertChoice(8, 4, factor=1.5, per="batch"), FFN(4, 8, 12))
    assert count(batch, tokens=6).flops == count(layer).flops


class Deep(Router):
    """A router of one's own, which says nothing of its rows."""

    def forward(self, x, context):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("router", "rows"), [(Deep(), 4), (Capacity(TopK(8, 4, k=3)), 3), (Capacity(Capacity(ExpertChoice(8, 4))), 2)]
)
def test_a_router_asks_all_experts_unless_it_or_one_inside_it_says_otherwise(router, rows):
    counted = count(MoE(router, FFN(4, 8, 12)))
    assert counted.dense_flops - counted.flops == (4 - rows) * 2 * 3 * 8 * 12


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 16), hidden=st.integers(1, 16), gated=st.booleans())
def test_one_expert_counts_as_its_dense_network_plus_the_router(width, hidden, gated):
    maps = 2 if gated else 1
    dense = count(nn.Sequential(nn.Linear(width, maps * hidden, bias=False), nn.Linear(hidden, width, bias=False)))
    activation = Glu(F.silu) if gated else Plain(F.relu)
    sparse = count(MoE(TopK(width, 1, k=1), FFN(1, width, hidden, activation=activation)))
    assert sparse.parameters == sparse.active_parameters == dense.parameters + width
    assert sparse.flops == sparse.dense_flops == dense.flops + 2 * width


@settings(max_examples=30, deadline=None)
@given(data=st.data(), num_experts=st.integers(2, 8))
def test_active_is_k_of_the_experts_and_all_of_router_and_shared(data, num_experts):
    k = data.draw(st.integers(2, num_experts))
    layer = MoE(Capacity(TopK(8, num_experts, k=k)), FFN(num_experts, 8, 12, bias=True), shared=nn.Linear(8, 8))
    one = (3 * 8 * 12) + (2 * 12 + 8)
    assert count(layer).active_parameters == k * one + num_experts * 8 + 72
    assert count(layer).flops == 2 * (k * 3 * 8 * 12 + num_experts * 8 + 64)
    assert count(layer).dense_flops == 2 * (num_experts * 3 * 8 * 12 + num_experts * 8 + 64)


def test_identity_and_zero_experts_cost_nothing():
    ffn = FFN(2, 8, 12)
    layer = MoE(TopK(8, 4, k=2), Blocks([ffn, Identity(), Zero()]))
    assert count(layer).flops == 2 * (3 * 8 * 12 + 4 * 8)  # two of four experts: on average one network
    assert count(layer).active_parameters == 3 * 8 * 12 + 4 * 8


def test_constant_experts_cost_the_two_numbers_that_they_compute():
    layer = MoE(TopK(8, 4, k=2), Blocks([FFN(2, 8, 12), Constant(2, 8)]))
    assert count(layer).flops == 2 * (3 * 8 * 12 + 2 * 8 + 4 * 8)


def test_the_recipe_of_moepp_costs_its_share_of_ffn_experts():
    config = hf.LlamaConfig(intermediate_size=48, num_key_value_heads=2, vocab_size=64, **SMALL)
    model = sparsify(hf.LlamaForCausalLM(config), recipes["moepp"], verbose=False)
    moe = next(part for part in model.modules() if isinstance(part, MoE))
    ffn, *others = moe.experts.experts.banks
    free = sum(bank.num_experts for bank in others)
    rows = 2 * ffn.num_experts / (ffn.num_experts + free)
    constants = sum(2 * bank.weight.numel() for bank in moe.experts.modules() if isinstance(bank, Constant)) * 2 / 12
    router = sum(2 * weight.numel() for weight in moe.router.parameters() if weight.dim() == 2)
    assert count(moe).flops == round(rows * 2 * 3 * 32 * ffn.hidden + constants + router)


def test_a_sparse_layer_among_experts_multiplies_the_shares():
    inside = [MoE(TopK(8, 4, k=2), FFN(4, 8, 12)) for _ in range(2)]
    layer = MoE(TopK(8, 2, k=1, normalize=False), Each(inside))
    assert count(layer).flops == 2 * (2 * 8 + 4 * 8 + 2 * 3 * 8 * 12)


def test_a_tied_weight_is_held_once_and_used_as_often_as_it_is_applied():
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    counted = count(nn.Sequential(first, second))
    assert (counted.parameters, counted.flops) == (64, 256)


def test_a_weight_that_an_expert_shares_with_a_dense_layer_is_active_as_a_whole():
    dense, experts = nn.Linear(8, 8, bias=False), Each(nn.Linear(8, 8, bias=False) for _ in range(4))
    experts.experts[0].weight = dense.weight
    moe = MoE(TopK(8, 4, k=2), experts)
    for model in (nn.Sequential(dense, moe), nn.Sequential(moe, dense)):
        assert count(model).active_parameters == 64 + 3 * 64 // 2 + 4 * 8


def test_a_state_space_model_pays_nothing_for_a_longer_sequence():
    config = hf.Mamba2Config(hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, n_groups=1, vocab_size=64)
    model = on_meta(hf.Mamba2Model, config)
    assert count(model, tokens=4096) == count(model)


class ExpertsWithoutK(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Parameter(torch.zeros(2, 4, 4)), nn.Parameter(torch.zeros(2, 4, 4))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


def test_a_block_of_transformers_that_does_not_say_its_k_is_refused():
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.experts = ExpertsWithoutK()
    with pytest.raises(ValueError, match=r"how many experts a token uses in mlp: .* set `top_k`"):
        count(model)


@pytest.mark.parametrize("tokens", [0, -5, "12", 2.5, float("nan")])
def test_a_length_that_is_none_is_refused(tokens):
    with pytest.raises(ValueError, match="no length of a sequence"):
        count(nn.Linear(2, 2), tokens=tokens)


def test_a_count_reads_like_a_model_card():
    counted = Count(
        parameters=46_702_792_704, active_parameters=12_879_925_248, flops=25_494_028_288, dense_flops=10**11
    )
    assert str(counted) == (
        "46.7 B parameters, 12.9 B active per token (27.6%)\n"
        "25.5 GFLOPs per token forward, 100.0 GFLOPs if every expert ran"
    )
    assert counted.training_flops == 3 * counted.flops
