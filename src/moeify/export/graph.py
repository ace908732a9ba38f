"""The base class of exports to graph runtimes: any model as one graph, by transformers' exporters, and compared."""

from __future__ import annotations

import logging
import math
import re
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from moeify.export.calls import Calls, Inputs
from moeify.export.exporter import Exporter, Verification
from moeify.export.model_spec import Unsupported
from moeify.export.probe import in_float32
from moeify.modes import in_evaluation
from moeify.routers import Arrow, Capacity

_ROUNDING = 1e-4
_MISSING = re.compile(r"No conversion rule found for operations: (.+)|No ONNX function found for .*?op='([^']+)'")
"""What OpenVINO and torch.onnx say about operations that they lack."""


@dataclass(frozen=True)
class GraphExporter(Exporter, ABC):
    """Writes one graph from a model's inputs to its outputs, in fp32, for every batch size and length of text.

    A graph holds no cache of keys and values: a language model gives the logits of whole texts.

    Attributes:
        probe: an input of the model, as a tensor, a tuple or a dict by name; None guesses one.
    """

    probe: Any = None
    extra: ClassVar[str]
    """The extra of moeify with the libraries that write and run the graph."""

    @abstractmethod
    def export(self, model: Any, inputs: Inputs) -> Any:
        """The graph, as the exporters of transformers return it."""

    @abstractmethod
    def runner(self, folder: Path) -> tuple[str, Callable[[Inputs], torch.Tensor]]:
        """The program with its version, and a function that runs the graph of a folder by it."""

    def probe_of(self, model: nn.Module) -> Calls:
        """Two calls of the model."""
        return Calls.of(model, self.probe)

    def probe_from_dict(self, values: dict[str, Any]) -> Calls:
        """The inverse of `Calls.to_dict`."""
        return Calls.from_dict(values)

    @property
    def question(self) -> Hashable:
        """The same for all exporters of graphs with the same probe."""
        return GraphExporter, id(self.probe)

    def match(self, model: nn.Module) -> torch.export.ExportedProgram:
        """The model as a program of `torch.export`, from which the graph is made.

        Raises:
            Unsupported: a step of the model has no program that serves every input.
        """
        return self._traced(model, _program)

    def write(self, model: nn.Module, folder: Path) -> list[str]:
        """Write the graph, its weights and the names of its inputs."""
        self._traced(model, self.export).save_pretrained(folder)
        return [f"one graph of {type(model).__name__}, in fp32, without a cache"]

    def _traced(self, model: nn.Module, trace: Callable[[nn.Module, Inputs], Any]) -> Any:
        try:
            with _quiet():
                return traced(model, self.probe_of(model).inputs[0], trace)
        except ImportError as error:
            raise ImportError(f"this export needs moeify[{self.extra}] and transformers 5.24: {error}") from None

    def verify(self, folder: Path, probe: Calls) -> Verification:
        """Run the graph on both calls."""
        return _compared(*self.runner(folder), probe)


def traced(model: nn.Module, inputs: Inputs, trace: Callable[[nn.Module, Inputs], Any]) -> Any:
    """What `trace` makes of a model in evaluation, in fp32 and without a cache.

    Raises:
        Unsupported: a step of the model has no graph that serves every input.
    """
    _refuse_reassignment(model)
    try:
        with in_evaluation(model), in_float32(model), _without_cache(model), _with_constants(model):
            return trace(model, inputs)
    except ImportError:
        raise
    except Exception as error:  # any error: torch.export or the target lacks an operator
        raise Unsupported(_reason(model, error)) from error


def check_program(model: nn.Module, probe: Any = None) -> Verification:
    """Trace a model by `torch.export`, and compare the program with it on an input of another size, too.

    Args:
        model: any; not changed.
        probe: an input of the model, as a tensor, a tuple or a dict by name; None guesses one.

    Raises:
        Unsupported: a step of the model has no program that serves every input.
        ValueError: the program computes something else.
    """
    calls = Calls.of(model, probe)
    program = traced(model, calls.inputs[0], _program).module()

    def run(inputs: Inputs) -> torch.Tensor:
        with torch.no_grad():
            found = program(**inputs)
        return getattr(found, "logits", found)

    return _compared(f"torch {torch.__version__}", run, calls)


def _compared(program: str, run: Callable[[Inputs], torch.Tensor], probe: Calls) -> Verification:
    difference, agreement = probe.compare(run)
    if difference > _ROUNDING * max(1.0, probe.size):
        raise ValueError(f"{program} gives other outputs than the model, by {difference:.3g}")
    return Verification(program, difference, agreement)


def _program(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    open_axes = {name: dict.fromkeys(range(min(value.dim(), 2)), Dim.AUTO) for name, value in inputs.items()}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=open_axes, strict=False)
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in inputs and is_concrete_int(size := node.meta["val"].shape[0]):
            raise Unsupported(f"a step of it fixes the first size of {node.name} to {size}, that of the trace")
    return program


def main_output(names: list[str], values: list[Any]) -> torch.Tensor:
    """The logits; without logits, the first output."""
    return torch.as_tensor(values[names.index("logits") if "logits" in names else 0])


def _refuse_reassignment(model: nn.Module) -> None:
    for name, part in model.named_modules():
        if isinstance(part, Capacity) and part.overflow == "next" and not math.isinf(part.eval_factor):
            raise Unsupported(
                f"{name} offers rows that were dropped to other experts (overflow='next') in rounds, whose number "
                "depends on the tokens; switch the capacity off by moeify.serve.serve_with(model, capacity=math.inf)"
            )


def _reason(model: nn.Module, error: Exception) -> str:
    """Why a model has no graph, in one sentence."""
    errors = _with_causes(error)
    if missing := _missing(errors):
        return f"it computes with {missing}, for which the program has no operator"
    said = (str(errors[-1]).strip().splitlines() or [type(errors[-1]).__name__])[0]
    if "data-dependent" not in said:
        return f"a step of it has no graph that serves every input: {said}"
    names = {module: name for name, module in model.named_modules()}
    owners = [frame.f_locals.get("self") for each in errors for frame, _ in traceback.walk_tb(each.__traceback__)]
    inside = next((owner for owner in reversed(owners) if isinstance(owner, nn.Module) and owner in names), model)
    part = f"{names[inside]} ({type(inside).__name__})" if names[inside] else f"this {type(inside).__name__}"
    return f"{part} computes sizes from the values of its input, which a graph cannot"


def _with_causes(error: BaseException) -> list[BaseException]:
    """The error, its cause, and so on to the first cause."""
    return [error] if error.__cause__ is None else [error, *_with_causes(error.__cause__)]


def _missing(errors: list[BaseException]) -> str | None:
    """The operations that ONNX or OpenVINO lacks, None if no error names any."""
    found = next(filter(None, (_MISSING.search(str(error)) for error in errors)), None)
    return None if found is None else (found[1] or found[2]).replace(".default", "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager without what torch and the exporters of transformers print about their own steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(before)


@contextmanager
def _with_constants(model: nn.Module) -> Iterator[None]:
    """Context manager in which what Arrow computes from weights alone is a constant of the graph."""
    with ExitStack() as stack:
        for router in model.modules():
            if isinstance(router, Arrow):
                stack.enter_context(router.constant_prototypes())
        yield


@contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    before = getattr(getattr(model, "config", None), "use_cache", None)
    if before is None:
        yield
        return
    model.config.use_cache = False
    try:
        yield
    finally:
        model.config.use_cache = before
