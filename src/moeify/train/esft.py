"""Expert-specialised fine-tuning (ESFT, arXiv 2407.01906): train the experts that matter for the data, not others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from moeify.experts.slices import slice_parameter
from moeify.hf.blocks import unwrapped
from moeify.layers import SparseLayer, sparse_layers
from moeify.train.freeze import Trainable, trainable

Chosen = Mapping[str, Sequence[int]]


def train_experts(model: nn.Module, chosen: Chosen, *, verbose: bool = True) -> Trainable:
    """Freeze a model but for some experts of each sparse layer, print what is trained, and return it.

        train_experts(model, expert_relevance(model, batches).choose(0.2))
        SparseTrainer(model, arguments, train_dataset=data, sparse=SparseArguments(balance=0)).train()

    Only these experts have gradients and optimizer states. Make the optimizer afterwards.

    Args:
        model: a sparse model of moeify, or a mixture-of-experts model of transformers.
        chosen: the experts by the name of the sparse layer; layers that are not named are frozen.
        verbose: print the table.

    Raises:
        ValueError: a layer or an expert that the model does not have, no expert at all, experts that are chosen
            already, or experts without parameters of their own; nothing is frozen then.
    """
    layers = check_chosen(model, chosen)
    parts = {name: list(_parts(layer)) for name, layer in layers.items()}
    for name, layer in layers.items():
        if not parts[name]:
            raise ValueError(
                f"the experts of {name} are {type(unwrapped(layer.experts)).__name__}, whose parameters belong to no "
                "single expert; train them all, or adapt their linear layers with LoRA"
            )
    model.requires_grad_(False)
    for name, experts in chosen.items():
        for owner, key in parts.get(name, ()):
            if key is None:
                for expert in experts:
                    list(owner.children())[expert].requires_grad_(True)
            else:
                slice_parameter(owner, key, [itemgetter(expert) for expert in experts])
    report = trainable(model)
    if verbose:
        report.show()
    return report


def check_chosen(model: nn.Module, chosen: Chosen) -> dict[str, SparseLayer]:
    """The sparse layers of which experts were chosen.

    Raises:
        ValueError: a layer or an expert that the model does not have, one that is there twice, or no expert at all.
    """
    layers = sparse_layers(model)
    for name, experts in chosen.items():
        if name not in layers:
            raise ValueError(f"this {type(model).__name__} has no sparse layer {name!r}; it has {', '.join(layers)}")
        count = layers[name].num_experts
        if len(set(experts)) < len(experts) or not all(0 <= expert < count for expert in experts):
            raise ValueError(f"{name} has the experts 0 to {count - 1}, each at most once, and not {list(experts)}")
    if not any(chosen.values()):
        raise ValueError("no expert was chosen, so nothing would learn; raise the threshold")
    return {name: layers[name] for name, experts in chosen.items() if experts}


def _parts(layer: SparseLayer) -> Iterator[tuple[nn.Module, str | None]]:
    """The parameters of a layer that are stacked by expert, with their owners; or the container of its experts."""
    experts, count = unwrapped(layer.experts), layer.num_experts
    for module in experts.modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) == count:
            yield module, None
            return
    for module in experts.modules():
        if is_parametrized(module):
            raise ValueError(f"experts of {layer.name} were chosen before; call join_experts(model) first")
        for key, parameter in module.named_parameters(recurse=False):
            if _is_stacked(key, parameter, count):
                yield module, key


def _is_stacked(key: str, parameter: Tensor, count: int) -> bool:
    return parameter.shape[:1] == (count,) and (parameter.dim() >= 3 or "bias" in key)


def lora_experts(model: Any, chosen: Chosen, *, rank: int = 8, alpha: float = 16, **options: Any) -> Any:
    """Adapt some experts of each sparse layer by LoRA, with PEFT, and return the `PeftModel`.

    PEFT adapts stacked weights by `target_parameters`, all experts alike. Here the parts of its matrices that belong to
    the chosen experts are trained; those of the others keep B = 0, so they change nothing. `save_pretrained` writes
    them as ever, and PEFT reads them over the same base.

    Args:
        model: a sparse model of moeify, or a mixture-of-experts model of transformers.
        chosen: the experts by the name of the sparse layer.
        rank: r, per expert.
        alpha: the scale times r.
        options: others of PEFT's `LoraConfig`, such as `target_modules` for layers outside the experts.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: as `train_experts`; experts whose weights are not stacked.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora.layer import ParamWrapper
    except ImportError:
        raise ImportError("LoRA of experts needs PEFT; pip install 'moeify[adapters]'") from None

    layers = check_chosen(model, chosen)
    names = {id(module): name for name, module in model.named_modules()}
    targets, of_experts = [], {}
    for name, layer in layers.items():
        experts = unwrapped(layer.experts)
        if not layer.weights:
            raise ValueError(f"the experts of {name} are {type(experts).__name__}, which PEFT adapts by target_modules")
        for owner, key in _parts(layer):
            if key is not None and owner.get_parameter(key).dim() == 3:
                targets.append(f"{names[id(owner)]}.{key}")
                of_experts[id(owner)] = (layer.num_experts, chosen[name])
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": [], "target_parameters": targets}
    adapted = get_peft_model(model, LoraConfig(**settings | options))
    for wrapper in [module for module in adapted.modules() if isinstance(module, ParamWrapper)]:
        count, experts = of_experts[id(wrapper.get_base_layer())]
        for adapter in wrapper.lora_A:
            down, up = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
            slice_parameter(down, "weight", [_Rows(count, expert) for expert in experts])
            slice_parameter(up, "weight", [_Columns(count, expert) for expert in experts])
    return adapted


class _Rows:
    """The rows of PEFT's A, (E · r, D), that belong to an expert."""

    def __init__(self, count: int, expert: int) -> None:
        self.count, self.expert = count, expert

    def __call__(self, stack: Tensor) -> Tensor:
        return stack.unflatten(0, (self.count, -1))[self.expert]


class _Columns:
    """The columns of PEFT's B, (O, r · E), that belong to an expert."""

    def __init__(self, count: int, expert: int) -> None:
        self.count, self.expert = count, expert

    def __call__(self, stack: Tensor) -> Tensor:
        return stack.unflatten(1, (-1, self.count))[..., self.expert]
