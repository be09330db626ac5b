# Two commands do everything: `make compare` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/compare
# Where the optimizer's tests run: cpu, cuda, cuda:1. On Linux the torch that pip brings from PyPI is
# one for CUDA; a machine's own is used by naming its Python, see CONTRIBUTING.md.
DEVICE ?= cpu
GPU_PYTHON ?= $(BIN)/python
DATA ?= data
RUNS ?= runs/results

.PHONY: compare quick test test-all test-matrix lint build kernel bench gpu-check results results-tables results-check docs clean
.DELETE_ON_ERROR:

$(VENV)/.ready: requirements/dev.txt pyproject.toml setup.py bench/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("make needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . -e bench
	touch $@

compare: $(VENV)/.ready  ## four optimizers on images, language and translation; the report is in $(OUT)
	$(BIN)/apollo-bench compare --out $(OUT) $(ARGS)

quick: $(VENV)/.ready  ## a short look at the same
	$(BIN)/apollo-bench compare --quick --out $(OUT)-quick $(ARGS)

# One thread per process: the tests run in two processes, and a sum's order of additions is fixed.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: lint results-check  ## format, lint, types, tables, the fast tests, wheel; with DEVICE=cuda the optimizer's tests there
ifeq ($(DEVICE),cpu)
	$(PYTEST) -m "not slow" --durations=10 $(ARGS)
	$(BIN)/python scripts/check_wheel.py
else
	APOLLO_QN_TEST_DEVICE=$(DEVICE) PYTHONPATH=src:bench/src:. $(GPU_PYTHON) -m pytest $(ARGS)
endif

test-all: lint results-check  ## the same with the slow tests, coverage, and proof that the fast ones notice faults
	$(PYTEST) --cov --cov-report=term-missing:skip-covered --durations=10 $(ARGS)
	$(BIN)/python scripts/check_wheel.py --pure
	$(BIN)/python -m tests.faults

test-matrix: $(VENV)/.ready  ## the optimizer's fast tests with the oldest, newest and other promised torch and Python
	OMP_NUM_THREADS=1 $(BIN)/nox --no-error-on-missing-interpreters $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

build: $(VENV)/.ready  ## wheels and sdists of both distributions
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m build --no-isolation --outdir dist bench

kernel: $(VENV)/.ready  ## compile the fused kernel again
	$(BIN)/python setup.py --quiet build_ext --inplace

bench: $(VENV)/.ready  ## step times against torch.optim; the table is in runs/steptime
	$(BIN)/apollo-bench steptime $(ARGS)

gpu-check: $(VENV)/.ready  ## all that is to be known of a GPU, in nine minutes; runs/gpu/summary.txt
	$(GPU_PYTHON) benchmarks/gpu.py --out runs/gpu $(ARGS)

results: $(VENV)/.ready  ## measure the evidence again, hours on two cores; DATA is where results/run.sh says
	results/run.sh $(DATA) $(RUNS)

results-tables: $(VENV)/.ready  ## write the tables of results/ and of the pages again
	$(BIN)/python scripts/results.py

results-check: $(VENV)/.ready  ## whether they are what the committed metrics give
	$(BIN)/python scripts/results.py --check

docs: $(VENV)/.ready  ## the documentation as a site; open site/index.html
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site src/*.egg-info bench/build bench/src/*.egg-info src/apollo_qn/backends/cpu/*.so build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .nox
