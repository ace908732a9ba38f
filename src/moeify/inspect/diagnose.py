"""Diagnose a sparse model: check every known fault, and report which were found, ruled out or could not be decided."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import nn

from moeify.inspect.faults import FAULTS, Finding, Inapplicable, NotGiven, Observed, Unknown, training_of
from moeify.inspect.logged import LOG_FAULTS, TrainingLog
from moeify.inspect.trace import Trace
from moeify.layers import sparse_layers

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The faults of a model that were found, those that were ruled out, and those that could not be checked.

    Attributes:
        findings: causes before their consequences.
        healthy: names of the faults that were looked for and not found.
        unknown: the faults whose check was inconclusive, and why.
        inapplicable: the faults that this model cannot have, and why.
        unchecked: the faults whose check needs an input that was not given, such as a trainer, and which input.
    """

    findings: tuple[Finding, ...]
    healthy: tuple[str, ...]
    unknown: Mapping[str, str]
    inapplicable: Mapping[str, str]
    unchecked: Mapping[str, str]

    @property
    def status(self) -> Literal["findings", "unknown", "healthy"]:
        """`healthy` only if every check that ran was conclusive, and none found a fault."""
        if self.findings:
            return "findings"
        return "unknown" if self.unknown or not self.healthy else "healthy"

    def with_log(self, log: Diagnosis) -> Diagnosis:
        """This diagnosis of a model, and the one of its training's log, see `diagnose_log`.

        The findings of both, those of the model first; a fault is healthy if one ruled it out and the other did not
        find it, and unknown only if neither decided.
        """
        theirs = (replace(found, cause=f"{found.cause}, in the log of the training") for found in log.findings)
        findings = (*self.findings, *theirs)
        decided = {found.fault for found in findings}

        def left(mine: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
            kept = {name: why for name, why in {**mine, **other, **mine}.items() if name not in decided}
            decided.update(kept)
            return kept

        healthy = tuple(left(dict.fromkeys(self.healthy, ""), dict.fromkeys(log.healthy, "")))
        return Diagnosis(
            findings=findings, healthy=healthy, unknown=left(self.unknown, log.unknown),
            inapplicable=left(self.inapplicable, log.inapplicable), unchecked=left(self.unchecked, log.unchecked),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"status": self.status, **asdict(self)}

    def __str__(self) -> str:
        """Every finding with evidence and fix, equal ones of several layers merged, and the other faults by result."""
        many = len(self.findings)
        lines = [f"{many} finding{'s' * (many > 1)}" if many else _HEADLINES[self.status]]
        for alike in _alike(self.findings):
            first, layers = alike[0], [found.layer for found in alike]
            where = ", ".join(layers[:_NAMED]) + (f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else "")
            lines += ["", f"{first.fault}  {first.cause}"]
            lines += [f"  {'where':9} {where}"] if where else []
            lines += [f"  {'evidence':9} {first.evidence}" + (", in the first of them" if len(layers) > 1 else "")]
            lines += [f"  {'fix':9} {first.fix}"]
        lines.append("")
        if self.healthy:
            lines.append(f"not found: {', '.join(self.healthy)}")
        open_ends = {"unknown": self.unknown, "not checked": self.unchecked, "not applicable": self.inapplicable}
        for title, reasons in open_ends.items():
            for reason in dict.fromkeys(reasons.values()):
                names = [name for name, why in reasons.items() if why == reason]
                lines.append(f"{title}: {', '.join(names)} ({reason})")
        return "\n".join(lines)


def _alike(findings: Iterable[Finding]) -> list[list[Finding]]:
    """The findings of one fault and cause together, in the order of the first of each."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for found in findings:
        groups.setdefault((found.fault, found.cause), []).append(found)
    return list(groups.values())


_NAMED = 3  # layers of a finding
_HEADLINES = {
    "unknown": "no fault was found, but some checks could not decide, so the model may still have one",
    "healthy": "nothing was found",
}


def diagnose(
    model: nn.Module | Trace,
    batches: Iterable[Mapping[str, Any]] = (),
    *,
    trainer: Any = None,
    faults: Sequence[str] | None = None,
    progress: Progress = lambda fault: None,
) -> Diagnosis:
    """Look for every known fault of a model, moeify's or one of transformers; `moeify.inspect.FAULTS` lists them.

    The model runs over the batches in evaluation, one loss is differentiated, and with a trainer some of its steps are
    rehearsed: forward and backward, without its optimizer. Weights, gradients, modes and random numbers are as before.

    Args:
        model: a sparse model, or a `Trace` of one, for the checks that need only decisions.
        batches: what the model is called with, as mappings of arguments; for load some hundred tokens per expert. The
            entry `domain` of `capture` may be there, and is not given to the model.
        trainer: how the model is trained: a trainer of transformers, TRL or `SparseTrainer`, or a function of a list of
            micro-batches that runs their forward and backward passes as the training loop does. Without it, faults of
            training are not checked.
        faults: names of those to look for, all if not given.
        progress: is called with the name of every fault before it is looked for.

    Raises:
        ValueError: the model has no sparse layer, or an unknown fault.
        TypeError: a trainer of another type.
    """
    if not isinstance(model, Trace) and not sparse_layers(model):
        raise ValueError(f"{type(model).__name__} has no sparse layer to diagnose; pass a mixture-of-experts model")
    if unknown := [name for name in faults or () if name not in FAULTS]:
        raise ValueError(f"no fault is called {unknown[0]!r}; known are: {', '.join(FAULTS)}")
    seen = Observed(
        model if isinstance(model, nn.Module) else None,
        list(batches),
        training=None if trainer is None else training_of(trainer),
        trace=model if isinstance(model, Trace) else None,
    )
    return _look({name: partial(FAULTS[name], seen) for name in faults or FAULTS}, progress)


def diagnose_log(log: TrainingLog | Sequence[Mapping[str, Any]]) -> Diagnosis:
    """Look for the faults that the log of a training can show; `LOG_FAULTS` of `moeify.inspect.logged` lists them.

    The other faults of a model are in `unchecked`: they need the model.

    Args:
        log: of `read_log`, or the entries of a `metrics.jsonl` or of a trainer's `state.log_history`, oldest first.
    """
    seen = log if isinstance(log, TrainingLog) else TrainingLog(log)
    found = _look({name: partial(fault, seen) for name, fault in LOG_FAULTS.items()}, lambda fault: None)
    others = {name: "a log does not show them; name the model by --model" for name in FAULTS if name not in LOG_FAULTS}
    return replace(found, unchecked={**found.unchecked, **others})


def _look(checks: Mapping[str, Callable[[], Iterator[Finding]]], progress: Progress) -> Diagnosis:
    findings: list[Finding] = []
    healthy: list[str] = []
    unknown: dict[str, str] = {}
    unchecked: dict[str, str] = {}
    inapplicable: dict[str, str] = {}
    for name, check in checks.items():
        progress(name)
        try:
            found = [replace(finding, fault=name) for finding in check()]
        except Inapplicable as reason:
            inapplicable[name] = str(reason)
        except NotGiven as reason:
            unchecked[name] = str(reason)
        except Unknown as reason:
            unknown[name] = str(reason)
        else:
            findings += found
            healthy += [] if found else [name]
    return Diagnosis(
        findings=tuple(findings),
        healthy=tuple(healthy),
        unknown=unknown,
        inapplicable=inapplicable,
        unchecked=unchecked,
    )
