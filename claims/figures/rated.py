"""Figures of claims that were run twice: with one rate for all arms, and with a rate that was tuned for each."""

from __future__ import annotations

from statistics import fmean

from figures.rows import T_95_OF_5, Differences, Figure, Rows, table
from figures.tuned import intervals


def rated() -> dict[str, list[Figure]]:
    """By id; `ID.one_rate` has what the first run found, `ID.least` the smallest difference that could be told."""
    return {**zero_computation(), **densemixer()}


def runs(claim: str, arm: str = "arm") -> tuple[Rows, Rows]:
    """The rows of the first run, with one rate for all arms, and those with a rate for each."""
    rows = table(f"claims/results/{claim}.csv")
    return rows.where(commit=rows.rows[0]["commit"]), rows.last(arm, "seed")


def means(differences: list[Differences]) -> list[Figure]:
    return [each.mean("lower") for each in differences]


def zero_computation() -> dict[str, list[Figure]]:
    one, own = runs("zero_computation")

    def against_alone(rows: Rows) -> Differences:
        return rows.where(arm="MoE++").minus(rows.where(arm="8 alone"), "loss")

    def fewer(rows: Rows) -> Figure:
        calls = rows.where(arm="MoE++")
        return calls.figure(100 * (fmean(calls.values("calls")) / 2 - 1), "mean of calls over 2, less 1", "lower")

    moepp = own.where(arm="MoE++")
    return {
        "zero_computation": [
            fewer(own), *intervals([against_alone(own)], "lower"),
            moepp.over(min, "correlation"), moepp.over(max, "correlation"),
        ],
        "zero_computation.one_rate": [fewer(one), against_alone(one).mean("lower")],
        "zero_computation.least": [against_alone(own).half()],
    }  # fmt: skip


def densemixer() -> dict[str, list[Figure]]:
    one, own = runs("densemixer")

    def behind(rows: Rows) -> list[Differences]:
        mixer = rows.where(arm="DenseMixer")
        return [mixer.minus(rows.where(arm=arm), "loss") for arm in ("as ever", "as ever, FLOPs of DenseMixer")]

    return {
        "densemixer": [figure for each in behind(own) for figure in (each.mean("lower"), *each.ends(T_95_OF_5))],
        "densemixer.one_rate": means(behind(one)),
    }
