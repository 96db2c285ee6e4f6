# make demo   deblur the sample photo and look at it        make test   every test, with coverage
# make check  lint, types and tests                         make bench  speed and memory, beside the floor
# make results DATA=…  what the model does, in docs/results/, from the folder with the validation pairs

PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
GPU := $(shell command -v nvidia-smi || [ "$$(uname -s)" = Linux ] || echo not-linux)

.PHONY: setup demo test lint types format check bench results
setup: .venv/installed

# Without a GPU the CPU build of torch is enough and gigabytes smaller: from a local wheel if there is one, else through
# uv, which knows where PyTorch keeps it. With a GPU, and on other systems, the standard build is the right one.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
ifeq ($(GPU),)
	$(BIN)/pip install -q --no-deps "torch==$(TORCH)+cpu" \
	|| { $(BIN)/pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu "torch==$(TORCH)"; } \
	|| $(BIN)/pip install -q "torch==$(TORCH)"
endif
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py --output demo_output

test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --cov --cov-report=term --cov-fail-under=90

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint types test

bench: setup
	$(BIN)/python benchmarks/speed.py

results: setup
	$(BIN)/python scripts/results.py $(DATA)
