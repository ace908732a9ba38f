"""Pictures and captions to embeddings by one transformer encoder that reads both in one pass, as in LIMoE."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

PICTURE, CAPTION = 0, 1
"""The modality of a sequence, as routers look it up."""


class OneTowerOutput(NamedTuple):
    """What `OneTower` returns, by the names of CLIP's output.

    Attributes:
        loss: the mean of the cross-entropies of the right caption and of the right picture in the batch.
        logits_per_image: the scaled similarity of every picture with every caption.
        image_embeds: of length 1.
        text_embeds: of length 1.
    """

    loss: Float[Tensor, ""]
    logits_per_image: Float[Tensor, "B B"]
    image_embeds: Float[Tensor, "B O"]
    text_embeds: Float[Tensor, "B O"]


class OneTower(nn.Module):
    """A transformer encoder that reads B pictures and B captions as 2B sequences, so that both share its experts.

    Every modality has its own input layer, positions and output projection; all between is shared. An embedding is
    the projected mean over the tokens of a sequence (LIMoE, arXiv 2206.02770, section 2).

    Args:
        size: pixels of a side of a picture.
        patch: pixels of a side of a patch.
        vocabulary: token ids of captions.
        length: the most tokens of a caption.
        width: D, also of the embeddings.
        layers: of the encoder.
        heads: of attention.
        hidden: hidden width of the FFN.
    """

    def __init__(
        self, *, size: int, patch: int, vocabulary: int, length: int, width: int, layers: int, heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.settings = {
            "size": size, "patch": patch, "vocabulary": vocabulary, "length": length, "width": width,
            "layers": layers, "heads": heads, "hidden": hidden,
        }  # fmt: skip
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.words = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.words.weight, std=0.02)
        self.positions = nn.ParameterList(
            nn.Parameter(torch.randn(count, width) * 0.02) for count in ((size // patch) ** 2, length)
        )
        layer = nn.TransformerEncoderLayer(
            width, heads, hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.projections = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in self.positions)
        self.scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # the start of CLIP's temperature

    def forward(
        self,
        pixel_values: Float[Tensor, "B 3 H W"],
        input_ids: Int[Tensor, "B N"],
        attention_mask: Int[Tensor, "B N"],
        modality: Int[Tensor, "2*B"] | None = None,
    ) -> OneTowerOutput:
        """Embed pictures and their captions, and compare all with all.

        Args:
            pixel_values: the pictures.
            input_ids: their captions.
            attention_mask: 1 for the real tokens of captions.
            modality: `PICTURE` or `CAPTION` of each of the 2B sequences, for routers, which look it up by this name.
        """
        pictures = self.patches(pixel_values).flatten(2).mT + self.positions[PICTURE]
        captions = self.words(input_ids) + self.positions[CAPTION][: input_ids.shape[1]]
        longest = max(pictures.shape[1], captions.shape[1])
        x = torch.cat([_padded(pictures, longest), _padded(captions, longest)])
        real = torch.cat(
            [_padded(pictures.new_ones(pictures.shape[:2]), longest), _padded(attention_mask.to(x.dtype), longest)]
        )
        y = self.norm(self.encoder(x, src_key_padding_mask=real == 0))
        mean = (y * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
        picture, caption = (
            F.normalize(project(part), dim=-1) for project, part in zip(self.projections, mean.chunk(2), strict=True)
        )
        logits = self.scale.exp().clamp(max=100.0) * picture @ caption.mT
        own = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2
        return OneTowerOutput(loss, logits, picture, caption)


def _padded(x: Float[Tensor, "B N ..."], longest: int) -> Float[Tensor, "B L ..."]:
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, longest - x.shape[1]))
