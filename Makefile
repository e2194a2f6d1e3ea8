# Every target does all the set-up it needs, and nothing twice.
PYTHON ?= python3
BIN := .venv/bin
CHECKS := .venv/.checks-ready
SETUP := .venv/.headstart-ready
PIP := $(BIN)/pip install --quiet --no-compile -c constraints.txt
# Python compiles what is imported when it is, once; all that is installed would take a minute.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo setup test test-all check format bench bench-quick clean

demo: $(SETUP)
	$(BIN)/headstart demo

setup: $(SETUP)

test: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The slow ones too.
test-all: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m ''

# What CI runs beside the tests: style, types.
check: $(CHECKS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(CHECKS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Wants an idle machine, for two hours on two cores.
bench: $(SETUP)
	$(BIN)/headstart bench loss
	$(BIN)/headstart bench train
	$(BIN)/headstart bench decode
	$(BIN)/headstart bench passes

# Whether it runs, not what it costs: a few minutes.
bench-quick: $(SETUP)
	$(BIN)/headstart bench decode --sizes 12M --batches 1 --repetitions 2 --prompt-tokens 16 --new-tokens 32 --prompt-count 2 --tune-seconds 0.5 --out .venv/bench-quick

clean:
	rm -rf .venv

# Built anew when the versions or the dependencies change. First what checks need, so that CI checks beside the rest.
$(CHECKS): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[serve,grammar]' mypy ruff types-PyYAML zstandard
	touch $@

$(SETUP): $(CHECKS)
	$(PIP) -e '.[dev,report,hf,data,watch,serve]'
	touch $@
