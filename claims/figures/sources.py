"""Where every registered figure comes from: for each id its figures, in the order in which texts name them."""

from __future__ import annotations

from statistics import fmean, stdev

from common.agreement import COMMIT
from figures.designed import designed
from figures.planned import planned
from figures.plotted import plotted
from figures.rated import rated
from figures.rows import LOG, Better, Figure, Rows, quoted, table
from figures.tuned import tuned

XEON, NOT_NOTED = "Intel Xeon (Emerald Rapids), 2 shared cores", "a CPU, not noted further"
FAMILIES = ("Mixtral", "Qwen3-MoE", "OLMoE", "DeepSeek-V3", "GPT-OSS", "moeify")


def sources() -> dict[str, list[Figure]]:
    """All ids with their figures, computed anew from the rows."""
    return {
        **_demo(), **_conversion(), **_composition(), **planned(), **_training(), **_independent(),
        **designed(), **tuned(), **rated(), **plotted(), **_benchmarks(), **_diagnosis(), **_noted(),
    }  # fmt: skip


def _demo() -> dict[str, list[Figure]]:
    now, before = (table("claims/results/demo.csv").where(first_seed=seed) for seed in (31, 0))

    def at(rows: Rows, axis: str) -> list[Figure]:
        row = rows.where(at_equal=axis)
        return [
            row.one("sparse", "lower"), row.one("dense"), row.one("difference", "lower"), row.one("spread", "lower"),
        ]  # fmt: skip

    load = table("claims/results/demo_balance.csv")
    controlled, weak = load.where(arm="proportional 0.03"), load.where(arm="loss 0.002")
    worst, worst_of_loss = (
        max(float(value) for row in arm.rows for value in row["max_vio_by_layer"].split()) for arm in (controlled, weak)
    )
    price = controlled.minus(weak, "validation_loss")
    return {
        "demo.tokens": at(now, "tokens"),
        "demo.flops": at(now, "flops"),
        "demo.cpu": at(now, "seconds"),
        "demo.gains": [figure for axis in ("tokens", "flops", "seconds") for figure in at(now, axis)[2:]],
        "demo.before": at(before, "tokens")[2:],
        "demo.step": [now.where(at_equal="tokens").one("step_ratio", "lower")],
        "demo.quartiles": quoted(
            LOG, "with the quartiles of the pairs for a ratio the difference is -0.033 and -0.013", XEON
        ),
        "demo.busiest": [controlled.figure(1 + worst, "1 + largest of max_vio_by_layer", "lower")],
        "demo_balance": [
            controlled.figure(worst, "largest of max_vio_by_layer", "lower"),
            weak.figure(worst_of_loss, "largest of max_vio_by_layer"),
            price.mean("lower"),
            price.spread(),
        ],
    }


def _conversion() -> dict[str, list[Figure]]:
    halves = table("claims/results/splits.csv").where(running=2, weight="1.000")

    def against_random(method: str) -> Figure:
        return halves.where(method=method).minus(halves.where(method="random"), "loss_after").mean("lower")

    return {
        "splits": [
            against_random(method)
            for method in (
                "coactivated", "residual by gradients", "independent by gradients", "clustered", "inner by gradients",
            )
        ],
    }  # fmt: skip


def _composition() -> dict[str, list[Figure]]:
    cluster = table("claims/results/mocle.csv")
    one = cluster.where(arm="one adapter", rate="0.01")
    at_paper, at_one = (
        cluster.where(arm=arm, rate="0.003").minus(one, "loss_seen") for arm in ("MoCLE", "MoCLE, temperature 1")
    )
    return {
        "mocle": [at_paper.mean("lower"), at_paper.spread(), at_one.behind(), at_one.spread()],
    }


