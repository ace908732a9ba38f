"""PLE, one token, one level and one gate at a time."""

from functools import partial

import pytest
import torch
from torch import nn

from moeify import Context, MoE, record
from moeify.experts import FFN, Each, OfInputs, Plain
from moeify.flops import count
from moeify.ple import ple
from moeify.routers import Extraction, MultiGate
from strategies import agree, doubled, route

D, O, H, TASKS, PRIVATE, SHARED = 6, 4, 5, 3, 2, 1  # noqa: E741
E = TASKS * PRIVATE + SHARED
relu = partial(FFN, hidden=H, activation=Plain(nn.functional.relu), bias=True, width_out=O)


def built(levels, **options):
    torch.manual_seed(0)
    return ple(D, O, relu, tasks=TASKS, levels=levels, private=PRIVATE, shared=SHARED, **options)


def softmax(logits):
    e = [torch.exp(z - max(logits)) for z in logits]
    return [v / sum(e) for v in e]


def slow_level(own, level, inputs, *, shared_gate):
    """y_1 .. y_n, and y_s, of the inputs x_1 .. x_n and x_s of one token."""

    def expert(j, x):
        part = f"levels.{level}.experts.experts"
        hidden = (own[f"{part}.up_proj"][j] @ x + own[f"{part}.up_proj_bias"][j]).clamp_min(0)
        return own[f"{part}.down_proj"][j] @ hidden + own[f"{part}.down_proj_bias"][j]

    f = [expert(j, inputs[min(j // PRIVATE, TASKS)]) for j in range(E)]
    outputs = []
    for gate in range(TASKS + shared_gate):
        own_experts = range(gate * PRIVATE, (gate + 1) * PRIVATE)
        seen = [*own_experts, *range(TASKS * PRIVATE, E)] if gate < TASKS else list(range(E))
        weight = own[f"levels.{level}.router.weight"][gate]
        g = softmax([weight[j] @ inputs[gate] for j in seen])
        outputs.append(sum(w * f[j] for w, j in zip(g, seen, strict=True)))
    return outputs


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_every_level_reads_what_the_gates_before_it_gave(levels):
    model, x = built(levels), torch.randn(5, D, requires_grad=True)
    x64, own = x.detach().double().requires_grad_(), doubled(model)
    slow = torch.zeros(5, TASKS, O, dtype=torch.float64)
    for t in range(5):
        inputs = [x64[t]] * (TASKS + 1)
        for level in range(levels):
            inputs = slow_level(own, level, inputs, shared_gate=level < levels - 1)
        slow[t] = torch.stack(inputs)
    agree(model(x), [x, *model.parameters()], slow, [x64, *own.values()])


def test_one_level_is_cgc():
    model, x = built(1), torch.randn(7, D)
    gates = MultiGate(D, E, gates=TASKS, private=PRIVATE)
    gates.weight = model.levels[0].router.weight
    torch.testing.assert_close(model(x), MoE(gates, model.levels[0].experts.experts)(x))


def test_a_batch_of_one_and_tokens_of_sequences_are_served():
    model = built(2)
    assert model(torch.randn(1, D)).shape == (1, TASKS, O)
    assert model(torch.randn(2, 3, D)).shape == (2, 3, TASKS, O)


def test_padding_reaches_no_level():
    context = Context()
    model = built(2, context=context)
    context.mask(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    with record(model) as decisions:
        y = model(torch.randn(2, 3, D))
    assert [set(d.source.tolist()) for d in decisions.values()] == [{0, 1, 3}] * 2
    assert not y[0, 2].any()


def test_what_is_saved_is_what_is_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    model, again, x = built(3), built(3), torch.randn(4, D)
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    save_file(model.state_dict(), tmp_path / "ple.safetensors")
    again.load_state_dict(load_file(tmp_path / "ple.safetensors"))
    assert torch.equal(again(x), model(x))


def test_an_expert_is_counted_once_and_a_gate_by_the_input_that_it_reads():
    ffn, gates = 2 * H * (D + O), TASKS + 1
    assert count(built(1)).flops == E * ffn + 2 * TASKS * E * D
    assert count(built(2)).flops == E * (ffn + 4 * H * O) + 2 * E * (gates * D + TASKS * O)


def test_the_last_level_has_no_shared_gate_and_each_before_it_has_one():
    assert [level.router.weight.shape[0] for level in built(3).levels] == [TASKS + 1, TASKS + 1, TASKS]
    decision = route(Extraction(TASKS * 2 + 2, E, tasks=TASKS, private=PRIVATE), torch.randn(4, TASKS * 2 + 2))
    assert decision.weight.shape == (4 * E, TASKS + 1)


def test_levels_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="0 levels have no experts"):
        built(0)
    with pytest.raises(ValueError, match="a width of 10 does not hold 4 inputs"):
        Extraction(10, E, tasks=3)
    with pytest.raises(ValueError, match="3 gates with 3 private experts each do not fit into 7"):
        Extraction(8, E, tasks=3, private=3)
    with pytest.raises(ValueError, match="2 experts read the inputs"):
        OfInputs(Each([nn.Linear(2, 2), nn.Linear(2, 2)]), [0, 2], 2)
