"""The result of comparing a sparse model with its dense baseline, in sentences."""

from __future__ import annotations

from moeify.evaluate.versus import Axis, Difference, Versus

Names = dict[Axis, str]


def axis_names(versus: Versus) -> Names:
    """The names of the budgets that are held equal, by axis; time is wall-clock or CPU time."""
    clock = "wall-clock" if versus.pace is None else versus.pace.clock
    return {"tokens": versus.units.pieces, "flops": "training FLOPs", "seconds": f"{clock} time"}


def verdict(versus: Versus) -> str:
    """The result in words, one clause for every axis."""
    names = axis_names(versus)
    return "; ".join(_clause(d, names[d.axis]) for d in versus.differences) + "."


def _clause(d: Difference, name: str) -> str:
    better = "lower" if d.difference < 0 else "higher"
    noise = "" if d.spread is None else f" (± {d.spread:.4f} over {d.seeds} seeds)"
    found = f"at equal {name} the sparse model's loss is {abs(d.difference):.4f} {better}{noise}"
    if d.is_clear:
        return found
    low, high = sorted(d.between)
    why = "" if low == high else f", between {low:+.4f} and {high:+.4f} by what a step was measured to cost"
    return f"{found}, too noisy to tell{why}"


def headline(versus: Versus) -> str:
    """One sentence: where the sparse model is ahead, behind, or within the noise."""
    names = axis_names(versus)
    found: dict[str, list[str]] = {"ahead": [], "behind": [], "unclear": []}
    for d in versus.differences:
        side = ("ahead" if d.difference < 0 else "behind") if d.is_clear else "unclear"
        found[side].append(f"equal {names[d.axis]}")
    sentences = [f"{side} at {_list(found[side])}" for side in ("ahead", "behind") if found[side]]
    if found["unclear"]:
        sentences.append(f"too close to its dense baseline to tell at {_list(found['unclear'])}")
    one = "" if versus.differences[0].spread is not None else " One seed says nothing about noise between seeds."
    return f"The sparse model is {', and '.join(sentences)}.{one}"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
