"""The trace of a model: tables of tokens and what layers decided for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moeify.inspect.join import concatenate
from moeify.inspect.trace import DECODE, PREFILL, LayerTrace, Tokens, Trace


def make(tokens: int = 6, domains: tuple[str, ...] = ("code", "text"), layers: int = 2, seed: int = 0) -> Trace:
    g = torch.Generator().manual_seed(seed)
    table = Tokens(
        tokens,
        ids=torch.randint(99, (tokens,), generator=g),
        sequence=torch.arange(tokens) // 3,
        position=torch.arange(tokens) % 3,
        phase=(torch.arange(tokens) % 3 == 2).long(),
        batch=torch.zeros(tokens, dtype=torch.long),
        domain=torch.randint(len(domains), (tokens,), generator=g),
        domains=domains,
    )
    made = {}
    for name in map("layers.{}".format, range(layers)):
        scores = torch.rand(tokens, 4, generator=g)
        weights, experts = scores.topk(2)
        made[name] = LayerTrace(
            name=name, num_experts=4, tokens=table, experts=experts, weights=weights, scores=scores.half()
        )
    return Trace(layers=made, header={"model": "tiny"})


def test_rows_are_counted_with_and_without_what_a_capacity_dropped():
    layer = LayerTrace(
        name="a", num_experts=3, tokens=Tokens(2), experts=torch.tensor([[0, 2], [2, -1]]),
        dropped=torch.tensor([[False, True], [False, False]]),
    )  # fmt: skip
    assert layer.assigned.tolist() == [1, 0, 2]
    assert layer.counts.tolist() == [1, 0, 1]
    assert layer.k == 2


def test_columns_are_kept_in_small_types():
    trace = make()
    layer = trace.layers["layers.0"]
    assert layer.experts.dtype == torch.int16
    assert {name: column.dtype for name, column in layer.tokens.columns.items()} == {
        "ids": torch.int32, "sequence": torch.int32, "position": torch.int32, "phase": torch.int8,
        "batch": torch.int32, "domain": torch.int16,
    }  # fmt: skip
    many = replace(layer, num_experts=2**15 + 1, scores=None)
    assert many.experts.dtype == torch.int32


def test_tokens_and_layers_are_selected():
    trace = make()
    decoded = trace.where(lambda tokens: tokens.need("phase") == DECODE)
    assert decoded.tables[0].position.tolist() == [2, 2]
    assert torch.equal(decoded.layers["layers.1"].experts, trace.layers["layers.1"].experts[[2, 5]])
    assert len(decoded.tables) == 1
    assert list(trace.only(["layers.1"]).layers) == ["layers.1"]
    assert list(trace.only(lambda name: name.endswith("0")).layers) == ["layers.0"]
    with pytest.raises(ValueError, match=r"none of these layers, it has: layers\.0, layers\.1"):
        trace.only(["head"])
    assert trace.without("scores", "weights").layers["layers.0"].columns.keys() == {"experts"}


def test_traces_are_concatenated_with_new_numbers_and_names():
    one, other = make(), make(3, domains=("text", "maths"), seed=1)
    both = concatenate([one, other])
    (table,) = both.tables
    assert table.sequence.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert table.batch.tolist() == [0] * 6 + [1] * 3
    assert table.domains == ("code", "text", "maths")
    names = [table.domains[i] for i in table.domain]
    assert names == [t.domains[i] for t in (*one.tables, *other.tables) for i in t.domain]
    for name, layer in both.layers.items():
        assert torch.equal(layer.experts, torch.cat([one.layers[name].experts, other.layers[name].experts]))
    assert concatenate([one]) == one
    assert concatenate([one, one], renumber=False).tables[0].sequence.tolist() == [0, 0, 0, 1, 1, 1] * 2


def test_a_column_that_only_one_trace_has_is_unknown_in_the_other():
    one, other = make(), make()
    blind = replace(other.tables[0], phase=None)
    other = replace(other, layers={name: replace(layer, tokens=blind) for name, layer in other.layers.items()})
    phase = concatenate([one, other]).tables[0].phase
    assert phase[:6].tolist() == [PREFILL, PREFILL, DECODE] * 2
    assert phase[6:].tolist() == [-1] * 6


def test_layers_of_different_k_are_concatenated():
    one, other = make(), make()
    narrow = {
        name: replace(layer, experts=layer.experts[:, :1], weights=layer.weights[:, :1])
        for name, layer in other.layers.items()
    }
    layer = concatenate([replace(other, layers=narrow), one]).layers["layers.0"]
    assert layer.experts[:6, 1].tolist() == [-1] * 6
    assert layer.assigned.sum() == 6 + 12


def test_what_does_not_belong_together_is_not_concatenated():
    trace = make()
    with pytest.raises(ValueError, match=r"scores in 1 of 2 traces; leave them out by trace\.without\('scores'\)"):
        concatenate([trace, trace.without("scores")])
    bigger = {name: replace(layer, num_experts=5, scores=None) for name, layer in trace.layers.items()}
    with pytest.raises(ValueError, match="has 4 and 5 experts"):
        concatenate([trace, Trace(layers=bigger)])
    with pytest.raises(ValueError, match="no trace"):
        concatenate([])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ids": torch.zeros(3, dtype=torch.long)}, r"ids has shape \(3,\), and there are 2 tokens"),
        ({"ids": torch.zeros(2)}, r"ids must be whole numbers, not torch\.float32"),
        ({"ids": torch.tensor([-2, 0])}, "ids lie between -2 and 0; they must be between -1"),
        ({"domain": torch.tensor([0, 1]), "domains": ("a",)}, "domain has the number 1, and only 1 of them"),
        ({"phase": torch.tensor([0, 2])}, "phase has the number 2; it is 0 for prefill"),
    ],
)
def test_damaged_tables_are_refused(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Tokens(2, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"experts": torch.tensor([[0]])}, r"shape \(1, 1\), and it needs one row for each of its 2 tokens"),
        ({"experts": torch.tensor([[0], [4]])}, "has expert 4, and there are 4, counted from 0"),
        ({"weights": torch.ones(2, 2)}, r"weights of layer a have shape \(2, 2\) instead of \(2, 1\)"),
        ({"scores": torch.ones(2, 3)}, r"scores of layer a have shape \(2, 3\) instead of \(2, 4\)"),
        ({"dropped": torch.ones(2, 1)}, r"dropped of layer a are torch\.float32"),
        ({"scores": torch.ones(2, 4, dtype=torch.bool)}, r"scores of layer a are torch\.bool"),
        ({"num_experts": 0}, "has 0 experts"),
    ],
)
def test_damaged_layers_are_refused(wrong: dict, message: str):
    right = {"name": "a", "num_experts": 4, "tokens": Tokens(2), "experts": torch.tensor([[0], [1]])}
    with pytest.raises(ValueError, match=message):
        LayerTrace(**right | wrong)


def test_a_trace_names_its_layers_and_has_one():
    layer = make().layers["layers.0"]
    with pytest.raises(ValueError, match=r"layer layers\.0 is called b"):
        Trace(layers={"b": layer})
    with pytest.raises(ValueError, match="nothing was recorded"):
        Trace(layers={})
    with pytest.raises(ValueError, match="does not have the step of its tokens, only ids, sequence"):
        layer.tokens.need("step")
    assert make() == make()
    assert make() != make(seed=1)
