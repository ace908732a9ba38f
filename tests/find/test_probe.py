"""An input that a model accepts: guessed, or given."""

import pytest
import torch
from torch import nn

from moeify.find.probe import Probe, as_probe, find_probe
from plain_models import Block, Gated, Recommender, Tied, blocks, encoder, tower
from tiny_models import DENSE

PLAIN = {
    "an embedding": Tied,
    "two embeddings": Recommender,
    "a tower": tower,
    "a down map that comes first": lambda: nn.Sequential(*blocks(2)),
    "an encoder": encoder,
    "an encoder, sequence first": lambda: encoder(batch_first=False),
    "an encoder and a decoder": lambda: nn.Transformer(16, 2, 1, 1, 32),
}


class Patches(nn.Module):
    """A vision transformer of a few lines, which takes images of one size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 8, 8, stride=8)
        self.position = nn.Parameter(torch.randn((size // 8) ** 2, 8))
        self.layers = nn.Sequential(*blocks(2))

    def forward(self, image):
        return self.layers(self.cut(image).flatten(2).mT + self.position)


@pytest.mark.parametrize("size", [32, 224])
def test_an_image_is_guessed_for_a_plain_vision_transformer(size):
    assert find_probe(Patches(size)).args[0].shape == (2, 3, size, size)


@pytest.mark.parametrize(("attribute", "size"), [("img_size", (40, 40)), ("image_size", 40)])
def test_an_image_has_the_size_that_a_part_of_the_model_names(attribute, size):
    model = Patches(40)
    assert find_probe(model) is None
    setattr(model.cut, attribute, size)
    assert find_probe(model).args[0].shape == (2, 3, 40, 40)


@pytest.mark.parametrize("family", DENSE)
def test_an_input_is_guessed_for_models_of_transformers(family):
    model = DENSE[family]()
    assert find_probe(model).run(model).isfinite().all()


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_an_input_is_guessed_for_plain_models(kind):
    model = PLAIN[kind]()
    assert find_probe(model).run(model).isfinite().all()


def test_a_model_in_half_precision_is_given_half_precision():
    model = nn.Sequential(*blocks(1)).bfloat16()
    assert find_probe(model).args[0].dtype == torch.bfloat16


def test_no_input_is_found_for_a_model_that_takes_a_riddle():
    class Riddle(Block):
        def forward(self, x):
            raise KeyError("not like this")

    assert find_probe(Riddle(Gated())) is None


def test_a_model_without_values_is_not_called():
    with torch.device("meta"):
        assert find_probe(Tied()) is None


@pytest.mark.parametrize(
    ("given", "probe"),
    [
        ({"x": 1}, Probe(kwargs={"x": 1})),
        ((1, 2), Probe(args=(1, 2))),
        (3, Probe(args=(3,))),
    ],
)
def test_what_a_user_passes_becomes_a_call(given, probe):
    assert as_probe(given) == probe


def test_running_a_probe_leaves_modes_and_random_numbers_alone():
    model = nn.Sequential(nn.Dropout(0.5), *blocks(1)).train()
    probe = find_probe(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(probe.run(model), probe.run(model))
    assert torch.equal(torch.rand(3), expected)
    assert all(part.training for part in model.modules())


def test_keyword_arguments_without_names_are_not_waited_for():
    class Open(Block):
        def forward(self, x, **options):
            assert not options
            return super().forward(x)

    assert len(find_probe(Open(Gated())).args) == 1
