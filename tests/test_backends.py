import functools
from dataclasses import replace

import accelerate
import pytest
import torch
import transformers
from hypothesis import given
from torch import nn
from torch.autograd import forward_ad

from moeify import Mixture, MoE, assign, backends
from moeify.backends import Backend, backend_names, choose, compose, find_backend, order, register_backend
from moeify.experts import FFN, Blocks, Each, Identity, LoRA
from moeify.experts.quantized import Quantized, quantize
from moeify.find import every
from moeify.routers import Capacity, TopK
from moeify.sparsify import Recipe, fresh, sparsify
from strategies import agree, choices, seeds, sharpen


@pytest.mark.parametrize("name", ["gather", "compose", "auto"])
@given(choices(), seeds)
def test_every_backend_agrees_with_the_definition(name, choice, seed):
    torch.manual_seed(seed)
    index, gates, num_experts = choice
    experts = FFN(num_experts, 6, 3)
    x = torch.randn(len(index), 6, requires_grad=True)
    leaves = [x, gates, *experts.parameters()]
    y = backends.run(name, x, assign(*choice), experts)
    agree(y, leaves, compose(x, assign(*choice), experts), leaves)


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'cuda'; known are: auto, .*compose"):
        MoE(TopK(4, 2), FFN(2, 4, 3), backend="cuda")(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("reason", "layer", "mask"),
    [
        ("dropped", lambda: MoE(Capacity(TopK(4, 2), factor=0.25), FFN(2, 4, 3), backend="gather"), None),
        ("padding", lambda: MoE(TopK(4, 2), FFN(2, 4, 3), backend="gather"), torch.tensor([[1, 0, 1, 1]])),
    ],
)
def test_a_named_backend_that_cannot_serve_says_why(reason, layer, mask):
    moe = layer()
    moe.context.mask(mask)
    with pytest.raises(ValueError, match=f"'gather' cannot run this layer.*{reason}.*backend='auto'"):
        moe(torch.randn(1, 4, 4))


@pytest.mark.parametrize(
    ("reason", "routing"),
    [
        ("several gates", assign(torch.tensor([[0]]), torch.ones(1, 1, 2), 1)),
        ("gave a Mixture", Mixture(counts=torch.tensor([1]), into=torch.ones(1, 1), out_of=torch.ones(1, 1))),
        ("the same number of experts", replace(assign(torch.tensor([[0]]), torch.ones(1, 1), 1), choices=None)),
    ],
)
def test_gather_serves_one_weight_for_each_of_k_choices(reason, routing):
    with pytest.raises(ValueError, match=reason):
        backends.run("gather", torch.ones(1, 2), routing, Identity())
    assert backends.run("auto", torch.ones(1, 2), routing, Identity()).eq(1).all()


@pytest.mark.parametrize(
    ("reason", "experts"),
    [
        ("these are Identity", Identity(2)),
        ("dropout in training is drawn for every expert", LoRA(2, 4, dropout=0.5)),
    ],
)
def test_experts_that_are_not_computed_as_one_low_rank_are_refused_with_the_reason(reason, experts):
    routing, x = assign(torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2), 2), torch.randn(2, 4)
    with pytest.raises(ValueError, match=f"'low_rank' cannot run this layer.*{reason}"):
        backends.run("low_rank", x, routing, experts)
    assert choose(x, routing, experts) != "low_rank"


def test_padding_that_is_nan_reaches_no_gradient_of_low_rank_experts():
    experts, x = LoRA(2, 4), torch.randn(3, 4)
    nn.init.normal_(experts.lora_B)
    x[2] = torch.nan
    routing = assign(torch.tensor([[0, 1], [1, 0]]), torch.rand(2, 2), 2, shape=(3,), positions=torch.arange(2))
    y = backends.run("low_rank", x.requires_grad_(), routing, experts)
    assert choose(x, routing, experts) == "low_rank"
    agree(y, [x, *experts.parameters()], compose(x, routing, experts), [x, *experts.parameters()])


def test_low_rank_experts_keep_no_copy_of_the_tokens_for_the_backward_pass():
    tokens, width, kept = 128, 512, {}
    experts, routing = LoRA(4, width, rank=2), assign(torch.randint(4, (tokens, 2)), torch.rand(tokens, 2), 4)
    for name in ("compose", "low_rank"):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            backends.run(name, torch.randn(tokens, width), routing, experts)
        kept[name] = sum(sizes)
    assert kept["compose"] > 3 * tokens * width > 1.5 * kept["low_rank"]


