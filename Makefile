# Two commands: `make train` sets up everything and trains the embedded default; `make test` sets up everything and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: train test lint clean

# so that all of it stays under 20 minutes it steps on a fifth of the rows, begins without the states of the longest (their words count)
# and takes 1,000 of the everyday requests. `python train.py` takes all (benchmarks/LOG.md, entries 56, 58 to 60 and 62)
train: $(VENV)/.ready
	$(BIN)/python train.py trainer.limit_train_batches=0.2 head.longest=100 data.sources.everyday.max_rows=1000 $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# packages are compiled as they are first imported, and that is kept; pip would compile all their 18,000 files, for over a minute
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
export PYTHONDONTWRITEBYTECODE :=

# torch first and pinned: on its own, another package would pull the newest build
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[dev,benchmarks]"
	touch $@

clean:
	rm -rf $(VENV) outputs multirun
