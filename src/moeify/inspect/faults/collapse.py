"""Faults: routing that has collapsed onto a few experts, with or without showing in the balance loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moeify.inspect.faults.finding import Finding, Unknown
from moeify.inspect.faults.observed import Observed
from moeify.statistics import load


@dataclass(frozen=True)
class Collapsed:
    """A layer that uses half of its experts or fewer.

    Attributes:
        name: of the layer; empty for the mean over all.
        experts: E; None if it is not known.
        in_use: 1 / (E Σ_j f_j²): at even load this share of the experts would have the same imbalance.
        balance: E · Σ_j f_j · P_j; None where no scores are known.
    """

    name: str
    experts: int | None
    in_use: float
    balance: float | None

    @property
    def is_hidden(self) -> bool:
        """Whether the balance loss shows less than a tenth of the imbalance, E · Σ_j f_j² - 1."""
        return self.balance is not None and self.balance - 1 <= 0.1 * (1 / self.in_use - 1)

    def __str__(self) -> str:
        """How many experts are in use."""
        if self.experts is None:
            return f"{self.in_use:.0%} of the experts in use"
        return f"{self.in_use * self.experts:.1f} of {self.experts} experts in use"


def blind_collapse(seen: Observed) -> Iterator[Finding]:
    """Half the experts or fewer carry the load while the balance loss reads 1.0, as if it were even.

    E · Σ f_j · P_j (Switch, eq. 4) is 1 for any load f, if the scores P are uniform. The load is judged by 1 / Σ
    f_j², the number of experts at even load with the same imbalance; the loss is blind if it shows less than a tenth
    of E · Σ f_j² - 1, which it would show if P were f.
    """
    for found in _collapsed(seen):
        if found.balance is None:
            raise Unknown("the routers keep no scores, so their balance loss is not known")
        if found.is_hidden:
            yield blind(found)


def blind(found: Collapsed, since: str = "") -> Finding:
    """The finding about a collapse that the balance loss does not show.

    Args:
        found: the layer.
        since: when it began, in words.
    """
    return Finding(
        layer=found.name,
        cause="the routing has collapsed, and the balance loss does not show it: the scores are uniform",
        evidence=f"balance loss {found.balance:.2f} (1 is even), and {found}{since}",
        fix="watch MaxVio and dead experts in the place of the loss; balance by a selection bias "
        "(SparseArguments(controller=Sign())), which counts rows; initialise the router with a larger std",
    )


def collapse(seen: Observed) -> Iterator[Finding]:
    """Half the experts or fewer carry the load, and the balance loss, where it is known, shows it.

    In use are 1 / Σ f_j² experts, f_j being the share of the rows of expert j.
    """
    for found in _collapsed(seen):
        if not found.is_hidden:
            yield plain(found)


def plain(found: Collapsed, since: str = "") -> Finding:
    """The finding about a collapse that the balance loss shows, or that has none.

    Args:
        found: the layer.
        since: when it began, in words.
    """
    balance = "" if found.balance is None else f"; balance loss {found.balance:.2f} (1 is even)"
    return Finding(
        layer=found.name,
        cause="the routing has collapsed onto a few experts",
        evidence=f"{found}{since}{balance}",
        fix="raise the weight of the balance loss (SparseArguments(balance=1e-2)) or use a controller; lower "
        "the learning rate of the router",
    )


def _collapsed(seen: Observed) -> Iterator[Collapsed]:
    for name, rows in seen.loads.items():
        layer, f = seen.trace.layers[name], load(rows)
        in_use = 1 / (len(f) * float(f.square().sum()))
        if in_use <= 0.5 and layer.k < len(f):
            balance = None
            if layer.scores is not None:
                p = layer.scores.float()
                p = (p / p.sum(-1, keepdim=True).clamp_min(1e-20)).mean(0)
                balance = float(len(f) * (f * p).sum())
            yield Collapsed(name, len(f), in_use, balance)
