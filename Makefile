# `make demo` and `make test` do all the set-up they need; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

# `check` is `lint` and then `test`: the same two that .ci/run calls.
.PHONY: help demo test lint check exhaustive bench gpu clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# pip rather than another installer: it is the one tool that every Python brings along.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP) ## train one network in float32, BF16 and FP8 side by side; writes runs/demo
	$(BIN)/octavo compare --out runs/demo

# Processes that each ran several threads would slow each other down.
test: $(STAMP) ## run the tests, in WORKERS=2 processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(STAMP) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test ## everything CI runs

exhaustive: $(STAMP) ## every float32 bit pattern through every 8-bit format on two backends, and every product (over an hour)
	$(BIN)/python tests/exhaustive.py

bench: $(STAMP) ## the benchmarks, each beside its peers; writes benchmarks/results
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/casts.py
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/jax_step.py
	$(BIN)/python benchmarks/emulate.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/engine_scaling.py
	$(BIN)/python benchmarks/speedrun.py
	$(BIN)/python benchmarks/replicas.py
	$(BIN)/python benchmarks/validate.py

gpu: $(STAMP) ## the tests and benchmarks that need a CUDA device; without one it says so
	@$(BIN)/python -c "import sys, torch; sys.exit(torch.cuda.is_available())" \
		&& echo "no CUDA device here: nothing to test or measure" \
		|| { $(BIN)/python -m pytest tests/gpu && $(BIN)/python benchmarks/gpu.py \
			&& $(BIN)/python benchmarks/gpu_engine.py; }

clean: ## remove the environment and what the tools left
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
