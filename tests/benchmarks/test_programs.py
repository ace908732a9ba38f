"""The benchmarks of a CPU: every program runs, and rows hold what their columns say."""

import argparse
import csv
import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeify.flops import count
from moeify.inspect import FAULTS
from moeify.kernels.cpu.packing import may_pack

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_the_limits_of_a_processor_without_products_in_bf16_are_found(avx2):
    program = (
        "import measure, torch; measure.LARGE, measure.SIDE = 64, {'cpu': 8}; "
        "print(*measure.limits(torch.float32), *measure.limits(torch.bfloat16))"
    )
    said = subprocess.run([sys.executable, "-c", program], env=avx2, cwd=FOLDER, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert all(float(limit) > 0 for limit in said.stdout.split())


def test_only_the_command_line_says_how_idle_threads_wait(benchmarks, monkeypatch):
    load, say = benchmarks("load"), "import os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    said = {}
    for name, program in load.PROGRAMS.items():
        with load.worker(program.replace(load.WORK, say), 3) as process:
            said[name] = process.stdout.read().split()
    assert said == {"OpenMP": ["None", "3"], "command line": ["PASSIVE", "3"]}


def test_a_stopwatch_charges_the_innermost_part(benchmarks, monkeypatch):
    price, now = benchmarks("price"), [0.0]
    monkeypatch.setattr(price.time, "process_time", lambda: now[0])
    watch = price.Stopwatch()

    def spend(seconds):
        now[0] += seconds

    inner = watch.wrapped("products", lambda: spend(2))
    watch.wrapped("layer", lambda: (spend(1), inner(), spend(4)))()
    watch.enter("layer")
    watch.enter("router")
    spend(8)
    watch.leave("layer")  # and what was entered inside
    watch.leave("products")  # which was not entered
    spend(16)
    watch.charge()
    assert watch.spent == {"trainer": 16, "layer": 5, "products": 2, "router": 8}


def test_the_steps_of_both_models_are_taken_apart_into_known_parts(benchmarks, monkeypatch):
    price = benchmarks("price")
    monkeypatch.setattr(price, "LAYERS", 1)
    shape = {"width": 16, "hidden": 32, "heads": 2, "vocabulary": 31, "sequences": 2, "length": 8}
    both = price.arms(shape, 1)
    assert all(arm.whole(0) > 0 for arm in both.values())
    parts = {name: [arm.parts(0)] for name, arm in both.items()}
    assert set(parts["sparse"][0]) == set(price.PARTS)
    assert {"products", "activation", "model", "optimizer"} <= set(parts["dense"][0]) <= set(price.PARTS) - {"router"}
    step, *rows = price.rows_of({"sparse": [30.0], "dense": [20.0]}, parts)
    assert step["sparse_over_dense"] == "1.500"
    assert sum(float(row["sparse_ms"]) for row in rows) == pytest.approx(30, rel=0.02)


def test_a_picture_shows_the_last_row_of_every_point_on_one_machine(benchmarks, tmp_path):
    measure, file = benchmarks("measure"), tmp_path / "rows.csv"
    rows = [("this", 1, 5), ("other", 1, 6), ("other", 2, 7), ("this", 2, 8), ("this", 1, 9)]
    columns = ["device", "threads", "batch", "speed"]
    measure.report(file, columns, [dict(zip(columns, (a, "1", str(b), str(c)), strict=True)) for a, b, c in rows])
    assert {row["batch"]: row["speed"] for row in measure.latest(file, ["batch"])} == {"1": "9", "2": "8"}


def test_implementations_share_their_weights_but_not_the_permission_to_pack(benchmarks):
    block = benchmarks("run").Block((16, 32, 4, 2), torch.float32, "cpu", bits=(8,))
    assert block.ours.gate_up_proj is block.packed.gate_up_proj is block.hf.gate_up_proj
    assert (may_pack(block.ours), may_pack(block.packed)) == (False, True)


def test_what_one_token_costs_at_best_does_not_depend_on_the_number_of_experts(benchmarks, monkeypatch):
    scaling = benchmarks("scaling")
    monkeypatch.setattr(scaling, "WIDTH", 32)
    monkeypatch.setattr(scaling, "HIDDEN", 64)
    layers = {e: scaling.blocks_of(scaling.sizes(e), torch.bfloat16)[:2] for e in (8, 16)}
    dense = [scaling.Dense()]
    times, _, cases = scaling.measure(layers, dense, 1, 1)
    assert {(2 * case.read, case.flops) for case in cases} == {(dense[0].nbytes, dense[0].nbytes)}
    assert {(8, "moeify"), (16, "moeify/packed"), (16, "transformers/eager"), (1, "dense")} <= times.keys()


def test_times_of_more_experts_are_relative_to_the_fewest_and_to_the_dense_network(benchmarks, tmp_path):
    scaling = benchmarks("scaling")
    times = {(1, "dense"): [1.0], (8, "moeify"): [2.0], (8, "transformers/eager"): [4.0]}
    times |= {(16, "moeify"): [3.0], (16, "transformers/eager"): [9.0]}
    rows = scaling.rows_of(times, {}, {1: 0.5, 8: 0.5, 16: 1.5})
    ours = next(row for row in rows if (row["experts"], row["implementation"]) == ("16", "moeify"))
    columns = ("times_fewest", "times_dense", "speedup_over_best_peer", "share_of_limit")
    assert [ours[column] for column in columns] == ["1.500", "3.000", "3.000", "0.500"]
    assert all(row.keys() <= set(scaling.FIELDS) for row in rows)
    benchmarks("pictures").draw_scaling([row | {"tokens": "1"} for row in rows], tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size


def test_the_trained_models_have_equal_active_sizes(benchmarks):
    train_step = benchmarks("train_step")
    with torch.device("meta"):
        sparse, dense = (count(train_step.MODELS[name]()) for name in ("sparse", "dense"))
    assert sparse.parameters == pytest.approx(52e6, rel=0.01)
    assert sparse.active_parameters == pytest.approx(dense.parameters, rel=0.01)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_all_contenders_train_and_their_time_is_split(benchmarks, monkeypatch, mode):
    train_step = benchmarks("train_step")
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(train_step, "SHAPE", train_step.SHAPE | small | {"num_key_value_heads": 2})
    monkeypatch.setattr(train_step, "HIDDEN", 64)
    monkeypatch.setattr(train_step, "LENGTH", 16)
    found, left_out = train_step.contenders(mode)
    for training, implementation in found.values():
        before = training.model.lm_head.weight.clone()
        training.step(implementation)
        assert mode == "bf16" or not torch.equal(training.model.lm_head.weight, before)
        split = train_step.shares(training, implementation, repeats=1)
        assert sum(split.values()) == pytest.approx(1)
        assert all(share > 0 for share in split.values())
    split = dict.fromkeys(found, dict.fromkeys(train_step.PARTS, 0.25))
    rows = train_step.rows_of({name: [1000.0] for name in found}, left_out, split, {"sparse": 250.0, "dense": 500.0})
    assert [row["share_of_limit"] for row in rows] == ["0.250", "0.250", "0.250", "0.500"]
    assert all(row.keys() <= set(train_step.FIELDS) for row in rows)


def test_one_expert_after_another_computes_the_layer(benchmarks):
    peak, run = benchmarks("peak"), benchmarks("run")
    case = run.Case([run.Block((16, 32, 4, 2), torch.float32, "cpu", bits=())], 32)
    ways = {name: way(case.blocks[0]) for name, way in peak.ways(case).items()}
    assert set(peak.WAYS["forward+backward"]) <= ways.keys()
    for y in ways.values():
        torch.testing.assert_close(y, case.reference("moeify"), rtol=1e-4, atol=1e-5)


def test_peaks_are_relative_to_the_thriftiest_peer_and_to_the_loop(benchmarks):
    peak = benchmarks("peak")
    rows = peak.rows_of({"transformers/eager": [8.0], "transformers/grouped_mm": [16.0], peak.LOOP: [4.0]}, {})
    assert [row["times_best_peer"] for row in rows] == ["1.000", "2.000", "0.500"]
    assert [row["times_segment_loop"] for row in rows] == ["2.000", "4.000", "1.000"]
    assert peak.weights("mixtral-like") == 168


def test_the_larger_dense_model_is_to_the_active_part_as_llama_is_to_that_of_mixtral(benchmarks):
    decode = benchmarks("decode")
    sparse, total, active, larger = (decode.skeleton(name) for name in decode.MODELS)
    assert decode.bytes_per_step(larger, 16) / decode.bytes_per_step(sparse, 16) == pytest.approx(70 / 12.9, rel=0.01)
    assert decode.bytes_per_step(total, 16) == pytest.approx(decode.bytes_per_step(sparse, 16, chosen=8), rel=0.001)
    assert decode.bytes_per_step(active, 16) == pytest.approx(decode.bytes_per_step(sparse, 16), rel=0.001)


def test_a_step_of_more_sequences_asks_more_experts(benchmarks, tiny_decoder):
    roofline = benchmarks("roofline")
    one, some, many = (roofline.experts_chosen(tiny_decoder, batch) for batch in (1, 3, 64))
    assert one == 2 <= some <= many <= 4


def test_a_sparse_model_is_compared_with_the_dense_one_and_with_what_the_hardware_allows(benchmarks, tmp_path):
    roofline = benchmarks("roofline")
    speeds = {
        ("sparse", "moeify", 4): [60.0], ("sparse", "transformers/eager", 4): [10.0],
        ("sparse", "transformers/grouped_mm", 4): [20.0],
        (roofline.DENSE, "moeify", 4): [10.0], (roofline.DENSE, "transformers", 4): [5.0],
    }  # fmt: skip
    beside = {(name, 4): {"memory_limit": 80.0, "product_limit": 90.0} for name in ("sparse", roofline.DENSE)}
    rows = roofline.rows_of(speeds, beside)
    assert [row.get("over_dense") for row in rows] == ["6.000", "2.000", "4.000", None, None]
    assert [row["speedup_over_best_peer"] for row in rows] == ["3.000", "0.500", "1.000", "2.000", "1.000"]
    assert rows[0]["share_of_limit"] == "0.750"
    assert all(row.keys() <= set(roofline.FIELDS) for row in rows)
    slower = roofline.rows_of(speeds | {(roofline.DENSE, "moeify", 4): [1.0]}, beside)
    assert slower[0]["over_dense"] == "12.000", "the dense model is not held back by what is slow of ours"
    benchmarks("pictures").draw_roofline(rows, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size


def test_rows_of_the_diagnosis_are_of_six_families_and_reach_what_is_promised():
    """95 % of the broken models named, and nothing found in six healthy ones with three seeds each."""
    with (FOLDER / "results" / "diagnosis.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    healthy = [row for row in rows if row["fault"] == "healthy"]
    assert len({(row["family"], row["seed"]) for row in healthy}) == 18
    assert all(row["right"] == "True" and not row["also"] for row in healthy)
    broken = [row for row in rows if row["fault"] in FAULTS]
    assert {row["fault"] for row in broken} == FAULTS.keys()
    assert len({row["family"] for row in broken}) == 6
    assert sum(row["right"] == "True" for row in broken) >= 0.95 * len(broken)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ways_of_fine_tuning_train_what_they_say(benchmarks):
    tune = benchmarks("tune_memory")
    sizes = argparse.Namespace(layers=1, experts=4, width=16, hidden=8, threads=1, threshold=0.2)
    experts, numbers = zip(*(tune.tuned(sizes, way)[1:] for way in tune.WAYS), strict=True)
    assert numbers[0] == sum(p.numel() for p in tune.model(sizes).parameters())
    assert experts[0] == experts[2] == 4
    assert experts[1] == experts[3] < 4
    assert numbers[1] == experts[1] * 3 * 16 * 8
    assert numbers[3] * 4 == numbers[2] * experts[3]


def test_adapters_answer_as_in_peft_and_both_libraries_train_the_same_numbers(benchmarks, tmp_path):
    adapters = benchmarks("adapters")
    base = adapters.dense(argparse.Namespace(width=32, layers=1))
    folders = adapters.write(base, tmp_path, 4)
    adapters.must_agree(adapters.arrows(base, folders), torch.arange(48).unsqueeze(0))
    trained = {
        name: sum(p.numel() for p in model.parameters() if p.requires_grad)
        for name, model in adapters.singles(base, folders[0]).items()
    }
    assert trained["moeify"] == trained["PEFT"] > 0
    strangers = {name: adapters.singles(base, folders[at])[name] for at, name in enumerate(("moeify", "PEFT"))}
    with pytest.raises(RuntimeError, match="logits of moeify and PEFT differ by"):
        adapters.must_agree(strangers, torch.arange(48).unsqueeze(0))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_long_rows_are_packed_and_a_sparse_layer_has_the_active_size_of_the_dense_one(benchmarks):
    long_text = benchmarks("long_text")
    sparse, dense = long_text.layer("sparse"), long_text.layer("dense")
    router = sparse.router.weight.numel()
    assert count(sparse).flops - 2 * router == count(dense).flops
    assert long_text.documents_of(long_text.fullest(4096)) > 1
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed would hold the layer's memory
    peak, seconds = long_text.used("layer", "sparse", 4096, 1)
    assert peak > 4096 * long_text.WIDTH * 4 / 2**20  # more than the tokens
    assert seconds > 0
