# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := build/demo
PYTEST := $(BIN)/python -m pytest
# Most tests wait for processes: more of them side by side than there are cores. tests/grouping.py says which stay together.
PARALLEL ?= 4
SIDE_BY_SIDE := -n $(PARALLEL) --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults test-long test-gpu check format docs bench clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(READY)  ## build .venv from pinned requirements

$(READY): .ci/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r .ci/requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(READY)

demo: $(READY)  ## a working folder, an SFT job on two workers with ZeRO-2, three questions before and after
	rm -rf $(DEMO)
	$(BIN)/muster init $(DEMO)
	@echo; echo "== before: the untrained model on three held-out questions"
	$(BIN)/muster generate $(DEMO)/model --file $(DEMO)/data/sft.heldout.jsonl --limit 3 --max-new-tokens 96
	@echo "== training"
	$(BIN)/muster run $(DEMO)/sft.yaml
	@echo; echo "== after"
	$(BIN)/muster generate $(DEMO)/runs/word-problems --file $(DEMO)/data/sft.heldout.jsonl --limit 3 --max-new-tokens 96

test: $(READY)  ## what every change must pass
	$(PYTEST) $(SIDE_BY_SIDE) -m "not faults and not long and not gpu"

test-faults: $(READY)  ## real faults: killed workers, drivers and machines, hangs, full disks; .ci/run runs it after `test`
	$(PYTEST) $(SIDE_BY_SIDE) -m "faults and not long and not gpu"

test-long: $(READY)  ## soaks, learning runs, Slurm, AWS, whole tables (hours, by hand)
	$(PYTEST) -m "long and not gpu"

test-gpu: $(READY)  ## the tests that need a GPU
	$(PYTEST) -m gpu

check: $(READY)  ## format, lint, types, import contracts, unit tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -q -n 2 --dist loadgroup -m "not cpu and not cluster and not faults and not long and not gpu"

format: $(READY)  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)  ## docs/reference, from the code
	$(BIN)/python -m launcher.reference docs/reference

bench: $(READY)  ## all benchmarks (long; on a quiet machine)
	$(BIN)/python -m benchmarks

clean:  ## remove everything that was built
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
