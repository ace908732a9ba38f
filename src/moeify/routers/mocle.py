"""Routing by cluster: samples with similar instructions share an expert, beside a universal expert (MoCLE)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routing import Assignment, Evidence


@register("router", "cluster")
class Cluster(Router):
    """The expert of the cluster that a sample's instruction is in, beside a universal one (MoCLE, arXiv 2312.12379).

        z = W C[c] + b                           c the sample's cluster, C a table of embeddings
        p = softmax((z + σ ε) / τ)               ε ~ N(0, 1) in training, 0 in evaluation
        i = argmax p,  G = p_i
        y = G · E_i(x) + (1 - G) · U(x)          U the last expert

    One decision per sample, independent of its tokens; the context holds the cluster. The more certain the choice, the
    smaller the weight of the universal expert.

    Args:
        width: D; the decision does not look at the tokens.
        num_experts: E, the universal one included.
        clusters: entries of the table.
        key: the name of the model's input that holds the cluster, of shape (B,), or (B, N) where samples are packed.
        temperature: τ.
        noise: σ.
        universal: whether the last expert is universal; without it y = G · E_i(x).
        gate: `once` as in the paper; `twice` weights the expert by G · G, as the authors' code does.
        dimensions: width of the embeddings.
        bias: whether the gate has b, as the authors' has.

    Raises:
        ValueError: no cluster; a universal expert alone; a temperature that is not positive; in `forward`, an input
            that the model was not given, or a cluster that is not in the table.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        clusters: int = 64,
        key: str = "cluster",
        temperature: float = 0.05,
        noise: float = 0.1,
        universal: bool = True,
        gate: Literal["once", "twice"] = "once",
        dimensions: int = 384,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if clusters < 1:
            raise ValueError(f"a table of clusters={clusters} has no cluster to look up; choose clusters >= 1")
        if num_experts <= universal:
            raise ValueError("the last expert is the universal one, so at least two are needed; or universal=False")
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} divides logits; choose temperature > 0")
        self.num_experts, self.clusters, self.key = num_experts, clusters, key
        self.temperature, self.noise, self.universal, self.gate = temperature, noise, universal, gate
        self.k = 1 + universal
        self.weights_sum_to_one = universal and gate == "once"
        self.embedding = nn.Embedding(clusters, dimensions)
        bound = 1 / math.sqrt(dimensions)
        self.weight = nn.Parameter(torch.empty(num_experts - universal, dimensions).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_experts - universal).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route all real tokens of a sample to the expert of its cluster, and to the universal one."""
        tokens = real_tokens(x, context)
        samples = torch.stack([tokens.sequence_id, tokens.keys(context, self.key)])
        (sequence_id, cluster), which = samples.unique(dim=1, return_inverse=True)
        if not torch.compiler.is_compiling():  # the embedding table raises by itself
            self._require_known(cluster)
        logits = project(self.embedding(cluster), self.weight, self.bias)
        p = (self._noisy(logits) / self.temperature).softmax(-1)
        certainty, expert = p.max(-1)
        indices, topk_weights = [expert], [certainty if self.gate == "once" else certainty.square()]
        if self.universal:
            indices.append(torch.full_like(expert, self.num_experts - 1))
            topk_weights.append(1 - certainty)
            logits, p = F.pad(logits, (0, 1), value=torch.finfo(p.dtype).min), F.pad(p, (0, 1))  # never chosen
        indices, topk_weights = torch.stack(indices, dim=-1)[which], torch.stack(topk_weights, dim=-1)[which]
        evidence = Evidence(logits=logits, scores=p, sequence_id=sequence_id)
        return tokens.assign(indices, topk_weights, self.num_experts, evidence)

    def _noisy(self, logits: Float[Tensor, "L E"]) -> Float[Tensor, "L E"]:
        return logits + self.noise * torch.randn_like(logits) if self.training else logits

    def _require_known(self, cluster: Int[Tensor, "L"]) -> None:
        if int(cluster.min()) < 0 or int(cluster.max()) >= self.clusters:
            raise ValueError(
                f"{self.key!r} goes from {int(cluster.min())} to {int(cluster.max())}, but the table has the clusters "
                f"0 to {self.clusters - 1}; make it as large as what was clustered, clusters=..."
            )

    def extra_repr(self) -> str:
        """The experts, the clusters and the settings of the choice."""
        experts = f"{self.num_experts - self.universal}{' + 1 universal' * self.universal}"
        return f"experts={experts}, clusters={self.clusters}, temperature={self.temperature}, gate={self.gate!r}"
