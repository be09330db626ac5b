# Two commands do everything: `make compare` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/compare

.PHONY: compare quick test lint build kernel bench docs clean
.DELETE_ON_ERROR:

$(VENV)/.ready: requirements/dev.txt pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

compare: $(VENV)/.ready  ## four optimizers on images, language and translation; the report is in $(OUT)
	$(BIN)/apollo-qn compare --out $(OUT) $(ARGS)

quick: $(VENV)/.ready  ## a short look at the same
	$(BIN)/apollo-qn compare --quick --out $(OUT)-quick $(ARGS)

test: lint  ## format, lint, types, tests with coverage, wheel
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(ARGS)
	$(BIN)/python scripts/check_wheel.py

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

build: $(VENV)/.ready  ## wheel and sdist
	$(BIN)/python -m build --no-isolation

kernel: $(VENV)/.ready  ## compile the fused kernel again
	$(BIN)/python setup.py --quiet build_ext --inplace

bench: $(VENV)/.ready  ## step times against torch.optim; the table is in runs/bench
	$(BIN)/apollo-qn bench $(ARGS)

docs: $(VENV)/.ready  ## the documentation as a site; open site/index.html
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site src/*.egg-info src/apollo_qn/backends/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
