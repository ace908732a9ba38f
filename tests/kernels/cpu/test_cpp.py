"""The C++ kernel against the definition; on a machine without a compiler, that it says so."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from levels import COMPILED
from moeify import Mixture, MoE, assign, backends
from moeify.backends import choose, compose
from moeify.experts import FFN, ClampedGlu, Glu, Identity, Plain, Quantized, quantize
from moeify.experts.quantized import Weights
from moeify.hf.interface import HfExperts
from moeify.kernels.cpu import cpp
from moeify.kernels.cpu.cpp import build, call, steps
from moeify.kernels.cpu.cpp.reading import READINGS
from moeify.kernels.cpu.packing import pack
from moeify.kernels.stacked import KNOWN
from moeify.routers import Capacity, DefaultVector, TopK, TopP
from strategies import choices, route, seeds, sharpen

ACTIVATIONS = [ClampedGlu(), *(kind(act) for kind in (Plain, Glu) for act in KNOWN.values())]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
TOLERANCE_OF_BYTES = 4e-2  # where activations may be rounded to 8 bits


def run(x, routing, experts):
    """The kernel's output; where there is no kernel, its reason is checked and the definition runs."""
    if reason := cpp.why_not():
        with pytest.raises(ValueError, match=re.escape(reason)):
            backends.run("cpp", x, routing, experts)
        return compose(x, routing, experts)
    return backends.run("cpp", x, routing, experts)


def check(x, routing, experts):
    with torch.no_grad():
        y, expected = run(x, routing, experts), compose(x, routing, experts)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    rounds = isinstance(experts, Quantized) and x.dtype == torch.bfloat16
    tolerance = TOLERANCE_OF_BYTES if rounds else TOLERANCE[x.dtype]
    torch.testing.assert_close(y / scale, expected / scale, rtol=0, atol=tolerance)


def ffn(*sizes, bias=False, dtype=torch.float32, **options):
    experts = FFN(*sizes, bias=bias, **options)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() == 3 else 1.0)
    return experts.to(dtype)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=12)
@given(
    choices(max_tokens=30), st.integers(1, 150), st.integers(1, 150), st.sampled_from(ACTIVATIONS), st.booleans(), seeds
)
def test_every_level_agrees_with_the_definition(dtype, bits, choice, width, hidden, activation, bias, seed):
    torch.manual_seed(seed)
    index, gates, num_experts = choice
    experts = ffn(num_experts, width, hidden, activation=activation, bias=bias, width_out=width + 3, dtype=dtype)
    if bits < 16:
        experts = quantize(experts, bits, group_size=32 if seed % 2 else 64)
    x = torch.randn(len(index), width).to(dtype)
    check(x, assign(index, gates.detach(), num_experts), experts)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("level", [each for each in COMPILED if each.startswith("avx512_vnni")], indirect=True)
@pytest.mark.parametrize("bits", [8, 4])
def test_where_only_int8_is_multiplied_activations_are_rounded_beside_weights_of_4_bits(bits):
    experts = quantize(ffn(4, 256, 256, dtype=torch.bfloat16), bits)
    x, routing = torch.randn(8, 256).bfloat16(), assign(torch.arange(8).unsqueeze(1) % 4, torch.ones(8, 1), 4)
    with torch.no_grad():
        y, expected = run(x, routing, experts).float(), compose(x.float(), routing, experts)
    assert ((y - expected).norm() / expected.norm() < 0.005) == (bits == 8)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=8)
@given(st.data(), st.integers(1, 60), st.integers(1, 5), st.sampled_from(ACTIVATIONS), seeds)
def test_few_rows_and_many_agree_with_the_definition(bits, data, tokens, used, activation, seed):
    torch.manual_seed(seed)
    width, hidden = (data.draw(st.sampled_from([63, 200, 256, 1025, 1200])) for _ in range(2))
    experts = quantize(
        ffn(6, width, hidden, activation=activation, bias=True, width_out=71, dtype=torch.bfloat16), bits
    )
    index = torch.rand(tokens, used).topk(min(used, 2)).indices  # experts from `used` on get no rows
    check(torch.randn(tokens, width).bfloat16(), assign(index, torch.rand(index.shape), 6), experts)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=12)
