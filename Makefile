# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# cpu or cuda: which file of torch; without a word the one that pip takes on this machine.
LOCK ?=
DEMO := build/demo
AUDIT := build/audit
SITE := build/site-env
PYTEST := $(BIN)/python -m pytest
# Most tests wait for processes: more of them side by side than there are cores. tests/support/grouping.py says which stay together.
PARALLEL ?= 4
SIDE_BY_SIDE := -n $(PARALLEL) --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-faults test-long test-gpu check audit format docs site bench wheel clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(READY)  ## build .venv from pinned requirements

# The build backend comes first, by its hash: what is built from source is not given another.
$(READY): .ci/cpu.lock .ci/cuda.lock .ci/dev.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --require-hashes --no-deps -r .ci/dev.lock
	lock=$(LOCK); $(PIP_INSTALL) --require-hashes --no-build-isolation -r .ci/$${lock:-$$($(BIN)/python .ci/which_lock.py)}.lock -r .ci/dev.lock
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
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

check: $(READY) audit site  ## format, lint, types, import contracts, unit tests, known vulnerabilities, the site
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -q -n 2 --dist loadgroup -m "not cpu and not cluster and not faults and not long and not gpu"

audit: $(AUDIT)/.ready  ## known vulnerabilities of the pinned packages, where an index answers
	$(AUDIT)/bin/python .ci/audit.py

$(AUDIT)/.ready: .ci/audit.lock
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .ci/audit.lock
	touch $@

format: $(READY)  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)  ## docs/reference, from the code
	$(BIN)/python -m docs.generate_reference docs/reference

site: $(SITE)/.ready  ## build/site: docs/ as a site that can be searched offline; dead links and omitted pages are errors
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict -f docs/site/mkdocs.yml

$(SITE)/.ready: .ci/site.lock
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .ci/site.lock
	touch $@

bench: $(READY)  ## all benchmarks (long; on a quiet machine)
	$(BIN)/python -m benchmarks

wheel: $(READY) $(AUDIT)/.ready  ## build/wheel: the wheel, and beside it the list of what it is tested with (SBOM, CycloneDX)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	for lock in cpu cuda; do $(AUDIT)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible -o build/wheel/$$lock.cdx.json .ci/$$lock.lock; done

clean:  ## remove everything that was built
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
