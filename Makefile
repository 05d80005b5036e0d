# Everything there is to run. Each command makes its own environment first, so a fresh machine needs Python and make only.

PYTHON  ?= python3
WORKERS ?= 2

VENV   := .venv
python := $(VENV)/bin/python
# Stamps: set-up runs again only when what it installs from has changed.
installed := $(VENV)/.installed
peers     := $(patsubst %,.peers/%/.installed,galore-torch-1.0 apollo-torch-1.0.3)

CORE      := $(addprefix tests/,projection lowbit optim targets gradients)
PROCESSES := tests/distributed tests/gradients/test_processes.py

# One thread a test process: two processes on two cores are faster than one process with two threads.
test test-fast test-oldest frameworks: export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-fast test-oldest frameworks check format bench docs dist clean

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*##/ { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(installed) $(peers)  ## make .venv and install what was tested (constraints.txt)

demo: $(installed)  ## the main job: pre-train a tiny LLaMA with GaLore and with AdamW, and compare
	$(VENV)/bin/galore compare pretrain --preset llama-tiny --method galore --method full --out runs/demo $(ARGS)

test: $(installed) $(peers)  ## the whole test suite
	$(python) -m pytest -n $(WORKERS) --dist worksteal --durations 10 $(ARGS)

test-fast: $(installed) $(peers)  ## the test suite without what takes more than a few seconds
	$(python) -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-oldest: .oldest/.installed  ## the core's fast tests and all of several processes with the oldest releases allowed
	.oldest/bin/python -m pytest -n $(WORKERS) -m "not slow" $(CORE) $(ARGS)
	.oldest/bin/python -m pytest -n $(WORKERS) --dist worksteal $(PROCESSES) $(ARGS)

frameworks: export GALORE_FRAMEWORKS ?= .frameworks
frameworks: $(installed)  ## run published frameworks with GaLore, each in an environment of its own under .frameworks
	$(python) -m pytest -rsP --durations 10 tests/integrations/test_*_for_real.py $(ARGS)

check: $(installed)  ## lint, format and types
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy galore_torch reference benchmarks examples

format: $(installed)  ## put imports and layout in order
	$(python) -m ruff check --fix
	$(python) -m ruff format

bench: $(installed)  ## the cost of a step and of a renewal, beside its peers and the physical floor (ARGS="--quick")
	$(python) -m benchmarks.step $(ARGS)

docs: $(installed)  ## the documentation as a site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict

dist: $(installed)  ## wheel and source archive in dist/
	rm -rf dist
	PIP_CONSTRAINT=constraints.txt $(python) -m build

clean:  ## remove everything that set-up and the tools made
	rm -rf $(VENV) .oldest .peers .frameworks .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

$(installed): pyproject.toml constraints.txt
	test -x $(python) || $(PYTHON) -m venv $(VENV)
	$(python) -m pip install -c constraints.txt -e ".[all,dev]"
	@touch $@

.oldest/.installed: pyproject.toml constraints-oldest.txt
	test -x .oldest/bin/python || $(PYTHON) -m venv .oldest
	.oldest/bin/python -m pip install -c constraints-oldest.txt -e ".[train,bnb,torchao]" pytest pytest-xdist hypothesis tensorly \
		lightning prodigyopt schedulefree torch-optimi
	@touch $@

# galore-torch 1.0 and apollo-torch, whose trajectories ours must equal, lie in folders of their own: the first is
# imported as galore_torch, as ours is.
$(peers): .peers/%/.installed: | $(installed)
	$(python) -m benchmarks.common.peers $*
