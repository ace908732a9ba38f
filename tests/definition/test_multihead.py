"""MH-MoE, one sub-token at a time."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moeify import Context, MoE, kernels, record
from moeify.documents import Packing
from moeify.experts import FFN, Plain
from moeify.flops import count
from moeify.multihead import MultiHead, matched, multi_head
from moeify.routers import Lookup, TopK
from strategies import agree, doubled, layer

D, E, H = 12, 4, 5


def multi(heads, context=None, router=TopK):
    torch.manual_seed(0)
    moe = layer(D // heads, E, H, router=router)
    moe.context = moe.context if context is None else context
    return MultiHead(moe, D, heads)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_every_token_is_cut_routed_in_parts_and_merged(heads):
    model, x = multi(heads), torch.randn(2, 3, D, requires_grad=True)
    x64, own = x.detach().double().requires_grad_(), doubled(model)
    slow = torch.zeros(2, 3, D, dtype=torch.float64)
    for b in range(2):
        for n in range(3):
            parts = []
            for part in (own["head.weight"] @ x64[b, n] + own["head.bias"]).split(D // heads):
                p = (own["moe.router.weight"] @ part).softmax(-1)
                best = sorted(range(E), key=lambda j: -p[j].item())[:2]
                expert_output = torch.zeros_like(part)
                for j in best:
                    gate, up = (own["moe.experts.gate_up_proj"][j] @ part).chunk(2)
                    hidden = gate / (1 + torch.exp(-gate)) * up
                    expert_output = expert_output + p[j] / sum(p[i] for i in best) * (
                        own["moe.experts.down_proj"][j] @ hidden
                    )
                parts.append(expert_output)
            slow[b, n] = own["merge.weight"] @ torch.cat(parts) + own["merge.bias"]
    agree(model(x), [x, *model.parameters()], slow, [x64, *own.values()])


def test_padding_is_padding_in_every_part():
    context = Context()
    model = multi(3, context)
    context.mask(torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]))
    with record(model) as decisions:
        model(torch.randn(2, 4, D))
    assert decisions["moe"].counts.sum() == 5 * 3 * 2
    real = {3 * t + part for t in (0, 1, 4, 5, 6) for part in range(3)}
    assert set(decisions["moe"].source.tolist()) == real
    assert decisions["moe"].sequence_id.tolist() == [0] * 6 + [1] * 9


def test_parts_belong_to_the_document_of_their_token():
    context = Context()
    model = multi(3, context)
    context.call.packing = Packing({"position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])}, (2, 4))
    with record(model) as decisions:
        model(torch.randn(2, 4, D))
    assert decisions["moe"].sequence_id.tolist() == [0] * 6 + [1] * 6 + [2] * 12


def test_a_mask_is_forgotten_with_its_forward_pass():
    context = Context()
    model = multi(2, context)
    context.mask(torch.tensor([[1, 0]]))
    model(torch.randn(1, 2, D))
    context.clear()
    assert model(torch.randn(3, 5, D)).shape == (3, 5, D)
    assert context.call.token_mask is None


def test_sequences_that_come_second_stay_together():
    context = Context()
    model, x = multi(2, context, router=lambda *a: TopK(*a, per="sequence")), torch.randn(3, 4, D)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    context.mask(mask)
    y = model(x)
    context.call.batch_first = False
    context.mask(mask.T)
    torch.testing.assert_close(model(x.transpose(0, 1)).transpose(0, 1), y)


def test_what_is_known_of_a_token_is_known_of_its_parts():
    context = Context()
    moe = MoE(Lookup(D // 3, E, size=10), FFN(E, D // 3, H), context=context)
    context.call.inputs = {"input_ids": torch.tensor([[1, 2], [3, 1]])}
    with record(model := MultiHead(moe, D, 3)) as decisions:
        model(torch.randn(2, 2, D))
    table = moe.router.table[:, 0]
    assert decisions["moe"].choices.indices[:, 0].tolist() == table[[1] * 3 + [2] * 3 + [3] * 3 + [1] * 3].tolist()


def test_a_matched_layer_costs_what_the_plain_one_costs(monkeypatch):
    monkeypatch.setattr("moeify.experts.ffn.grouped_linear", kernels.naive_grouped_linear)
    width, experts, hidden, tokens = 48, 8, 96, 10
    plain = MoE(TopK(width, experts, k=2), FFN(experts, width, hidden))
    equal = multi_head(width, experts, hidden, heads=4, k=2)

    plain.backend = equal.moe.backend = "compose"  # whose products are counted one by one

    def flops(model, routers):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(1, tokens, width))
        return counter.get_total_flops() - 2 * tokens * width * routers

    assert flops(equal, equal.moe.experts.num_experts) == flops(plain, experts)
    assert count(equal).flops == flops(equal, 0) / tokens
    assert count(equal).dense_flops == 2 * (2 * width**2 + 4 * sum(p.numel() for p in equal.moe.parameters()))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (plain, equal)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_linear_layers_are_paid_for_by_narrower_experts():
    """By hand: H' = 96 - 2 · 48 / (2 · 3), E' = (8 · 3 · 96 - 2 · 48) · 4 / (3 · 80)."""
    assert matched(48, 8, 96, heads=4) == (37, 80)


def test_what_cannot_be_cut_or_matched_is_refused():
    with pytest.raises(ValueError, match="width of 12 cannot be cut into 5 heads"):
        MultiHead(layer(), D, 5)
    with pytest.raises(ValueError, match="take more or wider experts"):
        multi_head(D, E, 3, heads=2, activation=Plain(nn.functional.relu))
