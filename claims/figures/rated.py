"""Figures of claims that were run twice: with one rate for all arms, and with a rate that was tuned for each."""

from __future__ import annotations

from statistics import fmean, median, stdev

from common.plots import MEMORY
from figures.rows import T_95_OF_3, T_95_OF_5, Differences, Figure, Rows, table
from figures.tuned import intervals, least


def rated() -> dict[str, list[Figure]]:
    """By id; `ID.one_rate` has what the first run found, `ID.least` the smallest difference that could be told."""
    return {
        **zero_computation(), **densemixer(), **switch_scaling(), **mixtral(), **fine_grained(), **collapse(),
        **heterogeneous(), **long_text(), **upcycling(), **engram(), **three_modalities(), **batch_priority(),
        **flan_moe(), **limoe(), **nllb(), **mobile_vmoe(), **over_sparsity(), **soft_moe(),
        **branch_train_mix(), **phatgoose(),
    }  # fmt: skip


def runs(claim: str, *arm: str) -> tuple[Rows, Rows]:
    """The rows of the first day, with one rate for all arms, and the last, with a rate for each; arms are a column."""
    rows = table(f"claims/results/{claim}.csv")
    return rows.where(date=rows.rows[0]["date"]), rows.last(*(arm or ["arm"]), "seed")


def means(differences: list[Differences]) -> list[Figure]:
    return [each.mean("lower") for each in differences]


def less(rows: Rows, base: str, *others: str, column: str = "loss") -> list[Differences]:
    """What each of these arms has less the first one."""
    return [rows.where(arm=other).minus(rows.where(arm=base), column) for other in others]


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


def switch_scaling() -> dict[str, list[Figure]]:
    one, own = runs("switch_scaling", "experts")
    sparse = (2, 4, 8, 16, 32)

    def behind(rows: Rows) -> list[Differences]:
        return [rows.where(experts=experts).minus(rows.where(experts=1), "loss") for experts in sparse]

    reached = [float(row["steps_to_dense"]) for row in own.rows if row["experts"] != "1" and row["steps_to_dense"]]
    dense, *others = (own.where(experts=experts) for experts in (1, *sparse))
    taken = [arm.values("step_cpu_ms")[0] / dense.values("step_cpu_ms")[0] for arm in others]
    return {
        "switch_scaling": [
            *means(behind(own)),
            own.figure(len(reached), "rows with steps_to_dense and experts > 1", "higher"),
            own.figure(len(own.rows) - len(dense.rows), "rows with experts > 1"),
            own.figure(min(reached), "least of steps_to_dense with experts > 1", "lower"),
            *(arm.figure(ratio, "step_cpu_ms over dense", "lower") for arm, ratio in zip(others, taken, strict=True)),
        ],
        "switch_scaling.one_rate": means(behind(one)),
        "switch_scaling.least": least(behind(own)),
    }


def mixtral() -> dict[str, list[Figure]]:
    one, own = runs("mixtral")
    sparse, total = own.where(arm="sparse"), own.where(arm="total")

    def ahead(rows: Rows) -> Differences:
        return rows.where(arm="sparse").minus(rows.where(arm="active"), "loss")

    def way(rows: Rows) -> Figure:
        ours, active, all_of_it = (fmean(rows.where(arm=arm).values("loss")) for arm in ("sparse", "active", "total"))
        what = "loss of active less sparse over that of active less total"
        return rows.figure((active - ours) / (active - all_of_it), what, "higher")

    def faster(setting: str) -> Figure:
        ours, theirs = (arm.values(f"tokens_per_s_{setting}") for arm in (sparse, total))
        ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
        return sparse.figure(ratio, f"median by seed of tokens_per_s_{setting} over that of total", "higher")

    settings = ("width_64_batch_1", "width_512_batch_1", "width_512_batch_64")
    return {
        "mixtral": [*intervals([ahead(own)], "lower"), way(own), *map(faster, settings)],
        "mixtral.one_rate": [ahead(one).mean("lower"), way(one)],
        "mixtral.least": [ahead(own).half()],
    }


