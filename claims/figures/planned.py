"""Figures of the planner, the rebalancer and experts that move, against measurements."""

from __future__ import annotations

from statistics import fmean

from figures.rows import LOG, Better, Figure, Rows, quoted, table


def planned() -> dict[str, list[Figure]]:
    layers = table("claims/results/h100_layers.csv").last("seed")
    errors = []
    for devices in (2, 4, 8, 16, 32):
        predicted, measured = (fmean(layers.values(f"ratio{which}_{devices}")) for which in ("_predicted", ""))
        errors.append((100 * (predicted / measured - 1), measured))
    what = "mean of ratio_predicted over mean of ratio, less 1"
    worst, best = min(errors)[0], max(errors)[0]
    steps = table("claims/results/simumax.csv").where(routing="balanced")

    def largest(commit: str, column: str, better: Better = "") -> Figure:
        rows = steps.where(commit=commit)
        error = max(abs(float(row[column]) / float(row["real_ms"]) - 1) for row in rows.rows)
        return rows.figure(100 * error, f"largest of |{column} / real_ms - 1|", better)

    pairs = table("claims/results/smartmoe.csv")
    again = table("claims/results/virtual_devices_2.csv")
    quiet = table("claims/results/virtual_devices_3.csv")
    hot = {
        routing: [table("claims/results/hot_experts.csv").where(routing=routing, arm=arm) for arm in ("moved", "lent")]
        for routing in ("one hot expert", "a hot half", "Zipf")
    }
    cells = {(row["model"], row["world"], row["correlation"]) for row in again.rows}
    moves = table("claims/results/placement.csv").last("routing", "devices", "ep", "spare")
    equal = moves.where(eplb_equal="60 of 60")
    if len(equal.rows) != len(moves.rows):
        raise ValueError("a placement of claims/results/placement.csv is not EPLB's")
    traces = [row for row in moves.rows if row["routing"] in ("qwen", "gemma")]
    on_8, on_32 = (
        Rows(moves.file, tuple(row for row in traces if row["ep"] == ep), f"routing of traces, ep={ep}")
        for ep in ("8", "32")
    )
    return {
        "h100_layers": [
            layers.over(fmean, "error", "lower", 100), layers.over(fmean, "rank", "higher"),
        ],
        "h100_layers.three_terms": [
            layers.over(fmean, "error_three_terms", "higher", 100), layers.over(fmean, "rank_three_terms", "lower"),
        ],
        "h100_layers.skew": [
            layers.figure(worst, f"lowest {what}"), layers.figure(best, f"highest {what}"),
            layers.figure(min(m for _, m in errors), "least mean of ratio"),
            layers.figure(max(m for _, m in errors), "largest mean of ratio"),
        ],
        "h100_layers.skew_sizes": [
            layers.figure(-best, f"least size of {what}", "lower"),
            layers.figure(-worst, f"largest size of {what}", "lower"),
        ],
        "h100_layers.error": [layers.over(fmean, "error", "lower", 100)],
        "simumax.winners": quoted(
            LOG, "EP8 ahead per sequence in all 6 pairs, and EP4 x PP2 ahead in all 3 on A100", "none"
        ),
        "simumax.first": [largest("96dbf32", "ours_ms", "lower"), largest("96dbf32", "simumax_ms")],
        "simumax.corrected": [largest("fa4a581", "ours_ms", "lower")],
        "simumax.errors": [largest("96dbf32", "ours_ms", "lower"), largest("fa4a581", "ours_ms", "lower")],
        "smartmoe": [
            pairs.figure(len(pairs.where(right="True").rows), "rows that are right", "higher"),
            pairs.figure(len(pairs.rows), "rows"),
        ],
        "virtual_devices": [
            run.figure(float(run.rows[0]["correlation"]), "correlation", "higher")
            for world in (2, 4, 8)
            for run in _runs(table("claims/results/virtual_devices.csv").where(world=world))
        ],
        "virtual_devices.all": [
            again.where(model=model).figure(float(again.where(model=model).rows[0]["all"]), "all", "higher")
            for model in ("wide", "deep", "narrow", "broad")
        ],
        "virtual_devices.cells": [
            again.over(min, "correlation", "higher"), again.over(max, "correlation", "higher"),
        ],
        "virtual_devices.good": [
            again.figure(sum(float(value) >= 0.9 for *_, value in cells), "cells of 0.9 or more", "higher"),
            again.figure(len(cells), "cells"),
        ],
        "virtual_devices.quiet": [
            quiet.where(model=model, world=world).over(min, "correlation", "higher")
            for model in ("narrow", "broad")
            for world in (2, 4, 8)
        ],
        "virtual_devices.quiet_all": [
            quiet.where(model=model).over(min, "all", "higher") for model in ("narrow", "broad")
        ],
        "virtual_devices.quiet_ceiling": [quiet.over(min, "ceiling", "higher")],
        "hot_experts": [arm.one("speedup", "higher") for arms in hot.values() for arm in arms],
        "hot_experts.predicted": [arm.one("predicted") for arms in hot.values() for arm in arms],
        "placement.equal": [
            moves.figure(float(moves.rows[0]["eplb_equal"].split(" of ")[i]), "eplb_equal", better)
            for i, better in ((0, "higher"), (1, ""))
        ],
        "placement.speedup": [moves.over(min, "speedup", "higher"), moves.over(max, "speedup", "higher")],
        "placement.traces": [
            on_8.over(min, "speedup", "higher"), on_8.over(max, "speedup", "higher"),
            on_32.over(min, "speedup", "higher"), on_32.over(max, "speedup", "higher"),
        ],
        "placement.lasting": [moves.where(routing="lasting", spare=1).one("speedup", "higher")],
    }  # fmt: skip


def _runs(rows: Rows) -> list[Rows]:
    """The rows of every run, which all have its correlation."""
    found = dict.fromkeys(row["correlation"] for row in rows.rows)
    return [rows.where(correlation=value) for value in found]
