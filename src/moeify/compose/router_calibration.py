"""HARC: after sparse models were merged, realign the routers to what those of the merged models decided.

Merged routers send tokens elsewhere than those that they came from, whichever way weights were averaged. Hessian-aware
router calibration (arXiv 2606.03391) replaces each by the router that is nearest to all of them in what they decide:

    W = argmin Σ_i mean over x of (W x - W_i x)ᵀ H_i (W x - W_i x),      H_i = diag(p) - p pᵀ,  p = softmax(W_i x)

with W_i the router of model i, and x what it reads in the merged model on data of model i. H_i is the second derivative
of the Kullback-Leibler divergence of the decisions. Nothing is trained: W solves a linear system, found by conjugate
gradients without forming its matrix. Layers are calibrated in order, each on what the ones before let through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.layers import SparseLayer, sparse_layers, watch_inputs
from moeify.modes import in_evaluation

Batch = Mapping[str, Any] | Tensor


@torch.no_grad()
def calibrate_routers(
    model: nn.Module,
    sources: Mapping[str, nn.Module],
    data: Mapping[str, Sequence[Batch]],
    *,
    regularization: float = 0.9,
    iterations: int = 1000,
    tolerance: float = 1e-6,
) -> nn.Module:
    """Calibrate the routers of a merged model in place (HARC, arXiv 2606.03391), and return it.

    Args:
        model: the merged model, whose routers are those of TopK or of a block of transformers.
        sources: the models that were merged, with the same layers.
        data: of every source, batches of what it was trained on: keyword arguments of the model, or its only argument.
        regularization: γ; the off-diagonal part of the system is multiplied by it. The authors' scripts take 0.9.
        iterations: of conjugate gradients at most.
        tolerance: the residual at which they stop, relative to the right-hand side.

    Raises:
        ValueError: other names in `data` than in `sources`, a dense model, a source with other layers, a router without
            one matrix (E, D).
    """
    if sources.keys() != data.keys() or not sources:
        raise ValueError(f"the models are {sorted(sources)} and their data {sorted(data)}; give batches of every model")
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no sparse layer, so it has no router to calibrate")
    theirs = {name: sparse_layers(source) for name, source in sources.items()}
    for source, found in theirs.items():
        if found.keys() != layers.keys():
            raise ValueError(f"the sparse layers of {source!r} are {list(found)}, and not {list(layers)}")
    for name, layer in layers.items():
        weight = _matrix(layer)
        inputs = [_read_by_router(model, layers, layer, data[source]) for source in sources]
        routers = [_matrix(theirs[source][name]).detach() for source in sources]
        weight.copy_(nearest_router(inputs, routers, weight, regularization, iterations, tolerance))
    return model


def nearest_router(
    inputs: Sequence[Float[Tensor, "T D"]],
    routers: Sequence[Float[Tensor, "E D"]],
    start: Float[Tensor, "E D"],
    regularization: float = 0.9,
    iterations: int = 1000,
    tolerance: float = 1e-6,
) -> Float[Tensor, "E D"]:
    """The W of the equation above, in fp64, for one layer.

    Args:
        inputs: what the routers read, of each model's data.
        routers: W_i of each model.
        start: where conjugate gradients start.
        regularization: γ.
        iterations: at most.
        tolerance: the relative residual at which they stop.
    """
    read = [x.double() for x in inputs]
    of_models = [w.double() for w in routers]
    decided = [(x @ w.T).softmax(-1) for x, w in zip(read, of_models, strict=True)]

    def curvature(i: int, w: Float[Tensor, "E D"]) -> Float[Tensor, "E D"]:
        x, p = read[i], decided[i]
        z = p * (x @ w.T)
        whole = (z - p * z.sum(-1, keepdim=True)).T @ x
        diagonal = (p * (1 - p)).T @ x.square() * w
        return (regularization * whole + (1 - regularization) * diagonal) / len(x)

    def total(w: Float[Tensor, "E D"]) -> Float[Tensor, "E D"]:
        return torch.stack([curvature(i, w) for i in range(len(read))]).sum(0)

    wanted = torch.stack([curvature(i, w) for i, w in enumerate(of_models)]).sum(0)
    return _conjugate_gradients(total, wanted, start.double(), iterations, tolerance)


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], wanted: Tensor, start: Tensor, iterations: int, tolerance: float
) -> Tensor:
    """The x with `apply(x) = wanted`, for a symmetric positive semidefinite map."""
    x, residual = start.clone(), wanted - apply(start)
    direction, size = residual.clone(), residual.square().sum()
    for _ in range(iterations):
        if size.sqrt() <= tolerance * wanted.norm():
            break
        mapped = apply(direction)
        step = size / (direction * mapped).sum()
        x += step * direction
        residual -= step * mapped
        before, size = size, residual.square().sum()
        direction = residual + size / before * direction
    return x


def _matrix(layer: SparseLayer) -> nn.Parameter:
    found = [] if layer.router is None else [p for p in layer.router.parameters() if p.dim() == 2]
    if len(found) != 1 or len(found[0]) != layer.num_experts:
        raise ValueError(f"the router of {layer.name} has no single matrix (E, D), so HARC cannot calibrate it")
    return found[0]


def _read_by_router(
    model: nn.Module, layers: Mapping[str, SparseLayer], layer: SparseLayer, batches: Iterable[Batch]
) -> Float[Tensor, "T D"]:
    """What the router of a layer reads of some data, without padding."""
    read: list[Tensor] = []

    def keep(router: nn.Module, args: tuple) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        real = layer.context.real(len(x))
        read.append(x if real is None else x[real])

    assert layer.router is not None
    handles = [*watch_inputs(model, layers), layer.router.register_forward_pre_hook(keep)]
    try:
        with in_evaluation(model):
            for batch in batches:
                model(batch) if isinstance(batch, Tensor) else model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(read)
