"""Finding changes nothing, verifying leaves nothing behind, and applying can be undone."""

import pytest
import torch

from moeify import MoE, Recipe
from moeify.origin import Origin
from moeify.sparsify import find
from plain_models import output, sparse_layers
from tiny_models import DENSE, inputs

COPIES = Recipe(num_experts=4)


def parts(model):
    return {name: id(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("family", DENSE)
def test_a_plan_is_found_verified_applied_and_undone(family):
    model = DENSE[family]()
    given, before = inputs(model), parts(model)
    expected = output(model, given)
    plan = find(model, COPIES)
    assert plan.verify() is not None
    assert parts(model) == before
    undo = plan.apply()
    assert len(sparse_layers(model)) == len(plan.sites)
    assert Origin.of(model).recipe is COPIES
    undo()
    assert parts(model) == before
    assert Origin.of(model) == Origin()
    assert torch.equal(output(model, given), expected)


@pytest.mark.parametrize("family", DENSE)
def test_described_sites_give_the_same_plan(family):
    model, other = DENSE[family](), DENSE[family]()
    described = find(model, COPIES).describe()
    plan = find(other, COPIES, described)
    assert plan.describe() == described
    plan.apply()
    find(model, COPIES).apply()
    for layer, same in zip(sparse_layers(model).values(), sparse_layers(other).values(), strict=True):
        assert isinstance(layer, MoE)
        for name, value in layer.experts.state_dict().items():
            assert torch.equal(value, same.experts.state_dict()[name]), name
