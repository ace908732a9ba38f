import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from moeify.experts import FFN, Identity
from moeify.kernels.stacked import KNOWN, name_of


@pytest.mark.parametrize("act", [F.silu, nn.SiLU(), ACT2FN["silu"], lambda x: x * torch.sigmoid(x)])
def test_an_activation_is_known_by_what_it_computes(act):
    assert name_of(act) == "silu"


def test_every_known_activation_is_told_from_the_others():
    assert [name_of(act) for act in KNOWN.values()] == list(KNOWN)
    assert name_of(ACT2FN["gelu_new"]) == "gelu_tanh"
    assert name_of(ACT2FN["relu2"]) == "relu2"


@pytest.mark.parametrize("act", [torch.tanh, nn.PReLU(), nn.Identity()])
def test_an_activation_that_no_kernel_knows_has_no_name(act):
    assert name_of(act) is None


def test_dropping_hidden_units_is_no_business_of_a_kernel():
    experts = FFN(2, 4, 3, dropout=0.5)
    assert experts.stacked is None
    assert experts.eval().stacked is not None
    assert Identity(2).stacked is None
