"""The programs of `benchmarks/`, imported as they import their neighbours, and a small decoder for them."""

import importlib
import os
from pathlib import Path

import pytest
import transformers

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Import a program by name, as it imports its neighbours."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def avx2(benchmarks):
    return os.environ | benchmarks("all").AVX2 | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def no_time(benchmarks, monkeypatch):
    """A point of which no time is left, on a machine with slow products."""
    allowance = benchmarks("allowance")
    monkeypatch.setattr(allowance.ALLOWANCE, "free", 0.0)


@pytest.fixture
def tiny_decoder():
    config = transformers.MixtralConfig(
        vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config).eval()
