"""Leaks are found where they are, in the layer that leaks, and nowhere else."""

from functools import partial

import pytest
import torch
from torch import nn

from moeify import Context, MoE
from moeify.capacity import dropped
from moeify.experts import FFN
from moeify.inspect import check_causality
from moeify.routers import Capacity, ExpertChoice, Soft, TopK
from moeify.sparsify import Recipe, fresh, sparsify
from strategies import sharpen
from tiny_models import VOCABULARY, causal_lm, mixtral

D, E = 8, 4


def layer(router):
    moe = MoE(router, FFN(E, D, 6))
    sharpen(moe)
    nn.init.normal_(moe.experts.down_proj)
    return moe


def checked(router, tokens=None):
    return check_causality(nn.Sequential(layer(router)), torch.randn(3, 6, D) if tokens is None else tokens)["0"]


def tight(**options):
    return Capacity(TopK(D, E), factor=0.5, eval_factor=0.5, **options)


def test_token_choice_is_clean():
    found = checked(TopK(D, E))
    assert found
    assert found.future is found.others is None


def test_expert_choice_leaks_the_future_of_its_own_sequence():
    found = checked(ExpertChoice(D, E))
    assert not found
    assert found.others is None
    assert found.future.what == "decision"
    assert found.future.token[0] == found.future.by[0]
    assert found.future.token[1] < found.future.by[1]


def test_soft_mixtures_leak_in_what_they_answer():
    found = checked(Soft(D, E))
    assert found.future.what == "output"
    assert found.others is None


def test_a_capacity_by_score_leaks_the_future():
    assert not checked(tight(priority="score"))


def test_a_capacity_by_position_depends_on_the_sequences_before_and_on_how_many_tokens_follow():
    found = checked(tight())
    assert not found
    assert found.future is None
    assert found.others.by[0] < found.others.token[0]
    assert found.length.token[0] == found.length.by[0]
    assert found.length.token[1] < found.length.by[1]


def test_a_capacity_of_a_sequence_leaks_nothing_but_its_length():
    found = checked(tight(per="sequence"))
    assert found.future is found.others is None
    assert found.length is not None


def test_a_capacity_of_prefixes_is_clean():
    found = checked(tight(per="prefix"), torch.randn(3, 12, D))
    assert found
    assert found.future is found.others is found.length is None
    assert dropped(layer(tight(per="prefix")).router(torch.randn(3, 12, D), Context()))[0] > 0


def test_a_capacity_that_is_never_reached_leaks_nothing():
    assert checked(Capacity(TopK(D, E), factor=100.0, eval_factor=100.0, priority="score"))


def test_the_leak_has_the_name_of_the_layer_that_leaks():
    model = nn.Sequential(layer(TopK(D, E)), layer(ExpertChoice(D, E)), layer(TopK(D, E)))
    found = check_causality(model, torch.randn(2, 6, D))
    assert {name: bool(result) for name, result in found.items()} == {"0": True, "1": False, "2": True}


def test_padding_is_not_looked_at():
    moe = layer(ExpertChoice(D, E))
    moe.context = Context()
    moe.context.mask(torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0]]))
    found = check_causality(nn.Sequential(moe), torch.randn(2, 4, D))["0"]
    assert found.future is None


@pytest.mark.parametrize(("router", "clean"), [(TopK, True), (ExpertChoice, False)])
def test_a_decoder_of_transformers_is_checked_in_its_mode_and_left_as_it_was(router, clean):
    recipe = Recipe(num_experts=4, router=partial(router, init_std=1.0), experts=fresh)
    model = sparsify(causal_lm("llama"), recipe, verbose=False, allow_noncausal=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = check_causality(model, torch.randint(3, VOCABULARY, (2, 6)))
    assert [bool(result) for result in found.values()] == [clean] * 2
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_layers_of_transformers_are_checked_on_an_input_that_is_guessed():
    found = check_causality(mixtral())
    assert len(found) == 2
    assert all(found.values())


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="no sparse layer"):
        check_causality(nn.Linear(2, 2))
