"""`Observed`: decisions, gradients, outputs and training of a model, each measured when a check first reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.inspect.capture import capture
from moeify.inspect.faults.auxiliary import Decided, auxiliary_gradients
from moeify.inspect.faults.finding import NotGiven, Unknown
from moeify.inspect.faults.gradients import Gradients, task_gradients
from moeify.inspect.faults.training import Training
from moeify.inspect.measurements.layer_inputs import layer_inputs
from moeify.inspect.measurements.outliers import Outputs, expert_outputs
from moeify.inspect.trace import Trace
from moeify.layers import HfLayer, SparseLayer, sparse_layers
from moeify.modes import fixed_randomness, in_evaluation
from moeify.record import record
from moeify.routing import Assignment, Routing

Batch = Mapping[str, Any]

ROWS = 300
"""Rows per expert at even load, from which on the load of an expert can be judged.

An expert that gets nothing of n rows gets, with 95 % confidence, less than 3 / n of them (the rule of three); to tell
1 % of an even share, the limit of a dead expert, from nothing takes 3 / 0.01 rows.
"""


class Logits(NamedTuple):
    """The logits of a router, (T, E), and K, the number of experts per token."""

    values: Float[Tensor, "T E"]
    k: int


class Observed:
    """Measurements of a model, which the checks of a diagnosis read.

    Args:
        model: a sparse model, moeify's or one of transformers; None if there is only a trace.
        batches: what it is called with.
        training: how it is trained, if that is to be checked.
        trace: its decisions, if they were recorded already.

    Raises:
        Unknown: from every attribute that cannot be measured, with the reason.
        NotGiven: from every attribute that needs an input that was not given.
    """

    def __init__(
        self,
        model: nn.Module | None,
        batches: Sequence[Batch] = (),
        *,
        training: Training | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._model = model
        self._batches = [_on_device_of(model, batch) for batch in batches]
        self._training = training
        self._trace = trace

    @property
    def model(self) -> nn.Module:
        """The model."""
        if self._model is None:
            raise NotGiven("only a trace was given, no model")
        return self._model

    @property
    def training(self) -> Training:
        """How it is trained."""
        if self._training is None:
            raise NotGiven("no trainer was given")
        return self._training

    @property
    def batches(self) -> list[Batch]:
        """What it is called with, at least one."""
        if not self._batches:
            raise Unknown("there are no batches to run the model on")
        return self._batches

    @cached_property
    def layers(self) -> dict[str, SparseLayer]:
        """Its sparse layers."""
        return sparse_layers(self.model)

    @cached_property
    def not_finite(self) -> list[tuple[str, int]]:
        """Names of parameters with values that are not finite, and how many."""
        sums = ((name, int((~p.isfinite()).sum())) for name, p in self.model.named_parameters() if not p.is_meta)
        return [(name, count) for name, count in sums if count]

    def require_finite(self) -> None:
        """Refuse to run a model whose weights are not finite."""
        if self._model is not None and self.not_finite:
            raise Unknown("weights of the model are not finite, so its outputs are not either")

    @cached_property
    def trace(self) -> Trace:
        """Its decisions on the batches, in evaluation."""
        if self._trace is not None:
            return self._trace
        self.require_finite()
        return capture(self.model, self.batches)

    @cached_property
    def loads(self) -> dict[str, Int[Tensor, "E"]]:
        """The rows assigned to every expert, for layers that choose experts; there must be enough to judge the load."""
        found = {layer.name: layer.assigned for layer in self.trace if layer.k}
        for name, rows in found.items():
            even = int(rows.sum()) / len(rows)
            if even < ROWS:
                raise Unknown(
                    f"too little data: at even load each of the {len(rows)} experts of {name} would get {even:.0f} "
                    f"rows, and it takes {ROWS} to tell a dead expert from a rare one"
                )
        return found

    @cached_property
    def passes(self) -> list[dict[str, Routing]]:
        """The decisions of two passes in evaluation over the first batch, with different random numbers."""
        self.require_finite()
        found = []
        with in_evaluation(self.model), fixed_randomness(self.model), torch.no_grad():
            for _ in range(2):
                with record(self.model) as decisions:
                    self.model(**self.batches[0])
                found.append(decisions)
        return found

    @property
    def decisions(self) -> dict[str, Assignment]:
        """The decisions on the first batch of layers that send every token to K experts, in full precision."""
        found = {
            name: routing
            for name, routing in self.passes[0].items()
            if isinstance(routing, Assignment) and routing.choices is not None
        }
        if not found:
            raise Unknown("no layer sends every token to a fixed number of experts")
        return found

    @property
    def logits(self) -> dict[str, Logits]:
        """The logits of the routers that compute some: on the first batch, or those of the trace, which are rounded."""
        if self._model is None:
            found = {
                layer.name: Logits(layer.logits.float(), layer.k) for layer in self.trace if layer.logits is not None
            }
        else:
            pairs = ((name, one.logits, one.choices) for name, one in self.decisions.items())
            found = {name: Logits(z.float().cpu(), c.k) for name, z, c in pairs if z is not None and c is not None}
        if not found:
            raise Unknown("the routers keep no logits")
        return found

    @cached_property
    def gradients(self) -> dict[str, Gradients]:
        """The gradients of the loss of the first batch in every layer."""
        self.require_finite()
        return task_gradients(self.model, self.layers, self.batches[0])

    @cached_property
    def outputs(self) -> dict[str, Outputs]:
        """The outputs of every layer's experts, on the first batches."""
        self.require_finite()
        with fixed_randomness(self.model):
            found = expert_outputs(layer_inputs(self.model, self.batches[:4]))
        for name, layer in self.layers.items():
            if name not in found and isinstance(layer, HfLayer):
                raise Unknown(
                    f"no outputs of the experts of {name} were seen: a {type(layer.module).__name__} cannot be called "
                    "one by one, or they got no tokens"
                )
        return found

    def auxiliary(self, batches: Sequence[Batch]) -> dict[str, list[Decided]]:
        """The gradients of the auxiliary losses at the logits of every layer, in a step over some micro-batches."""
        self.require_finite()
        with self.training.rehearse() as step:
            return auxiliary_gradients(self.model, self.layers, step, batches)

    @cached_property
    def single_step(self) -> dict[str, list[Decided]]:
        """`auxiliary` of one micro-batch, with padding if it can have some."""
        _ = self.training  # without which batches are of no use here
        return self.auxiliary([self.padded])

    @cached_property
    def padded(self) -> Batch:
        """The first batch that has padding; if none has, the first one with the last quarter of a sequence masked."""
        for batch in self.batches:
            mask = batch.get("attention_mask")
            if mask is not None and mask.dim() == 2 and not mask.bool().all():
                return labelled(batch)
        batch = labelled(self.batches[0])
        if "input_ids" not in batch or batch["input_ids"].dim() != 2:
            return batch
        ids, labels = batch["input_ids"], batch["labels"]
        mask = torch.ones_like(ids)
        mask[0, -(mask.shape[1] // 4) :] = 0
        if labels.shape == mask.shape:
            labels = labels.masked_fill(mask == 0, -100)
        ids = ids.masked_fill(mask == 0, self.pad_token_id or 0)
        return {**batch, "input_ids": ids, "attention_mask": mask, "labels": labels}

    @property
    def pad_token_id(self) -> int | None:
        """The id of padding, if the configuration of the model names one."""
        return getattr(getattr(self.model, "config", None), "pad_token_id", None)


def labelled(batch: Batch) -> Batch:
    """The batch with labels; a language model's are its own inputs."""
    return {**batch, "labels": batch["input_ids"]} if "labels" not in batch and "input_ids" in batch else batch


def _on_device_of(model: nn.Module | None, batch: Batch) -> Batch:
    device = next((p.device for p in model.parameters()), None) if model is not None else None
    arguments = {name: value for name, value in batch.items() if name != "domain"}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}
