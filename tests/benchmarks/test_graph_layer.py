"""Engines that run graphs as peers of one layer: they compute what the definition does, or their rows say why not."""

import pytest
import torch

SIZES = (16, 32, 4, 2)


@pytest.fixture
def graph_layer(benchmarks):
    return benchmarks("graph_layer")


@pytest.fixture
def installed(graph_layer, monkeypatch):
    monkeypatch.setattr(graph_layer.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    return graph_layer


def test_an_engine_that_is_not_installed_has_a_row_that_says_so(benchmarks, graph_layer, monkeypatch):
    run = benchmarks("run")
    monkeypatch.setattr(graph_layer.importlib.util, "find_spec", lambda name: None)
    blocks = run.blocks_of(SIZES, torch.float32)
    _, left_out = run.timers(run.Case(blocks, 32))
    rows = {row["implementation"]: row for row in run.rows_of({}, left_out, lambda name: 1.0)}
    assert {engine: rows[engine]["quartiles_ms"] for engine in graph_layer.ENGINES} == dict.fromkeys(
        graph_layer.ENGINES, "left out: not installed"
    )
    assert run.Case(blocks, 32, backward=True).engines == {}


def test_products_in_bf16_are_openvinos_alone(installed):
    assert installed.why_not("onnxruntime", torch.float32) is None
    assert "bf16" in installed.why_not("onnxruntime", torch.bfloat16)
    assert installed.why_not("openvino", torch.bfloat16) is None


@pytest.mark.parametrize(("here", "fits"), [({"avx2"}, True), ({"avx2", "avx512f"}, False)])
def test_engines_take_no_part_where_instructions_are_withheld(installed, monkeypatch, here, fits):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setattr(installed, "flags", lambda: here)
    assert (installed.why_not("openvino", torch.float32) is None) == fits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_graphs_compute_the_experts_of_the_first_block(benchmarks, graph_layer, engine, dtype):
    pytest.importorskip(engine)
    if reason := graph_layer.why_not(engine, dtype):
        pytest.skip(reason)
    run = benchmarks("run")
    blocks = run.blocks_of(SIZES, dtype)[:2]
    for tokens in (1, 7, 32):
        case = run.Case(blocks, tokens)
        expected = case.reference("moeify")
        for block in blocks:
            y = case.ways()[engine](block).float()
            torch.testing.assert_close(
                y, expected, rtol=0, atol=16 * torch.finfo(dtype).eps * expected.abs().max().item()
            )
    assert blocks[0].graphs[engine] is not blocks[1].graphs[engine]