def _training() -> dict[str, list[Figure]]:
    merged = table("claims/results/harc.csv")
    calibrated = merged.where(arm="merged, routers calibrated").minus(merged.where(arm="merged"), "loss_mean")
    cost = merged.where(arm="merged").minus(merged.where(arm="branch of the domain"), "loss_mean")
    make = table("claims/results/makemoe.csv").last("seed")
    return {
        "harc": [calibrated.mean("lower"), *calibrated.ends(), cost.behind()],
        "makemoe": [
            make.over(fmean, "validation_loss", "lower"), make.over(stdev, "validation_loss", "lower"),
            make.over(max, "reported"),
        ],
    }  # fmt: skip


def _independent() -> dict[str, list[Figure]]:
    now = table("claims/results/independent.csv").where(commit=COMMIT)
    agree, differ = now.where(result="agrees"), now.where(result="differs, explained")
    if len(agree.rows) + len(differ.rows) != len(now.rows):
        raise ValueError("a quantity of claims/results/independent.csv neither agrees nor is explained")
    return {
        "independent": [
            agree.figure(len(agree.rows), "rows", "higher"),
            agree.over(max, "tolerance", "lower"),
            differ.figure(len(differ.rows), "rows"),
        ],
        "independent.engram": [
            table("claims/results/independent.csv").where(peer="deepseek-ai/Engram").over(max, "difference", "lower")
        ],
    }


