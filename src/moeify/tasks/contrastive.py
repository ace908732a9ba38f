"""The task `contrastive`: find the caption of a picture and the picture of a caption, by two towers or by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import CLIPConfig, CLIPModel

from moeify.data.images import fitted, image_of
from moeify.data.synthetic import shapes
from moeify.data.tokenizer import ByteTokenizer
from moeify.evaluate.objective import Batch, Judged, Objective, Units
from moeify.evaluate.run import on_device
from moeify.models import OneTower
from moeify.models.one_tower import CAPTION, PICTURE
from moeify.modes import in_evaluation
from moeify.sparsify import Recipe
from moeify.tasks.base import Setup, Shape, Task, labels_of
from moeify.tasks.classify_text import tokens
from moeify.tasks.modalities import entropies, use_of_experts
from moeify.tasks.models import load_dense, load_tokenizer, save_tokenizer
from moeify.tasks.pieces import pieces
from moeify.tasks.rows import Row, read_parts
from moeify.train.arguments import Loss

TRAIN, HELD_OUT = 1024, 128
"""Synthetic pictures in either part; no caption is in both."""

SHOWN = 6
"""Validation pictures whose nearest captions the report shows."""


@dataclass(frozen=True, kw_only=True)
class Contrastive(Task):
    """Pictures with captions; without data, synthetic shapes with a caption each.

    Data are rows with a path or the bytes of a picture, and a caption.

    Attributes:
        image: the field of a row that is a path or the bytes of a picture.
        caption: the field that is its caption.
        group: the field by which the report groups samples.
        validation: a file or folder of held-out pairs; without it, those that the data hold out, or a tenth.
        size: pixels of a side for the small model.
        patch: pixels of a side of its patches.
        towers: 2 for a CLIP, 1 for one tower that reads pictures and captions; 0 for 1 where the recipe's routers tell
            modalities apart, and 2 elsewhere.
        entropy: weight of LIMoE's entropies with one tower.
    """

    name: ClassVar[str] = "contrastive"
    image: str = "image"
    caption: str = "caption"
    group: str | None = None
    validation: str | None = None
    size: int = 32
    patch: int = 8
    towers: int = 0
    entropy: float = 0.04

    def suited_to(self, recipe: Recipe) -> Self:
        """Take one tower where the recipe's routers tell modalities apart, and two elsewhere."""
        return self if self.towers else replace(self, towers=1 if "modality" in labels_of(recipe) else 2)

    def losses(self, recipe: Recipe) -> list[tuple[float, Loss]]:
        """LIMoE's entropies, where routers tell modalities apart and one tower reads both."""
        if self.towers != 1 or self.entropy == 0 or "modality" not in labels_of(recipe):
            return []
        return entropies(self.entropy, recipe.num_experts)

    def prepare(self, model: str | None, data: str | None) -> Setup:
        """Read and decode the pictures, and tokenize the captions."""
        if self.towers not in (0, 1, 2):
            raise ValueError(f"towers={self.towers} is not known; 1 reads pictures and captions, 2 one each")
        if self.towers == 1 and model is not None:
            raise ValueError(
                f"{model} has a tower for pictures and one for captions, and one that reads both is asked for, by the "
                "recipe or by towers=1; leave out --model, or choose another recipe or --set towers=2"
            )
        train, validation = self._rows(data)
        source = data or "synthetic shapes with captions"
        tokenizer: Any = ByteTokenizer() if model is None else load_tokenizer(model)
        prepare = self._small_pictures() if model is None else Prepared(load_dense(model, "AutoImageProcessor"))
        length = min(self.length, max(len(tokens(tokenizer, row["caption"], self.length)) for row in train) + 1)
        parts = [self._pairs(rows, tokenizer, prepare, length) for rows in (train, validation)]
        objective = ImagesAndTexts(tokenizer, one_tower=self.towers == 1)

        def built() -> nn.Module:
            if model is not None:
                return load_dense(model, "AutoModel", dtype=torch.float32)
            return (small_clip if self.towers != 1 else small_tower)(self.shape, self.size, self.patch, length)

        probe = objective.collate([parts[0][i] for i in range(2)])
        for part in parts:
            part.length = pieces(built(), {n: v[0] for n, v in probe.items() if n not in ("return_loss", "modality")})
        return Setup(
            train=parts[0],
            validation=parts[1],
            objective=objective,
            build=built,
            model=model or f"{'CLIP' if self.towers != 1 else 'one tower'} from scratch {vars(self.shape)}",
            data=source,
            facts={"pairs": f"{len(train):,} to train on, {len(validation):,} held out"},
            save=lambda folder: save_tokenizer(tokenizer, folder),
            answers=lambda trained: nearest_captions(trained, parts[1], objective, [r["caption"] for r in validation]),
            probe=probe,
        )

    def _rows(self, data: str | None) -> tuple[list[Row], list[Row]]:
        """Rows with a caption and, as `image`, the pixels from 0 to 255."""
        if data is None:
            made = shapes(TRAIN + HELD_OUT, seed=0, size=self.size)
            rows = [{"image": (picture * 255).byte(), "caption": caption} for picture, caption in made]
            return rows[:TRAIN], rows[TRAIN:]
        folder = Path(data) if Path(data).is_dir() else Path(data).parent
        fields = {"image": self.image, "caption": self.caption}
        parts = read_parts(data, self.validation, fields, {"group": self.group or "domain"})
        for number, row in enumerate([row for part in parts for row in part], 1):
            if not isinstance(row["caption"], str) or not row["caption"].strip():
                raise ValueError(f"{data}: a caption is a text, not {row['caption']!r:.60}")
            row["image"] = image_of(row["image"], folder, f"{data}, row {number}")
        return parts

    def _small_pictures(self) -> Callable[[Tensor], Tensor]:
        return lambda pixels: fitted(pixels, self.size, 3).float() / 127.5 - 1

    def _pairs(self, rows: Sequence[Row], tokenizer: Any, prepare: Callable[[Tensor], Tensor], length: int) -> Pairs:
        """Pictures as the model takes them; a caption of bytes ends with the end of text, whose state CLIP reads."""
        end = [tokenizer.eos_token_id] if isinstance(tokenizer, ByteTokenizer) else []
        captions = [tokens(tokenizer, row["caption"], length - len(end)) + end for row in rows]
        pictures = [prepare(row["image"]) for row in rows]
        return Pairs(pictures, captions, [str(row.get("group") or "pairs") for row in rows])


