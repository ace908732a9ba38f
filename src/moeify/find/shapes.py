"""Recognise feed-forward networks in each of the forms in which models define them.

- in a module of its own (Llama, T5, GPT-2, ViT, CLIP);
- split over two neighbouring modules, the second of which may add dropout, norm and residual (BERT);
- as loose parts that a layer calls inline (OPT, BART, Whisper, torch's own transformer layers);
- as neighbours in a `nn.Sequential`, or a longer tower of linear layers there (recommenders).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from moeify.find.dense import (
    DenseFFN,
    accepts,
    activations,
    closest,
    dropouts,
    held_activations,
    is_linear,
    is_quantized,
    matrix,
    output_error,
    parameters_of,
    read,
    widths,
)
from moeify.kernels.stacked import Plain
from moeify.stacks import layer_of, stack_of


@dataclass(frozen=True)
class Site:
    """A place in a model where a sparse layer can be inserted.

    Attributes:
        name: the name of the module that the sparse layer replaces.
        dense: the module to be replaced: a `DenseFFN`, or any module from (..., D) to (..., O).
        place: the module and attribute that the sparse layer is put into.
        after: dropout that follows in the replaced module.
        disabled: attributes of the model that must do nothing once the layer is there, with their harmless values.
        known_width: D, where it is known without trying.
        sequence_first: whether tokens are laid out as (N, B, D); None where no probe has shown it.
        routes_padding: whether padding is routed too, since the model reads its outputs.
        keyword: the name by which the model passes the tokens, None if by position.
        heads: h, the sub-tokens in which a sparse layer reads every token (MH-MoE).
    """

    name: str
    dense: nn.Module
    place: tuple[nn.Module, str]
    after: float = 0.0
    disabled: tuple[tuple[nn.Module, str, Any], ...] = ()
    known_width: int | None = None
    sequence_first: bool | None = None
    routes_padding: bool = False
    keyword: str | None = None
    heads: int = 1

    @property
    def layer(self) -> str:
        """The numbered layer that the site is in, see `moeify.stacks.layer_of`."""
        return layer_of(self.name)

    @property
    def stack(self) -> str:
        """The stack of layers that the site is in: the name of what holds its numbered layer."""
        return stack_of(self.name)

    @property
    def width(self) -> int:
        """D.

        Raises:
            ValueError: a module that does not take rows alone, and so cannot be an expert.
        """
        if self.known_width is not None:
            return self.known_width
        if isinstance(self.dense, DenseFFN):
            return self.dense.width
        if is_linear(self.dense) or is_quantized(self.dense):
            return widths(self.dense)[1]
        tried = dict.fromkeys(width for _, width in self._widths)
        for width in tried:
            if accepts(self.dense, width):
                return width
        raise ValueError(
            f"{self.name} ({type(self.dense).__name__}) cannot be an expert: it does not take a tensor of rows (R, D) "
            f"alone, tried with D = {', '.join(map(str, tried))}; leave it out of where=..."
        )

    @property
    def keeps_width(self) -> bool:
        """Whether O is D."""
        return self._widths[-1][0] == self.width

    @property
    def _widths(self) -> list[tuple[int, int]]:
        return [widths(part) for part in self.dense.modules() if is_linear(part)]

    @property
    def training(self) -> bool:
        """The training mode of the module in the place."""
        return getattr(*self.place).training

    def install(self, module: nn.Module) -> Callable[[], None]:
        """Put a module into the place, and return a function that restores the old one."""
        if self.after:
            module = nn.Sequential(module, nn.Dropout(self.after)).train(self.training)
        undo = [_swap(*self.place, module)] + [_swap(*change) for change in self.disabled]
        if self.keyword is not None:
            hook = partial(_by_position, self.keyword)
            undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return lambda: [restore() for restore in reversed(undo)].clear()


def _by_position(keyword: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pass the tokens by position, under any keyword."""
    others = {name: value for name, value in kwargs.items() if name != keyword}
    return ((*args, kwargs[keyword]) if keyword in kwargs else args), others


