"""Adapters on models that lay sequences out first: each stack reads the mask in its own layout."""

import pytest
import torch
from torch import nn

from adapter_folders import layers, make_adapter
from layout_models import siglip, xlnet
from moeify import from_adapters, load_adapters, save_adapters
from moeify.routers import TopK
from plain_models import encoder
from tiny_models import tokens


@pytest.fixture
def folders(tmp_path):
    return {name: make_adapter(tmp_path / name, ["layer_1"], seed=e, base=xlnet()) for e, name in enumerate("ab")}


def assert_reads(model: nn.Module, real: torch.Tensor, *given, **named) -> None:
    """Require that every adapted layer takes these tokens for real, of its own layout."""
    read = []
    for layer in layers(model).values():
        layer.register_forward_pre_hook(lambda layer, args: read.append(layer.context.real(args[0].shape[:-1])))
    with torch.no_grad():
        model(*given, **named)
    positions = None if real.all() else real.flatten().nonzero().squeeze(1)
    assert len(read) == len(layers(model)) > 1
    assert all(each is None if positions is None else torch.equal(each, positions) for each in read)


def square() -> dict[str, torch.Tensor]:
    mask = torch.ones(6, 6, dtype=torch.long)
    mask[1, 2:] = 0
    return {"input_ids": tokens(6, 6), "attention_mask": mask}


def test_adapters_of_a_model_that_lays_sequences_out_first_see_the_tokens_of_theirs(folders, tmp_path):
    model, given = from_adapters(xlnet(), folders, TopK, verbose=False), square()
    save_adapters(model, tmp_path / "library")
    for one in (model, load_adapters(xlnet(), tmp_path / "library")):
        assert_reads(one, given["attention_mask"].bool().T, **given)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
def test_adapters_of_torchs_layers_see_the_tokens_of_their_layout(batch_first, tmp_path):
    model = encoder(batch_first=batch_first).eval()
    folder = make_adapter(tmp_path / "a", ["linear1", "linear2"], base=model)
    other = make_adapter(tmp_path / "b", ["linear1", "linear2"], seed=1, base=model)
    from_adapters(model, {"a": folder, "b": other}, TopK, verbose=False)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [1], [5], [5]])
    real = ~padding if batch_first else ~padding.T
    assert_reads(model, real, torch.randn(5, 5, 16), src_key_padding_mask=padding)


def test_adapters_of_a_model_that_reads_padding_adapt_it_too(tmp_path):
    folders = {name: make_adapter(tmp_path / name, ["fc1"], seed=e, base=siglip()) for e, name in enumerate("ab")}
    model = from_adapters(siglip(), folders, TopK, verbose=False)
    given = {"input_ids": tokens(2, 4) % 96, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    assert_reads(model, torch.ones(2, 4, dtype=torch.bool), **given)
