"""An input that a model accepts, to compare what it computes before and after a change."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from moeify.context import extra_inputs
from moeify.find.dense import is_linear, matrix
from moeify.modes import fixed_randomness, in_evaluation
from moeify.routers.lookup import columns
from moeify.snapshot import Snapshot


@dataclass(frozen=True)
class Probe:
    """Arguments of one call of a model."""

    args: tuple = ()
    kwargs: dict[str, Any] | None = None

    def run(self, model: nn.Module) -> Tensor:
        """The model's main output in evaluation, in fp32; models that draw random numbers draw the same every time.

        Routers that look up what the probe does not tell, a task, look up 0. Whatever else the call changes of the
        model is as it was afterwards.
        """
        return _main(self._output(model)).float()

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Every floating-point tensor among the model's outputs, as of `run`."""
        output = self._output(model)
        values = [output] if isinstance(output, Tensor) else output.values() if isinstance(output, dict) else output
        return [value.float() for value in values if isinstance(value, Tensor) and value.is_floating_point()]

    @torch.no_grad()
    def _output(self, model: nn.Module) -> Any:
        with restored(model), in_evaluation(model), fixed_randomness(model), self._untold(model):
            return model(*self.args, **(self.kwargs or {}))

    @property
    def batch(self) -> int | None:
        """The number of sequences or images, None if only positions and not names say what they are."""
        return next((len(value) for value in (self.kwargs or {}).values() if isinstance(value, Tensor)), None)

    def padded(self, padding: int) -> tuple[Probe, Bool[Tensor, "B N"]] | None:
        """The same texts, the last of them from its middle on nothing but padding, and which tokens are real.

        Args:
            padding: the id of a padding token.
        """
        ids = (self.kwargs or {}).get("input_ids")
        if ids is None or ids.dim() != 2 or len(ids) < 2 or ids.shape[1] < 2:
            return None
        real = torch.ones_like(ids, dtype=torch.bool)
        real[-1, ids.shape[1] // 2 :] = False
        ids = ids.masked_fill(~real, padding)
        return Probe(kwargs={**(self.kwargs or {}), "input_ids": ids, "attention_mask": real.long()}), real

    def _untold(self, model: nn.Module) -> AbstractContextManager[None]:
        names = columns(model) - (self.kwargs or {}).keys()
        if not names:
            return nullcontext()
        first = next(value for value in (*self.args, *(self.kwargs or {}).values()) if isinstance(value, Tensor))
        return extra_inputs(model, **dict.fromkeys(names, torch.zeros(len(first), dtype=torch.int64)))


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Every attribute, submodule and buffer of a model as it was: some switch for good what a first call shows them."""
    before = Snapshot(model)
    try:
        yield
    finally:
        before.restore()


def as_probe(given: Any) -> Probe:
    """A probe from what a user passed: a tensor, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(given, dict):
        return Probe(kwargs=given)
    return Probe(args=given if isinstance(given, tuple) else (given,))


def find_probe(model: nn.Module) -> Probe | None:
    """A random input that the model accepts, None if every guess fails (or the model has no values, on meta)."""
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.is_meta:
        return None
    for probe in _guesses(model):
        probe = Probe(_moved(probe.args, parameter), _moved(probe.kwargs or {}, parameter))
        try:
            if torch.isfinite(probe.run(model)).all():
                return probe
        except Exception:  # a guess that the model does not accept, whatever it raises
            continue
    return None


def _moved(inputs: Any, like: Tensor) -> Any:
    if isinstance(inputs, dict):
        return {name: _moved(value, like) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_moved(value, like) for value in inputs)
    return inputs.to(like.device, like.dtype if inputs.is_floating_point() else None)


def _guesses(model: nn.Module) -> Iterator[Probe]:
    config = getattr(model, "config", None)
    if config is not None:
        inputs = dict(_named_inputs(model, config))
        yield Probe(kwargs=inputs)
        for name in inputs:
            yield Probe(kwargs={name: inputs[name]})
    given = inspect.signature(model.forward).parameters.values()
    required = [p for p in given if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    sizes = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)]
    for shape in ((2, 8), (8,)) if sizes else ():
        yield Probe((torch.randint(min(sizes), shape),) * len(required))
    channels = next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), 0)
    for size in (32, 64, 224) if channels else ():
        yield Probe((torch.randn(2, channels, size, size),) * len(required))
    widths = [part.embed_dim for part in model.modules() if isinstance(part, nn.MultiheadAttention)]
    widths += [matrix(part).shape[1] for part in model.modules() if is_linear(part)]
    for width in dict.fromkeys(widths):
        yield Probe((torch.randn(2, 5, width),) * len(required))
        yield Probe((torch.randn(4, width),) * len(required))


def _named_inputs(model: nn.Module, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Random values for the arguments that models of transformers commonly take."""
    accepted = inspect.signature(model.forward).parameters
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    tokens = torch.randint(5, max(6, getattr(text, "vocab_size", None) or 6), (2, 11))
    if "input_ids" in accepted:
        yield "input_ids", tokens
    if "decoder_input_ids" in accepted:
        yield "decoder_input_ids", tokens[:, :6]
    if "pixel_values" in accepted:
        size = getattr(vision, "image_size", None) or 64
        height, width = size if isinstance(size, tuple | list) else (size, size)
        frames = [frames] if (frames := getattr(vision, "num_frames", None)) else []
        yield "pixel_values", torch.randn(2, *frames, getattr(vision, "num_channels", 3), height, width)
    if "input_values" in accepted:
        yield "input_values", torch.randn(2, 4000)
    if "input_features" in accepted and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        yield "input_features", torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)


def _main(output: Any) -> Tensor:
    """Logits or, failing these, the first floating-point tensor of an output."""
    if isinstance(output, Tensor):
        return output
    if getattr(output, "logits", None) is not None:
        return output.logits
    values = output.values() if isinstance(output, dict) else output
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())
