# make quickstart   the whole method on digit scenes: weights -> graphs -> features -> probes -> fusion -> report.html
# make test         the test suite (offline, no GPU)
# make faults       the long tests of what a store promises: killed everywhere, power cuts, full disks, corruption, races (about ten minutes)
# make lint         ruff and pyright
# make full-size    DiT-XL/2 and Plaid 1B at full size, random weights: export, parity, speed (about 24 GiB of memory)
# make gpu          correctness, ceilings and speed on an NVIDIA GPU, with .venv or with the system's own Python; options in GPU="..."

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup quickstart test faults lint full-size gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/difffeat quickstart --output quickstart-out

test: setup
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

faults: setup
	$(BIN)/python -m tests.faults

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

full-size: setup
	$(BIN)/python -m difffeat.benchmarks.full_size --output full-size-out
	$(BIN)/python -m pytest -m slow

# Installs nothing: a machine with a card may have its own torch and no package index.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m difffeat.benchmarks.gpu --output gpu-out $(GPU)

clean:
	rm -rf .venv quickstart-out full-size-out gpu-out