def fine_grained() -> dict[str, list[Figure]]:
    one, own = runs("fine_grained")

    def finer(rows: Rows) -> list[Differences]:
        return less(rows, "8, top-2", "16, top-4", "32, top-8")

    def shared(rows: Rows) -> list[Differences]:
        return less(rows, "32, top-8", "32, top-8, 1 shared")

    return {
        "fine_grained": intervals([*finer(own), *shared(own)], "lower"),
        "fine_grained.one_rate": means([*finer(one), *shared(one)]),
        "fine_grained.least": least(finer(own)),
    }


def collapse() -> dict[str, list[Figure]]:
    one, own = runs("collapse")
    rivals = ("CompeteSMoE", "X-MoE", "SMoE-Dropout", "MH-MoE")
    return {
        "collapse": intervals(less(own, "top-2", *rivals), "lower"),
        "collapse.changed": [own.where(arm=arm).over(fmean, "changed") for arm in ("top-2", *rivals)],
        "collapse.one_rate": means(less(one, "top-2", *rivals)),
        "collapse.least": least(less(own, "top-2", *rivals)),
    }


def heterogeneous() -> dict[str, list[Figure]]:
    one, own = runs("heterogeneous")
    equal, penalty = "equal widths", "unequal widths, penalty"

    def growth(rows: Rows, arm: str) -> Figure:
        of = rows.where(arm=arm)
        after, before = (fmean(of.values(column)) for column in ("running", "running_untrained"))
        return of.figure(100 * (after / before - 1), "mean of running over that of running_untrained, less 1", "lower")

    return {
        "heterogeneous": [
            *(growth(own, arm) for arm in (penalty, "unequal widths", equal)),
            *intervals(less(own, equal, penalty), "lower"),
        ],
        "heterogeneous.one_rate": [growth(one, penalty), *means(less(one, equal, penalty))],
        "heterogeneous.least": least(less(own, equal, penalty)),
    }


def long_text() -> dict[str, list[Figure]]:
    one, own = runs("long_text")
    sparse, dense = own.where(arm="sparse"), own.where(arm="dense")
    rises = less(own, "dense", "sparse", column="rise")
    return {
        "long_text": [
            sparse.over(fmean, "rise", "lower"),
            dense.over(fmean, "rise"),
            *intervals(rises, "lower"),
            sparse.over(fmean, "changed_first_layer"),
            sparse.over(fmean, "changed_last_layer"),
        ],
        "long_text.one_rate": means(less(one, "dense", "sparse", column="rise")),
        "long_text.least": least(rises),
    }


def upcycling() -> dict[str, list[Figure]]:
    one, own = runs("upcycling")
    gain = less(own, "dense", "copies", column="loss_at_end")
    return {
        "upcycling": [*intervals(gain, "lower"), *intervals(less(own, "dense", "fresh experts", column="loss_at_end"))],
        "upcycling.one_rate": means(less(one, "dense", "copies", column="loss_at_end")),
    }


def engram() -> dict[str, list[Figure]]:
    one, own = runs("engram", "share")

    def fewer(rows: Rows, share: str, *others: str) -> list[Differences]:
        return [rows.where(share=share).minus(rows.where(share=other), "loss") for other in others]

    best = min(MEMORY, key=lambda share: fmean(own.where(share=share).values("loss")))
    return {
        "engram": [
            own.figure(float(best), "share of the lowest mean loss between the ends"),
            *intervals(fewer(own, best, "1.00", "0.00"), "lower"),
            *means(fewer(own, "0.79", "1.00")),
        ],
        "engram.one_rate": means(fewer(one, "0.31", "1.00", "0.00")),
        "engram.least": least(fewer(own, best, "1.00", "0.00")),
    }


def three_modalities() -> dict[str, list[Figure]]:
    one, own = runs("three_modalities")
    names = ("texts", "pictures", "sounds")

    def ahead(rows: Rows) -> list[Differences]:
        return [rows.where(arm="not told").minus(rows.where(arm=f"dense, {name}"), name) for name in names]

    return {
        "three_modalities": [
            *(own.where(arm="not told").over(fmean, name, "higher") for name in names),
            *intervals(ahead(own), "higher"),
            *(own.where(arm=arm).over(fmean, "bits") for arm in ("not told", "told")),
        ],
        "three_modalities.one_rate": [each.mean("higher") for each in ahead(one)],
        "three_modalities.least": least(ahead(own)),
    }