@given(st.integers(1, 2100), st.integers(1, 70), st.integers(1, 8), st.sampled_from([32, 64]), seeds)
def test_inputs_that_are_whole_numbers_already_are_multiplied_exactly(bits, width, width_out, tokens, group_size, seed):
    torch.manual_seed(seed)
    weights = Weights(1, width_out, width, bits, group_size)
    weights.fill(torch.randn(1, width_out, width), None)
    x, y = torch.randint(-127, 128, (tokens, width)).float(), torch.empty(tokens, width_out)
    x[:, ::64] = 127
    step = steps.linear(x, y, weights.weight, scales=weights.scales, group_size=group_size, dtype=torch.bfloat16)
    if cpp.why_not() is None:
        steps.run_steps([step], tokens)
        exact = x.double() @ weights.of(0, torch.float64).t()
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-6 * (127 * 3 * width))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize(("width", "hidden"), [(200, 1025), (1300, 71)])
def test_one_row_of_an_expert_agrees_with_the_definition_however_its_weights_are_read(
    reading, bits, width, hidden, monkeypatch
):
    monkeypatch.setattr(call, "reading", lambda *_: reading)
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    experts = ffn(3, width, hidden, bias=True, width_out=71, dtype=dtype)
    experts = experts if bits >= 16 else quantize(experts, bits)
    check(torch.randn(1, width).to(dtype), assign(torch.tensor([[2, 0]]), torch.rand(1, 2), 3), experts)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_many_rows_of_one_expert_are_cut_into_pieces(bits, monkeypatch):
    experts = ffn(3, 40, 20000)  # hidden units of more than 52 rows do not fit at once
    experts = experts if bits == 16 else quantize(experts, bits)
    check(torch.randn(130, 40), assign(torch.ones(130, 1, dtype=torch.int64), torch.rand(130, 1), 3), experts)


def test_the_number_of_threads_changes_no_bit_of_the_output_of_few_rows():
    experts, index = (
        quantize(ffn(6, 70, 300, width_out=333, dtype=torch.bfloat16), 4),
        torch.rand(50, 6).topk(2).indices,
    )
    x, routing = torch.randn(50, 70).bfloat16(), assign(index, torch.rand(50, 2), 6)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with torch.no_grad():
                outputs.append(run(x, routing, experts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        index = torch.rand(50, 6).topk(2).indices
        check(torch.randn(50, 70), assign(index, torch.rand(50, 2), 6), ffn(6, 70, 90, bias=True, width_out=33))
    finally:
        torch.set_num_threads(before)


def test_tokens_need_not_lie_side_by_side():
    experts, index = ffn(4, 24, 16), torch.rand(6, 4).topk(2).indices
    routing = assign(index, torch.rand(6, 2), 4)
    check(torch.randn(24, 6).t(), routing, experts)
    check(torch.randn(6, 48)[:, ::2], routing, experts)
    check(torch.randn(6, 48)[:, :24], routing, experts)


@pytest.mark.parametrize(
    "router",
    [
        lambda: Capacity(TopK(24, 4), factor=0.5),
        lambda: TopP(24, 4),
        lambda: DefaultVector(24, 4),
        lambda: TopK(24, 4, k=3),
    ],
    ids=["dropped rows", "top-p", "default vector", "padding"],
)
def test_tokens_may_have_any_number_of_rows(router):
    experts = ffn(4, 24, 16)
    moe = MoE(router(), experts).eval()
    sharpen(moe)
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        check(x, route(moe.router, x, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])), experts)


