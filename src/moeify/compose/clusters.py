"""Cluster instructions by k-means, for routers that look up the cluster of a sample (MoCLE, arXiv 2312.12379)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.data.tokenizer import Tokenizer
from moeify.experts.lora import LoRA
from moeify.files import open_tensors, read_tensors, write_tensors
from moeify.layers import moe_layers
from moeify.modes import in_evaluation

Embed = Callable[[Sequence[str]], Any]
"""Instructions -> (T, D): `MeanPooling`, or the `encode` of a sentence encoder."""

_FILE = "clusters.safetensors"


@dataclass(frozen=True)
class Clusters:
    """The centres of clusters; an instruction is in the cluster whose centre is nearest to its embedding.

    Attributes:
        centres: of every cluster, in fp32.
    """

    centres: Float[Tensor, "C D"]

    def __len__(self) -> int:
        return len(self.centres)

    def predict(self, embeddings: Any) -> Int[Tensor, "T"]:
        """The cluster of every embedding, (T, D).

        Raises:
            ValueError: embeddings of another width, so of another encoder.
        """
        points = torch.as_tensor(embeddings).float().cpu()
        if points.dim() != 2 or points.shape[1] != self.centres.shape[1]:
            raise ValueError(
                f"the embeddings have shape {tuple(points.shape)}, the centres width {self.centres.shape[1]}; embed "
                "new instructions as those that were clustered"
            )
        return torch.cdist(points, self.centres).argmin(-1)

    def column(self, instructions: Sequence[str], embed: Embed) -> list[int]:
        """The column `cluster` of a data set: `data.add_column("cluster", clusters.column(data["prompt"], embed))`."""
        return self.predict(embed(instructions)).tolist()

    def save(self, folder: str | Path) -> None:
        """Write the centres into the folder of a model, created if missing, as `clusters.safetensors`.

        Their SHA-256 is in the file's header, and not in `SHA256.json`, so that saving the model again keeps them.
        """
        write_tensors(Path(folder) / _FILE, {"centres": self.centres}, {"sha256": _digest(self.centres)})

    @classmethod
    def load(cls, folder: str | Path) -> Clusters:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no clusters are in the folder.
            ValueError: the file is damaged, or holds something else; files of earlier versions have no hash and pass.
        """
        path = Path(folder) / _FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {_FILE}; write one with Clusters.save")
        tensors, header = read_tensors(path), open_tensors(path).metadata() or {}
        if tensors.keys() != {"centres"} or tensors["centres"].dim() != 2:
            raise ValueError(f"{path} holds {', '.join(tensors) or 'nothing'}, and no centres (C, D)")
        if header.get("sha256", digest := _digest(tensors["centres"])) != digest:
            raise ValueError(
                f"{path} is damaged: its centres are not what was saved (SHA-256 differs from the header's); copy it "
                "again from where it came from, or find the clusters anew"
            )
        return cls(tensors["centres"])


def _digest(centres: Float[Tensor, "C D"]) -> str:
    return hashlib.sha256(centres.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def cluster(instructions: Sequence[str], embed: Embed, count: int = 64, *, seed: int = 0) -> Clusters:
    """k-means on the embeddings of instructions.

    Args:
        instructions: of the training data, each as often as it should count.
        embed: gives an embedding to each.
        count: C; 64 or 16 in the paper.
        seed: of the initial centres.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: fewer instructions than clusters.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise ImportError("k-means needs scikit-learn: pip install 'moeify[adapters]'") from error
    if not 1 <= count <= len(instructions):
        raise ValueError(
            f"{len(instructions)} instructions cannot be put into {count} clusters; give more, or ask for fewer"
        )
    points: Any = torch.as_tensor(embed(instructions)).float().cpu().numpy()
    found = KMeans(count, n_init=4, random_state=seed).fit(points)
    return Clusters(torch.from_numpy(found.cluster_centers_).float())


@dataclass(frozen=True)
class MeanPooling:
    """Embeddings by mean pooling: the last hidden states of a model, averaged over the tokens of a text, normalised.

    Adapters are disabled, so that the embeddings of a frozen model do not depend on the adapters.

    Attributes:
        model: of transformers.
        tokenizer: its tokenizer.
        length: tokens of a text that are read; the others are cut off.
        batch: texts per forward pass.
    """

    model: nn.Module
    tokenizer: Tokenizer
    length: int = 256
    batch: int = 32

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "T D"]:
        """The embedding of every text, in fp32.

        Raises:
            ValueError: a text without any token.
        """
        tokens = [torch.tensor(self.tokenizer.encode(text)[: self.length]) for text in texts]
        if not all(map(len, tokens)):
            raise ValueError(f"text {[len(ids) for ids in tokens].index(0)} has no token; leave empty instructions out")
        by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        with in_evaluation(self.model), _adapters_disabled(self.model):
            found = [self._embed([tokens[i] for i in part]) for part in _parts(by_length, self.batch)]
        return torch.cat(found)[torch.tensor(by_length).argsort()]

    def _embed(self, tokens: list[Int[Tensor, "N"]]) -> Float[Tensor, "B D"]:
        device = next(self.model.parameters()).device
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True).to(device)
        states = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1].float()
        real = mask.unsqueeze(-1)
        return F.normalize((states * real).sum(1) / real.sum(1), dim=-1).cpu()


def _parts(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


@contextmanager
def _adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Context manager in which linear layers with LoRA experts compute without them; no router runs."""
    layers = [layer for layer in moe_layers(model).values() if isinstance(layer.experts, LoRA)]
    beside = [(layer, layer.shared) for layer in layers if layer.shared is not None]
    try:
        for layer, dense in beside:
            vars(layer)["forward"] = dense.forward
        yield
    finally:
        for layer, _ in beside:
            del vars(layer)["forward"]