def batch_priority() -> dict[str, list[Figure]]:
    one, own = runs("batch_priority", "priority", "factor")
    low = ("0.3", "0.2", "0.1", "0.05")

    def by_seed(rows: Rows) -> list[float]:
        """What batch priority is ahead at low factors."""
        at = [
            rows.where(priority="batch", factor=f).minus(rows.where(priority="arrival", factor=f), "accuracy")
            for f in low
        ]
        return [fmean(seeds) for seeds in zip(*(each.values for each in at), strict=True)]

    def ahead(rows: Rows) -> list[Figure]:
        what = "mean of batch less arrival of accuracy at factors up to 0.3"
        seeds = by_seed(rows)
        return [
            rows.figure(fmean(seeds), what, "higher"),
            *(rows.figure(value, f"{what}, seed {seed}", "higher") for seed, value in enumerate(seeds)),
        ]

    full = own.where(priority="batch", factor="4.0")
    half = T_95_OF_3 * stdev(by_seed(own)) / 3**0.5
    return {
        "batch_priority": [*ahead(own), full.over(min, "accuracy"), full.over(max, "accuracy")],
        "batch_priority.one_rate": ahead(one),
        "batch_priority.least": [own.figure(half, "half the 95 % interval of batch less arrival at factors up to 0.3")],
    }


def flan_moe() -> dict[str, list[Figure]]:
    one, own = runs("flan_moe")

    def behind(rows: Rows) -> list[Differences]:
        """Sparse less dense: each data set alone, those left out, all together; and the second less the first."""
        alone, left_out, together = (
            less(rows, "dense", "sparse", column=f"loss_{name}")[0] for name in ("alone", "left_out", "together")
        )
        values = tuple(a - b for a, b in zip(left_out.values, alone.values, strict=True))
        what = "loss_left_out less loss_alone, sparse less dense, paired by seed"
        return [alone, left_out, together, Differences(left_out.rows, values, what)]

    return {
        "flan_moe": intervals(behind(own), "lower"),
        "flan_moe.one_rate": means(behind(one)),
        "flan_moe.least": least(behind(own)[-1:]),
    }


def limoe() -> dict[str, list[Figure]]:
    one, own = runs("limoe")
    arms = ("balance loss", "entropies")

    def ratios(rows: Rows, arm: str) -> list[float]:
        captions, patches = (rows.where(arm=arm).values(f"dropped_{of}") for of in ("captions", "patches"))
        return [a / max(b, 0.1) for a, b in zip(captions, patches, strict=True)]

    def both(rows: Rows) -> list[Figure]:
        what = "mean by seed of dropped_captions over dropped_patches"
        return [
            *(rows.where(arm=arm).figure(fmean(ratios(rows, arm)), what) for arm in arms),
            *(rows.where(arm=arm).over(fmean, "recall_at_5") for arm in arms),
        ]

    apart = [a - b for a, b in zip(*(ratios(own, arm) for arm in arms), strict=True)]
    half = T_95_OF_3 * stdev(apart) / 3**0.5
    return {
        "limoe.claim": both(own),
        "limoe.one_rate": both(one),
        "limoe.least": [own.figure(half, "half the 95 % interval of the ratio less that of the balance loss")],
    }


def nllb() -> dict[str, list[Figure]]:
    one, own = runs("nllb")
    others = ("final masking", "expert masking", "dense")
    languages = ("es", "pt_BR", "fr", "it", "nl", "id")
    by_arm = {arm: own.where(arm=arm) for arm in ("dense", "sparse", "final masking", "expert masking")}
    chrf = less(own, "sparse", *others, column="chrf_small")
    return {
        **{
            f"nllb.{arm.split()[0]}": [rows.over(fmean, f"chrf_{language}") for language in languages]
            for arm, rows in by_arm.items()
        },
        "nllb": [
            *intervals(chrf),
            *intervals(less(own, "sparse", *others, column="loss_small")),
            by_arm["sparse"].over(fmean, "chrf_small"),
            by_arm["sparse"].over(fmean, "chrf_large"),
        ],
        "nllb.one_rate": [each.mean() for each in less(one, "sparse", *others, column="chrf_small")],
        "nllb.least": least(chrf[:1]),
    }


