"""Expert load and balance while a model trains: per layer, over all ranks, without a further forward pass."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify import statistics
from moeify.files import write_text
from moeify.losses import probability
from moeify.notices import say
from moeify.ranks import all_reduce
from moeify.routing import Routing
from moeify.train.loss import Decisions


class Tally:
    """Sums since the last log: rows assigned, rows computed, probabilities, entropies, number of decisions."""

    def __init__(self) -> None:
        self.layers: dict[str, Float[Tensor, "S"]] = {}

    @torch.no_grad()
    def add(self, decisions: Decisions, *, counts: bool = True) -> None:
        """Add the rows that one micro-batch assigned to the experts; dense mixtures are balanced by construction.

        Those of a micro-batch of padding do not count; its layers are named all the same, as ranks add up by layer.
        """
        for name, routing in decisions:
            if (assigned := routing.assigned) is not None:
                new = _sums(routing, assigned) * counts
                self.layers[name] = self.layers[name] + new if name in self.layers else new

    def drain(self) -> dict[str, dict[str, float]]:
        """The metrics of every layer over all ranks since the last call."""
        sums, self.layers = self.layers, {}
        totals = {name: all_reduce(sums[name]).cpu() for name in sorted(sums)}
        return {name: measure(total) for name, total in totals.items() if total.any()}


def _sums(routing: Routing, assigned: Int[Tensor, "E"]) -> Float[Tensor, "S"]:
    assigned, counts = assigned.float(), routing.counts.float()
    if routing.scores is None:
        return torch.cat([assigned, counts, torch.zeros_like(assigned), assigned.new_zeros(2)])
    p = probability(routing).detach()
    entropy = statistics.router_entropy(p).sum()
    return torch.cat([assigned, counts, p.sum(0), entropy.view(1), entropy.new_full((1,), len(p))])


def measure(sums: Float[Tensor, "S"]) -> dict[str, float]:
    """The metrics of one layer from its sums.

    `load_entropy` and `router_entropy` are divided by log E: 1 is even. `max_vio` is max / mean load - 1 (arXiv
    2408.15664), 0 is even; `dead_experts` are those below 1 % of their fair share; `drop_rate` is the share of rows
    that capacity refused; `balance` is E · Σ_j f_j · P_j, 1 is even. Without scores, `balance` and `router_entropy`
    are left out.
    """
    experts = (len(sums) - 2) // 3
    assigned, counts, p = sums[:-2].view(3, experts)
    entropy, decisions = sums[-2:].tolist()
    f = statistics.load(assigned)
    metrics = {
        "load_entropy": float(statistics.load_entropy(assigned)),
        "max_vio": float(statistics.max_violation(assigned)),
        "max_load": float(statistics.max_violation(assigned) + 1),
        "dead_experts": float(statistics.dead(assigned)),
        "drop_rate": float(statistics.drop_rate(assigned, counts)),
    }
    if decisions:
        metrics["balance"] = float(experts * (f * p).sum() / decisions)
        metrics["router_entropy"] = entropy / decisions / statistics.log_experts(experts)
    return metrics


_WORST = {"load_entropy": min, "max_vio": max, "dead_experts": max, "drop_rate": max}


def summarize(layers: dict[str, dict[str, float]]) -> dict[str, float]:
    """Means over layers, the worst value of each kind, and which layer (in order of names) is loaded least evenly."""
    if not layers:
        return {}
    kinds = sorted(set().union(*layers.values()))
    values = {kind: [layer[kind] for layer in layers.values() if kind in layer] for kind in kinds}
    means = {kind: sum(v) / len(v) for kind, v in values.items() if kind != "max_load"}
    worst = {f"{kind}_worst": pick(values[kind]) for kind, pick in _WORST.items()}
    entropies = values["load_entropy"]
    return means | worst | {"worst_layer": float(entropies.index(min(entropies)))}


def exact(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers and, beside loss and gradient norm, their bits: equal runs are then equal texts."""
    bits = {f"{name}_hex": float(values[name]).hex() for name in ("loss", "grad_norm") if name in values}
    return values | bits


def append(file: Path, record: dict[str, Any]) -> None:
    """Write one line of JSON, whole or not at all; a full disk costs the line and a warning, not the run."""
    line = (json.dumps(record) + "\n").encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab", buffering=0) as out:
            size = out.seek(0, os.SEEK_END)
            if out.write(line) < len(line):
                out.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        step = record.get("step")
        say(f"moeify: the metrics of step {step} could not be written to {file} ({error}); the run goes on")


def forget_after(file: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will do again, and lines that a crash has cut off or damaged.

    Lines at the end are cut off in place, which a full disk allows; where it does not, a warning is printed.
    """
    if not file.exists():
        return
    try:
        whole = file.read_bytes()
        kept = b"".join(line + b"\n" for line in whole.split(b"\n") if _is_until(line, step))
        if whole.startswith(kept):
            os.truncate(file, len(kept))
        else:
            write_text(file, kept.decode())
    except OSError as error:
        say(f"moeify: the metrics after step {step} could not be taken out of {file} ({error}); the run goes on")


def _is_until(line: bytes, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, RecursionError, TypeError, KeyError):
        return False
