# Every target sets up what it needs: Python 3.11 or newer with venv is all that must be there.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint format golden-check gpu-check clean

demo: .venv/ready
	$(BIN)/nextlat demo

test: .venv/ready-dev
	$(BIN)/python -m pytest -n $(JOBS)

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Shows that a refactor changed no bit: the golden trajectories of BASE and of this tree, on this machine.
golden-check: .venv/ready-dev
	$(BIN)/python -m tests.invariants.check $(BASE)

# What to run first on a machine with a CUDA GPU; uses the python3 and torch that are there.
gpu-check:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_check.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[plots]"
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache
