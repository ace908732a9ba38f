"""The context of a sparse layer: padding mask, documents and model inputs, which its `forward(x)` does not receive.

One `Context` serves one stack of layers (an encoder, a decoder, a vision tower). Pre-hooks on the modules above the
stack read the token mask and the other inputs; an FFN below sees which tokens are real, and which belong together.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeify import masks
from moeify.documents import Packing
from moeify.forward_pass import TOKENS, Call


class Context:
    """Gives the layers of one stack access to the current forward pass; each thread has its own.

    A forward pass that activation checkpointing repeats in backward gets the pass that it repeats by `resumed`,
    which `moeify.train.keep_decisions` calls; without it the latest pass is used, if it is the only candidate.

    Args:
        batch_first: whether the stack lays tokens out as (B, N, D); by default that of torch's attention modules in it.
        routes_padding: treat every token as real, for a model that reads the layers' outputs at padding.
    """

    def __init__(self, batch_first: bool | None = None, *, routes_padding: bool = False) -> None:
        self.batch_first = batch_first
        self.routes_padding = routes_padding
        self._thread = threading.local()
        self._unrepeated: list[Call] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Context:
        copy = memo[id(self)] = Context(self.batch_first, routes_padding=self.routes_padding)
        return copy

    def __reduce__(self) -> tuple[Callable[..., Context], tuple[()], dict[str, Any]]:
        return Context, (), {"batch_first": self.batch_first, "routes_padding": self.routes_padding}

    @property
    def extra_inputs(self) -> dict[str, Tensor]:
        """Tensors that are inputs of every pass of this thread although the outermost module does not take them."""
        return getattr(self._thread, "extra_inputs", {})

    @extra_inputs.setter
    def extra_inputs(self, inputs: dict[str, Tensor]) -> None:
        self._thread.extra_inputs = inputs

    @property
    def call(self) -> Call:
        """The current forward pass of this thread; outside of one, that of `mask`, for layers called alone.

        Raises:
            RuntimeError: activation checkpointing repeats one of several passes, and it is unknown which.
        """
        if (call := self._running()) is not None:
            return call
        if self._unrepeated and recomputing():
            return self._repeated()
        if getattr(self._thread, "alone", None) is None:
            self._thread.alone = Call()
        return self._thread.alone

    def _running(self) -> Call | None:
        """The pass that this thread is in; those that an interrupt ended are left first."""
        call = getattr(self._thread, "call", None)
        while call is not None and call.was_interrupted:
            self._leave(call, failed=True)
            call = call.outer
        return call

    def _leave(self, call: Call, *, failed: bool) -> None:
        self._thread.call = call.outer
        call.layer_mask, call.frame = False, None
        _RUNNING.passes = [each for each in _RUNNING.passes if each[1] is not call]
        if failed:  # no backward pass will repeat it
            self._unrepeated = [each for each in self._unrepeated if each is not call]

    def _repeated(self) -> Call:
        """The pass that is repeated: the latest, unless another one that differs waits for its backward pass too."""
        earlier, latest = self._unrepeated[:-1], self._unrepeated[-1]
        if any(not _same_mask(latest, other) for other in earlier):
            raise RuntimeError(_WHICH_PASS)
        latest.repeated = True
        return latest

    def look_up(self, name: str) -> Tensor | None:
        """An input of the model by the name of its argument, None if the model was called without it.

        Raises:
            RuntimeError: as of `call`.
        """
        call = self.call
        if call.repeated and len(self._unrepeated) > 1:
            raise RuntimeError(_WHICH_PASS)
        return call.inputs.get(name)

    def clear(self) -> None:
        """Remove the mask that was set for layers called alone."""
        self._thread.alone = Call()

    @contextmanager
    def resumed(self, call: Call) -> Iterator[None]:
        """Give layers an earlier forward pass again, to repeat it or to call one of them alone."""
        before = getattr(self._thread, "call", None)
        self._thread.call = call
        try:
            yield
        finally:
            self._thread.call = before

    def mask(self, token_mask: Tensor | None) -> None:
        """Set which tokens are real, see `Call.mask`."""
        self.call.mask(None if self.routes_padding else token_mask)

    def real(self, shape: int | Sequence[int]) -> Int[Tensor, "T"] | None:
        """The positions of the real ones among flattened tokens, None for all of them, see `Call.real`."""
        return self.call.real(shape)

    def sequence_ids(self, shape: Sequence[int]) -> Int[Tensor, "T"]:
        """The sequence, document or image of each of the flattened tokens, see `Call.sequence_ids`."""
        return self.call.sequence_ids(shape)

    def documents(self, shape: Sequence[int]) -> Int[Tensor, "T"] | None:
        """The document of each of the flattened tokens, None if no input describes documents, see `Call.documents`."""
        return self.call.documents(shape)

    def watch(self, ancestors: Sequence[nn.Module], layers: Sequence[nn.Module] = ()) -> list[RemovableHandle]:
        """Read the inputs of a stack from the modules above it, outermost first, and the masks of its layers.

        Args:
            ancestors: from the model down to the module that holds the stack.
            layers: of the stack, those around sparse layers.
        """
        if self.batch_first is None:
            self.batch_first = _batch_first(ancestors[-1])
        root, *others = [module for module in ancestors if not isinstance(module, nn.ModuleList | nn.ModuleDict)]
        handles = [root.register_forward_pre_hook(partial(self._begin, innermost=not others), with_kwargs=True)]
        for module in others:
            hook = partial(self._read_stack, innermost=module is others[-1])
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            handles.append(module.register_forward_hook(self._end, always_call=True))
        for layer in () if self.routes_padding else layers:
            if found := masks.places(layer):
                hook = partial(self._read_layer, places=found)
                handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
                handles.append(layer.register_forward_hook(self._leave_layer, always_call=True))
        return [*handles, root.register_forward_hook(self._end, always_call=True)]

    def _begin(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], *, innermost: bool, depth: int = 1
    ) -> None:
        given = _by_name(module, args, kwargs)
        inputs = {name: value for name, value in given.items() if isinstance(value, Tensor)} | self.extra_inputs
        for name, value in inputs.items():
            if value.numel() == 0:
                raise ValueError(
                    f"{type(module).__name__} was called with an empty batch: {name} has shape {tuple(value.shape)}"
                )
        batch_first = self.batch_first is not False
        frame = None if torch.compiler.is_compiling() else sys._getframe(depth)
        call = Call(inputs=inputs, batch_first=batch_first, outer=self._running(), begun_by=module, frame=frame)
        if torch.is_grad_enabled():
            waiting = [] if any(earlier.repeated for earlier in self._unrepeated) else self._unrepeated[-1:]
            self._unrepeated = [*waiting, call]
        call.rows = _shape(_tokens(given))
        call.packing = Packing.of(given | self.extra_inputs, call.rows, of_stack=innermost)
        self._thread.call = call
        _RUNNING.passes = [*getattr(_RUNNING, "passes", []), (self, call)]
        self._read_mask(module, given)
        call.of_stack = innermost

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        ended = self._running()
        if ended is not None and ended.begun_by is module:
            self._leave(ended, failed=output is None)

    def _read_stack(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], *, innermost: bool) -> None:
        if self._running() is None and not recomputing():  # called by itself: a pass of its own
            self._begin(module, args, kwargs, innermost=innermost, depth=2)
            return
        given = _by_name(module, args, kwargs)
        tokens = _tokens(given)
        call = self.call
        if tokens is not None and call.token_mask is not None and _count(tokens) != call.token_mask.numel():
            self.mask(None)  # the mask above is for other tokens, such as words where this stack reads an image
        call.rows = _shape(tokens) or call.rows
        call.packing = Packing.of(given, _shape(tokens), above=call.packing, of_stack=innermost)
        self._read_mask(module, given)
        call.of_stack = (
            innermost and isinstance(given.get("attention_mask"), Tensor) and given["attention_mask"].dim() == 2
        )

    def _read_layer(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], *, places: list[tuple[str, int | None]]
    ) -> None:
        self.call.layer_mask = masks.given_mask(places, args, kwargs)

    def _leave_layer(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Remove the mask of a layer that was called by itself."""
        if self._running() is None and not recomputing():
            self.call.layer_mask = False

    def _read_mask(self, module: nn.Module, given: dict[str, Any]) -> None:
        call = self.call
        if "attention_mask" in given:  # (B, past + N): 1 for a token; transformers turns it into 4-D further down
            mask, tokens = given["attention_mask"], _tokens(given)
            if mask is None and (labels := self._labels_of_decoder(module, given)) is not None:
                self._read_tokens(masks.of_labels(labels))
                call.from_labels = True
            elif mask is None:
                self.mask(None)
                call.unpadded = None if tokens is None else _count(tokens)
            elif isinstance(mask, Tensor) and mask.dim() == 2:
                if tokens is None:
                    self._read_tokens(mask)
                elif mask.shape[0] == tokens.shape[0] and mask.shape[1] >= tokens.shape[1]:
                    self._read_tokens(mask[:, mask.shape[1] - tokens.shape[1] :])
        for name in masks.HIDING & given.keys():  # (B, N): True for padding
            hidden = given[name]
            if hidden is None:
                self.mask(None)
            else:
                self._read_tokens(~hidden.bool())

    def _labels_of_decoder(self, module: nn.Module, given: dict[str, Any]) -> Int[Tensor, "B N"] | None:
        """The labels of a model whose encoder the module reads, one for each of its tokens; else None."""
        labels = self.call.inputs.get("labels")
        if labels is None or labels.is_floating_point() or labels.shape != _shape(_tokens(given)):
            return None
        reads = isinstance(given.get(_OF_ENCODER), Tensor) and _OF_ENCODER not in self.call.inputs
        config = getattr(module, "config", None)
        decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
        return labels if reads and decodes else None

    def _read_tokens(self, mask: Bool[Tensor, "B N"]) -> None:
        """Take a mask of the model, sequences first, for that of the layers, in their layout."""
        call = self.call
        call.from_labels = False
        real = masks.real_tokens(mask)
        self.mask(real if call.batch_first else real.T)
        call.unpadded = mask.numel() if call.token_mask is None else None


