"""Capture the trace of a model: run it over batches and keep which experts every token was sent to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moeify.inspect.decided import decided
from moeify.inspect.generation import generated, until_the_end
from moeify.inspect.join import Part, concatenate, join
from moeify.inspect.token_tables import TokenTables
from moeify.inspect.trace import LayerTrace, Trace
from moeify.layers import SparseLayer, sparse_layers, watch_inputs
from moeify.modes import in_evaluation
from moeify.notices import notify
from moeify.progress import Progress
from moeify.routing import Routing

SCORES = 2**30
"""Default limit of the bytes of scores and logits in a trace."""


@torch.no_grad()
def capture(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    tokens: int | None = None,
    generate: int = 0,
    scores: bool = True,
    logits: bool = False,
    most_bytes: int = SCORES,
    tokenizer: Any = None,
) -> Trace:
    """Run a model in evaluation over batches, and collect the decisions of its sparse layers without padding.

    Args:
        model: a model with sparse layers of moeify or of transformers.
        batches: each a mapping of the model's inputs by name, a tensor, or a tuple of arguments. The entry `domain`, a
            name or one for every row, is kept and not given to the model.
        tokens: stop after the batch in which a layer has received this many tokens.
        generate: after every batch, generate greedily until the model has read this many generated tokens; their phase
            is `DECODE`, one step each, up to the end of their sequence.
        scores: keep the scores of all experts, in half precision.
        logits: keep their logits, in half precision.
        most_bytes: if scores and logits take more after a batch, the trace has none, and a line is printed.
        tokenizer: converts the ids that occur to text.

    Raises:
        ValueError: the model has no sparse layer; no batch; domains that do not fit their batch.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no sparse layer to trace; make it sparse with moeify.sparsify, or pass a "
            "mixture-of-experts model of transformers"
        )
    recorder = _Recorder(model, layers, {"scores": scores, "logits": logits}, most_bytes)
    wanted = tokens or (len(batches) if isinstance(batches, Sized) else 0)
    progress, traces, seen = Progress("trace", max(wanted, 1)), [], 0
    with in_evaluation(model), recorder:
        for number, batch in enumerate(batches, 1):
            traces.append(recorder.run(batch, generate))
            seen += max(len(table) for table in traces[-1].tables)
            if wanted:
                progress.at(seen if tokens else number)
            if tokens is not None and seen >= tokens:
                break
    if not traces:
        raise ValueError("there is no batch to trace; give at least one")
    if recorder.is_full:
        traces = [trace.without("scores", "logits") for trace in traces]
    return replace(_with_texts(concatenate(traces), tokenizer), header={"model": type(model).__name__})


def _with_texts(trace: Trace, tokenizer: Any) -> Trace:
    """The trace with the text of every id that occurs in it."""
    if tokenizer is None:
        return trace
    tables = {}
    for table in trace.tables:
        numbers = [] if table.ids is None else table.ids.unique().tolist()
        tables[id(table)] = replace(table, vocabulary={i: _text(tokenizer, i) for i in numbers if i >= 0})
    layers = {layer.name: replace(layer, tokens=tables[id(layer.tokens)]) for layer in trace}
    return replace(trace, layers=layers)


def _text(tokenizer: Any, number: int) -> str:
    """The text of an id, with the space in front that SentencePiece marks by ▁ and leaves out of a single token."""
    text = str(tokenizer.decode([number]))
    token = str(tokenizer.convert_ids_to_tokens(number)) if hasattr(tokenizer, "convert_ids_to_tokens") else ""
    return f" {text}" if token.startswith("▁") and not text.startswith(" ") else text


class _Recorder:
    """Runs a model and makes a trace of every batch."""

    def __init__(self, model: nn.Module, layers: dict[str, SparseLayer], wanted: Mapping[str, bool], most: int) -> None:
        self.model, self.layers, self.wanted, self.most = model, layers, dict(wanted), most
        self.tables = TokenTables(model, layers)
        self.parts: dict[str, list[Part]] = {}
        self.bytes = 0
        self.is_full = False
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._watching = ExitStack()

    def __enter__(self) -> _Recorder:
        handles = [*watch_inputs(self.model, self.layers), *self.tables.watch()]
        for name, layer in self.layers.items():
            handles += layer.observe(partial(self._see, name))
        for handle in handles:
            self._watching.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._watching.close()

    def run(self, batch: Any, generate: int) -> Trace:
        """The trace of a batch."""
        args, inputs = _inputs(batch)
        self.parts = {}
        self.tables.begin(inputs.pop("domain", None))
        args = [_moved(value, self.device) for value in args]
        inputs = {name: _moved(value, self.device) for name, value in inputs.items()}
        if generate:
            written = generated(self.model, args, inputs, generate)
            trace = until_the_end(Trace(layers=join(self.parts)), self.model, written, self.tables.step)
        else:
            self.model(*args, **inputs)
            trace = Trace(layers=join(self.parts))
        self.bytes += sum(v.nbytes for layer in trace for v in (layer.scores, layer.logits) if v is not None)
        if self.bytes > self.most:
            self._leave_out()
        return trace

    def _leave_out(self) -> None:
        notify(f"trace: scores and logits take more than {self.most / 2**20:,.0f} MiB, so the trace has none")
        self.is_full, self.wanted, self.bytes = True, {"scores": False, "logits": False}, 0

    def _see(self, name: str, routing: Routing) -> None:
        seen = self.tables.of(name, routing)
        found = decided(routing, seen.positions, seen.sequence, **self.wanted)
        columns = {column: values.cpu() for column, values in vars(found).items() if values is not None}
        for column in {"scores", "logits"} & columns.keys():
            columns[column] = _half(columns[column])
        layer = LayerTrace(name=name, num_experts=len(routing.counts), tokens=seen.tokens, **columns)
        self.parts.setdefault(name, []).append((layer, {}))


def _half(values: Tensor) -> Tensor:
    """In half precision, clamped to its largest number."""
    most = torch.finfo(torch.half).max
    return values.clamp(-most, most).half()


def _inputs(batch: Any) -> tuple[list[Any], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return [], dict(batch)
    return list(batch) if isinstance(batch, tuple | list) else [batch], {}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
