"""Put LoRA adapters beside the linear layers that they adapt: each becomes a sparse layer with LoRA experts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.compose.peft_files import Adapter, LowRank
from moeify.context import Context
from moeify.experts.lora import LoRA, LoRAFFN
from moeify.find.contexts import contexts_of
from moeify.find.dense import compute_dtype, is_linear, is_quantized, matrix, widths
from moeify.find.layout import seen_in_a_run
from moeify.find.shapes import Site, fast_paths, whole
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.origin import Origin
from moeify.routers.base import Router
from moeify.routers.topk import TopK
from moeify.snapshot import restored_on_error
from moeify.sparsify.plan import put
from moeify.sparsify.shared import frozen

MakeRouter = Callable[..., Router]


@dataclass(frozen=True)
class AdapterLibrary:
    """The settings that the sparse layers of an adapter library are made with.

    Attributes:
        router: makes a router from width and number of experts.
        dropout: probability of dropping an input of an adapter in training.
        names: of the adapters, in the order of the experts in every layer.
    """

    router: MakeRouter = TopK
    dropout: float = 0.0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer with adapters beside it.

    Attributes:
        layer: the sparse layer that replaces it.
        experts: its adapters.
        dense: the linear layer.
    """

    layer: MoE
    experts: LoRA
    dense: nn.Module

    @property
    def router_vectors(self) -> Float[Tensor, "E D"] | None:
        """The router's vector for every adapter, or None where the router has none."""
        weight: Any = getattr(self.layer.router, "weight", None)
        fits = isinstance(weight, Tensor) and weight.shape == (self.experts.num_experts, self.experts.width)
        return weight if fits else None

    def adapters(self) -> dict[str, LowRank]:
        """The adapters by name, each at its own rank: without the zeros that padded it to the largest."""
        return {name: _unpadded(self.experts, e) for e, name in enumerate(self.experts.names)}


