"""Measure on data the importance of each hidden unit: |h · ∂L/∂h|, averaged over the tokens of each cluster.

v_c = 1 / |T_c| · Σ_{x in T_c} |h(x) · ∂L/∂h(x)|        (LLaMA-MoE, arXiv 2406.16554, eq. 8)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.find.dense import DenseFFN
from moeify.find.where import Where, ffn
from moeify.modes import in_evaluation
from moeify.registry import register
from moeify.sparsify.split.clustered import greedy

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


@register("importance", "measured")
@dataclass(frozen=True)
class Measured:
    """Measurements of the feed-forward networks of one dense model; files hold its name only.

    Attributes:
        of: the values, (C, H) or (H, H), by the down projection of each network.
        centres: the centres (C, D) of the clusters of tokens, by the name of each network, if these were clustered.
    """

    of: WeakKeyDictionary[nn.Module, Tensor] = field(default_factory=WeakKeyDictionary, compare=False, repr=False)
    centres: dict[str, Float[Tensor, "C D"]] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, dense: DenseFFN, parts: int) -> Float[Tensor, "parts H"]:
        """The values of a network.

        Raises:
            ValueError: nothing was measured of it, or for another number of parts.
        """
        if (values := self.of.get(dense.down)) is None:
            raise ValueError(
                "nothing was measured of this network; measure the very model that is made sparse, and pass what "
                "measure_importance or measure_coactivation returns"
            )
        if len(values) not in (parts, values.shape[1]):
            raise ValueError(f"importance was measured for {len(values)} clusters, and {parts} experts need {parts}")
        return values


def measure_importance(
    model: nn.Module, clusters: Sequence[Iterable[Batch]], *, where: Where = ffn, loss: Loss | None = None
) -> Measured:
    """The importance of every hidden unit for every cluster of data, one cluster per expert (LLaMA-MoE).

    Args:
        model: the dense model; its gradients are left alone.
        clusters: for each expert batches of the model's arguments, with labels; `attention_mask` marks padding.
        where: selects the networks.
        loss: from model and batch to the loss, `model(**batch).loss` if not given.

    Raises:
        ValueError: a network that the batches do not reach, or whose tokens are not those of the mask.
    """
    watch = _Watch(networks(model, where), len(clusters))
    for number, batches in enumerate(clusters):
        for batch in batches:
            watch.run(model, batch, loss, lambda name, number=number: number)
    return Measured(watch.means())


def measure_token_importance(
    model: nn.Module,
    batches: Sequence[Batch],
    clusters: int,
    *,
    where: Where = ffn,
    loss: Loss | None = None,
    tokens: int = 4096,
    jitter: float = 0.4,
) -> Measured:
    """The importance of every hidden unit for clusters of tokens, which each layer forms (LLaMA-MoE v2, 2411.15708).

    Two passes: k-means on what each network reads gives `centres`, which may start a router (`start_routers`); then a
    token counts for the cluster whose centre has the largest product with it, as such a router would send it.

    Args:
        model: the dense model; its gradients are left alone.
        batches: of the model's arguments, with labels.
        clusters: E.
        where: selects the networks.
        loss: from model and batch to the loss, `model(**batch).loss` if not given.
        tokens: the most tokens of each layer that are clustered.
        jitter: a cluster has at most 1 + jitter times its share of them.

    Raises:
        ValueError: as of `measure_importance`.
    """
    dense = networks(model, where)
    read = _inputs(model, dense, batches, tokens)
    centres = {name: k_means(rows, clusters, jitter) for name, rows in read.items()}
    watch = _Watch(dense, clusters)
    for batch in batches:
        watch.run(model, batch, loss, lambda name: (watch.inputs[name] @ centres[name].t()).argmax(-1))
    return Measured(watch.means(), centres)


def k_means(rows: Float[Tensor, "T D"], clusters: int, jitter: float) -> Float[Tensor, "C D"]:
    """The centres after twenty rounds by Euclidean distance, with at most (1 + jitter) T / C rows in a cluster."""
    if len(rows) < clusters:
        raise ValueError(f"{len(rows)} tokens cannot form {clusters} clusters; give more data")
    centres = rows[torch.randperm(len(rows), device=rows.device)[:clusters]]
    for _ in range(20):
        member = greedy(-torch.cdist(rows, centres), -int(-(1 + jitter) * len(rows) // clusters))
        sums = torch.zeros_like(centres).index_add(0, member, rows)
        sizes = member.bincount(minlength=clusters).unsqueeze(1)
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return centres


class _Watch:
    """Adds up |h · ∂L/∂h| of every network, by cluster."""

    def __init__(self, dense: dict[str, DenseFFN], clusters: int) -> None:
        self.dense = dense
        self.inputs: dict[str, Tensor] = {}
        self.hidden: dict[str, Tensor] = {}
        device = next(iter(dense.values())).down_weight.device
        self.sums = {name: torch.zeros(clusters, network.hidden, device=device) for name, network in dense.items()}
        self.sizes = {name: torch.zeros(clusters, device=device) for name in dense}

    def run(self, model: nn.Module, batch: Batch, loss: Loss | None, cluster_of: Callable[[str], Any]) -> None:
        with in_evaluation(model), torch.enable_grad(), seen(self.dense, self.inputs, self.hidden):
            total = model(**batch).loss if loss is None else loss(model, batch)
        require_reached(self.dense, self.hidden)
        gradients = torch.autograd.grad(total, [self.hidden[name] for name in self.dense])
        for name, gradient in zip(self.dense, gradients, strict=True):
            real = real_tokens(name, batch, self.hidden[name])
            self.inputs[name] = self.inputs[name].detach().flatten(0, -2)[real].float()
            change = (self.hidden[name].detach() * gradient).float().abs().flatten(0, -2)[real]
            member = torch.as_tensor(cluster_of(name), device=change.device).expand(len(change))
            self.sums[name].index_add_(0, member, change)
            self.sizes[name] += member.bincount(minlength=len(self.sizes[name]))
        self.hidden.clear()

    def means(self) -> WeakKeyDictionary[nn.Module, Tensor]:
        means = {name: sums / self.sizes[name].clamp_min(1).unsqueeze(1) for name, sums in self.sums.items()}
        return by_down(self.dense, means)


def networks(model: nn.Module, where: Where) -> dict[str, DenseFFN]:
    """The feed-forward networks of a model, by the names of their sites."""
    found = {site.name: site.dense for site in where(model)}
    if others := [name for name, dense in found.items() if not isinstance(dense, DenseFFN)]:
        raise ValueError(f"{others[0]} is not a feed-forward network and has no hidden units; narrow where=")
    return {name: dense for name, dense in found.items() if isinstance(dense, DenseFFN)}


def require_reached(dense: Iterable[str], reached: Container[str]) -> None:
    """Raise if the data did not run a network."""
    if missed := [name for name in dense if name not in reached]:
        raise ValueError(f"the data does not reach {missed[0]}, so that nothing can be measured of it; narrow where=")


def by_down(dense: Mapping[str, DenseFFN], values: Mapping[str, Tensor]) -> WeakKeyDictionary[nn.Module, Tensor]:
    """Values by the down projections of the networks, which are the model's own modules."""
    found: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
    for name, network in dense.items():
        found[network.down] = values[name]
    return found