def _swap(owner: nn.Module, name: str, new: Any) -> Callable[[], None]:
    old = getattr(owner, name)
    setattr(owner, name, new)
    return lambda: setattr(owner, name, old)


def pass_through(x: Tensor) -> Tensor:
    """The identity, in the place of a disabled activation function."""
    return x


def disable(owner: nn.Module, name: str) -> tuple[nn.Module, str, Any]:
    """An attribute that is called, with the value that passes its input through."""
    old = getattr(owner, name)
    return owner, name, nn.Identity().train(old.training) if isinstance(old, nn.Module) else pass_through


def recognise(model: nn.Module) -> tuple[list[Site], list[str]]:
    """Every feed-forward network of a model, and the modules that have the parts of one but compute something else."""
    sites: list[Site] = []
    rejected: list[str] = []
    for name, module in model.named_modules():
        if any(name == site.name or name.startswith(f"{site.name}.") for site in sites):
            continue
        found = [*_loose(model, name, module), *_split(name, module)] or _sequential(model, name, module)
        has_parts = not found and bool(name) and _has_parts(module)
        if has_parts:
            found = _own(model, name, module) or _inline(model, name, module)
        if has_parts or found:
            rejected = [other for other in rejected if not name.startswith(f"{other}.")]
        sites += found
        if has_parts and not found:
            rejected.append(name)
    return sites, rejected


def whole(model: nn.Module, name: str, dense: nn.Module | None = None, after: float = 0.0) -> Site:
    """The site of a whole module."""
    parent, _, child = name.rpartition(".")
    dense = model.get_submodule(name) if dense is None else dense
    return Site(name, dense, (model.get_submodule(parent), child), after)


def _has_parts(module: nn.Module) -> bool:
    """Whether a module holds the linear maps of one feed-forward network, and no other parameters."""
    linears = [part for part in module.modules() if is_linear(part)]
    owned = {id(parameter) for part in linears for parameter in part.parameters()}
    owned |= {id(parameter) for _, act in held_activations(module) for parameter in parameters_of(act)}
    if isinstance(module, _CONTAINERS) or any(id(parameter) not in owned for parameter in module.parameters()):
        return False
    if len(linears) > 3 and list(held_activations(module)):
        linears = list(_direct_linears(module).values())  # the others may adapt these
    return 2 <= len(linears) <= 3 and any(
        {shape[1] for shape in ups} == {down[0]} and sum(shape[0] for shape in ups) in (down[1], 2 * down[1])
        for *ups, down in itertools.permutations([matrix(linear).shape for linear in linears])
    )


def _own(model: nn.Module, name: str, module: nn.Module) -> list[Site]:
    linears = [part for part in module.modules() if is_linear(part)]
    dense = read(module, linears) if len(linears) <= 3 else None
    if dense is None:
        return []
    dense.dropout.p, after = dropouts(module, dense)
    return [whole(model, name, dense, after)]


def _split(name: str, module: nn.Module) -> list[Site]:
    """Each pair of neighbours of which the first holds an up projection and its activation, the second a down one."""
    found: list[Site] = []
    taken = None
    for (first_name, _), (second_name, second) in itertools.pairwise(module.named_children()):
        if first_name != taken and (site := _pair(name, module, first_name, second)) is not None:
            found.append(site)
            taken = second_name
    return found


def _pair(name: str, module: nn.Module, first_name: str, second: nn.Module) -> Site | None:
    first = module.get_submodule(first_name)
    ups, downs = _direct_linears(first), _direct_linears(second)
    drops = [part.p for part in first.modules() if isinstance(part, nn.Dropout)]
    if len(ups) != 1 or len(downs) != 1 or len(list(first.modules())) > 3 + len(drops):
        return None
    (up,), ((down_name, down),) = ups.values(), downs.items()
    if matrix(up).shape != matrix(down).shape[::-1]:
        return None
    acts = activations(first)
    if up.get_parameter("weight").is_meta:
        act = acts[0]
    else:
        act = closest(acts, lambda act: output_error(first, _Composed(up, act), matrix(up).shape[1]))
    if act is None:
        return None
    dense = DenseFFN([up], down, Plain(act), max(drops, default=0.0))
    disabled = (second, down_name, nn.Identity())
    return Site(f"{name}.{first_name}".lstrip("."), dense, (module, first_name), disabled=(disabled,))


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class _Composed(nn.Module):
    def __init__(self, up: nn.Module, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.act = up, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.up(x))