class Pairs(Dataset[dict[str, Any]]):
    """Pictures with the tokens of their captions.

    Args:
        pictures: (3, H, W) each.
        captions: token ids each.
        domains: the group of each, for the report.
    """

    def __init__(
        self, pictures: Sequence[Tensor], captions: Sequence[Sequence[int]], domains: Sequence[str], length: int = 1
    ) -> None:
        self.pictures, self.captions, self.domains, self.length = pictures, captions, domains, length

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `pixel_values` and `input_ids` of a pair."""
        return {"pixel_values": self.pictures[index], "input_ids": list(self.captions[index])}

    def domain_of(self, index: int) -> str:
        """Return the group of a pair."""
        return self.domains[index]


class ImagesAndTexts(Objective):
    """Cross-entropy of the right caption among those of a batch, and of the right picture; and recall among all.

    The model returns `image_embeds`, `text_embeds` and `logits_per_image`, as CLIP and SigLIP do.

    Args:
        tokenizer: pads the captions.
        one_tower: give the model the modality of every sequence, as `OneTower` takes it.
    """

    units: ClassVar[Units] = Units("patch or token", "patches and tokens", "nats per pair")

    def __init__(self, tokenizer: Any, *, one_tower: bool = False) -> None:
        self.tokenizer, self.one_tower = tokenizer, one_tower

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Pad the captions, and ask for the loss, or name the modality of each sequence."""
        texts = self.tokenizer.pad([{"input_ids": sample["input_ids"]} for sample in samples], return_tensors="pt")
        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        batch = {"input_ids": texts["input_ids"], "pixel_values": pixels, "attention_mask": texts["attention_mask"]}
        if not self.one_tower:
            return batch | {"return_loss": True}
        return batch | {"modality": torch.tensor([PICTURE, CAPTION]).repeat_interleave(len(samples))}

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the mean of both cross-entropies of every pair in nats, and its embeddings and caption."""
        found = model(**batch)
        logits = found.logits_per_image.float()
        own = torch.arange(len(logits), device=logits.device)
        both = [F.cross_entropy(each, own, reduction="none") for each in (logits, logits.mT)]
        captions = [tuple(ids) for ids in masked(batch)]
        return Judged(torch.stack(both).mean(0), (found.image_embeds.float(), found.text_embeds.float(), captions))

    def scores(self, answers: Sequence[Any]) -> dict[str, float]:
        """Return recall at 1 and at 5 in both directions, among all pairs that were judged."""
        images, texts = (torch.cat([answer[i] for answer in answers]) for i in range(2))
        return recall(images @ texts.mT, [caption for answer in answers for caption in answer[2]])


def masked(batch: Batch) -> list[list[int]]:
    """The tokens of every caption, without padding."""
    pairs = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
    return [[token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in pairs]


def recall(similarity: Float[Tensor, "T T"], captions: Sequence[Any]) -> dict[str, float]:
    """How often the right one is among the nearest 1 and 5: captions of a picture, and pictures of a caption.

    Pairs with equal captions are right for each other.

    Args:
        similarity: of every picture (rows) with every caption.
        captions: something that is equal for equal captions.
    """
    numbers = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    caption = torch.tensor([numbers[each] for each in captions], device=similarity.device)
    right = caption.unsqueeze(0) == caption.unsqueeze(1)
    found = {}
    for k in (1, 5):
        for name, scores in (("caption", similarity), ("picture", similarity.mT)):
            nearest = scores.topk(min(k, len(captions))).indices
            found[f"{name} recall@{k}"] = right.gather(1, nearest).any(1).float().mean().item()
    return found


@torch.no_grad()
def nearest_captions(model: nn.Module, pairs: Pairs, objective: ImagesAndTexts, captions: Sequence[str]) -> list[str]:
    """The caption nearest to a few pictures among those of 64 pairs, and of one tower the use of its experts."""
    step = max(1, len(pairs) // 64)
    chosen = range(0, len(pairs), step)[:64]
    batch = on_device(objective.collate([pairs[i] for i in chosen]), next(model.parameters()).device)
    with in_evaluation(model):
        nearest = model(**batch).logits_per_image.argmax(1).tolist()
    lines = [f"{captions[i]} -> {captions[chosen[j]]}" for i, j in zip(chosen, nearest, strict=True)]
    used = use_of_experts(model, batch) if objective.one_tower else []
    return ["\n".join([*lines[:SHOWN], *used])]


class Prepared:
    """Makes the pixels that a model takes, by the image processor of transformers that belongs to it.

    Args:
        processor: of transformers.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, pixels: Tensor) -> Tensor:
        """(3, H, W) of a picture from 0 to 255."""
        return self.processor(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"][0]


def small_clip(shape: Shape, size: int, patch: int, length: int) -> nn.Module:
    """A CLIP from scratch whose towers have the same sizes, and whose text tower reads bytes."""
    tower = {
        "hidden_size": shape.width, "intermediate_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
    }  # fmt: skip
    text = tower | {
        "vocab_size": ByteTokenizer.vocab_size, "max_position_embeddings": length,
        "eos_token_id": ByteTokenizer.eos_token_id, "pad_token_id": ByteTokenizer.pad_token_id,
        "bos_token_id": ByteTokenizer.eos_token_id,
    }  # fmt: skip
    vision = tower | {"image_size": size, "patch_size": patch}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=shape.width))


def small_tower(shape: Shape, size: int, patch: int, length: int) -> nn.Module:
    """A `OneTower` from scratch that reads bytes."""
    return OneTower(size=size, patch=patch, vocabulary=ByteTokenizer.vocab_size, length=length, **vars(shape))
