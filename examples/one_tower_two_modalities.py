"""LIMoE: one tower reads images and their captions in one pass, and both compete for the places of the same experts.

Digits of scikit-learn (pip install scikit-learn) and their names in letters. The recipe `limoe` routes every token to
one expert, the most confident first, and knows each token's modality, so that entropies can be of one modality alone.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from moeify import record, sparsify
from moeify.data import ByteTokenizer
from moeify.losses import global_entropy, local_entropy
from moeify.sparsify import recipes

IMAGE, TEXT = 0, 1
WIDTH, PATCH = 32, 2


class Tower(nn.Module):
    """Images and texts as sequences of one transformer encoder; the mean of a sequence is its embedding.

    The routers look up `modality`, the modality of every sequence.
    """

    def __init__(self, channels: int, patches: int, letters: int = 258) -> None:
        super().__init__()
        self.patch = nn.Conv2d(channels, WIDTH, PATCH, PATCH)
        self.letter = nn.Embedding(letters, WIDTH)
        self.position = nn.Parameter(torch.randn(2, patches, WIDTH) * 0.1)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(
        self, images: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, modality: torch.Tensor
    ) -> torch.Tensor:
        patches = self.patch(images).flatten(2).mT
        length = patches.shape[1]
        letters = F.pad(self.letter(ids), (0, 0, 0, length - ids.shape[1]))
        x = torch.cat([patches + self.position[IMAGE], letters + self.position[TEXT]])
        real = torch.cat([patches.new_ones(len(images), length), F.pad(mask, (0, length - ids.shape[1]))]).bool()
        y = self.encoder(x, src_key_padding_mask=~real)
        mean = (y * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
        image, text = F.normalize(mean, dim=-1).split([len(images), len(ids)])
        return self.scale.exp() * image @ text.mT


def batch_of(images: torch.Tensor, texts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What the tower is called with."""
    modality = torch.tensor([IMAGE] * len(images) + [TEXT] * len(texts["input_ids"]))
    return images, texts["input_ids"], texts["attention_mask"], modality


def contrast(
    model: nn.Module, images: torch.Tensor, texts: dict[str, torch.Tensor], labels: torch.Tensor
) -> torch.Tensor:
    """The contrastive loss of images and captions, with LIMoE's entropies."""
    with record(model) as decisions:
        logits = model(*batch_of(images, texts))
    entropies = sum(
        local_entropy(routing, label=TEXT)
        + global_entropy(routing, experts=3, label=TEXT)
        + global_entropy(routing, experts=5, label=IMAGE)
        for routing in decisions.values()
    )
    return F.cross_entropy(logits, labels) + 0.3 * entropies / len(decisions)


def main() -> None:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    tokenizer = ByteTokenizer()
    captions = tokenizer.pad([{"input_ids": tokenizer.encode(f"a {name}")} for name in names])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    unseen, to_learn = order[:400], order[400:]

    torch.manual_seed(0)
    model = sparsify(Tower(channels=1, patches=16), recipes["limoe"], probe=batch_of(images[:4], captions))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(6):
        for batch in to_learn[torch.randperm(len(to_learn))].split(48):
            loss = contrast(model, images[batch], captions, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    model.eval()
    with torch.no_grad(), record(model) as decisions:
        right = model(*batch_of(images[unseen], captions)).argmax(-1) == labels[unseen]
    print(f"{right.float().mean():.1%} of {len(unseen)} unseen digits are nearest to their own caption")
    for name, routing in decisions.items():
        for modality, label in (("image", IMAGE), ("text", TEXT)):
            of = routing.choices.indices[routing.evidence.label == label].flatten()
            print(f"  {name}: {modality} tokens per expert", *of.bincount(minlength=8).tolist())


if __name__ == "__main__":
    main()
