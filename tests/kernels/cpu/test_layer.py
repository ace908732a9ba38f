"""A whole layer block by block agrees with the definition, whatever is trained, kept, cast or cut."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from moeify import MoE, assign, backends
from moeify.backends import backend_names, compose
from moeify.experts import FFN, Each, Experts
from moeify.kernels.cpu import layer as layer_kernel
from moeify.kernels.cpu import segments
from moeify.kernels.cpu.layer import infer_layer, run_layer
from moeify.kernels.cpu.packing import pack, unpack
from moeify.kernels.stacked import ClampedGlu, Glu, Plain, Stacked
from moeify.routers import TopK
from moeify.routing import Assignment
from strategies import agree, choices, seeds

ACTIVATIONS = [Glu(F.silu), Glu(F.gelu), ClampedGlu(), Plain(F.relu), Plain(torch.tanh)]
NAMES = ["onednn", "recompute"]


def ffn(num_experts, width=8, hidden=6, dtype=torch.float32, **options):
    """Experts whose biases are not zero."""
    experts = FFN(num_experts, width, hidden, **options).to(dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts


def routing_of(counts, tokens=9, gates=None):
    """A decision with given counts, its tokens at random; tokens may come twice to one expert, or never."""
    source = torch.cat([torch.randperm(tokens)[:n] if n <= tokens else torch.randint(tokens, (n,)) for n in counts])
    weight = torch.rand(len(source)) if gates is None else gates
    return Assignment(counts=torch.tensor(counts), source=source, weight=weight, shape=(tokens,))


@pytest.fixture(params=[3, 512], ids=["small blocks", "large blocks"])
def rows_of_a_block(request, monkeypatch):
    monkeypatch.setattr(layer_kernel, "_ROWS", request.param)


@pytest.fixture(params=[False, True], ids=["by the library", "by the C++ kernel"])
def products(request, monkeypatch):
    monkeypatch.setattr(segments, "WORTH_COMPILING", 0 if request.param else 2**62)


@pytest.mark.usefixtures("rows_of_a_block", "products")
@pytest.mark.parametrize("name", NAMES)
@given(choices(), st.sampled_from(ACTIVATIONS), st.booleans(), st.sampled_from([(6, 3), (8, 8), (5, 7)]), seeds)
def test_output_and_gradients_are_those_of_the_definition(name, choice, activation, bias, sizes, seed):
    torch.manual_seed(seed)
    index, gates, num_experts = choice
    experts = ffn(num_experts, *sizes, activation=activation, bias=bias, width_out=4)
    x = torch.randn(len(index), sizes[0], requires_grad=True)
    leaves = [x, gates, *experts.parameters()]
    y = backends.run(name, x, assign(*choice), experts)
    agree(y, leaves, compose(x, assign(*choice), experts), leaves)
    with torch.no_grad():
        torch.testing.assert_close(backends.run(name, x, assign(*choice), experts), y)


@pytest.mark.usefixtures("rows_of_a_block", "products", "uninitialised_memory_is_nan")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("counts", [[0, 5, 0], [0, 0, 1], [9, 0, 0], [1, 3, 5], [0, 0, 0], [4, 4, 0]])
def test_any_counts_will_do(counts, name):
    experts, x, gates = ffn(3, bias=True), torch.randn(9, 8, requires_grad=True), torch.rand(sum(counts))
    leaves = [x, gates.requires_grad_(), *experts.parameters()]
    routing = routing_of(counts, gates=gates)
    agree(backends.run(name, x, routing, experts), leaves, compose(x, routing, experts), leaves)


@pytest.mark.parametrize("trained", ["x", "gates", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_frozen_gets_no_gradient_and_the_others_the_same(name, trained):
    experts, x, gates = ffn(3, bias=True), torch.randn(9, 8), torch.rand(12)
    leaves = {"x": x, "gates": gates, **dict(experts.named_parameters())}
    for leaf_name, leaf in leaves.items():
        leaf.requires_grad_(leaf_name == trained)
    routing = routing_of([7, 0, 5], gates=gates)
    agree(backends.run(name, x, routing, experts), [leaves[trained]], compose(x, routing, experts), [leaves[trained]])
    backends.run(name, x, routing, experts).sum().backward()
    assert [leaf_name for leaf_name, leaf in leaves.items() if leaf.grad is not None] == [trained]


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 6e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision_is_near_the_exact_output(name, dtype, tolerance):
    experts, x, gates = ffn(3, 16, 8, dtype, bias=True), torch.randn(9, 16, dtype=dtype), torch.rand(12)
    exact = ffn(3, 16, 8, torch.float64, bias=True)
    exact.load_state_dict(experts.state_dict())
    leaves = [x.requires_grad_(), gates.requires_grad_(), *experts.parameters()]
    twins = [x.detach().double().requires_grad_(), gates.detach().double().requires_grad_(), *exact.parameters()]
    routing = routing_of([7, 0, 5], gates=gates)
    twin = routing_of([7, 0, 5], gates=twins[1])
    object.__setattr__(twin, "source", routing.source)
    y = backends.run(name, x, routing, experts)
    assert y.dtype == dtype
    scale = 4.0
    agree(y, leaves, compose(twins[0], twin, exact), twins, rtol=tolerance, atol=scale * tolerance)


class Transposed(Experts):
    """Experts that store their weights (E, D, M) and (E, H, O), as some models of transformers do."""

    def __init__(self):
        super().__init__()
        self.num_experts = 3
        self.up, self.down = nn.Parameter(torch.randn(3, 8, 12)), nn.Parameter(torch.randn(3, 6, 8))

    @property
    def stacked(self):
        return Stacked(self.up.transpose(1, 2), None, self.down.transpose(1, 2), None, Glu(F.silu))

    def forward(self, rows, counts):
        parts = rows.split(counts.tolist())
        return torch.cat([Glu(F.silu)(p @ up) @ down for p, up, down in zip(parts, self.up, self.down, strict=True)])


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name):
    experts, x = Transposed(), torch.randn(8, 9).t().requires_grad_()
    routing, leaves = routing_of([7, 0, 5]), [x, *experts.parameters()]
    agree(backends.run(name, x, routing, experts), leaves, compose(x, routing, experts), leaves)
    y = backends.run(name, x, routing, experts)
    y.sum().backward()  # an expanded gradient of stride zero
    assert experts.up.grad.stride() == experts.up.stride()
    with torch.no_grad():
        torch.testing.assert_close(backends.run(name, x, routing, pack(experts)), y)


@pytest.mark.parametrize("keep", [True, False])
def test_the_derivative_is_the_limit_of_differences(keep):
    experts, routing = ffn(3, 4, 3, torch.float64, bias=True), routing_of([3, 0, 2], 4)
    x, gates = torch.randn(4, 4, dtype=torch.float64), torch.rand(5, dtype=torch.float64)

    def call(x, gates, up, up_bias, down, down_bias):
        stacked = Stacked(up, up_bias, down, down_bias, Glu(F.silu))
        return run_layer(x, routing.source, gates, routing.counts, stacked, torch.float64, keep=keep)

    leaves = [leaf.detach().requires_grad_() for leaf in (x, gates, *experts.parameters())]
    leaves = [leaves[i] for i in (0, 1, 2, 4, 3, 5)] if leaves[3].dim() == 3 else leaves
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_a_gradient_penalty_sees_gates_that_depend_on_the_tokens():
    moe = MoE(TopK(8, 3, init_std=1.0), ffn(3))
    x = torch.randn(9, 8, requires_grad=True)
    penalties = []
    for moe.backend in ("onednn", "compose"):
        (slope,) = torch.autograd.grad(moe(x).square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(slope.square().sum(), [x, *moe.parameters()]))
    for ours, theirs in zip(*penalties, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_followed_and_gradients_keep_the_dtype_of_the_parameters(name):
    experts, x, routing = ffn(3, 16, 8, bias=True), torch.randn(9, 16, requires_grad=True), routing_of([7, 0, 5])
    leaves = [x, *experts.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = backends.run(name, x, routing, experts), compose(x, routing, experts)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    agree(ours, leaves, theirs, leaves, rtol=5e-2, atol=2e-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = backends.run(name, x, routing, experts)
    assert [g.dtype for g in torch.autograd.grad(y.float().sum(), leaves)] == [torch.float32] * len(leaves)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_activation_checkpointing_changes_nothing(name, reentrant):
    moe = MoE(TopK(8, 3, init_std=1.0), ffn(3, bias=True), backend=name)
    x = torch.randn(9, 8, requires_grad=True)
    moe(x).square().sum().backward()
    plain = [p.grad.clone() for p in moe.parameters()]
    moe.zero_grad()
    checkpoint(moe, x, use_reentrant=reentrant).square().sum().backward()
    for expected, p in zip(plain, moe.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_several_batches_add_up(name):
    experts, batches = ffn(3, bias=True), [torch.randn(9, 8) for _ in range(3)]
    routings = [routing_of(counts) for counts in ([5, 0, 0], [0, 3, 0], [2, 2, 2])]
    for x, routing in zip(batches, routings, strict=True):
        backends.run(name, x, routing, experts).square().sum().backward()
    whole = sum(compose(x, r, experts).square().sum() for x, r in zip(batches, routings, strict=True))
    for parameter, expected in zip(experts.parameters(), torch.autograd.grad(whole, experts.parameters()), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_a_compiled_layer_is_captured_whole(backward):
    torch._dynamo.reset()
    moe = MoE(TopK(8, 3, init_std=1.0), ffn(3, bias=True))
    x = torch.randn(9, 8, requires_grad=backward)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    with nullcontext() if backward else torch.no_grad():
        y, expected = compiled(x), moe(x)
    torch.testing.assert_close(y, expected)
    if backward:
        leaves = [x, *moe.parameters()]
        agree(y, leaves, expected, leaves)


REFUSED = {
    "stacked weights": (lambda: Each([nn.Linear(8, 8), nn.Linear(8, 8)]), lambda x: x),
    "an activation without parameters": (lambda: ffn(2, activation=Plain(nn.PReLU())), lambda x: x),
    "on a CPU": (lambda: ffn(2), lambda x: x.to("meta")),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_cannot_serve_it_refuses_with_the_reason(reason):
    experts, place = REFUSED[reason]
    with pytest.raises(ValueError, match=f"'onednn' cannot run this layer: .*{reason}"):
        backends.run("onednn", place(torch.randn(9, 8)), routing_of([3, 2]), experts())


def test_hooks_on_experts_are_called():
    moe, seen = MoE(TopK(8, 3), ffn(3)), []
    moe.experts.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    moe(torch.randn(9, 8))
    assert seen == [(18, 8)]


def test_auto_takes_it_where_a_gradient_is_needed():
    experts, x = ffn(3), torch.randn(9, 8)
    assert backends.choose(x, routing_of([3, 0, 2]), experts) == "onednn"


CHANGES = {
    "an optimizer's step": lambda p: p.mul_(2.0),
    "an edit through .data": lambda p: p.data.mul_(2.0),
    "new memory": lambda p: setattr(p, "data", p.data * 2.0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("autocast", [False, True])
def test_packed_weights_are_never_stale(change, autocast):
    experts, x, routing = pack(ffn(3, 16, 8, bias=True)), torch.randn(9, 16), routing_of([7, 0, 5])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for _ in range(2):
            ours, theirs = backends.run("onednn", x, routing, experts), compose(x, routing, experts)
            torch.testing.assert_close(ours, theirs, rtol=3e-2 if autocast else 1e-5, atol=1e-1 if autocast else 1e-5)
            for parameter in experts.parameters():
                CHANGES[change](parameter)
    unpack(experts)


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {StorageWeakRef(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _dense(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if _dense(tensor) and (ref := StorageWeakRef(tensor.untyped_storage())) not in before:
                self.held[ref] = tensor.untyped_storage().nbytes()
        self.held = {ref: size for ref, size in self.held.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.held.values()))
        return out


def _dense(value):
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def loop_over_segments(x, routing, experts):
    """The leanest obvious way: one expert at a time, its rows gathered, computed and added."""
    up, down = experts.up[0], experts.down[0]
    y = torch.zeros_like(x)
    weight = routing.weight.to(x.dtype)
    for expert, token in enumerate(routing.source.split(routing.counts.tolist())):
        scale = weight.split(routing.counts.tolist())[expert].unsqueeze(1)
        y.index_add_(0, token, F.linear(experts.activation(F.linear(x[token], up[expert])), down[expert]) * scale)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[512] * 8, [4096 - 7, 1, 1, 1, 1, 1, 1, 1], [1024, 0, 1024, 0, 1024, 0, 1024, 0]])
@pytest.mark.parametrize("library", ["onednn", "blas"])
def test_a_forward_pass_holds_no_more_than_one_expert_at_a_time_would(library, counts, dtype, monkeypatch):
    monkeypatch.setenv("MOEIFY_FP32_GEMM", library)
    experts, x, routing = ffn(8, 32, 64, dtype), torch.randn(2048, 32, dtype=dtype), routing_of(counts, 2048)
    peaks = []
    for way in (lambda *call: backends.run("onednn", *call), loop_over_segments):
        with torch.no_grad():
            way(x, routing, experts)  # what is measured at first use is measured now
            with Live() as live:
                way(x, routing, experts)
        peaks.append(live.peak)
    wider = x.numel() * (4 - x.element_size())  # outputs are added up in fp32, which the loop does in its own dtype
    assert peaks[0] <= peaks[1] + wider


@pytest.mark.parametrize("name", NAMES)
def test_what_is_computed_again_is_not_held(name):
    experts, x, routing = ffn(4, 32, 64), torch.randn(256, 32, requires_grad=True), routing_of([128] * 4, 256)
    with Live() as live:
        y = backends.run(name, x, routing, experts)
        held = sum(size for ref, size in live.held.items() if not ref.expired())
    before_inner = 512 * 128 * 4
    assert y.requires_grad
    assert (held >= before_inner) == (name == "onednn")


def test_named_backends_are_known():
    assert set(NAMES) < set(backend_names())


def test_rows_may_be_fewer_than_experts_and_the_layer_still_runs():
    experts = ffn(64, bias=True)
    x, routing = torch.randn(1, 8), routing_of([0] * 30 + [1] + [0] * 32 + [1], 1)
    with torch.no_grad():
        y = infer_layer(x, routing.source, routing.weight, routing.counts.tolist(), experts.stacked, x.dtype)
        torch.testing.assert_close(y, compose(x, routing, experts))
