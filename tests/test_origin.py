"""A model's origin stays with it and its copies."""

import copy
import pickle
from dataclasses import replace

from torch import nn

from moeify import Recipe
from moeify.origin import Origin
from moeify.sparsify import sparsify
from plain_models import blocks


def test_a_dense_model_has_the_empty_origin():
    assert Origin.of(nn.Linear(2, 2)) == Origin()


def test_a_sparse_model_comes_from_its_recipe_and_so_does_its_copy():
    recipe = Recipe(num_experts=2)
    model = sparsify(nn.Sequential(*blocks(2)), recipe, verbose=False)
    assert Origin.of(model).recipe is recipe
    assert Origin.of(copy.deepcopy(model)).recipe == recipe


def test_an_origin_may_be_changed_in_one_part():
    model = nn.Linear(2, 2)
    Origin(recipe="recipe", adapters="adapters").write_to(model)
    replace(Origin.of(model), recipe=None).write_to(model)
    assert Origin.of(model) == Origin(adapters="adapters")
    assert Origin.of(pickle.loads(pickle.dumps(model))) == Origin(adapters="adapters")


def test_an_origin_is_no_part_of_the_state():
    model = nn.Linear(2, 2)
    Origin(recipe="recipe").write_to(model)
    assert list(model.state_dict()) == ["weight", "bias"]
