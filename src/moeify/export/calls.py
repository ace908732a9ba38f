"""`Calls`: inputs of any model and its outputs, with which the outputs of exported graphs are compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeify.export.model_spec import Unsupported
from moeify.export.probe import by_definition, in_float32
from moeify.find.probe import Probe, as_probe, find_probe

Inputs = dict[str, Tensor]
_LONGER = 6
"""Tokens by which the texts of the second call are longer."""


@dataclass(frozen=True)
class Calls:
    """Two calls of a model; the second has another batch size and, of texts, another length and other padding.

    Attributes:
        inputs: arguments by name.
        outputs: logits or, without logits, the first output, in fp32.
    """

    inputs: tuple[Inputs, ...]
    outputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: nn.Module, given: Any = None) -> Calls:
        """What a model computes in fp32 for an input and for a second one of another size, without kernels.

        Args:
            model: any.
            given: a tensor, a tuple of arguments, or a dict of arguments by name; by default they are guessed.

        Raises:
            Unsupported: no guess is an input of the model.
        """
        probe = find_probe(model) if given is None else as_probe(given)
        if probe is None:
            raise Unsupported(f"no input of this {type(model).__name__} could be guessed; pass one as probe")
        first = _padded(model, _of_two(_by_name(model, probe)))
        inputs = (first, _of_another_size(first))
        with in_float32(model), by_definition(model):
            return cls(inputs, tuple(Probe(kwargs=each).run(model).cpu() for each in inputs))

    def compare(self, run: Callable[[Inputs], Tensor]) -> tuple[float, float]:
        """The largest absolute difference from another program's outputs, and how often the largest output is the same.

        Args:
            run: gives the program's output for inputs; positions of padding are not compared.
        """
        found = [
            _compare(run(inputs), output, inputs.get("attention_mask"))
            for inputs, output in zip(self.inputs, self.outputs, strict=True)
        ]
        return max(gap for gap, _ in found), sum(share for _, share in found) / len(found)

    @property
    def size(self) -> float:
        """The largest absolute output, by which differences are divided."""
        return max(output.abs().max().item() for output in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; floating-point values are exact."""
        inputs = [{name: [str(v.dtype)[6:], v.tolist()] for name, v in each.items()} for each in self.inputs]
        return {"inputs": inputs, "outputs": [output.tolist() for output in self.outputs]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calls:
        """The inverse of `to_dict`."""
        inputs = tuple(
            {name: torch.tensor(value, dtype=getattr(torch, dtype)) for name, (dtype, value) in each.items()}
            for each in values["inputs"]
        )
        return cls(inputs, tuple(torch.tensor(output) for output in values["outputs"]))


def _by_name(model: nn.Module, probe: Probe) -> Inputs:
    names = [p.name for p in inspect.signature(model.forward).parameters.values()]
    named: Mapping[str, Any] = dict(zip(names, probe.args, strict=False)) | (probe.kwargs or {})
    return {name: value.cpu() for name, value in named.items() if isinstance(value, Tensor)}


def _of_two(inputs: Inputs) -> Inputs:
    """A batch of one twice, since a trace takes a size of 1 for a constant."""
    return {name: value.repeat_interleave(2, 0) if value.shape[:1] == (1,) else value for name, value in inputs.items()}


def _padded(model: nn.Module, inputs: Inputs) -> Inputs:
    """Texts with a mask, so that the graph has an input for it; half of the last one is padding."""
    ids = inputs.get("input_ids")
    if ids is None or "attention_mask" in inputs or "attention_mask" not in inspect.signature(model.forward).parameters:
        return inputs
    mask = torch.ones_like(ids)
    mask[-1, ids.shape[1] // 2 :] = 0
    return {**inputs, "attention_mask": mask}


def _of_another_size(inputs: Inputs) -> Inputs:
    """Other values, in a larger batch; texts are longer, while features keep their length, and so does their mask."""
    generator = torch.Generator().manual_seed(1)
    features = {value.shape[:2] for value in inputs.values() if value.is_floating_point()}
    return {
        name: _drawn(name, value, 0 if value.shape[:2] in features else _LONGER, generator)
        for name, value in inputs.items()
    }


def _drawn(name: str, value: Tensor, longer: int, generator: torch.Generator) -> Tensor:
    batch = len(value) + 1
    if value.is_floating_point():
        return torch.randn(batch, *value.shape[1:], generator=generator, dtype=value.dtype)
    shape = (batch, value.shape[1] + longer, *value.shape[2:]) if value.dim() > 1 else (batch,)
    if name == "attention_mask":
        mask = torch.ones(shape, dtype=value.dtype)
        mask[0, -3:] = 0
        return mask
    return torch.randint(int(value.max()) + 1, shape, generator=generator).to(value.dtype)


def _compare(found: Tensor, expected: Tensor, mask: Tensor | None) -> tuple[float, float]:
    if found.shape != expected.shape:
        raise ValueError(f"the export gives {tuple(found.shape)} where the model gives {tuple(expected.shape)}")
    if mask is not None and expected.shape[:2] == mask.shape:
        found, expected = found[mask.bool()], expected[mask.bool()]
    gap = (found.float() - expected).abs()
    agreement = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return gap.max().item() if torch.isfinite(gap).all() else float("inf"), agreement
