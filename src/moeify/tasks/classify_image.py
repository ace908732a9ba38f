"""The task `classify-image`: name the class of an image. The small model is a vision transformer (ViT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from moeify.evaluate.objective import Units
from moeify.tasks.base import Setup, Task
from moeify.tasks.classify import Classes, Classification, LabelledSamples, groups, predictions
from moeify.tasks.classify_text import facts
from moeify.tasks.confused import confused_classes
from moeify.tasks.image_models import Pixels, is_plain, load_image_classifier, pixels_of, small_vit
from moeify.tasks.image_rows import Images, read_images
from moeify.tasks.image_untrained import pixels_untrained, untrained
from moeify.tasks.pieces import pieces
from moeify.tasks.rows import Row


class OfImages(Classification):
    """Classification of images."""

    units: ClassVar[Units] = Units("patch", "patches", "nats per image")


@dataclass(frozen=True, kw_only=True)
class ClassifyImage(Task):
    """Images with a label each; without data, synthetic handwritten digits.

    Data are a folder with a folder per class; rows with an image (its bytes, or its path) and a label; an `.npz` file
    of arrays; or `digits`, the scans of handwritten digits that come with scikit-learn.

    Attributes:
        image: the field of a row that is the image, or the array of an `.npz` file.
        label: the field that is the class.
        group: the field of a super-class, by which the report groups samples, and which routers look up as
            `super_class`; without it the report groups by class, where there are few.
        super_classes: find that many super-classes in what a dense model confuses after a short training.
        validation: held-out images; without it, those that the data hold out, or a tenth.
        size: pixels of a side; 0 for what a named model reads, and for the small model for those of the first image, 64
            at most.
        patch: pixels of a side of a patch; 0 for an eighth of the image.
        pretrained: whether a named model keeps its weights; without them, a model of timm needs no download.
    """

    name: ClassVar[str] = "classify-image"
    image: str = "image"
    label: str = "label"
    group: str | None = None
    super_classes: int = 0
    validation: str | None = None
    size: int = 0
    patch: int = 0
    pretrained: bool = True

    def prepare(self, model: str | None, data: str | None) -> Setup:
        """Read the rows; images are decoded when they are used."""
        if self.group and self.super_classes:
            raise ValueError("super-classes are given by group or found by super_classes; set one of the two")
        fields = {"image": self.image, "label": self.label} | ({"group": self.group} if self.group else {})
        images = read_images(data, self.validation, fields)
        source = data or "synthetic handwritten digits"
        classes = Classes.of([row["label"] for row in images.train], source)
        supers = Classes.of([row["group"] for row in images.train], source) if self.group else None
        pixels = self._pixels(model, images)
        patch = self._patch(pixels.size)

        def build() -> nn.Module:
            if model is None:
                return small_vit(self.shape, pixels, patch, classes)
            return load_image_classifier(model, classes) if self._loads(model) else untrained(model, classes, self.size)

        def inputs(row: Row) -> dict[str, Tensor]:
            return {"pixel_values": pixels(images.image(row))}

        def samples(rows: Sequence[Row], of_class: Sequence[int] | None = None) -> LabelledSamples:
            labels = [classes.number(row["label"], source) for row in rows]
            given = [row.get("group") for row in rows]
            numbers = None if supers is None else [supers.number(group, source) for group in given]
            if of_class is not None:
                numbers = [of_class[label] for label in labels]
                given = [f"super-class {number}" for number in numbers]
            domains = groups(labels, classes, given, Path(source).name)
            return LabelledSamples(rows, labels, domains, length, inputs, numbers)

        probe = torch.stack([inputs(row)["pixel_values"] for row in images.train[:2]])
        length, objective = pieces(build(), {"pixel_values": probe[0]}), OfImages()
        found = None
        if self.super_classes:
            found = confused_classes(build, samples(images.train), objective, self.super_classes)
        train, validation = samples(images.train, found), samples(images.validation, found)
        about = {"image": f"{pixels.channels} x {pixels.size} x {pixels.size}, read as {length} patches"}
        if train.super_classes is not None:
            about["super-classes"] = f"{len(set(train.super_classes))}"
        return Setup(
            train=train,
            validation=validation,
            objective=objective,
            build=build,
            model=model or f"ViT from scratch {vars(self.shape)}, patches of {patch} x {patch} pixels",
            data=source,
            facts=facts(classes, images.train, images.validation) | about,
            save=pixels.save,
            probe={"pixel_values": probe},
            answers=lambda trained: predictions(
                trained, validation, objective, classes, lambda i: f"held-out image {i + 1}"
            ),
        )

    def _loads(self, model: str) -> bool:
        return self.pretrained or is_plain(model)

    def _pixels(self, model: str | None, images: Images) -> Pixels:
        if model is not None and not is_plain(model):
            return pixels_of(model, self.size) if self._loads(model) else pixels_untrained(model, self.size)
        channels, *sides = images.image(images.train[0]).shape
        return Pixels(self.size or min(64, *sides), channels)

    def _patch(self, size: int) -> int:
        patch = self.patch or max(each for each in range(1, max(1, size // 8) + 1) if size % each == 0)
        if size % patch:
            raise ValueError(f"images of {size} pixels cannot be cut into patches of {patch}; choose a divisor")
        return patch