def _loose(model: nn.Module, name: str, module: nn.Module) -> list[Site]:
    return [] if _has_parts(module) else _inline(model, name, module)


def _inline(model: nn.Module, name: str, module: nn.Module) -> list[Site]:
    linears = _direct_linears(module)
    acts = list(held_activations(module))
    if len(linears) != 2 or not acts or isinstance(module, nn.Sequential):
        return []
    (up_name, up), (down_name, down) = linears.items()
    if matrix(up).shape != matrix(down).shape[::-1]:
        return []
    act_name, act = acts[0]
    disabled = [disable(module, act_name), disable(module, down_name)]
    dropout = 0.0
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        dropout = module.dropout.p
        disabled += [disable(module, "dropout"), *fast_paths(model, module)]
    elif isinstance(probability := getattr(module, "activation_dropout", None), float):
        dropout = probability
        disabled.append((module, "activation_dropout", 0.0))
    dense = DenseFFN([up], down, Plain(act), dropout)
    return [Site(f"{name}.{up_name}".lstrip("."), dense, (module, up_name), disabled=tuple(disabled))]


def fast_paths(model: nn.Module, layer: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Switches of torch's own transformer that would compute the FFN from the weights it expects to find."""
    if isinstance(layer, nn.TransformerEncoderLayer):
        yield layer, "activation_relu_or_gelu", 0
        for encoder in model.modules():
            if isinstance(encoder, nn.TransformerEncoder) and layer in list(encoder.layers):
                yield encoder, "use_nested_tensor", False


def _sequential(model: nn.Module, name: str, module: nn.Module) -> list[Site]:
    if not isinstance(module, nn.Sequential):
        return []
    linears = [i for i, part in enumerate(module) if is_linear(part)]
    if len(linears) == 2:
        first, last = linears
        between = nn.Sequential(*[module[i] for i in range(first + 1, last)])
        acts = [act for _, act in held_activations(between)]
        drops = [part.p for part in between if isinstance(part, nn.Dropout)]
        if len(acts) == 1 and len(acts) + len(drops) == len(between):
            dense = DenseFFN([module[first]], module[last], Plain(acts[0]), max(drops, default=0.0))
            disabled = tuple(disable(module, str(i)) for i in range(first + 1, last + 1))
            return [Site(f"{name}.{first}".lstrip("."), dense, (module, str(first)), disabled=disabled)]
    return _tower(name, module)


def _tower(name: str, module: nn.Sequential) -> list[Site]:
    """Linear layers with anything between them that reads one row at a time, from the first weights to the last.

    Without an activation they are one linear map, such as a low-rank adapter, and no network.
    """
    maps = [i for i, part in enumerate(module) if is_linear(part)]
    acts = [act for _, act in held_activations(module)]
    learning = (part for part in module if list(part.parameters()) and part not in acts)
    if len(maps) < 2 or not acts or not all(is_linear(part) or isinstance(part, _ROW_NORMS) for part in learning):
        return []
    first = next(i for i, part in enumerate(module) if list(part.parameters()))
    disabled = tuple(disable(module, str(i)) for i in range(first + 1, maps[-1] + 1))
    dense = nn.Sequential(*list(module)[first : maps[-1] + 1])
    return [Site(f"{name}.{first}".lstrip("."), dense, (module, str(first)), disabled=disabled)]


_ROW_NORMS = (nn.LayerNorm, nn.RMSNorm)  # statistics of a batch would change with the rows that an expert is given


def _direct_linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in module.named_children() if is_linear(part)}
