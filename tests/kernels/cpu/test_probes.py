"""Measurements that select a kernel: taken once per processor, kept in the cache, and measured again when damaged."""

import time

import pytest
import torch

from moeify.files import read_json
from moeify.kernels.cpu import cpp, crossover, layer_crossover, probes
from moeify.kernels.cpu.cpp import reading
from moeify.kernels.cpu.crossover import ANY, COUNTS, WITHOUT_CLOCK, last_win, max_rows
from moeify.kernels.cpu.layer_crossover import max_layer_rows
from moeify.kernels.cpu.onednn import can_pack
from moeify.kernels.cpu.probes import remembered

LAYOUTS = ["nt", "nn", "tn"]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    cpp.why_not()  # compiles into the cache of all tests
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "cache"))
    measured = crossover._measured, layer_crossover._measured, reading._fastest
    for function in measured:
        function.cache_clear()
    yield
    for function in measured:
        function.cache_clear()


def test_a_later_process_does_not_measure_again():
    assert remembered("how many?", lambda: 7) == 7
    assert remembered("how many?", lambda: pytest.fail("measured again")) == 7
    assert remembered("another?", lambda: True) is True
    assert read_json(probes.file())["answers"] == {"another?": True, "how many?": 7}


@pytest.mark.parametrize("change", ["processor", "instructions", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"])
def test_a_home_folder_of_several_processors_has_an_answer_for_each(change, monkeypatch):
    assert remembered("how many?", lambda: 7) == 7
    if change == "processor":
        monkeypatch.setattr(probes, "_processor", lambda: {"model name": "another"})
    elif change == "instructions":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
    else:
        monkeypatch.setenv(change, "SSE4_1")
    assert remembered("how many?", lambda: 8) == 8
    assert len(list(probes.file().parent.glob("*.json"))) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"answers": 3}'])
def test_a_damaged_file_is_measured_again_and_replaced(content):
    probes.file().parent.mkdir(parents=True)
    probes.file().write_text(content)
    assert remembered("how many?", lambda: 7) == 7
    assert read_json(probes.file())["answers"] == {"how many?": 7}


def test_where_no_file_can_be_written_the_process_measures(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path / "file"))
    assert remembered("how many?", lambda: 7) == 7
    assert remembered("how many?", lambda: 8) == 8


def test_the_kernel_is_used_up_to_where_it_is_first_behind():
    assert last_win(lambda count: [1.0, 1.0], COUNTS) == ANY
    assert last_win(lambda count: [2.0, 1.0], COUNTS) == 0
    assert last_win(lambda count: [2.0 if count == 32 else 1.0, 1.0], COUNTS) == 16
    assert last_win(lambda count: [2.0 if count == COUNTS[-1] else 1.0, 1.0], COUNTS) == COUNTS[-2]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_of_a_comparison_compute_the_same(layout, dtype):
    if reason := cpp.why_not():
        pytest.skip(reason)
    written, *computed = crossover.ways(layout, dtype, 4)
    for compute in computed:
        written.fill_(float("nan"))
        compute()
        assert (written == (4 if layout == "tn" else 512 if layout == "nt" else 1024)).all()


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_to_compute_a_layer_compute_the_same_with_other_experts_in_every_call(packs, dtype, monkeypatch):
    if reason := cpp.why_not():
        pytest.skip(reason)
    asked = []
    monkeypatch.setattr(crossover, "_measured", lambda *_: 32)
    compute = layer_crossover.infer_layer
    monkeypatch.setattr(
        layer_crossover, "infer_layer", lambda *call, **rest: asked.append(call[3]) or compute(*call, **rest)
    )
    fused, blocks = layer_crossover.ways(dtype, packs and can_pack(dtype), 64)
    for _ in range(2):
        torch.testing.assert_close(fused(), blocks(), rtol=0.02, atol=0)
    assert [sum(counts) for counts in asked] == [256, 256]
    assert asked[0] != asked[1]


