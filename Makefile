# Every target does all the set-up it needs, and nothing twice.
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.headstart-ready

.PHONY: demo test test-all check format bench bench-quick clean

demo: $(SETUP)
	$(BIN)/headstart demo

test: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The slow ones too.
test-all: $(SETUP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m ''

# What CI runs beside the tests: style, types.
check: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Wants an idle machine, for two hours on two cores.
bench: $(SETUP)
	$(BIN)/headstart bench loss
	$(BIN)/headstart bench train
	$(BIN)/headstart bench decode

# Whether it runs, not what it costs: a few minutes.
bench-quick: $(SETUP)
	$(BIN)/headstart bench decode --quick --out .venv/bench-quick

clean:
	rm -rf .venv

# Built anew when the versions or the dependencies change.
$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev,report,hf,data,watch,serve]'
	touch $@
