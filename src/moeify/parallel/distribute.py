"""Put a sparse model on several processes by transformers' own engine, whole experts on each: `DistributedConfig`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from moeify import ranks
from moeify.experts import Experts
from moeify.experts.blocks import Blocks
from moeify.experts.sequences import Sequences
from moeify.hf.blocks import is_wrapper
from moeify.layers import HfLayer, MoELayer, SparseLayer, sparse_layers, watch_inputs
from moeify.routers.arrow import Arrow

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.distributed import DistributedConfig

    Model = TypeVar("Model", bound=PreTrainedModel)

INSTEAD = "leave ep_size=1: FSDP2 (fsdp_size) and DDP (torchrun without a DistributedConfig) train it as it is"


class CannotBeParallel(ValueError):
    """Experts that no process can hold apart from the others."""


def distribute(model: Model, config: DistributedConfig | dict[str, Any]) -> Model:
    """Shard a model in memory over all processes, in place: FSDP2, expert, tensor and replicated data parallelism.

    Call it on every process of `torchrun`, with the same model, before trainer and optimizer are made. Experts are
    exchanged by `RowsToExperts` if the configuration names no `ep_implementation`. Afterwards the parameters are
    DTensors. On a single process with sizes of 1 nothing changes.

    Args:
        model: of transformers, sparsified or with MoE blocks of its own.
        config: the sizes `fsdp_size`, `tp_size` and `dp_replicate_size`, whose product is the number of processes, and
            `ep_size`, a divisor of `fsdp_size * tp_size`.

    Returns:
        The model.

    Raises:
        CannotBeParallel: with `ep_size` above 1, experts that processes cannot hold apart or share evenly.
        ValueError: processes with different weights, a model that is not transformers' own, or sizes that do not fit.
        RuntimeError: an expert's parameter was left whole by the plan.
        ImportError: a transformers older than 5.23.
    """
    from transformers import PreTrainedModel, __version__
    from transformers.distributed import DistributedConfig

    if find_spec("transformers.distributed.expert_parallel") is None:
        raise ImportError(f"transformers {__version__} cannot exchange tokens between processes; install 5.23 or newer")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is not a model of transformers, whose engine this is; shard it with FSDP2 "
            "(torch.distributed.fsdp.fully_shard) yourself"
        )
    config = DistributedConfig.from_dict(config) if isinstance(config, dict) else config
    engine: Any = type(model)
    sized, _, mesh = engine.prepare_distribute_model(config)
    if mesh is None:
        return model
    _require_same_weights(model)
    parallel = sized.ep_size > 1
    if parallel:
        plan = expert_plan(model, sized.ep_size)
        sized = _with_plan(sized, plan | (sized.ep_plan or {}))
    _forget_dense_rules(model)
    layers = sparse_layers(model)
    model = engine.maybe_distribute_model(model, sized, mesh)
    if parallel:
        require_sharded(layers)
        _tell_padding(model, layers)
    return model


def expert_plan(model: nn.Module, ep_size: int = 1) -> dict[str, str]:
    """The `ep_plan` of `DistributedConfig` for the layers that `sparsify` made, empty for a model without any.

    Layer numbers are `*`, as transformers writes its plans. MoE blocks of transformers have plans of their own.

    Args:
        model: the model.
        ep_size: processes that share the experts of a layer.

    Raises:
        CannotBeParallel: experts that processes cannot hold apart, or that these do not share evenly.
    """
    plan: dict[str, str] = {}
    placed: set[str] = set()
    for layer in sparse_layers(model).values():
        if layer.num_experts % ep_size:
            raise CannotBeParallel(
                f"{layer.name} has {layer.num_experts} experts, which {ep_size} processes cannot share evenly; choose "
                f"an ep_size that divides {layer.num_experts}"
            )
        if isinstance(layer, MoELayer):
            for name, experts in _stacks(layer):
                placed.add(name)
                generic = _generic(name)
                plan |= {f"{generic}.{key}": "grouped_gemm" for key, _ in experts.named_parameters(recurse=False)}
                plan[generic] = "ep_dispatch_experts"
    modules = dict(model.named_modules())
    if caught := [name for name in modules if _generic(name) in plan and name not in placed]:
        raise CannotBeParallel(
            f"a rule for {_generic(caught[0])} would catch {caught[0]} ({type(modules[caught[0]]).__name__}) too, "
            f"which is not one stack of experts; {INSTEAD}"
        )
    return plan


def _stacks(layer: MoELayer) -> Iterator[tuple[str, Experts]]:
    """The modules that stack the experts of a layer in parameters (E, ...), with their names in the model."""
    if reason := _not_parallel(layer):
        raise CannotBeParallel(f"the experts of {layer.name} cannot be parallel: {reason}; {INSTEAD}")
    for name, part in layer.module.named_modules():
        if isinstance(part, Experts) and next(part.parameters(recurse=False), None) is not None:
            yield f"{layer.name}.{name}", part


def _not_parallel(layer: MoELayer) -> str | None:
    """Why processes cannot hold the experts of a layer apart, None if they can."""
    experts = layer.experts
    if is_wrapper(experts):
        return f"{type(experts).__name__} is around them; put it on dense layers only, or on the model before sparsify"
    if isinstance(experts, Sequences):
        return "they are whole modules that read sequences, and processes exchange rows"
    if isinstance(layer.router, Arrow):
        return "Arrow reads the weights of all experts to route"
    if kinds := next((part for part in experts.modules() if isinstance(part, Blocks)), None):
        return f"they are of different kinds ({', '.join(type(each).__name__ for each in kinds.banks)})"
    stacks = 0
    for part in experts.modules():
        if not isinstance(part, Experts):
            continue
        own = dict(part.named_parameters(recurse=False))
        kind = type(part).__name__
        if own and any(p.dim() == 0 or len(p) != layer.num_experts for p in own.values()):
            return f"{kind} holds {_shown(own)}, which are not one slice for each of {layer.num_experts} experts"
        inside = [name for child in part.children() for name, _ in child.named_parameters()]
        if own and inside:
            return f"{kind} holds parameters beside those of modules inside it ({inside[0]}), not shared by processes"
        stacks += bool(own)
    return (
        None if stacks else f"{type(experts).__name__} does not stack them in parameters, they are modules of their own"
    )


def _shown(parameters: dict[str, nn.Parameter]) -> str:
    return ", ".join(f"{name} {tuple(p.shape)}" for name, p in parameters.items())


def _generic(name: str) -> str:
    """A name with `*` for numbers, as keys of a plan have them."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _with_plan(config: DistributedConfig, plan: dict[str, str]) -> DistributedConfig:
    ours = "moeify" if config.ep_implementation == "auto" else config.ep_implementation
    known = {field.name for field in fields(config)} - {"enable_expert_parallel"}  # deprecated, and set by the sizes
    kept = {name: getattr(config, name) for name in known}
    return replace(config, **kept | {"ep_plan": plan or None, "ep_implementation": ours})