def is_hook_of_context(hook: Callable[..., Any]) -> bool:
    """Whether a hook on a module is one with which a context reads what the module is called with."""
    function = hook.func if isinstance(hook, partial) else hook
    return isinstance(getattr(function, "__self__", None), Context)


_RUNNING = threading.local()


def running() -> list[tuple[Context, Call]]:
    """The forward passes that this thread is in, of every stack, to be `resumed` where they are repeated."""
    for context, _ in getattr(_RUNNING, "passes", []):
        context._running()
    return list(getattr(_RUNNING, "passes", []))


@contextmanager
def extra_inputs(model: nn.Module, **inputs: Tensor | Sequence[int]) -> Iterator[None]:
    """Give routers inputs that the model's forward does not take: the task of a sequence, its cluster, a modality.

        with extra_inputs(model, task=[2, 0]):
            model.generate(prompts)

    Args:
        model: the model that is called inside, alone or in a wrapper.
        inputs: one number per token, (B, N), or per sequence, (B,); with beams, per beam.

    Raises:
        ValueError: the model has no sparse layer of moeify that could look them up.
    """
    contexts = {id(c): c for module in model.modules() if isinstance(c := getattr(module, "context", None), Context)}
    if not contexts:
        raise ValueError(
            f"{type(model).__name__} has no sparse layer of moeify, so nothing in it can look up {', '.join(inputs)}"
        )
    device = next((parameter.device for parameter in model.parameters()), None)
    tensors = {name: torch.as_tensor(value, device=device) for name, value in inputs.items()}
    before = [(context, context.extra_inputs) for context in contexts.values()]
    try:
        for context, outer in before:
            context.extra_inputs = outer | tensors
        yield
    finally:
        for context, outer in before:
            context.extra_inputs = outer


