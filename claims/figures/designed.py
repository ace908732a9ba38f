"""Figures of the claims whose designs and predictions are in claims/designs.md."""

from __future__ import annotations

from statistics import fmean, median, stdev

from figures.rows import T_95_OF_3, T_95_OF_5, Figure, Rows, table


def designed() -> dict[str, list[Figure]]:
    """By id; `ID.least` is the smallest difference that the seeds of the claim could tell from none."""
    gates = table("claims/results/multi_gate.csv")

    def rise(arm: str) -> Figure:
        rows = gates.where(arm=arm)
        means = [fmean(rows.where(rho=rho).values("error")) for rho in ("0.0", "1.0")]
        return rows.figure(100 * (means[0] / means[1] - 1), "mean of error at rho=0.0 over that at rho=1.0, less 1")

    unrelated = gates.where(rho="0.0")
    apart = unrelated.where(arm="MMoE").minus(unrelated.where(arm="shared bottom"), "error")

    rates = table("claims/results/z_loss.csv")
    stable = {z: rates.where(z=z, stable="True") for z in ("0.0", "0.001", "0.01")}
    best = {z: [min(rates.where(z=z, seed=seed).values("loss")) for seed in range(3)] for z in stable}
    costs = {z: [a - b for a, b in zip(best[z], best["0.0"], strict=True)] for z in ("0.001", "0.01")}
    half = T_95_OF_3 * stdev(costs["0.001"]) / 3**0.5
    sizes = {z: fmean(rates.where(z=z, rate="0.004").values("squared_logsumexp")) for z in stable}
    people = {arm: table("claims/results/census.csv").where(arm=arm) for arm in ("shared bottom", "MMoE", "PLE")}
    areas = [
        people[one].minus(people[other], f"auc_{task}")
        for task in ("income", "never_married")
        for one, other in (("MMoE", "shared bottom"), ("PLE", "MMoE"))
    ]
    second = table("claims/results/mocle_layers_1.csv")

    def best(arm: str) -> Rows:
        """At the rate of the lowest mean loss on learnt tasks."""
        rates = [second.where(arm=arm, rate=rate) for rate in ("0.003", "0.01", "0.03")]
        return min(rates, key=lambda rows: fmean(rows.values("loss_seen")))

    learnt, near = (best("MoCLE").minus(best("one adapter"), f"loss_{part}") for part in ("seen", "near"))
    fast = {arm: table("claims/results/mixtral_speed.csv").where(arm=arm) for arm in ("sparse", "total", "active")}

    def over_dense(arm: str, kind: str, batch: int) -> Figure:
        ours, theirs = (fast[which].where(**{"pass": kind, "batch": batch}) for which in ("sparse", arm))
        ratios = [a / b for a, b in zip(*(rows.values("tokens_per_s") for rows in (ours, theirs)), strict=True)]
        return ours.figure(median(ratios), f"median by seed of tokens_per_s over that of {arm}", "higher")

    cells = [(kind, batch) for kind in ("decode", "prefill") for batch in (1, 16, 64, 256)]
    what = "least loss of a seed less that without z-loss, mean over seeds, z="
    return {
        "census": [figure for each in areas for figure in (each.mean("higher"), *each.ends(T_95_OF_5))],
        "census.least": [max((each.half(T_95_OF_5) for each in areas), key=lambda half: half.value)],
        "mocle.second": [learnt.mean("lower"), *learnt.ends(), near.mean("lower"), *near.ends()],
        "mocle.least": [learnt.half()],
        "mixtral.speed": [
            how((over_dense(arm, *cell) for cell in cells), key=lambda figure: figure.value)
            for arm in ("total", "active")
            for how in (min, max)
        ],
        "multi_gate.least": [apart.half()],
        "z_loss.least": [rates.figure(half, f"half the 95 % interval of the {what}0.001", "lower")],
        "z_loss": [
            *(rows.figure(len(rows.rows), "rows that are stable") for rows in stable.values()),
            rates.figure(fmean(costs["0.001"]), f"{what}0.001", "lower"),
            rates.figure(half, f"half the 95 % interval of the {what}0.001", "lower"),
            rates.figure(fmean(costs["0.01"]), f"{what}0.01", "lower"),
            rates.figure(sizes["0.001"] / sizes["0.0"], "squared_logsumexp at rate=0.004, z=0.001 over z=0.0", "lower"),
        ],
        "multi_gate": [rise("shared bottom"), rise("MMoE"), apart.mean("lower"), *apart.ends()],
    }
