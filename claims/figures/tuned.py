"""Figures of the normalisation of Soft MoE and of expert dropout, and what other claims need for theirs."""

from __future__ import annotations

from statistics import fmean

from figures.rows import T_95_OF_10, Better, Differences, Figure, Rows, table


def tuned() -> dict[str, list[Figure]]:
    """By id; `ID.least` is the smallest difference that the seeds of the claim could tell from none."""
    return normalisation() | expert_dropout()


def arms(claim: str) -> dict[str, Rows]:
    """The rows of a claim by arm."""
    rows = table(f"claims/results/{claim}.csv")
    return {arm: rows.where(arm=arm) for arm in dict.fromkeys(row["arm"] for row in rows.rows)}


def intervals(differences: list[Differences], better: Better = "") -> list[Figure]:
    """The mean of every difference and the ends of its interval."""
    return [figure for each in differences for figure in (each.mean(better), *each.ends())]


def least(differences: list[Differences]) -> list[Figure]:
    """The largest of the smallest differences that could be told."""
    return [max((difference.half() for difference in differences), key=lambda half: half.value)]


def normalisation() -> dict[str, list[Figure]]:
    plain = table("claims/results/soft_moe_normalisation.csv")
    by_rate = [
        plain.where(rate=rate, arm="normalised").minus(plain.where(rate=rate, arm="not normalised"), "accuracy")
        for rate in ("0.001", "0.004")
    ]
    return {
        "soft_moe.normalisation": [
            *intervals(by_rate),
            plain.where(arm="normalised").over(max, "fullest"),
            plain.where(arm="not normalised").over(max, "fullest"),
        ],
        "soft_moe.normalisation_least": least(by_rate),
    }


def expert_dropout() -> dict[str, list[Figure]]:
    of = arms("expert_dropout")
    base = of["0.1"]
    ahead = {arm: rows.minus(base, "accuracy") for arm, rows in of.items() if arm != "0.1"}
    inside = ahead["0.1, experts 0.4"]
    return {
        "expert_dropout": [
            inside.mean("higher"),
            *inside.ends(T_95_OF_10),
            *(figure for arm in ("0.3", "dense, 0.1") for figure in (ahead[arm].mean(), *ahead[arm].ends(T_95_OF_10))),
            base.over(fmean, "accuracy"),
        ],
        "expert_dropout.least": [inside.half(T_95_OF_10)],
    }
