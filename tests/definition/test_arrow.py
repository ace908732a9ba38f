"""Arrow against its equations, against every expert run densely, and against PEFT."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from moeify import MoE, Recipe, kernels, sparsify
from moeify.backends import compose
from moeify.experts import FFN, LoRA
from moeify.find import linears
from moeify.routers import Arrow
from moeify.sparsify import frozen, lora
from strategies import agree, doubled
from tiny_models import TINY, inputs

D, OUT, E, K, T, TAU = 6, 5, 4, 2, 9, 0.7


def layer(k: int = K, **options) -> MoE:
    moe = MoE(Arrow(D, E, k=k, temperature=TAU), LoRA(E, D, OUT, rank=3, scale=0.5), nn.Linear(D, OUT), **options)
    nn.init.normal_(moe.experts.lora_B)
    return moe


def prototype(delta: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svd(delta.detach().double()).Vh[0]


@pytest.mark.parametrize("k", [1, K, E])
def test_the_layer_is_the_papers_loop_over_tokens(k):
    moe, x = layer(k), torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    a, b = p["experts.lora_A"], p["experts.lora_B"]
    v = [prototype(b[j] @ a[j]) for j in range(E)]
    slow = []
    for u in x64:
        z = [abs(u @ v[j]) / TAU for j in range(E)]
        kept = sorted(range(E), key=lambda j: -z[j].item())[:k]
        y = p["shared.weight"] @ u + p["shared.bias"]
        for j in kept:
            y = y + z[j].exp() / sum(z[i].exp() for i in kept) * 0.5 * b[j] @ (a[j] @ u)
        slow.append(y)
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


@pytest.mark.parametrize("rank", [1, 3, D, D + 2])
@pytest.mark.parametrize("out", [2, D, 9])
def test_a_prototype_is_what_its_expert_stretches_most(rank, out):
    experts = LoRA(E, D, out, rank=rank)
    nn.init.normal_(experts.lora_B)
    v = MoE(Arrow(D, E), experts).router.prototypes
    torch.testing.assert_close(v.norm(dim=-1), torch.ones(E))
    for j in range(E):
        stretched = (experts.delta(j) @ v[j]).norm()
        torch.testing.assert_close(stretched, torch.linalg.matrix_norm(experts.delta(j), ord=2), rtol=1e-4, atol=1e-5)


def test_adapters_of_smaller_rank_keep_their_prototypes_when_they_are_filled_up():
    moe = layer()
    moe.experts.lora_A.data[:, 2:] = 0
    small = LoRA(E, D, OUT, rank=2)
    small.lora_A.data.copy_(moe.experts.lora_A[:, :2])
    small.lora_B.data.copy_(moe.experts.lora_B[..., :2])
    other = MoE(Arrow(D, E), small).router.prototypes
    torch.testing.assert_close((moe.router.prototypes * other).sum(-1).abs(), torch.ones(E))


@pytest.mark.parametrize("change", ["optimizer", "data", "replaced", "copied", "loaded"])
def test_prototypes_are_never_stale(change):
    moe = layer()
    before = moe.router.prototypes
    assert moe.router.prototypes is before
    match change:
        case "optimizer":
            moe(torch.randn(T, D)).square().sum().backward()
            torch.optim.SGD(moe.parameters(), lr=1.0).step()
        case "data":
            moe.experts.lora_A.data.copy_(torch.randn(E, 3, D))
        case "replaced":
            moe.experts.lora_B = nn.Parameter(torch.randn(E, OUT, 3))
        case "copied":
            moe = deepcopy(moe)
            moe.experts.lora_A.data.mul_(torch.randn(E, 3, 1))
        case "loaded":
            moe.load_state_dict(layer().state_dict())
    after = moe.router.prototypes
    for j in range(E):
        assert abs(after[j].double() @ prototype(moe.experts.delta(j))).item() == pytest.approx(1, abs=1e-5)
    assert (after * before).sum(-1).abs().min() < 0.999
    assert "prototypes" not in str(moe.state_dict().keys())


def test_k_experts_that_run_are_all_experts_that_run_and_k_that_are_kept():
    model = sparsify(TINY["llama"](), recipe(num_experts=5, router=partial(Arrow, k=2)), verbose=False)
    for part in model.modules():
        if isinstance(part, LoRA):
            nn.init.normal_(part.lora_B)
    sparse = model(**inputs(model)).logits
    for part in model.modules():
        if isinstance(part, MoE):
            part.forward = partial(dense, part)
    torch.testing.assert_close(sparse, model(**inputs(model)).logits, rtol=1e-4, atol=1e-4)


def dense(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """All experts for all tokens, masked afterwards."""
    u = x.flatten(0, -2)
    z = (u @ moe.router.prototypes.T).abs()
    low = z.topk(2).values[:, -1:]
    weight = z.masked_fill(z < low, float("-inf")).softmax(-1)
    return moe.shared(x) + torch.einsum("te,teo->to", weight, moe.experts.all_outputs(u)).view(*x.shape[:-1], -1)


def recipe(**parts) -> Recipe:
    return Recipe(where=linears(r"q_proj|v_proj"), experts=partial(lora, rank=2), shared=frozen, **parts)


@pytest.mark.filterwarnings("ignore")
def test_it_computes_what_peft_computes(tmp_path):
    peft = pytest.importorskip("peft")
    arrow = pytest.importorskip("peft.tuners.lora.arrow")
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = sparsify(TINY["llama"](), recipe(num_experts=3, router=partial(Arrow, k=2, temperature=0.5)), verbose=False)
    for j in range(3):
        torch.manual_seed(j)
        adapter = peft.get_peft_model(TINY["llama"](), config)
        for name, part in model.named_modules():
            if isinstance(part, MoE):
                theirs = adapter.base_model.model.get_submodule(name)
                theirs.lora_A["default"].weight.data[0] *= 6  # fifteen power iterations find what stands out
                part.experts.lora_A.data[j] = theirs.lora_A["default"].weight
                part.experts.lora_B.data[j] = theirs.lora_B["default"].weight
                part.experts.scale[j] = 6 / 2
        adapter.save_pretrained(tmp_path / str(j))
    theirs = arrow.create_arrow_model(
        TINY["llama"](),
        [str(tmp_path / str(j)) for j in range(3)],
        peft.ArrowConfig(top_k=2, router_temperature=0.5, rng_seed=0),
    ).eval()
    ids = inputs(model)["input_ids"]
    base, expected = TINY["llama"]()(ids).logits, theirs(ids).logits
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["compose", "gather", "auto"])
def test_every_backend_and_dtype_is_the_definition(backend, dtype, monkeypatch):
    moe = MoE(Arrow(D, E, k=K), LoRA(E, D, rank=3), backend=backend).to(dtype)
    nn.init.normal_(moe.experts.lora_B)
    exact, x = deepcopy(moe).double(), torch.randn(3, 4, D, dtype=dtype, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    y = moe(x)
    monkeypatch.setattr("moeify.experts.lora.grouped_linear", kernels.naive_grouped_linear)
    slow = compose(x64, exact.router(x64, moe.context), exact.experts)
    tolerance = 6e-2 if dtype == torch.bfloat16 else 1e-5
    agree(y, [x, *moe.parameters()], slow, [x64, *exact.parameters()], rtol=tolerance, atol=tolerance)


def test_experts_without_low_rank_maps_have_no_prototypes():
    with pytest.raises(ValueError, match="and FFN has none; use experts=lora"):
        MoE(Arrow(D, E), FFN(E, D, 4))
    with pytest.raises(ValueError, match="put it into a MoE"):
        Arrow(D, E)(torch.randn(T, D), layer().context)
    with pytest.raises(ValueError, match="temperature=0 divides"):
        Arrow(D, E, temperature=0)


def test_an_adapter_around_the_experts_is_refused_before_anything_changes():
    class Adapted(nn.Module):
        """As PEFT wraps a module."""

        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

    moe = layer()
    experts = moe.experts
    with pytest.raises(ValueError, match="Adapted changes what experts compute without changing these; train lora_A"):
        moe.experts = Adapted(experts)
    assert moe.experts is experts