def _benchmarks() -> dict[str, list[Figure]]:
    layer = table("benchmarks/results/layer-cpu.csv").where(commit="e726a3f", implementation="moeify")
    one_token = table("benchmarks/results/layer-cpu.csv").where(commit="adb638f", implementation="moeify", isa="AVX2")
    narrow_forward, forward = (layer.where(isa=isa).where(**{"pass": "forward"}) for isa in ("AVX2", "AVX512"))
    both = layer.where(isa="AVX512").where(**{"pass": "forward+backward"})
    trainings = table("benchmarks/results/train-cpu.csv").where(implementation="moeify", model="sparse")
    steps = trainings.where(commit="06ebc7b")
    decode = table("benchmarks/results/decode-cpu.csv").where(commit="61fcd6f", model="sparse", what="decode")
    zen4 = table("benchmarks/results/decode-cpu.csv").where(commit="adb638f", model="sparse", what="decode")
    zen4_before = table("benchmarks/results/decode-cpu.csv").where(commit="434d359", model="sparse", what="decode")
    wide, narrow = (decode.where(isa=isa).last("implementation", "bits") for isa in ("AVX512", "AVX2"))
    scaling = table("benchmarks/results/scaling-cpu.csv").where(commit="06ebc7b", implementation="moeify")
    tuned = table("benchmarks/results/tune-memory-cpu.csv")
    tunings = {"esft": "ESFT", "lora": "LoRA of all experts", "esft_lora": "LoRA of ESFT's experts"}
    long_text = table("benchmarks/results/long-text-cpu.csv")
    by_position = long_text.where(what="position", documents="packed")
    sparse, dense = (by_position.where(model=model) for model in ("sparse", "dense"))
    losses = {(row["tokens"], row["first"]): float(row["loss"]) for row in dense.rows}
    apart = [float(row["loss"]) - losses[row["tokens"], row["first"]] for row in sparse.rows]
    price = table("benchmarks/results/price-cpu.csv").where(part="step")
    zen5, emerald, narrow_price = (price.where(commit=commit) for commit in ("2db1617", "fba5040", "e548183"))
    waits = table("benchmarks/results/load-cpu.csv").where(commit="8230e41", waiting="command line")
    traced = table("benchmarks/results/streamed-cpu.csv")
    ten, all_layers = traced.where(layers=10), traced.where(layers=48)

    def speed(implementation: str, bits: int, better: Better) -> Figure:
        return wide.where(implementation=implementation, bits=bits).one("tok_per_s", better)

    return {
        "layer-cpu.forward": [
            forward.over(min, "speedup_over_best_peer", "higher"),
            forward.over(max, "speedup_over_best_peer", "higher"),
        ],
        "layer-cpu.both": [
            both.over(min, "speedup_over_best_peer", "higher"), both.over(max, "speedup_over_best_peer", "higher"),
        ],
        "train-cpu": [
            steps.over(min, "speedup_over_best_peer", "higher"), steps.over(max, "speedup_over_best_peer", "higher"),
        ],
        "train-cpu.mkl": [
            trainings.where(commit="fba5040", mode="fp32").one("speedup_over_best_peer", "higher"),
        ],
        **{
            f"tune-memory-cpu.{name}": [tuned.where(way=way).one(of, "lower") for of in ("peak_mib", "times_whole")]
            for name, way in tunings.items()
        },
        "long-text-cpu.position": [
            by_position.figure(min(apart), "least loss of sparse less dense over ranges of positions"),
            by_position.figure(max(apart), "largest loss of sparse less dense over ranges of positions"),
            sparse.over(min, "elsewhere"),
            sparse.over(max, "elsewhere"),
        ],
        **{
            f"long-text-cpu.{tokens}": [
                long_text.where(what=what, model=model, tokens=tokens).one("peak_mib", "lower")
                for what in ("layer", "step")
                for model in ("sparse", "dense")
            ]
            for tokens in (4096, 8192, 16384)
        },
        "price-cpu": [zen5.where(model=model).one("sparse_over_dense", "lower") for model in ("demo", "52M")],
        "price-cpu.mkl": [emerald.where(model=model).one("sparse_over_dense", "lower") for model in ("demo", "52M")],
        "price-cpu.avx2": [narrow_price.where(model=m).one("sparse_over_dense", "lower") for m in ("demo", "52M")],
        "price-cpu.zen4": [
            price.where(commit=commit, model=model, isa=isa).one("sparse_over_dense", "lower")
            for isa in ("AVX512", "AVX2")
            for commit, model in (("e726a3f", "demo"), ("ad878c9", "52M"))
        ],
        "scaling-cpu": [scaling.where(experts=128, tokens=1024).one("times_fewest", "lower")],
        "decode-cpu.moeify": [speed("moeify", bits, "higher") for bits in (16, 8, 4)],
        "decode-cpu.peers": [
            *(speed("llama.cpp", bits, "lower") for bits in (16, 8, 4)),
            speed("transformers/eager", 16, "lower"),
        ],
        "decode-cpu.avx2": [
            narrow.where(implementation="moeify", bits=bits).one("over_llama.cpp", "higher") for bits in (16, 8, 4)
        ],
        "decode-cpu.zen4": [
            rows.where(implementation="moeify", bits=bits, isa="AVX512").one("over_llama.cpp", "higher")
            for bits in (16, 8, 4)
            for rows in (zen4_before, zen4)
        ],
        "decode-cpu.zen4_avx2": [
            zen4.where(implementation="moeify", bits=bits, isa="AVX2").one("over_llama.cpp", "higher")
            for bits in (16, 8, 4)
        ],
        "layer-cpu.avx2": [
            narrow_forward.over(min, "speedup_over_best_peer", "higher"),
            narrow_forward.over(max, "speedup_over_best_peer", "higher"),
        ],
        "layer-cpu.avx2_one_token": [
            one_token.over(min, "speedup_over_best_peer", "higher"),
            one_token.over(max, "speedup_over_best_peer", "higher"),
        ],
        "load-cpu": [
            waits.where(load="idle").one("over_openmp", "higher"),
            waits.where(load="one busy process").one("over_openmp", "higher"),
            waits.where(load="four busy processes").one("over_openmp", "higher"),
            waits.where(load="idle").one("over_one_thread", "higher"),
            waits.where(load="one busy process").one("over_one_thread", "higher"),
        ],
        "streamed-cpu": [
            ten.one("checkpoint_gb"), ten.one("limit_gib", "lower"), ten.one("peak_resident_gib", "lower"),
            all_layers.one("checkpoint_gb"), all_layers.one("limit_gib", "lower"),
        ],
    }  # fmt: skip


