"""Every method for vision learns real images: scans of digits, and photographs where they are at hand."""

import io
from dataclasses import replace
from functools import partial
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from moeify import MoE, Recipe, record, sparsify
from moeify.data.claim_files import data_file
from moeify.losses import supervision
from moeify.sparsify import recipes

Images = tuple[Tensor, Tensor, Tensor]  # pixels (B, C, H, W), classes (B,), super-classes (B,)
ALIKE = torch.tensor([0, 1, 2, 2, 3, 4, 0, 1, 4, 3])  # the super-class of each digit, by its shape

vmoe = recipes["vmoe"]
METHODS = {name: recipes[name] for name in ("soft", "vmoe", "expert_choice", "mobile_vmoe")}
METHODS["vmoe, batch priority"] = replace(vmoe, router=partial(vmoe.router, priority="batch", factor=0.5))


@pytest.fixture(scope="session")
def digits() -> tuple[Images, Images]:
    """To learn, and held out."""
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    pixels = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    classes = torch.tensor(bunch.target)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    pixels, classes = pixels[order], classes[order]
    return (pixels[400:], classes[400:], ALIKE[classes[400:]]), (pixels[:400], classes[:400], ALIKE[classes[:400]])


@pytest.fixture(scope="session")
def photographs() -> Images:
    """Caltech-101 in eleven super-classes, every eighth image."""
    try:
        file = data_file("caltech101-64/train.parquet")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    rows = pytest.importorskip("pyarrow.parquet").read_table(file).to_pydict()
    images = [_decoded(image) for image in rows["image"][::8]]
    return torch.stack(images), torch.tensor(rows["label"][::8]), torch.tensor(rows["super"][::8])


def _decoded(image: bytes) -> Tensor:
    picture = pytest.importorskip("PIL.Image").open(io.BytesIO(image)).convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1) / 127.5 - 1


def vit(images: Images, patch: int) -> ViTForImageClassification:
    torch.manual_seed(0)
    pixels, classes, _ = images
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1,
        image_size=pixels.shape[-1], patch_size=patch, num_channels=pixels.shape[1], num_labels=int(classes.max()) + 1,
    )  # fmt: skip
    return ViTForImageClassification(config)


def learn(
    model: nn.Module, images: Images, *, steps: int, batch: int = 48, taught: float = 0.0, lr: float = 4e-3
) -> list[float]:
    """The loss of every step; `taught` is λ of the super-classes."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    draw = torch.Generator().manual_seed(0)
    losses = []
    model.train()
    for _ in range(steps):
        pixels, classes, supers = (part[chosen] for chosen in [_draw(draw, images, batch)] for part in images)
        with record(model) as decisions:
            loss = F.cross_entropy(model(pixel_values=pixels).logits, classes)
        losses.append(loss.item())
        if taught:
            loss = loss + taught * sum(supervision(routing, supers) for routing in decisions.values()) / len(decisions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return losses


def _draw(generator: torch.Generator, images: Images, batch: int) -> Tensor:
    return torch.randint(len(images[0]), (batch,), generator=generator)


@torch.no_grad()
def right(model: nn.Module, images: Images) -> float:
    """The share of images that are classified correctly."""
    pixels, classes, _ = images
    return (model(pixel_values=pixels).logits.argmax(-1) == classes).float().mean().item()


@torch.no_grad()
def obedient(model: nn.Module, images: Images) -> float:
    """The share of images that go to the expert of their super-class."""
    with record(model) as decisions:
        model(pixel_values=images[0])
    return fmean((routing.logits.argmax(-1) == images[2]).float().mean().item() for routing in decisions.values())


def made_sparse(images: Images, recipe: Recipe, patch: int = 2) -> ViTForImageClassification:
    return sparsify(vit(images, patch), recipe, verbose=False)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_on_digits_and_unseen_ones_are_read(method, digits):
    to_learn, unseen = digits
    model = made_sparse(to_learn, METHODS[method])
    losses = learn(model, to_learn, steps=50, taught=0.3 * (method == "mobile_vmoe"))
    assert fmean(losses[-5:]) < fmean(losses[:5]) - 0.9
    assert right(model, unseen) > 0.5
    routers = [layer.router for layer in model.modules() if isinstance(layer, MoE)]
    assert all(weight.grad.any() for router in routers for weight in router.parameters())


def test_a_router_per_image_learns_the_super_classes_that_it_is_told_and_no_others(digits):
    to_learn, unseen = digits
    obeyed = []
    for taught in (0.0, 0.3):
        model = made_sparse(to_learn, replace(METHODS["mobile_vmoe"], num_experts=5))
        learn(model, to_learn, steps=60, taught=taught)
        obeyed.append(obedient(model, unseen))
    assert obeyed[0] < 0.4
    assert obeyed[1] > 0.55


@pytest.mark.data
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls_on_photographs(method, photographs):
    recipe = METHODS[method]
    if method == "mobile_vmoe":
        recipe = replace(recipe, num_experts=11)
    losses = learn(
        made_sparse(photographs, recipe, patch=16), photographs, steps=40, taught=0.3 * (method == "mobile_vmoe")
    )
    assert fmean(losses[-5:]) < fmean(losses[:5]) - 0.5