_OF_ENCODER = "encoder_hidden_states"

_WHICH_PASS = (
    "activation checkpointing repeats a forward pass, and the model was called several times, with different masks or "
    "inputs, before this backward pass; let each checkpoint keep its own: "
    'model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": moeify.train.keep_decisions})'
)


def _same_mask(one: Call, other: Call) -> bool:
    a, b = one.token_mask, other.token_mask
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _tokens(given: dict[str, Any]) -> Tensor | None:
    return next((given[name] for name in TOKENS if isinstance(given.get(name), Tensor)), None)


def _count(tokens: Tensor) -> int:
    """The number of tokens among ids (B, N) or states (..., D)."""
    return tokens.shape[:-1].numel() if tokens.is_floating_point() else tokens.numel()


def _shape(tokens: Tensor | None) -> tuple[int, int] | None:
    """(B, N) of ids (B, N) or of states (B, N, D) or (T, D), None for others."""
    if tokens is None:
        return None
    shape = tuple(tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape)
    return (shape[-2] if len(shape) > 1 else 1, shape[-1]) if 0 < len(shape) < 3 else None


def _by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; a mask that was not given counts as given with None."""
    names = _parameters(module)
    return (
        {name: None for name in names if name == "attention_mask" or name in masks.HIDING}
        | dict(zip(names, args, strict=False))
        | kwargs
    )


def _batch_first(module: nn.Module) -> bool:
    return all(part.batch_first for part in module.modules() if isinstance(part, nn.MultiheadAttention))


def recomputing() -> bool:
    """Whether the code runs inside a backward pass, as it does when activation checkpointing repeats a forward."""
    return torch._C._current_graph_task_id() != -1
