"""Models that classify images are made by the name of their architecture, with random weights."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from moeify import Recipe, sparsify
from moeify.tasks.classify import Classes
from moeify.tasks.classify_image import ClassifyImage
from moeify.tasks.image_models import pixels_of
from moeify.tasks.image_untrained import pixels_untrained, untrained

CLASSES = Classes.of(["cat", "dog", "cow"], "pets")


@pytest.fixture
def folder(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8))
    model.save_pretrained(tmp_path)
    return str(tmp_path), model


def test_a_folder_gives_the_architecture_and_not_the_weights(folder):
    name, saved = folder
    torch.manual_seed(0)
    model = untrained(name, CLASSES, 24)
    ours, theirs = dict(model.named_parameters()), dict(saved.named_parameters())
    weights = [name for name, weight in theirs.items() if weight.dim() == 2 and ours[name].shape == weight.shape]
    assert weights
    assert not any(torch.equal(ours[each], theirs[each]) for each in weights)
    assert model(torch.zeros(1, 3, 24, 24)).logits.shape == (1, 3)
    assert pixels_untrained(name, 24).size == 24
    assert pixels_untrained(name).size == 16


def test_the_task_trains_it_with_the_size_that_is_asked_for(folder):
    setup = ClassifyImage(pretrained=False, size=24).prepare(folder[0], None)
    model = setup.build()
    assert setup.train.length == 9 + 1
    batch = setup.objective.collate([setup.train[i] for i in range(2)])
    assert torch.isfinite(model(**batch).loss)


def test_timm_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="timm/resnet18 needs timm and torchvision"):
        untrained("timm/resnet18", CLASSES)


def test_without_a_network_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no model 'timm/resnet18' could be loaded.*--set pretrained=false"):
        pixels_of("timm/resnet18")


def test_a_model_of_timm_needs_no_download():
    pytest.importorskip("timm")
    pixels = pixels_untrained("timm/vit_tiny_patch16_224", 32)
    assert (pixels.size, pixels.channels, pixels.mean) == (32, 3, (0.5, 0.5, 0.5))
    model = untrained("timm/vit_tiny_patch16_224", CLASSES, 32)
    sparsify(model, Recipe(num_experts=2), probe={"pixel_values": torch.zeros(1, 3, 32, 32)}, verbose=False)
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="timm has no architecture 'vit_tiny_patch16_223'; did you mean"):
        untrained("timm/vit_tiny_patch16_223", CLASSES)