def _diagnosis() -> dict[str, list[Figure]]:
    runs = table("benchmarks/results/diagnosis.csv")

    def of(rows: Rows) -> list[Figure]:
        kinds = {"broken": [r for r in rows.rows if r["fault"] not in ("healthy", "unknown")]}
        kinds |= {kind: [r for r in rows.rows if r["fault"] == kind] for kind in ("healthy", "unknown")}
        found = []
        sides: list[tuple[str, Better]] = [("right", "higher"), ("moewatch_right", "lower")]
        for column, better in sides:
            for kind, chosen in kinds.items():
                part = Rows(rows.file, tuple(chosen), f"{rows.key}, {kind}".lstrip(", "))
                right = sum(row[column] == "True" for row in chosen)
                found += [part.figure(right, f"rows with {column}", better)]
                found += [part.figure(len(chosen), "rows")]
        return found

    return {f"diagnosis.{family}": of(runs.where(family=family)) for family in FAMILIES} | {"diagnosis.all": of(runs)}


def _noted() -> dict[str, list[Figure]]:
    """Figures that have no table: the log has them as they were measured."""
    rows = {
        "2": "2 micro-batches 35 %, moeify's 0.0001 %",
        "8": "8 micro-batches 123 %, moeify's 0.0001 %",
        "packed": "packed into 6 micro-batches 91 %, moeify's 0.0001 %",
        "one": "packed or padding-free in one micro-batch 0.00004 %",
        "dpo": "DPO in 2 and 8 micro-batches 27 % and 75 %, moeify's below 0.0001 %",
        "grpo": "GRPO in 8 micro-batches 161 %, moeify's below 0.0001 %",
        "smoothing": "no gradient at all under label smoothing, moeify's 0.0001 % off",
    }
    percents = {
        "2": (1, 2), "8": (1, 2), "packed": (1, 2), "one": (0,), "dpo": (2, 3, 4), "grpo": (1, 2), "smoothing": (0,),
    }  # fmt: skip
    kinds = ("saves", "kills", "rank", "interrupts", "kernels")
    replicas = {
        "replicas": "20 of 20 kills left the experts, biases, other weights, optimizer, controllers, loads and random "
        "numbers of all replicas with equal SHA-256 after every step that they shared, 18 of them cost a step and none "
        "cost more, and the others went on after a median of 1.12 s",
        "repeated": "The losses of all steps were within 6e-7",
        "resumed": "differ by 1.4e-6 at most",
        "ranks": "50 of 50 random kills of one process",
        "restarts": "9 of 9 kills of a process under",
        "exits": "100 of 100 runs ended",
    }
    words = {
        "saves": "150 of 150 random kills of saves left a complete model, 32 of them between commit and the end",
        "kills": "500 of 500 random kills in 123 training runs were resumed bit for bit",
        "rank": "with a timeout of 3 s an error came 8.5 s after the ranks had started",
        "interrupts": "404 of 404 interrupts of `sparsify` left the model as it was",
        "kernels": "2,000 of 2,000 random problems of the C++ kernels on 4 instruction sets",
    }
    return {
        **{f"trl.{row}": quoted(LOG, words_of, NOT_NOTED, percents[row]) for row, words_of in rows.items()},
        **{f"reliability.{kind}": quoted(LOG, words[kind], NOT_NOTED) for kind in kinds},
        **{f"reliability.{kind}": quoted(LOG, text, "AMD EPYC (Zen 5), 2 cores") for kind, text in replicas.items()},
        "trl": quoted(LOG, rows["8"], NOT_NOTED, (1,)),
        "sounds": quoted(LOG, "an accuracy of 0.693 (sparse, `matched`) and 0.700 (dense)", NOT_NOTED),
        "limoe": quoted(
            LOG,
            "recall@1 of captions 0.041 and of pictures 0.035\n(sparse), 0.018 and 0.012 (dense)",
            "AMD EPYC (Zen 5), 2 cores",
        ),
        "auction": quoted(
            LOG, "a median of 5 ms, and 18 ms where all tokens share a mean", "AMD EPYC (Zen 5), 2 cores"
        ),
        "h200": quoted(
            "benchmarks/gpu_roofline.py", "reached on one: 4.3 TB/s, 790 TFLOP/s", "NVIDIA H200", (1, 0), "2026-11-24"
        ),
    }
