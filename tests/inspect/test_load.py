"""Expert load: counted by hand, and what is read off the counts."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.data.blocks import Blocks
from moeify.inspect import ExpertLoad, expert_load
from moeify.record import record
from moeify.routers.topk import TopK
from moeify.sparsify import Recipe, sparsify
from tiny_models import VOCABULARY, causal_lm, mixtral

LENGTH = 8


def blocks(**sizes):
    streams = {name: torch.randint(3, VOCABULARY, (n * LENGTH,)) for name, n in sizes.items()}
    return Blocks(streams, LENGTH)


def llama(**router):
    recipe = Recipe(num_experts=4, router=partial(TopK, **router))
    return sparsify(causal_lm("llama"), recipe, verbose=False)


def load(rows):
    rows = torch.as_tensor(rows, dtype=torch.float32)
    layers, domains = (tuple(f"{kind}{i}" for i in range(n)) for kind, n in zip("ld", rows.shape[:2], strict=True))
    return ExpertLoad(layers, domains, rows)


def test_rows_are_those_that_a_hand_counts():
    model, data = llama(k=2).train(), blocks(code=5, prose=3)
    found = expert_load(model, data, batch=2)
    assert model.training
    model.eval()
    assert found.domains == ("code", "prose")
    for d, members in enumerate((range(5), range(5, 8))):
        expected = {name: [0] * 4 for name in found.layers}
        for i in members:
            with record(model) as seen, torch.no_grad():
                model(input_ids=data[i]["input_ids"][None])
            for name in found.layers:
                for expert in seen[name].choices.indices.flatten().tolist():
                    expected[name][expert] += 1
        assert [found.rows[i, d].tolist() for i in range(2)] == list(expected.values())


def test_models_of_transformers_are_counted_as_well():
    found = expert_load(mixtral(), blocks(code=2))
    assert found.rows.sum((1, 2)).tolist() == [2 * LENGTH * 2] * 2


def test_at_most_as_many_blocks_of_a_domain_are_looked_at_as_asked():
    found = expert_load(llama(k=2), blocks(code=9, prose=2), per_domain=3, batch=2)
    assert found.rows[0].sum(-1).tolist() == [3 * LENGTH * 2, 2 * LENGTH * 2]


def test_a_dense_model_has_no_load():
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        expert_load(causal_lm("llama"), blocks(code=1))


def test_looking_leaves_no_hook_behind():
    model = llama(k=2)
    before = sum(len(module._forward_hooks) for module in model.modules())
    expert_load(model, blocks(code=1))
    assert sum(len(module._forward_hooks) for module in model.modules()) == before


def test_even_load_has_no_violation_and_no_dead_expert():
    found = load([[[5, 5, 5, 5], [1, 1, 1, 1]]])
    assert (found.max_violation.item(), found.dead.item()) == (0, 0)
    assert found.information.item() == pytest.approx(0, abs=1e-6)


def test_one_expert_that_takes_all_leaves_the_others_dead():
    found = load([[[8, 0, 0, 0]]])
    assert (found.max_violation.item(), found.dead.item()) == (3, 3)


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_an_expert_for_each_domain_tells_all_its_bits(experts):
    found = load(torch.eye(experts)[torch.randperm(experts)][None] * 7)
    assert 2 ** found.information.item() == pytest.approx(experts, rel=1e-5)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_experts_that_do_not_care_for_domains_tell_nothing(experts, domains):
    outer = torch.tensor(domains).float()[:, None] * torch.tensor(experts).float()
    assert load(outer[None]).information.item() == pytest.approx(0, abs=1e-5)


tables = st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=2, max_size=2)


@given(tables.filter(lambda table: any(map(any, table))))
def test_information_is_positive_and_at_most_that_of_the_domains(table):
    found = load([table])
    assert -1e-5 <= found.information.item() <= 1 + 1e-5
    assert found.share.sum(-1).item() == pytest.approx(1)


def test_the_dictionary_is_plain_and_by_layer():
    found = json.loads(json.dumps(load([[[3, 1]], [[2, 2]]]).to_dict()))
    assert found["l0"] == {"share": [0.75, 0.25], "max_violation": 0.5, "dead": 0, "domain_bits": 0}
    assert list(found) == ["l0", "l1"]