def _forget_dense_rules(model: PreTrainedModel) -> None:
    """Drop tensor-parallel rules for modules that experts have replaced, of which transformers would warn."""
    parts = (*dict(model.named_modules()), *dict(model.named_parameters()))
    known = {_generic(name) for name in parts}
    if model._tp_plan:
        model._tp_plan = {name: style for name, style in model._tp_plan.items() if name in known}


def require_sharded(layers: dict[str, SparseLayer]) -> None:
    """Check that every parameter of the experts lies on the processes of an expert-parallel mesh.

    Args:
        layers: the sparse layers of the model, as they were found before it was placed.

    Raises:
        RuntimeError: a parameter does not; processes would train different experts under one name.
    """
    from torch.distributed.tensor import DTensor

    for name, layer in layers.items():
        inner = layer.common_modules()
        common = {id(p) for module in inner for p in module.parameters()}
        for key, p in layer.experts.named_parameters():
            if id(p) not in common and not (isinstance(p, DTensor) and "ep" in (p.device_mesh.mesh_dim_names or ())):
                raise RuntimeError(
                    f"{key} of the experts of {name} lies whole on every process although ep_size is above 1: no rule "
                    f"of the ep_plan names it; add one, or {INSTEAD}"
                )


def _tell_padding(model: nn.Module, layers: dict[str, SparseLayer]) -> None:
    """Let the experts of transformers know which tokens are padding, as those of moeify do by their routers."""
    from moeify.hf.expert_parallel import implementation_of

    told: dict[str, SparseLayer] = {}
    for name, layer in layers.items():
        if isinstance(layer, HfLayer) and (parallel := implementation_of(layer.experts)) is not None:
            parallel.context = layer.context
            told[name] = layer
    watch_inputs(model, told)


def _require_same_weights(model: nn.Module) -> None:
    """Compare a sum of every parameter over processes, without which they would shard different models as one."""
    if not ranks.several():
        return
    sums = torch.stack([_checksum(p.detach()) for p in model.parameters()])
    world = torch.distributed.get_world_size()
    total = ranks.all_reduce(sums.clone())
    different = (total / world - sums).abs() > 1e-9 * sums.abs().clamp_min(1)
    if ranks.anywhere(bool(different.any()), sums.device):
        names = [name for name, _ in model.named_parameters()]
        where = names[int(different.int().argmax())] if different.any() else "some parameters"
        raise ValueError(
            f"processes hold different models: {where} is not the same on all of them; seed every process alike before "
            "the model is made (transformers.set_seed), or load it from one folder"
        )


def _checksum(p: Tensor) -> Tensor:
    """A sum with a weight for every place, so that exchanged values count as different."""
    flat = p.flatten().double()
    return (flat * torch.linspace(1, 2, len(flat), dtype=torch.float64, device=p.device)).sum()