def adapted_linears(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The linear layers with adapters beside them, by name.

    Raises:
        ValueError: there is none, or a sparse layer is another.
    """
    found: dict[str, AdaptedLinear] = {}
    for name, layer in moe_layers(model).items():
        experts, dense = layer.experts, layer.shared
        if not isinstance(experts, LoRA) or dense is None or not is_linear(dense):
            raise ValueError(
                f"{name} is not a linear layer with adapters beside it, but has {type(experts).__name__} experts; "
                + ("merge_into_experts(model) merges them into full weights; " if isinstance(experts, LoRAFFN) else "")
                + "moeify.save(model, folder) writes the whole model"
            )
        found[name] = AdaptedLinear(layer, experts, dense)
    if not found:
        raise ValueError(f"this {type(model).__name__} has no adapters; attach some with from_adapters first")
    return found


@torch.no_grad()
def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by name, with the vectors that its routers have for them as gates.

    Raises:
        ValueError: the model has none, or a sparse layer that is not a linear layer with adapters beside it.
    """
    found = {name: Adapter({}, {}) for name in (Origin.of(model).adapters or AdapterLibrary()).names}
    for module, here in adapted_linears(model).items():
        for e, (name, low) in enumerate(here.adapters().items()):
            adapter = found.setdefault(name, Adapter({}, {}))
            adapter.modules[module] = low
            if here.router_vectors is not None:
                adapter.gates[module] = here.router_vectors[e].clone()
    return found


def attach(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    library: AdapterLibrary,
    *,
    allow_noncausal: bool = False,
    prepare: Callable[[Mapping[str, MoE]], None] | None = None,
) -> None:
    """Make the sparse layers that adapters need; those that are there keep what they have learned, and grow.

    A guessed input, if the model takes it, shows how stacks lay out tokens and whether padding is read.

    Args:
        model: the base model, with or without some of the adapters; a call that raises leaves it unchanged.
        adapters: all adapters by name, those that are there first.
        library: how the sparse layers are made.
        allow_noncausal: let decoders have routers that look at later tokens.
        prepare: receives the sparse layers that were made, by name, before any is put in its place; it may raise.

    Raises:
        ValueError: an adapter that does not fit the model; an invalid router, or one that looks ahead in a decoder.
    """
    before = adapted_linears(model) if moe_layers(model) else {}
    contexts = {whole(model, name).stack: here.layer.context for name, here in before.items()}
    watched = set(contexts)
    latest: dict[str, AdaptedLinear] = {}
    made: list[tuple[Site, MoE]] = []
    found = list(_experts_by_site(model, adapters, library.dropout))
    contexts |= contexts_of(seen_in_a_run(model, [site for site, _ in found if site.stack not in watched]))
    for site, experts in found:
        old = before.get(site.name)
        if old is not None and old.experts.names == experts.names:
            latest[site.stack] = old
            continue
        router = _shared_or_own(site, experts, _router(site, experts, library.router), latest.get(site.stack))
        if old is not None:
            _grow(old.layer.router, router, _router(site, old.experts, library.router))
            _learn_alike(old.experts, experts)
        layer = _layer(site, experts, router, old, contexts[site.stack])
        latest[site.stack] = AdaptedLinear(layer, experts, site.dense)
        _set_gates(latest[site.stack], adapters)
        made.append((site, layer))

    if prepare is not None:
        prepare({site.name: layer for site, layer in made})

    def put_all() -> None:
        if new := [(site, layer) for site, layer in made if site.stack not in watched]:
            put(model, [site for site, _ in new], [layer for _, layer in new], allow_noncausal=allow_noncausal)
        for site, layer in made:
            if site.stack in watched:
                site.install(layer)
        replace(Origin.of(model), adapters=replace(library, names=tuple(adapters))).write_to(model)

    restored_on_error(model, put_all, values=False)


def _layer(site: Site, experts: LoRA, router: Router, old: AdaptedLinear | None, context: Context) -> MoE:
    """A sparse layer, beside the same linear layer as the one that is there already."""
    shared = frozen(site.dense, experts.width) if old is None else old.dense
    backend = "auto" if old is None else old.layer.backend
    router = router.to(experts.lora_A.dtype)
    layer = MoE(router, experts, shared, backend=backend, context=context, name=site.name)
    return layer.train(site.training)


def _experts_by_site(model: nn.Module, adapters: Mapping[str, Adapter], dropout: float) -> Iterator[tuple[Site, LoRA]]:
    """The linear layers that are adapted, in the order of the model, and the experts that each gets."""
    parts = _parts(model)
    for name, adapter in adapters.items():
        if not adapter.modules:
            raise ValueError(f"nothing of the adapter {name!r} attaches: its file has no tensors")
        for module, low in adapter.modules.items():
            _refuse_unfit(model, parts, name, module, low)
            if module in adapter.base:
                _refuse_other_base(name, module, parts[module], adapter.base[module])
    for module, dense in parts.items():
        here = {name: adapter.modules[module] for name, adapter in adapters.items() if module in adapter.modules}
        if here:
            site = whole(model, module, dense)
            yield (
                replace(site, disabled=tuple(fast_paths(model, site.place[0]))),
                stack(here, dense, dropout, compute_dtype(model, dense)),
            )


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base model; where a linear layer has adapters beside it already, the linear layer."""
    return {
        name: part.shared if isinstance(part, MoE) and part.shared is not None else part
        for name, part in model.named_modules()
    }


def _refuse_unfit(model: nn.Module, parts: Mapping[str, nn.Module], name: str, module: str, low: LowRank) -> None:
    kind, dense = type(model).__name__, parts.get(module)
    if dense is None:
        near = [other for other in parts if f".{other}".endswith(f".{module}") or f".{module}".endswith(f".{other}")]
        hint = f" (here it is {near[-1]})" if near else ""
        raise ValueError(
            f"the adapter {name!r} adapts {module}{hint}, which this {kind} does not have; pass the model that it was "
            "trained on"
        )
    if not is_linear(dense) or isinstance(parts[module.rpartition(".")[0]], nn.MultiheadAttention):
        raise ValueError(
            f"the adapter {name!r} adapts {module}, a {type(dense).__name__} that cannot have experts beside it: only "
            "linear layers that are called can; leave it out of the adapter's target_modules, or merge it into the base"
        )
    out, width = widths(dense)
    for side, tensor, needed in (("A", low.A, (low.rank, width)), ("B", low.B, (out, low.rank))):
        if tensor.shape != needed:
            raise ValueError(
                f"the adapter {name!r} is for another base: {module}.lora_{side} is {tuple(tensor.shape)}, and this "
                f"{kind} needs {needed}"
            )


def _refuse_other_base(name: str, module: str, dense: nn.Module, stored: Tensor) -> None:
    """Compare the base's weight that an adapter brings with the base's own, in the coarser dtype of both."""
    own = matrix(dense)
    if is_quantized(dense):
        return  # its initial value is not known
    coarse = max(stored.dtype, own.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    if own.shape != stored.shape or not torch.equal(own.to(coarse), stored.to(own.device, coarse)):
        raise ValueError(
            f"the adapter {name!r} is for another base: the weight of {module} that its file holds (base_layer.weight) "
            "differs from this model's; pass the model that it was trained on"
        )


@torch.no_grad()
def stack(
    adapters: Mapping[str, LowRank], dense: nn.Module, dropout: float = 0.0, dtype: torch.dtype | None = None
) -> LoRA:
    """The adapters of one linear layer as experts of one rank, padded with zeros, in its dtype if none is given."""
    weight = dense.get_parameter("weight")
    out, width = widths(dense)
    with torch.device(weight.device):
        experts = LoRA(
            len(adapters), width, out,
            rank=max(low.rank for low in adapters.values()), dropout=dropout, names=tuple(adapters),
        )  # fmt: skip
    scale = experts.scale
    experts.to(dtype or weight.dtype).scale = scale  # not rounded
    experts.lora_A.zero_()
    for e, low in enumerate(adapters.values()):
        experts.lora_A[e, : low.rank] = low.A
        experts.lora_B[e, :, : low.rank] = low.B
        experts.scale[e] = low.scale
    return experts


def _unpadded(experts: LoRA, e: int) -> LowRank:
    A, B = experts.lora_A[e].detach(), experts.lora_B[e].detach()
    used = (A.any(1) | B.any(0)).nonzero()
    rank = int(used.max()) + 1 if len(used) else 1
    return LowRank(A[:rank].clone(), B[:, :rank].clone(), experts.scale[e].item())


def _router(site: Site, experts: LoRA, make: MakeRouter) -> Router:
    """A router for one linear layer, with k at most the number of its experts."""
    k = inspect.signature(make).parameters.get("k")
    if k is not None and isinstance(k.default, int):
        make = partial(make, k=min(k.default, experts.num_experts))
    try:
        with torch.device(experts.lora_A.device):
            return make(experts.width, experts.num_experts)
    except ValueError as error:
        raise ValueError(
            f"the router of {site.name}, which {', '.join(experts.names)} adapt, cannot be made; choose one that "
            f"serves {experts.num_experts}: {error}"
        ) from None


def _shared_or_own(site: Site, experts: LoRA, router: Router, previous: AdaptedLinear | None) -> Router:
    """The router itself, or one that follows the router of the linear layer before."""
    following = router if previous is None else router.link_to(previous.layer.router)
    if previous is not None and following is not router and previous.experts.names != experts.names:
        raise ValueError(
            f"{site.name} is adapted by {', '.join(experts.names)} and {previous.layer.name} by "
            f"{', '.join(previous.experts.names)}, so that one decision for both would mean different adapters; give "
            "every adapter the same target_modules, or a router that decides in every layer by itself"
        )
    return following


@torch.no_grad()
def _set_gates(here: AdaptedLinear, adapters: Mapping[str, Adapter]) -> None:
    """Set the rows of a router to the gates that adapters bring."""
    if here.router_vectors is None:
        return
    for row, name in zip(here.router_vectors, here.experts.names, strict=True):
        gate = adapters[name].gates.get(here.layer.name)
        if gate is not None and gate.shape != row.shape:
            raise ValueError(
                f"the gate of {here.layer.name} of the adapter {name!r} is {tuple(gate.shape)}; it must be "
                f"{tuple(row.shape)}, the width that the layer reads"
            )
        if gate is not None:
            row.copy_(gate)


@torch.no_grad()
def _grow(old: nn.Module, new: nn.Module, began: nn.Module) -> None:
    """Copy what a smaller module has learned, its values that differ from when it `began`, into a larger one."""
    start, after = began.state_dict(), new.state_dict()
    for key, learned in old.state_dict().items():
        if key not in start or not torch.equal(learned, start[key]):
            after[key][tuple(map(slice, learned.shape))] = learned
    _learn_alike(old, new)


def _learn_alike(old: nn.Module, new: nn.Module) -> None:
    learns = {key: parameter.requires_grad for key, parameter in old.named_parameters()}
    for key, parameter in new.named_parameters():
        parameter.requires_grad_(learns.get(key, True))