@contextmanager
def seen(dense: Mapping[str, DenseFFN], inputs: dict[str, Tensor], hidden: dict[str, Tensor]) -> Iterator[None]:
    """Keep what each network reads, and its hidden units, by its name, while the model runs."""

    def keep(into: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: into.__setitem__(name, args[0])

    handles = [network.ups[0].register_forward_pre_hook(keep(inputs, name)) for name, network in dense.items()]
    handles += [network.down.register_forward_pre_hook(keep(hidden, name)) for name, network in dense.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def real_tokens(name: str, batch: Batch, values: Float[Tensor, "... H"]) -> Int[Tensor, "T"]:
    """The positions of the real tokens among all tokens of a network."""
    count = values.shape[:-1].numel()
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.arange(count, device=values.device)
    if mask.numel() != count:
        raise ValueError(f"{name} reads {count} tokens, and attention_mask has {mask.numel()}; leave the mask out")
    return mask.flatten().nonzero().flatten().to(values.device)


@torch.no_grad()
def _inputs(
    model: nn.Module, dense: dict[str, DenseFFN], batches: Iterable[Batch], tokens: int
) -> dict[str, Float[Tensor, "T D"]]:
    found: dict[str, list[Tensor]] = {name: [] for name in dense}
    for batch in batches:
        inputs: dict[str, Tensor] = {}
        with in_evaluation(model), seen(dense, inputs, {}):
            model(**batch)
        require_reached(dense, inputs)
        for name, x in inputs.items():
            found[name].append(x.flatten(0, -2)[real_tokens(name, batch, x)].float())
    rows = {name: torch.cat(parts) for name, parts in found.items()}
    return {name: r[torch.randperm(len(r), device=r.device)[:tokens]] for name, r in rows.items()}