def mobile_vmoe() -> dict[str, list[Figure]]:
    one, own = runs("mobile_vmoe")
    taught = "per image, super-classes"

    def ahead(rows: Rows) -> list[Differences]:
        others = ("dense", "per image, end to end", "per patch")
        return [rows.where(arm=taught).minus(rows.where(arm=other), "accuracy") for other in others]

    return {
        "mobile_vmoe": [*intervals(ahead(own), "higher"), own.where(arm=taught).over(fmean, "right", "higher")],
        "mobile_vmoe.one_rate": [ahead(one)[0].mean("higher")],
        "mobile_vmoe.least": least(ahead(own)),
    }


def over_sparsity() -> dict[str, list[Figure]]:
    one, own = runs("over_sparsity", "k", "experts")
    dense = (1, 1)

    def against(rows: Rows, base: tuple[int, int], *others: tuple[int, int]) -> list[Differences]:
        """What each of these k and E has less the first."""
        first = rows.where(k=base[0], experts=base[1])
        return [rows.where(k=k, experts=experts).minus(first, "validation_loss") for k, experts in others]

    return {
        "over_sparsity": [
            *intervals(against(own, dense, (4, 64)), "lower"),
            *means(against(own, dense, (1, 4), (1, 16), (1, 64))),
            *intervals(against(own, (1, 16), (1, 64))),
        ],
        "over_sparsity.one_rate": [
            *means(against(one, dense, (4, 64))),
            *(each.behind() for each in against(one, (1, 16), (1, 64))),
        ],
    }


def soft_moe() -> dict[str, list[Figure]]:
    one, own = runs("soft_moe")
    few, many = (own.where(arm=f"Soft, {experts} experts") for experts in (8, 32))
    ratio = many.values("step_cpu_ms")[0] / few.values("step_cpu_ms")[0]

    def ahead(rows: Rows) -> list[Differences]:
        soft = rows.where(arm="Soft, 8 experts")
        return [soft.minus(rows.where(arm=arm), "accuracy") for arm in ("top-1", "expert choice", "dense")]

    return {
        "soft_moe": [
            *intervals(ahead(own), "higher"),
            many.figure(ratio, "step_cpu_ms over that of 8 experts", "lower"),
        ],
        "soft_moe.one_rate": [each.mean("higher") for each in ahead(one)],
        "soft_moe.least": least(ahead(own)),
    }


def branch_train_mix() -> dict[str, list[Figure]]:
    (one, own), (one_later, later) = runs("branch_train_mix"), runs("branch_train_mix_4000")

    def behind(rows: Rows) -> list[Differences]:
        arms = ("merged, rest mean, all trained", "merged, rest mean, own expert")
        return less(rows, "dense, equal tokens", *arms, column="loss_mean")

    return {
        "branch_train_mix": intervals(behind(own), "lower"),
        "branch_train_mix.one_rate": means(behind(one)[:1]),
        "branch_train_mix.second": intervals(behind(later), "lower"),
        "branch_train_mix.second_one_rate": means(behind(one_later)),
        "branch_train_mix.second_least": least(behind(later)[:1]),
    }


def phatgoose() -> dict[str, list[Figure]]:
    one, own = runs("phatgoose", "base", "collection", "arm")
    one_later, later = runs("phatgoose_400", "base", "arm")
    bases = ("stories260k", "own")

    def ahead_of_arrow(rows: Rows) -> list[Figure]:
        settings = [
            rows.where(base=base, collection=collection)
            for base in bases
            for collection in ("text-domains", "instruct-mix")
        ]
        ahead = [
            -fmean(less(here, "Arrow, k=3", "PHATGOOSE, k=2", column=column)[0].values)
            for here in settings
            for column in ("loss_own", "loss_mixed")
        ]
        what = "mean of Arrow less PHATGOOSE by seed, of loss_own and loss_mixed in all settings"
        return [
            rows.figure(min(ahead), f"least {what}", "higher"), rows.figure(max(ahead), f"largest {what}", "higher"),
        ]  # fmt: skip

    def gates(rows: Rows) -> list[Differences]:
        return [
            less(rows.where(base=base), "mean activations, k=2", arm, column="loss_own")[0]
            for arm in ("PHATGOOSE, k=2", "PHATGOOSE with negatives, k=2")
            for base in bases
        ]

    return {
        "phatgoose": ahead_of_arrow(own),
        "phatgoose.one_rate": ahead_of_arrow(one),
        "phatgoose.second": intervals(gates(later), "lower"),
        "phatgoose.second_one_rate": means(gates(one_later)),
        "phatgoose.second_least": least(gates(later)),
    }