def test_no_tokens_are_no_rows():
    check(torch.empty(2, 0, 24), route(TopK(24, 4), torch.empty(2, 0, 24)), ffn(4, 24, 16))


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_not_a_number_stays_in_its_token(bits, dtype, number):
    x, experts = torch.randn(3, 24).to(dtype), ffn(2, 24, 16, dtype=dtype)
    experts = experts if bits == 16 else quantize(experts, bits)
    x[1, 7] = number
    routing = assign(torch.tensor([[0], [0], [1]]), torch.ones(3, 1), 2)
    with torch.no_grad():
        assert run(x, routing, experts).isfinite().all(1).tolist() == [True, False, True]


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "data", "replaced", "loaded"])
def test_weights_are_read_as_they_are_now(change):
    experts, routing, x = ffn(2, 24, 16), assign(torch.tensor([[0, 1]]), torch.ones(1, 2), 2), torch.randn(1, 24)
    check(x, routing, experts)
    if change == "in place":
        experts.down_proj.mul_(2)
    elif change == "data":
        experts.down_proj.data += 1
    elif change == "replaced":
        experts.down_proj = nn.Parameter(torch.randn(2, 24, 16))
    else:
        experts.load_state_dict(ffn(2, 24, 16).state_dict())
    check(x, routing, experts)


def test_transposed_weights_are_copied_where_that_is_allowed():
    config = GptOssConfig(hidden_size=32, intermediate_size=24, num_local_experts=4)
    hf_experts = GptOssExperts(config)
    for parameter in hf_experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    experts, x = HfExperts(hf_experts), torch.randn(5, 32)
    routing = assign(torch.rand(5, 4).topk(2).indices, torch.rand(5, 2), 4)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"these are transposed; .*pack allows a copy"):
            backends.run("cpp", x, routing, experts)
        pack(hf_experts)
        check(x, routing, experts)
        hf_experts.down_proj.mul_(2)
        check(x, routing, experts)


class Recorded(torch.Tensor):
    pass


def soft():
    return Mixture(counts=torch.tensor([1, 1]), into=torch.ones(1, 2), out_of=torch.ones(1, 2))


@torch.no_grad()
@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("the router gave a Mixture", {"routing": soft()}),
        ("several gates", {"routing": assign(torch.tensor([[0]]), torch.ones(1, 1, 2), 2)}),
        ("these are Identity", {"experts": Identity(2)}),
        ("without dropout", {"experts": FFN(2, 4, 3, dropout=0.1)}),
        ("supports the activations silu, .* not ", {"experts": FFN(2, 4, 3, activation=Plain(torch.tanh))}),
        (
            "in float32, bfloat16, and the tokens are torch.float16",
            {"x": torch.ones(1, 4).half(), "experts": FFN(2, 4, 3).half()},
        ),
        ("one dtype", {"experts": FFN(2, 4, 3).bfloat16()}),
        ("these are on meta|the tokens are on meta", {"x": torch.ones(1, 4, device="meta")}),
        ("lie whole in memory", {"x": torch.ones(1, 4).as_subclass(Recorded)}),
    ],
)
def test_what_the_kernel_cannot_do_it_refuses(reason, call):
    call = {"x": torch.ones(1, 4), "routing": assign(torch.tensor([[0]]), torch.ones(1, 1), 2)} | call
    with pytest.raises(ValueError, match=f"backend 'cpp' cannot run this layer: .*({reason})"):
        backends.run("cpp", call["x"], call["routing"], call.get("experts", FFN(2, 4, 3)))


def test_gradients_autocast_transforms_and_hooks_are_refused():
    x, routing, experts = torch.ones(1, 4), assign(torch.tensor([[0]]), torch.ones(1, 1), 2), FFN(2, 4, 3)
    with pytest.raises(ValueError, match="no gradient"):
        backends.run("cpp", x, routing, experts)
    with torch.no_grad(), torch.autocast("cpu"), pytest.raises(ValueError, match="autocast"):
        backends.run("cpp", x, routing, experts)
    with torch.no_grad(), pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.vmap(lambda x: backends.run("cpp", x, routing, experts))(x.unsqueeze(0))
    experts.register_forward_hook(lambda *args: None)
    with torch.no_grad(), pytest.raises(ValueError, match="hooks"):
        backends.run("cpp", x, routing, experts)


