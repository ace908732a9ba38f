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

    def finding(self, since: str = "") -> Finding:
        """What to report.

        Args:
            since: when it began, in words.
        """
        used = f"{self.in_use * self.experts:.1f} of {self.experts}" if self.experts else f"{self.in_use:.0%} of the"
        balance = "" if self.balance is None else f"balance loss {self.balance:.2f} (1 is even), and "
        cause = "the routing has collapsed onto a few experts"
        fix = (
            "raise the weight of the balance loss (SparseArguments(balance=1e-2)) or use a controller; lower the "
            "learning rate of the router"
        )
        if self.is_hidden:
            cause = "the routing has collapsed, and the balance loss does not show it: the scores are uniform"
            fix = (
                "watch MaxVio and dead experts in the place of the loss; balance by a selection bias "
                "(SparseArguments(controller=Sign())), which counts rows; initialise the router with a larger std"
            )
        return Finding(layer=self.name, cause=cause, evidence=f"{balance}{used} experts in use{since}", fix=fix)


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
            yield found.finding()


def collapse(seen: Observed) -> Iterator[Finding]:
    """Half the experts or fewer carry the load, and the balance loss, where it is known, shows it.

    In use are 1 / Σ f_j² experts, f_j being the share of the rows of expert j.
    """
    for found in _collapsed(seen):
        if not found.is_hidden:
            yield found.finding()


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
