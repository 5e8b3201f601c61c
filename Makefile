# `make help` lists what there is. Everything lives in .venv; stamps in it say what is installed.

VENV := .venv
BIN  := $(VENV)/bin
# The first of these that is Python >= 3.11 (a name on the PATH may be a shim that does not work).
PYTHONS := python3.11 python3.12 python3.13 python3
PYTHON ?= $(shell for p in $(PYTHONS); do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test check exact bench drift docs long survival format clean
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.package  ## train real digits over four unequal processes, kill one, compare
	@$(BIN)/crowdmesh demo

test: $(VENV)/.dev  ## all tests that CI runs
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: $(VENV)/.dev  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

exact: $(VENV)/.dev  ## the full exactness matrix (432 cells), and each model of the zoo
	$(BIN)/python -m pytest tests/exact -m '' -n 2 --dist loadgroup

long: $(VENV)/.dev  ## what is too long for CI
	$(BIN)/python -m pytest -m long

survival: $(VENV)/.dev  ## a hundred runs in which devices are killed; goes on where its log ends
	$(BIN)/python tests/system/exactly_once.py --log exactly_once.log

# In the order of their length. `drift` (docs/exactness.md) has a target of its own.
BENCHMARKS := mobility machines codec transport kernels stage_split pipeline prediction
BENCHMARKS += torch_pipeline memory recovery startup presets solvers partition departures replication_policies coalitions

bench: $(VENV)/.dev $(VENV)-bench/.torch  ## benchmarks; results go into benchmarks/results and docs
	@missed=""; for name in $(BENCHMARKS); do \
		start=$$(date +%s); echo "== $$name"; \
		$(BIN)/python benchmarks/$$name.py || missed="$$missed $$name"; \
		echo "== $$name took $$(( $$(date +%s) - start )) s"; done; \
	$(BIN)/python benchmarks/render.py; \
	[ -z "$$missed" ] || { echo "did not run to the end:$$missed" >&2; exit 1; }

drift: $(VENV)/.dev  ## how far stages drift from one program in 100 steps
	$(BIN)/python benchmarks/drift.py

docs: $(VENV)/.docs  ## the documentation as HTML in docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

format: $(VENV)/.dev  ## put the code into the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove everything that make has made, runs excepted
	rm -rf $(VENV) $(VENV)-bench docs/_build .pytest_cache .ruff_cache .hypothesis

$(VENV)/.venv:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; found none of: $(PYTHONS)" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { echo "'$(PYTHON) -m venv' failed; on Debian: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.package: $(VENV)/.venv pyproject.toml
	@echo "installing crowdmesh_jax and what it needs (a few minutes the first time)"
	@start=$$(date +%s); $(PIP) -e . && echo "installed in $$(( $$(date +%s) - start )) s"
	@touch $@

$(VENV)/.dev: $(VENV)/.package
	@echo "installing the test tools"
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.package
	@echo "installing the documentation tools"
	@$(PIP) -e '.[docs]'
	@touch $@

# torch is what some benchmarks compare with, and nothing else here: it has an environment of its
# own. The build for CPUs where the package index has it; any other build computes on the CPU too.
TORCH := 2.13.0
$(VENV)-bench/.torch: $(VENV)/.venv
	@echo "installing torch $(TORCH) into $(VENV)-bench, for benchmarks only"
	@$(PYTHON) -m venv $(VENV)-bench
	@pip="$(VENV)-bench/bin/python -m pip --disable-pip-version-check install --quiet numpy"; \
		$$pip 'torch==$(TORCH)+cpu' 2>/dev/null || $$pip 'torch==$(TORCH)'
	@touch $@