def test_auto_takes_the_kernel_for_short_segments_of_large_experts(monkeypatch):
    if cpp.why_not() is None:
        monkeypatch.setattr("moeify.backends.cpp.max_layer_rows", lambda dtype, packs: 100)
    x, index = torch.randn(3, 128), torch.tensor([[0, 1], [2, 3], [0, 3]])
    routing, experts = assign(index, torch.rand(3, 2), 4), FFN(4, 128, 512)
    with torch.no_grad():
        assert (choose(x, routing, experts) == "cpp") == (cpp.why_not() is None)
        assert choose(x, assign(index, torch.rand(3, 2), 4), FFN(4, 128, 16)) != "cpp"
        many = assign(index.repeat(1000, 1), torch.rand(3000, 2), 4)
        assert choose(x.repeat(1000, 1), many, experts) != "cpp"
    assert choose(x, routing, experts) != "cpp"


def test_a_decision_that_does_not_fit_the_tokens_is_no_crash():
    if cpp.why_not() is None:
        routing = assign(torch.tensor([[0], [1]]), torch.ones(2, 1), 2)
        with torch.no_grad(), pytest.raises(ValueError, match="does not fit 1 tokens"):
            backends.run("cpp", torch.randn(1, 24), routing, ffn(2, 24, 16))


@pytest.mark.parametrize("bits", [16, 8])
def test_the_layer_is_captured_whole_by_the_compiler(bits):
    experts = ffn(4, 24, 16) if bits == 16 else quantize(ffn(4, 24, 16), bits)
    moe = MoE(TopK(24, 4), experts, backend="cpp").eval()
    x = torch.randn(5, 24)
    check(x, route(moe.router, x), experts)
    if cpp.why_not() is None:
        with torch.no_grad():
            compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), moe(x))


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("MOEIFY_CPP", "0")
    assert cpp.why_not() == "it is switched off by MOEIFY_CPP=0"
    assert cpp.explain() == "none: it is switched off by MOEIFY_CPP=0"
    check(torch.randn(2, 24), route(TopK(24, 4), torch.randn(2, 24)), ffn(4, 24, 16))


def test_an_unknown_level_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("MOEIFY_CPP", "mmx")
    with pytest.raises(ValueError, match=r"MOEIFY_CPP=mmx .*choose one of 0, 1, .*portable"):
        cpp.why_not()
    monkeypatch.setattr(build, "levels", lambda: ["portable"])
    monkeypatch.setenv("MOEIFY_CPP", "neon")
    assert re.search(r"MOEIFY_CPP=neon is not among .*portable", cpp.why_not())


def test_a_compiler_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX=no-such-compiler is not found; install a C++ compiler" in cpp.why_not()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path))
    build._load.cache_clear()
    assert "none of c++, g++ and clang++ is found" in cpp.why_not()
    build._load.cache_clear()


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: no room on this device" >&2\nexit 1\n')
    broken.chmod(broken.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path))
    assert cpp.why_not() == f"it could not be compiled by {broken}: error: no room on this device"
    assert not list(tmp_path.rglob("*.so"))


def test_nothing_is_compiled_at_import(tmp_path):
    run = [sys.executable, "-c", "import moeify, moeify.kernels.cpu.cpp, moeify.experts"]
    subprocess.run(run, check=True, env=dict(os.environ, MOEIFY_CACHE=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_the_sources_lie_in_the_package():
    assert {"layer.cpp", "dots.h", "projections.h"} <= {path.name for path in Path(build.__file__).parent.iterdir()}
