# Every target sets up what it needs; the environment lives in .venv and is rebuilt when pyproject.toml changes.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test nightly check bench wheels wheel gpu claims suites docs compatibility clean

demo: $(VENV)/.test
	$(BIN)/moeify train --minutes 6 --output runs/demo --resume

test: $(VENV)/.test $(VENV)/.interpreter
	$(BIN)/python -m pytest tests --numprocesses 2 --dist worksteal

# make nightly KILLS=40 CASES=200 takes some minutes in the place of some hours; a release has RANK_KILLS=500.
KILLS  ?= 500
CASES  ?= 2000
RANK_KILLS ?= 50
nightly: $(VENV)/.test
	$(BIN)/python tests/nightly/kills.py --kills $(KILLS)
	$(BIN)/python tests/nightly/saves.py --kills $(KILLS)
	$(BIN)/python -m pip install --quiet --editable '.[torchft]'
	$(BIN)/python tests/nightly/replicas.py --kills 20
	$(BIN)/python tests/nightly/sharded.py --kills $(RANK_KILLS) --restarts 9 --exits 100
	$(BIN)/python tests/nightly/kernels.py --cases $(CASES)
	$(BIN)/python -m pytest tests/nightly/families.py
	$(BIN)/python benchmarks/exports.py --to transformers gguf mlx torch --out $(VENV)/exports.csv
	$(BIN)/python -m pytest tests -m nightly

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/codespell

# LLAMA=<folder of llama-bench and llama-quantize> measures llama.cpp too; benchmarks/README.md says how to build them.
# BUDGET minutes for all; the same command then measures what it had no time for. AVX2=1 uses no other instructions.
BUDGET ?= 55
bench: $(VENV)/.bench
	$(BIN)/python benchmarks/all.py --minutes $(BUDGET) $(if $(LLAMA),--llama $(LLAMA)) $(if $(AVX2),--avx2)

# Wheels with the C++ kernels, into dist/: by cibuildwheel where there is Docker, else of this machine's platform.
wheels: $(VENV)/.wheels
	if docker info > /dev/null 2>&1; then $(BIN)/cibuildwheel --output-dir dist; else $(MAKE) wheel; fi

wheel: $(VENV)/.wheels
	rm -rf dist/raw
	HATCH_BUILD_HOOK_ENABLE_CUSTOM=1 $(BIN)/python -m pip wheel --no-deps --wheel-dir dist/raw .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --wheel-dir dist dist/raw/*.whl
	rm -rf dist/raw

gpu: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --editable '.[gpu]'
	$(BIN)/python -m pytest tests/test_gpu.py tests/kernels/triton -m 'nightly or not nightly'
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/run.py --device cuda --tokens 1 16 256 4096 32768

# FULL=1 runs every claim with all of its seeds; claims/runs.toml says what each takes.
claims: $(VENV)/.test
	$(BIN)/moeify reproduce --all $(if $(FULL),--full)

# The tests of transformers and PEFT themselves, without moeify and with it behind their experts; they are fetched from the
# package index. OFFLINE=1 lets tiny random models stand in for those of huggingface.co.
suites: $(VENV)/.suites
	$(BIN)/python tests/suites/run.py $(if $(OFFLINE),--offline)

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

# The table of the recipes that other programs can hold, in docs/guide/export.md; a test fails where it is old.
compatibility: $(VENV)/.test
	$(BIN)/python -m moeify.export.table docs/guide/export.md

clean:
	rm -rf $(VENV) site runs

$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

# Triton's interpreter runs the kernels of GPUs. Torch for CUDA insists on a triton of its own, so none is put over it.
$(VENV)/.interpreter: $(VENV)/.test
	$(BIN)/python -c 'import triton' 2> /dev/null || $(BIN)/python -m pip install --quiet --editable '.[interpret]'
	touch $@
