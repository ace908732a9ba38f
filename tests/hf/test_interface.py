from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedModel

from moeify import Context, MoE, backends
from moeify.backends import order
from moeify.experts import FFN, ClampedGlu, Glu, Identity, Plain
from moeify.hf.interface import HfExperts, moeify_experts, use_moeify_experts, use_transformers_backends
from moeify.kernels import grouped_linear
from moeify.routers import Capacity, TopK
from tiny_models import SPARSE, causal_lm, deepseek_v3, inputs, mixtral

EXPERTS, K, TOKENS = 4, 2, 24


UNUSUAL = {
    "without a gate": (
        "nemotron_h.NemotronHExperts",
        "nemotron_h",
        {"moe_intermediate_size": 16, "n_routed_experts": EXPERTS, "mlp_hidden_act": "relu2"},
    ),
    "transposed": (
        "aria.AriaExperts",
        "aria_text",
        {"intermediate_size": 16, "moe_num_experts": EXPERTS},
    ),
    "transposed, with biases": (
        "openai_privacy_filter.OpenAIPrivacyFilterExperts",
        "openai_privacy_filter",
        {"intermediate_size": 16, "num_local_experts": EXPERTS, "num_experts_per_tok": K},
    ),
    "interleaved": (
        "gpt_oss.GptOssExperts",
        "gpt_oss",
        {"intermediate_size": 16, "num_local_experts": EXPERTS, "num_experts_per_tok": K},
    ),
    "with a norm behind": (
        "muse_spark.MuseSparkExperts",
        "muse_spark_text",
        {"moe_hidden_size": 32, "moe_intermediate_size": 16, "num_local_experts": EXPERTS, "num_attention_heads": 4},
    ),
}


def _on_the_interface(kind: str) -> bool:
    """Whether the installed transformers has these experts, and behind its interface."""
    family, name = UNUSUAL[kind][0].split(".")
    module = f"transformers.models.{family}.modeling_{family}"
    return find_spec(f"transformers.models.{family}") is not None and hasattr(
        getattr(importlib.import_module(module), name), "_apply_gate"
    )


PRESENT = [kind for kind in UNUSUAL if _on_the_interface(kind)]


def _loss_and_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**inputs(model))
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **gradients}


@pytest.mark.parametrize("family", SPARSE)
def test_a_native_model_computes_the_same_by_moeify(family: str):
    model = SPARSE[family]()
    model.set_experts_implementation("eager")
    eager = _loss_and_gradients(model)
    ours = _loss_and_gradients(use_moeify_experts(model))
    assert ours.keys() == eager.keys()
    for name, expected in eager.items():
        torch.testing.assert_close(ours[name], expected, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_native_model_computes_the_same_by_moeify_in_bf16():
    model = deepseek_v3().bfloat16()
    model.set_experts_implementation("eager")
    expected = model(**inputs(model)).logits
    logits = use_moeify_experts(model)(**inputs(model)).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() < 0.03 * expected.norm()


def test_a_model_is_loaded_with_our_function_by_name(tmp_path: Path):
    model = use_moeify_experts(mixtral())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="moeify")
    assert loaded.config._experts_implementation == "moeify"
    torch.testing.assert_close(loaded(**inputs(model)).logits, model(**inputs(model)).logits)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_activation_that_is_replaced_after_a_call_is_the_one_that_is_used(compiled: bool):
    model = use_moeify_experts(mixtral()).eval()
    call = torch.compile(model, backend="eager") if compiled else model
    given = {"input_ids": inputs(model)["input_ids"]}
    with torch.no_grad():
        before = call(**given).logits
        for layer in model.model.layers:
            layer.mlp.experts.act_fn = nn.GELU()
        ours = call(**given).logits
        model.set_experts_implementation("eager")
        torch.testing.assert_close(ours, model(**given).logits, atol=2e-5, rtol=1e-4)
    assert (ours - before).abs().max() > 1e-3


def test_our_function_is_what_a_model_calls_after_the_switch(monkeypatch: pytest.MonkeyPatch):
    calls = []
    run = backends.run
    monkeypatch.setattr(backends, "run", lambda *args: calls.append(args[0]) or run(*args))
    model = use_moeify_experts(mixtral())
    model(**inputs(model))
    assert len(calls) == model.config.num_hidden_layers


def _experts(kind: str) -> nn.Module:
    torch.manual_seed(0)
    path, model_type, sizes = UNUSUAL[kind]
    family, name = path.split(".")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    experts = getattr(module, name)(AutoConfig.for_model(model_type, hidden_size=32, **sizes))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    experts.config._experts_implementation = "eager"
    return experts


