"""What a planner needs to know of a model: how many parameters and FLOPs lie in its experts, and how many elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from moeify.flops import count
from moeify.hf.names import HEADS, number
from moeify.layers import SparseLayer, sparse_layers
from moeify.meta import made_on_meta

BLOCKS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

SAMPLE = 1024
"""Tokens for which attention is counted; its FLOPs per token grow in proportion."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A model in numbers; every block is as every other, as far as a plan is concerned.

    Attributes:
        name: for people.
        width: D.
        blocks: layers of the model, dense or sparse.
        sparse_layers: those that have experts.
        num_experts: E.
        k: rows of a token.
        hidden: H, the hidden width of an expert, as if it were gated.
        dense_parameters: parameters of all blocks outside experts, shared experts among them.
        embedding: parameters of the embedding and of the head.
        dense_flops: FLOPs of a token, forward, in these parameters.
        head_flops: those of the head.
        attention_flops: those of scores and values, per token that a token attends to.
        vocabulary: width of the logits.
        heads: of attention, which tensor parallelism divides; 0 where they are unknown.
    """

    name: str
    width: int
    blocks: int
    sparse_layers: int
    num_experts: int
    k: float
    hidden: float
    dense_parameters: float
    embedding: float
    dense_flops: float
    head_flops: float
    attention_flops: float
    vocabulary: int
    heads: int = 0

    @property
    def expert_parameters(self) -> float:
        """Parameters of one expert of one layer."""
        return 3 * self.width * self.hidden

    @property
    def parameters(self) -> float:
        """All parameters."""
        experts = self.sparse_layers * self.num_experts * self.expert_parameters
        return self.dense_parameters + self.embedding + experts

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None) -> ModelShape:
        """The shape of a sparse model, ours or of transformers; it may be on the meta device.

        Raises:
            ValueError: the model has no sparse layer, or its sparse layers differ in their number of experts.
        """
        layers = list(sparse_layers(model).values())
        if not layers:
            raise ValueError(f"{type(model).__name__} has no experts to place; make it sparse by moeify.sparsify first")
        experts = {layer.num_experts for layer in layers}
        if len(experts) > 1:
            raise ValueError(f"layers have {', '.join(map(str, sorted(experts)))} experts; a plan needs one number")
        size = sum(p.numel() for layer in layers for p in layer.experts.parameters()) / len(layers)
        (num_experts,) = experts
        k = float(layers[0].rows_per_token() or num_experts)
        width = _width(model, layers[0])
        found, long = count(model), count(model, SAMPLE)
        embedding, vocabulary, head_flops = _ends(model)
        in_experts = len(layers) * k * 2 * size / num_experts
        return cls(
            name=name or type(model).__name__, width=width, blocks=_blocks(model, len(layers)),
            sparse_layers=len(layers), num_experts=num_experts, k=k, hidden=size / num_experts / (3 * width),
            dense_parameters=found.parameters - embedding - len(layers) * size, embedding=embedding,
            dense_flops=max(found.flops - in_experts - head_flops, 0.0), head_flops=head_flops,
            attention_flops=(long.flops - found.flops) / SAMPLE, vocabulary=vocabulary,
            heads=int(number(getattr(model, "config", None), HEADS) or 0),
        )  # fmt: skip

    @classmethod
    def of_config(cls, config: Any, name: str | None = None) -> ModelShape:
        """The shape of a model of transformers from its configuration; no weights are made.

        Raises:
            ValueError: as `of`, or no such model can be made without weights.
        """
        from transformers import AutoModelForCausalLM

        model = made_on_meta(lambda: AutoModelForCausalLM.from_config(config))
        if model is None:
            raise ValueError(f"{type(config).__name__} cannot be made without its weights; give the model")
        return cls.of(model, name or str(config.model_type))


def _width(model: nn.Module, layer: SparseLayer) -> int:
    config = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    if width:
        return int(width)
    tables = [p for p in (layer.router or layer.module).parameters() if p.dim() == 2]
    if not tables:
        raise ValueError(f"cannot tell the width of {layer.name}: its router has no matrix; give a ModelShape")
    return max(tables[0].shape)


def _blocks(model: nn.Module, sparse: int) -> int:
    return max(int(number(getattr(model, "config", None), BLOCKS) or 0), sparse)


def _ends(model: nn.Module) -> tuple[float, int, float]:
    """Parameters of the embedding and head, width of the logits, and FLOPs of the head."""
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", None)
    weight = getattr(output() if callable(output) else None, "weight", None)
    if weight is not None:
        tables[id(weight)] = weight
        return float(sum(w.numel() for w in tables.values())), int(weight.shape[0]), 2.0 * weight.numel()
    return float(sum(w.numel() for w in tables.values())), 0, 0.0
