"""Mobile V-MoE (arXiv 2309.04354): one decision per image is enough if super-classes teach the router.

Photographs of caltech101-64 at 32 pixels, and a small vision transformer whose last two of four layers are sparse,
top-1 of 10 experts, at equal FLOPs: a decision per patch, one per image for both layers (end to end), the same with the
super-class of an image as the router's target (weight 0.3), and the dense model. Super-classes are groups of classes
that a dense model, trained for 300 steps, confuses on the training photographs. Reported are the accuracy on test
photographs, and the share of images that go to the expert of their super-class. Design, prediction and thresholds are
in claims/designs.md, written before the first run.

Reproduced if super-classes are not behind the dense model beyond the 95 % interval of the differences paired by seed.

    python claims/mobile_vmoe.py     3 seeds, about 15 minutes on one core; rows in claims/results/mobile_vmoe.csv
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean

import torch
from common.images import BATCH, Images, compared, photographs, train, vit
from common.small import options
from common.statistics import interval, paired
from common.training import balanced
from results import append
from torch import Tensor, nn

from moeify import Recipe, losses, record, sparsify
from moeify.find import last
from moeify.routers import Router, TopK
from moeify.routers.shared_routing import shared_routing
from moeify.routing import Routing
from moeify.sparsify import fresh, recipes
from moeify.train import confusion, super_classes

EXPERTS, LAYERS, CONFUSED_STEPS = 10, 2, 300


def built(router: Callable[[int, int], Router]) -> nn.Module:
    recipe = Recipe(where=last(LAYERS), num_experts=EXPERTS, router=router, experts=fresh)
    return sparsify(vit(), recipe, verbose=False)


ARMS: dict[str, Callable[[], nn.Module]] = {
    "dense": vit,
    "per patch": lambda: built(partial(TopK, k=1, normalize=False)),
    "per image, end to end": lambda: built(
        partial(shared_routing, router=partial(TopK, k=1, normalize=False, per="sequence"))
    ),
    "per image, super-classes": lambda: sparsify(vit(), recipes["mobile_vmoe"], verbose=False),
}


@torch.no_grad()
def confused(images: Images) -> Tensor:
    """The super-class of every class."""
    with torch.enable_grad():
        torch.manual_seed(0)
        model = train(vit(), images, CONFUSED_STEPS, 0, 1e-3)
    predicted = torch.cat([model(pixel_values=part).logits.argmax(-1) for part in images.pixels.split(BATCH)])
    return super_classes(confusion(predicted, images.labels), EXPERTS)


@torch.no_grad()
def right(model: nn.Module, images: Images, *, groups: Tensor) -> Mapping[str, str]:
    """The share of images whose first sparse layer sends them to the expert of their super-class."""
    chosen = []
    for part in images.pixels.split(BATCH):
        with record(model) as decisions:
            model(pixel_values=part)
        chosen.append(next(iter(decisions.values())).logits.argmax(-1))
    return {"right": f"{100 * (torch.cat(chosen) == groups[images.labels]).float().mean():.2f}"}


def supervised(routing: Routing) -> Tensor:
    return 0.3 * losses.supervision(routing)


def main() -> None:
    chosen = options(__doc__, steps=450)
    torch.set_num_threads(1)
    groups = confused(photographs("train"))
    print("classes by super-class:", *groups.bincount(minlength=EXPERTS).tolist())
    taught = "per image, super-classes"
    found, rows = compared(
        "mobile_vmoe", ARMS, chosen,
        balancing={"per patch": balanced, "per image, end to end": balanced, taught: supervised},
        inputs={taught: lambda images: {"super_class": groups[images.labels]}},
        measure=lambda arm, model, images: right(model, images, groups=groups) if arm == taught else {"right": ""},
    )  # fmt: skip
    for arm, values in found.items():
        print(f"{arm}: {fmean(values):.2f} %; super-classes less it {paired(found[taught], values)}")
    result = "reproduced" if interval(found[taught], found["dense"])[2] >= 0 else "failed"
    print(result)
    for row in rows:
        append("mobile_vmoe", row | {"result": result})


if __name__ == "__main__":
    main()