def _choices(k: int = K) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(TOKENS, 32, requires_grad=True)
    weights, index = torch.randn(TOKENS, EXPERTS).softmax(-1).topk(k)
    return x, index, weights.requires_grad_()


def _answer_and_gradients(compute: Callable[..., Tensor], experts: nn.Module, *given: Tensor) -> list[Tensor]:
    x, index, weights = given
    y = compute(x, index, weights)
    sources = [x, weights, *experts.parameters()]
    torch.manual_seed(2)
    return [y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), sources)]


@pytest.mark.parametrize("kind", PRESENT)
def test_unusual_experts_compute_the_same_by_moeify(kind: str):
    experts = _experts(kind)
    eager = _answer_and_gradients(experts, experts, *_choices())
    ours = _answer_and_gradients(lambda *given: moeify_experts(experts, *given), experts, *_choices())
    torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", PRESENT)
def test_an_index_of_e_means_no_expert(kind: str):
    experts = _experts(kind)
    x, index, weights = _choices()
    absent = torch.rand(TOKENS, K) < 0.4
    absent[0] = True
    with_gaps = index.masked_fill(absent, EXPERTS)
    y, *gradients = _answer_and_gradients(lambda *g: moeify_experts(experts, *g), experts, x, with_gaps, weights)
    zeroed = weights.detach().masked_fill(absent, 0.0).requires_grad_()
    expected, *expected_gradients = _answer_and_gradients(experts, experts, x, index, zeroed)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    assert (y[0] == 0).all()
    assert (gradients[1][absent] == 0).all()
    torch.testing.assert_close(gradients[1][~absent], expected_gradients[1][~absent], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients[2:], expected_gradients[2:], atol=1e-4, rtol=1e-4)


def test_tokens_without_any_expert_get_zeros():
    experts = _experts("without a gate")
    x, index, weights = _choices()
    assert (moeify_experts(experts, x, torch.full_like(index, EXPERTS), weights) == 0).all()


def test_generation_is_the_same_by_moeify():
    model = deepseek_v3()
    model.set_experts_implementation("eager")
    prompt = {"input_ids": inputs(model)["input_ids"], "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**prompt)
    torch.testing.assert_close(use_moeify_experts(model).generate(**prompt), expected)


STACKED = {
    "without a gate": "Plain",
    "transposed": "Glu",
    "transposed, with biases": None,  # clamped as GPT-OSS does, but gate and up lie side by side
    "interleaved": "ClampedGlu",
    "with a norm behind": None,
}


@pytest.mark.parametrize("kind", PRESENT)
def test_what_unusual_experts_compute_is_told_to_kernels(kind: str):
    experts = HfExperts(_experts(kind).eval())
    stacked = experts.stacked
    assert (stacked and type(stacked.activation).__name__) == STACKED[kind]
    if stacked is not None:
        rows, counts = torch.randn(8, 32), torch.tensor([3, 0, 1, 4])
        hidden = stacked.activation(grouped_linear(rows, stacked.up, counts, stacked.up_bias))
        torch.testing.assert_close(
            grouped_linear(hidden, stacked.down, counts, stacked.down_bias), experts(rows, counts)
        )


def test_a_dense_model_has_nothing_to_compute_by_moeify():
    with pytest.raises(ValueError, match="make a dense model sparse"):
        use_moeify_experts(causal_lm("llama"))


SWIGLU = Glu(F.silu)
THEIRS = ("transformers/grouped_mm", "transformers/batched_mm")
ACTIVATIONS = {"glu": (SWIGLU, False), "plain": (Plain(F.gelu), False), "clamped": (ClampedGlu(), True)}


@pytest.fixture(autouse=True)
def _their_backends_for_one_test(monkeypatch):
    monkeypatch.setattr(order, "_ORDER", list(order._ORDER))
    use_transformers_backends()


def _layer(backend: str, *, activation=SWIGLU, bias: bool = False, dtype=torch.float32, **sizes: int) -> MoE:
    torch.manual_seed(0)
    experts = FFN(EXPERTS, sizes.pop("width", 32), sizes.pop("hidden", 16), activation=activation, bias=bias, **sizes)
    if bias:
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            nn.init.normal_(experts.get_parameter(name), std=0.3)
    return MoE(TopK(experts.width, EXPERTS, k=K, init_std=0.3), experts, backend=backend).to(dtype)


def _y_and_gradients(layer: MoE, x: Tensor) -> list[Tensor]:
    y = layer(x)
    torch.manual_seed(2)
    return [y, *torch.autograd.grad((y * torch.randn_like(y)).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", THEIRS)
def test_our_layer_runs_by_their_function(backend: str, activation: str):
    function, bias = ACTIVATIONS[activation]
    x = torch.randn(3, 8, 32, requires_grad=True)
    ours = _y_and_gradients(_layer("compose", activation=function, bias=bias), x)
    theirs = _y_and_gradients(_layer(backend, activation=function, bias=bias), x)
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", THEIRS)
def test_our_layer_runs_by_their_function_in_bf16(backend: str):
    x = torch.randn(3, 8, 32).bfloat16()
    expected = _layer("compose", dtype=torch.bfloat16)(x)
    torch.testing.assert_close(_layer(backend, dtype=torch.bfloat16)(x), expected, atol=2e-2, rtol=2e-2)


def _dropping(backend: str) -> MoE:
    layer = _layer(backend)
    return MoE(Capacity(layer.router, factor=0.5, eval_factor=0.5), layer.experts, backend=backend)


def _identical(backend: str) -> MoE:
    return MoE(TopK(32, EXPERTS), Identity(EXPERTS), backend=backend)


def _with_dropout(backend: str) -> MoE:
    return MoE(TopK(32, EXPERTS), FFN(EXPERTS, 32, 16, dropout=0.1), backend=backend)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_dropping, "some are padding or were dropped"),
        (_identical, "the experts are Identity"),
        (_with_dropout, "does not support expert dropout"),
        (lambda backend: _layer(backend, width_out=16), "map 32 to 16"),
        (lambda backend: _layer(backend, dtype=torch.bfloat16), "one dtype"),
    ],
)
@pytest.mark.parametrize("backend", THEIRS)
def test_their_functions_refuse_in_words(backend: str, build: Callable[[str], MoE], reason: str):
    with pytest.raises(ValueError, match=reason):
        build(backend)(torch.randn(3, 8, 32))


