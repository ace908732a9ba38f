"""A model that was put into evaluation mode for a while comes back as it was."""

import pytest
import torch
from torch import nn

from moeify.modes import fixed_randomness, in_evaluation


def test_every_submodule_has_its_own_mode_back_also_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5))).train()
    model[1].eval()

    def fail():
        with in_evaluation(model):
            assert not any(module.training for module in model.modules())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_random_numbers_are_fixed_inside_and_undisturbed_outside():
    model, drawn = nn.Linear(1, 1), []
    torch.manual_seed(3)
    first, expected = torch.rand(1), torch.rand(1)
    torch.manual_seed(3)
    assert torch.rand(1) == first
    for _ in range(2):
        with fixed_randomness(model):
            drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]
    assert torch.rand(1) == expected
