# make quickstart   the whole method on digit scenes: weights -> graphs -> features -> probes -> fusion -> report.html
# make test         the test suite (offline, no GPU)
# make faults       the long tests of what a store promises: killed everywhere, power cuts, full disks, corruption, races (about ten minutes)
# make lint         ruff and pyright
# make full-size    DiT-XL/2 and Plaid 1B at full size, random weights: export, parity, speed (about 24 GiB of memory)
# make gpu          the same and more on an NVIDIA GPU: every engine side by side, one call

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

gpu: setup
	$(BIN)/python -m difffeat.benchmarks.gpu --output gpu-out

clean:
	rm -rf .venv quickstart-out full-size-out gpu-out