@pytest.mark.parametrize(
    ("num_experts", "rank", "k", "together"), [(8, 8, 2, True), (8, 64, 2, False), (64, 8, 1, False)]
)
def test_auto_computes_low_rank_experts_together_where_few_ranks_are_idle(num_experts, rank, k, together):
    routing = assign(torch.zeros(5, k, dtype=torch.long), torch.ones(5, k), num_experts)
    chosen = choose(torch.randn(5, 32), routing, LoRA(num_experts, 32, rank=rank))
    assert chosen == ("low_rank" if together else "compose")


def test_auto_falls_back():
    moe = MoE(Capacity(TopK(4, 2), factor=0.25), FFN(2, 4, 3))
    assert moe(torch.randn(8, 4)).shape == (8, 4)


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(order, "_ORDER", list(order._ORDER))


def test_auto_considers_the_backends_in_this_order():
    assert backend_names() == [
        "precomputed", "decode", "triton", "latent", "low_rank", "cpp", "onednn", "recompute", "gather", "liger",
        "sonicmoe", "compose",
    ]  # fmt: skip


def doubled(*call):
    return 2 * compose(*call)


KINDS = {
    "ffn": lambda: FFN(4, 8, 16),
    "each": lambda: Each([nn.Linear(8, 8) for _ in range(4)]),
    "blocks": lambda: Blocks([FFN(2, 8, 16), FFN(2, 8, 4)]),
    "lora": lambda: LoRA(4, 8, 8, rank=2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_tokens", [torch.bfloat16, torch.float32, torch.float64])
def test_tokens_of_another_dtype_come_out_in_that_of_the_experts_or_are_refused(kind, own, of_tokens):
    moe, x = MoE(TopK(8, 4), KINDS[kind]()).to(own), torch.randn(6, 8, dtype=of_tokens)
    sharpen(moe.router)
    expected = None
    for name in ("compose", "auto", *backend_names()):
        moe.backend = name
        y = _computed(moe, x)
        if isinstance(y, str):
            assert f"backend {name!r} cannot run this layer" in y
            continue
        expected = y if expected is None else expected
        assert y.dtype == own
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_without_tokens_has_an_output_without_tokens(kind):
    moe, x = MoE(TopK(8, 4), KINDS[kind]()), torch.randn(2, 0, 8, requires_grad=True)
    for name in ("auto", *backend_names()):
        moe.backend = name
        y = _computed(moe, x)
        if not isinstance(y, str):
            assert y.shape == (2, 0, 8), name
            y.sum().backward()


def _computed(moe, x):
    try:
        return moe(x)
    except ValueError as error:
        return str(error)


@pytest.mark.usefixtures("registry")
def test_a_backend_of_ones_own_is_considered_where_it_is_put():
    mine = Backend(doubled, refuse=lambda x, *_: "x is odd" if len(x) % 2 else None, chosen=lambda *call: True)
    register_backend("mine", mine, before="decode")
    assert backend_names()[:3] == ["precomputed", "mine", "decode"]
    moe, slow = (MoE(TopK(4, 2, k=2), Identity(2), backend=name) for name in ("auto", "compose"))
    x = torch.randn(4, 4)
    torch.testing.assert_close(moe(x), 2 * slow(x))
    torch.testing.assert_close(moe(x[1:]), slow(x[1:]))
    with pytest.raises(ValueError, match="'mine' cannot run this layer: x is odd"):
        MoE(TopK(4, 2), Identity(2), backend="mine")(x[1:])
    register_backend("mine", find_backend("compose"), before="gather")
    assert backend_names().count("mine") == 1
    assert backend_names().index("mine") == backend_names().index("gather") - 1


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("name", "before", "reason"),
    [
        ("auto", "gather", "cannot be called 'auto'"),
        ("compose", "gather", "cannot be called 'compose'"),
        ("mine", "gahter", "no backend 'gahter' .* did you mean 'gather'"),
        ("mine", "mine", "no backend 'mine' to put 'mine' before"),
    ],
)
def test_a_backend_without_a_name_or_a_place_is_refused(name, before, reason):
    known = backend_names()
    with pytest.raises(ValueError, match=reason):
        register_backend(name, find_backend("compose"), before=before)
    assert backend_names() == known


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setenv("MOEIFY_CHECK", "1")


@pytest.mark.usefixtures("checked", "registry")
def test_a_wrong_backend_is_caught_when_checking():
    wrong = Backend(lambda *args: compose(*args) + 0.1, lambda *call: None, lambda *call: True)
    register_backend("wrong", wrong)
    with pytest.raises(RuntimeError, match=r"'wrong' differs from the definition by 0\.1"):
        MoE(TopK(4, 2), Identity(2), backend="wrong")(torch.randn(3, 4))


@pytest.mark.usefixtures("checked")
def test_a_right_backend_with_dropout_passes_the_check():
    moe = MoE(TopK(8, 2), FFN(2, 8, 16, dropout=0.5), backend="gather")
    assert moe(torch.randn(9, 8)).isfinite().all()


def test_derivatives_by_torch_func_and_in_forward_mode_are_those_of_autograd():
    moe, x, v = MoE(TopK(8, 4), FFN(4, 8, 6)), torch.randn(5, 8), torch.randn(5, 8)
    sharpen(moe)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(moe(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: moe(x).square().sum())(x), gradient)
    _, slope = torch.func.jvp(lambda x: moe(x).square().sum(), (x,), (v,))
    torch.testing.assert_close(slope, (gradient * v).sum())
    with forward_ad.dual_level():
        y = moe(forward_ad.make_dual(x, v)).square().sum()
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, slope)
    for name in ("onednn", "recompute"):
        moe.backend = name
        with pytest.raises(ValueError, match=r"torch\.func"):
            torch.func.grad(lambda x: moe(x).sum())(x)
        with forward_ad.dual_level(), pytest.raises(ValueError, match="forward mode"):
            moe(forward_ad.make_dual(x, v))


