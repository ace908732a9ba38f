"""What a model was called with, for the layers deep inside that a plain `forward(x)` tells nothing.

One `Context` serves one stack of layers (an encoder, a decoder, a vision tower). Pre-hooks on the modules above the
stack read the token mask and the other inputs; an FFN below sees which tokens are real.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Context:
    """The inputs of the current forward pass of one stack.

    Attributes:
        token_mask: True where a token is real, None where every token is.
        positions: the real tokens as indices into the flattened tokens, None where every token is real.
        inputs: the tensors that the outermost module was called with, by argument name.
        given: tensors that are inputs of every pass though the outermost module does not take them, see `given`.
        decisions: what routers decided in this pass for layers after theirs to read, by router.
        batch_first: whether tokens are laid out as (B, N, D); torch's own transformer layers may use (N, B, D).
    """

    def __init__(self) -> None:
        self.given: dict[str, Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.token_mask: Bool[Tensor, "B N"] | None = None
        self.positions: Int[Tensor, "T"] | None = None
        self.inputs: dict[str, Tensor] = {}
        self.decisions: dict[nn.Module, Any] = {}
        self.batch_first = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        copy = memo[id(self)] = Context()
        return copy

    def mask(self, token_mask: Tensor | None) -> None:
        """Set which tokens are real: 1 or True for a token, 0 or False for padding.

        Raises:
            ValueError: not a single token is real.
        """
        self.token_mask = self.positions = None
        if token_mask is None:
            return
        real = token_mask.bool()
        positions = real.flatten().nonzero().squeeze(1)
        if positions.numel() == 0:
            raise ValueError(
                f"the attention mask of shape {tuple(real.shape)} marks every token as padding; "
                "leave such batches out, no expert can learn from them"
            )
        if positions.numel() < real.numel():
            self.token_mask, self.positions = real, positions

    def real(self, tokens: int) -> Int[Tensor, "T"] | None:
        """The positions of the real ones among `tokens` flattened tokens, None for all of them.

        Raises:
            ValueError: the mask speaks of another number of tokens, so it belongs to another call.
        """
        if self.token_mask is not None and self.token_mask.numel() != tokens:
            raise ValueError(
                f"the token mask has {tuple(self.token_mask.shape)} = {self.token_mask.numel()} tokens, but the layer "
                f"was given {tokens}; call the layer through its model, or context.clear() before calling it alone"
            )
        return self.positions

    def sequence_ids(self, shape: Sequence[int]) -> Int[Tensor, "T"]:
        """The sequence or image of each of the flattened tokens of a layer input with leading shape `shape`.

        A flattened input is one sequence, unless the model's own input tells the length of its sequences.
        """
        if len(shape) == 1:
            shape = next((t.shape for name, t in self.inputs.items() if _fits(name, t, shape[0])), (1, *shape))
        tokens = torch.arange(math.prod(shape))
        return tokens // shape[-1] if self.batch_first else tokens % shape[-1]

    def watch(self, ancestors: Sequence[nn.Module]) -> list[RemovableHandle]:
        """Read the inputs of a stack from the modules above it, outermost first."""
        return [
            module.register_forward_pre_hook(self._read_root if i == 0 else self._read_stack, with_kwargs=True)
            for i, module in enumerate(ancestors)
        ]

    def _read_root(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.clear()
        given = _by_name(module, args, kwargs)
        self.inputs = {name: value for name, value in given.items() if isinstance(value, Tensor)} | self.given
        for name, value in self.inputs.items():
            if value.numel() == 0:
                raise ValueError(
                    f"{type(module).__name__} was called with an empty batch: {name} has shape {tuple(value.shape)}"
                )
        self._read_mask(module, given)

    def _read_stack(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = _by_name(module, args, kwargs)
        tokens = _tokens(given)
        if tokens is not None and self.token_mask is not None and _count(tokens) != self.token_mask.numel():
            self.mask(None)  # the mask above speaks of other tokens: of words, where this stack reads an image
        self._read_mask(module, given)

    def _read_mask(self, module: nn.Module, given: dict[str, Any]) -> None:
        self.batch_first = _batch_first(module)
        if "attention_mask" in given:  # (B, past + N): 1 for a token; transformers turns it into 4-D further down
            mask = given["attention_mask"]
            tokens = _tokens(given)
            if mask is None:
                self.mask(None)
            elif isinstance(mask, Tensor) and mask.dim() == 2:
                if mask.is_floating_point() and (mask < 0).any():  # added to scores: 0 for a token, -10000 for padding
                    mask = mask >= 0
                if tokens is None:
                    self.mask(mask)
                elif mask.shape[0] == tokens.shape[0] and mask.shape[1] >= tokens.shape[1]:
                    self.mask(mask[:, mask.shape[1] - tokens.shape[1] :])
        for name in _HIDING & given.keys():  # (B, N): True for padding
            hidden = given[name]
            self.mask(None if hidden is None else ~hidden.bool() if self.batch_first else ~hidden.bool().T)


@contextmanager
def given(model: nn.Module, **inputs: Tensor | Sequence[int]) -> Iterator[None]:
    """Let routers look up what the model's forward does not take: the task of a sequence, its cluster, a modality.

        with given(model, task=[2, 0]):
            model.generate(prompts)

    Args:
        model: it, or a model around it, is called inside.
        inputs: one number per token, (B, N), or per sequence, (B,); with beams, per beam.

    Raises:
        ValueError: the model has no sparse layer of ours that could look at them.
    """
    contexts = {id(c): c for module in model.modules() if isinstance(c := getattr(module, "context", None), Context)}
    if not contexts:
        raise ValueError(
            f"{type(model).__name__} has no sparse layer of moeify, so nothing in it can look up {', '.join(inputs)}"
        )
    device = next((parameter.device for parameter in model.parameters()), None)
    tensors = {name: torch.as_tensor(value, device=device) for name, value in inputs.items()}
    before = [(context, context.given) for context in contexts.values()]
    try:
        for context, outer in before:
            context.given = outer | tensors
        yield
    finally:
        for context, outer in before:
            context.given = outer


_HIDING = {"src_key_padding_mask", "tgt_key_padding_mask"}
_TOKENS = ("input_ids", "inputs_embeds", "hidden_states")


def _fits(name: str, tensor: Tensor, tokens: int) -> bool:
    return name in _TOKENS and tensor.shape[:2].numel() == tokens


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _tokens(given: dict[str, Any]) -> Tensor | None:
    return next((given[name] for name in _TOKENS if isinstance(given.get(name), Tensor)), None)


def _count(tokens: Tensor) -> int:
    """The number of tokens among ids (B, N) or states (..., D)."""
    return tokens.shape[:-1].numel() if tokens.is_floating_point() else tokens.numel()


def _by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; a mask that was not given counts as given with None."""
    names = _parameters(module)
    return (
        {name: None for name in names if name == "attention_mask" or name in _HIDING}
        | dict(zip(names, args, strict=False))
        | kwargs
    )


def _batch_first(module: nn.Module) -> bool:
    return all(part.batch_first for part in module.modules() if isinstance(part, nn.MultiheadAttention))


def recomputing() -> bool:
    """Whether the code runs inside a backward pass, as it does when activation checkpointing repeats a forward."""
    return torch._C._current_graph_task_id() != -1