@pytest.mark.parametrize("backend", THEIRS)
def test_tokens_that_a_limit_sent_to_other_experts_are_refused_by_their_functions(backend: str):
    layer = _layer(backend)
    limited = Capacity(
        TopK(32, EXPERTS, k=1, normalize=False, init_std=1.0), factor=1.0, eval_factor=1.0, overflow="next"
    )
    moe = MoE(limited, layer.experts, backend=backend)
    x = torch.randn(1, 8, 32)
    routing = limited(x, moe.context)
    assert routing.source.shape[0] == 8  # as many rows as without a limit
    assert routing.counts.tolist() != routing.assigned.tolist()
    with pytest.raises(ValueError, match="a capacity has moved some tokens to others"):
        moe(x)


def test_padding_is_refused_by_their_functions():
    context = Context()
    context.mask(torch.tensor([[1] * 8, [1] * 5 + [0] * 3]))
    layer = _layer(THEIRS[0])
    with pytest.raises(ValueError, match="padding"):
        MoE(layer.router, layer.experts, backend=THEIRS[0], context=context)(torch.randn(2, 8, 32))


def test_autocast_is_refused_by_their_functions():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        _layer(THEIRS[0])(torch.randn(3, 8, 32))


def test_rows_that_are_not_aligned_are_refused_by_grouped_mm():
    layer = _layer(THEIRS[0], hidden=13)
    with pytest.raises(ValueError, match=r"26 .* values are not"):
        layer(torch.randn(3, 8, 32))


def test_auto_takes_none_of_their_functions():
    chosen = [backends.find_backend(name).chosen(torch.zeros(1), None, None) for name in THEIRS]
    assert chosen == [False, False]


@pytest.mark.parametrize("first", ["import moeify; import transformers", "import transformers; import moeify"])
def test_transformers_knows_our_experts_whichever_is_imported_first(first: str):
    program = f"""{first}
config = transformers.AutoConfig.for_model("mixtral", hidden_size=32, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=4, num_local_experts=4, vocab_size=64)
model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moeify")
print(model.config._experts_implementation)"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["moeify"], run.stderr


def test_experts_compile_whole_at_their_first_call_and_whatever_becomes_of_other_models():
    def experts(activation: str) -> nn.Module:
        model = use_moeify_experts(mixtral(hidden_act=activation))
        return next(part for part in model.modules() if hasattr(part, "_apply_gate"))

    x, index, weights = torch.randn(6, 32), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    with torch.no_grad():
        for activation in ("silu", "gelu", "silu"):
            ours = experts(activation)
            compiled = torch.compile(ours, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(x, index, weights), experts(activation)(x, index, weights))