@pytest.mark.parametrize("packs", [False, True])
def test_a_layer_is_measured_as_a_whole_beside_what_its_blocks_are_made_of(monkeypatch, packs):
    if reason := cpp.why_not():
        pytest.skip(reason)
    asked = []
    monkeypatch.setattr(layer_crossover, "last_win", lambda compare, counts: asked.append(counts) or 32)
    monkeypatch.setattr(crossover, "last_win", lambda compare, counts: 8)
    assert max_layer_rows(torch.float32, packs=packs) == 32
    assert asked == [layer_crossover.COUNTS]
    questions = read_json(probes.file())["answers"]
    assert sorted(questions.values()) == [8, 32]
    assert any(question.endswith("packed weights: layer, torch.float32, 1 threads") for question in questions) == packs


def test_what_else_runs_on_the_machine_does_not_decide():
    waiting, computing = probes.shortest(lambda: time.sleep(0.005), lambda: sum(range(20_000)), rounds=2)
    assert waiting < computing


def test_what_was_measured_meanwhile_is_kept():
    assert remembered("one", lambda: remembered("two", lambda: 2) - 1) == 1
    assert read_json(probes.file())["answers"] == {"one": 1, "two": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_of_rows_is_measured_once_and_without_random_numbers(monkeypatch, dtype):
    if reason := cpp.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(crossover, "COUNTS", (2, 4))
    before = torch.get_rng_state()
    assert max_rows("nt", dtype) in (0, 2, ANY)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(crossover, "last_win", lambda *_: pytest.fail("measured again"))
    crossover._measured.cache_clear()
    max_rows("nt", dtype)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_where_results_must_repeat_no_clock_decides(monkeypatch):
    if reason := cpp.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(crossover, "_measured", lambda *_: pytest.fail("measured"))
    assert max_rows("nt", torch.float32) == WITHOUT_CLOCK


def test_without_a_kernel_no_rows_are_its_own(monkeypatch):
    monkeypatch.setenv("MOEIFY_CPP", "0")
    assert max_rows("nt", torch.float32) == 0
    monkeypatch.setenv("MOEIFY_CPP", "1")
    assert max_rows("nt", torch.float16) == 0


STORED = [torch.float32, torch.bfloat16, torch.int8, torch.uint8]


def test_how_weights_are_read_is_measured_once_and_kept(monkeypatch):
    if reason := cpp.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(reading, "shortest", lambda *ways, rounds: [3.0, 2.0, 1.0, 4.0, 5.0])
    assert reading.reading(torch.int8, 2**26) == reading.READINGS[2]
    monkeypatch.setattr(reading, "shortest", lambda *ways, rounds: pytest.fail("measured again"))
    reading._fastest.cache_clear()
    assert reading.reading(torch.int8, 2**26) == reading.READINGS[2]


def test_a_reading_that_is_hardly_faster_than_the_first_does_not_replace_it(monkeypatch):
    monkeypatch.setattr(reading, "ways", lambda dtype: (None, []))
    monkeypatch.setattr(reading, "shortest", lambda *ways, rounds: [1.0, 0.97, 2.0, 2.0, 2.0])
    assert reading._measure(torch.int8) == 0
    monkeypatch.setattr(reading, "shortest", lambda *ways, rounds: [1.0, 0.97, 2.0, 0.9, 2.0])
    assert reading._measure(torch.int8) == 3


def test_small_weights_and_determinism_need_no_measurement(monkeypatch):
    monkeypatch.setattr(reading, "_measure", lambda dtype: pytest.fail("measured"))
    assert reading.reading(torch.int8, 2**20) == reading.READINGS[0]
    torch.use_deterministic_algorithms(True)
    try:
        assert reading.reading(torch.int8, 2**26) == reading.READINGS[0]
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", STORED)
def test_all_readings_that_are_compared_compute_the_same(dtype, monkeypatch):
    if reason := cpp.why_not():
        pytest.skip(reason)
    monkeypatch.setattr(reading, "_BYTES", 2**22)
    monkeypatch.setattr(reading, "_HIDDEN", 256)
    y, ways = reading.ways(dtype)
    outputs = []
    for run in ways:
        run()
        outputs.append(y.clone())
        y.zero_()
    assert len(outputs) == len(reading.READINGS)
    assert outputs[0].abs().min() > 0
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=0)