@pytest.mark.parametrize("name", ["gather", "compose", "auto"])
def test_no_tokens_are_no_rows(name):
    assert MoE(TopK(8, 4), FFN(4, 8, 3), backend=name)(torch.empty(2, 0, 8)).shape == (2, 0, 8)


def _meta(experts):
    return experts.to("meta")


def _forward_replaced(experts):
    part = experts.up if isinstance(experts, Quantized) else experts
    part.forward = functools.partial(type(part).forward, part)
    return experts


def _hooked(register):
    def change(experts):
        getattr(experts.up if isinstance(experts, Quantized) else experts, register)(lambda *call: None)
        return experts

    return change


CHANGES = {
    "weights where the tokens are, on cpu, and some are on meta": _meta,
    "forward that was replaced": _forward_replaced,
    "their hooks, .* would not run": _hooked("register_forward_hook"),
    "so their hooks, .* not run": _hooked("register_forward_pre_hook"),
    "hooks, or a forward .* not run": _hooked("register_full_backward_hook"),
    "hooks, or a forward that .* not run": _hooked("register_full_backward_pre_hook"),
}


@torch.no_grad()
@pytest.mark.parametrize("reason", CHANGES)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", ["cpp", "onednn"])
def test_weights_are_read_only_where_calling_their_modules_would_do_no_more(name, quantized, reason):
    experts = FFN(4, 64, 1024).eval()
    experts = CHANGES[reason](quantize(experts) if quantized else experts)
    call = torch.randn(3, 64), assign(torch.tensor([[0], [1], [3]]), torch.ones(3, 1), 4), experts
    if name == "onednn" and quantized:
        reason = "these are Quantized"
    with pytest.raises(ValueError, match=f"'{name}' cannot run this layer: .*{reason}"):
        backends.run(name, *call)
    assert choose(*call) == "compose"


def test_a_model_that_is_offloaded_computes_the_same_by_auto_and_refuses_by_name():
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=101, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    model = sparsify(llama, Recipe(where=every(1), num_experts=8, experts=fresh), verbose=False).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        before = model(ids).logits
        accelerate.cpu_offload(model, execution_device="cpu")
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
        for layer in model.modules():
            if isinstance(layer, MoE):
                layer.backend = "onednn"
        with pytest.raises(ValueError, match=r"'onednn' cannot run this layer: .*forward that was replaced"):
            model(ids)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
