# Everything that people and machines run here; `make help` lists it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu test-device test-flower campaign bench lint docs coverage constraints clean

BIN := .venv/bin
DEVICE_BIN := .venv-device/bin
FLOWER_BIN := .venv-flower/bin
# Twice the cores: the tests that start processes wait for most of their time.
WORKERS ?= $(shell echo $$(( 2 * $$(nproc) )))
DEVICE_LIMIT_MB := 250
NAME ?= simulation
PEERS := .venv-bench/.installed $(if $(filter inference,$(NAME)),$(patsubst %,.venv-%/.installed,kserve mlserver))
SOURCES := $(shell find fedcore edge_client server -type f -not -name '*.pyc')

# One thread a process: models this small gain nothing from more, and pools of threads that wait for
# each other lose a lot where the cores are shared, by test workers or by another program.
demo test test-gpu test-device test-flower campaign coverage: export OMP_NUM_THREADS := 1

# Where bytecode is kept, processes that tests start need not compile the sources, nor pytest rewrite
# the assertions of its last run.
test test-gpu test-device test-flower campaign coverage: export PYTHONDONTWRITEBYTECODE :=

# The first interpreter that runs and is new enough; a shim that fails when called is passed over.
FIND_PYTHON := for python in $(PYTHON) python3.11 python3; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then break; fi; python=; done; \
	if [ -z "$$python" ]; then echo "fedcore needs Python 3.11 or newer, and found none as \
	python3.11 or python3. Nothing was installed; install it, or name it: make PYTHON=/path/to/python3." \
	>&2; exit 1; fi

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed  ## make .venv with exactly the versions of constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	@$(FIND_PYTHON); [ -x $(BIN)/python ] || $$python -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[sim,dev,docs]"
	@touch $@

demo: setup  ## the whole loop on handwritten digits, until a device answers
	@[ -d runs/keys ] || $(BIN)/fedcore release init --keys runs/keys --repository runs/repository
	$(BIN)/fedcore simulate examples/digits/run.toml --fresh
	$(BIN)/fedcore device update --repository runs/repository \
		--root runs/keys/root.json --model digits --store runs/device
	$(BIN)/fedcore device infer --store runs/device --model digits \
		--input examples/digits/input.json

test: setup  ## every test that needs no GPU; FEDCORE_DATA names the data sets of some
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder -m "not gpu" $(ARGS)

test-gpu: setup  ## the tests that need an NVIDIA GPU
	$(BIN)/pytest -m gpu $(ARGS)

test-device: setup .venv-device/.installed  ## the base package alone: its size, and that it infers
	FEDCORE_DEVICE_VENV=$(CURDIR)/.venv-device FEDCORE_DEVICE_LIMIT_MB=$(DEVICE_LIMIT_MB) \
		$(BIN)/pytest tests/e2e/test_base_install.py $(ARGS)

# A wheel, not an editable install: what a device gets is what the wheel holds.
.venv-device/.installed: pyproject.toml constraints-device.txt $(SOURCES)
	@$(FIND_PYTHON); [ -x $(DEVICE_BIN)/python ] || $$python -m venv .venv-device
	rm -rf build
	$(DEVICE_BIN)/pip install --quiet --disable-pip-version-check -c constraints-device.txt .
	rm -rf build
	@touch $@

test-flower: .venv-flower/.installed  ## the contract tests with the latest Flower of the range
	$(FLOWER_BIN)/pytest -n $(WORKERS) tests/contract $(ARGS)

# certifi and uv: each version of Flower asks for its own range of them.
.venv-flower/.installed: pyproject.toml constraints.txt
	@$(FIND_PYTHON); [ -x $(FLOWER_BIN)/python ] || $$python -m venv .venv-flower
	grep -vE '^(flwr|certifi|uv)==' constraints.txt > .venv-flower/constraints.txt
	$(FLOWER_BIN)/pip install --quiet --disable-pip-version-check --upgrade \
		-c .venv-flower/constraints.txt -e ".[sim,dev]"
	@touch $@

campaign: setup  ## kill, stop, cut off, tear, fill and forge; results go to runs/campaign
	$(BIN)/python -m tests.campaign.run $(ARGS)
	$(BIN)/python -m tests.campaign.deliveries
	$(BIN)/python -m tests.campaign.serving
	$(BIN)/python -m tests.campaign.network
	$(BIN)/python -m tests.campaign.finetune_kills --out runs/campaign/finetune_kills.json

bench: setup $(PEERS)  ## a benchmark, NAME=simulation; results go to runs/bench
	$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

# The systems that fedcore is compared with, in versions that stay: no part of fedcore needs them.
.venv-bench/.installed: benchmarks/peers/requirements.txt
	@$(FIND_PYTHON); [ -x .venv-bench/bin/python ] || $$python -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# Servers of inference, whose dependencies exclude each other's.
.venv-kserve/.installed .venv-mlserver/.installed: .venv-%/.installed: benchmarks/peers/%.txt
	@$(FIND_PYTHON); [ -x .venv-$*/bin/python ] || $$python -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

lint: setup  ## formatting, style, types and the layers of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests
	$(BIN)/lint-imports

coverage: setup  ## the tests, with lines and branches that none of them reaches
	$(BIN)/pytest -n $(WORKERS) -m "not gpu" --cov --cov-report=term --cov-report=html $(ARGS)

# Not --quiet: that also silences the warnings which --strict counts.
docs: setup  ## write the generated pages, then build the site in runs/site; checks every link
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Resolved afresh in environments of their own. What torch's CUDA build brings is left out: torch
# pins it itself, and a CPU build has none of it.
constraints:  ## resolve again and write constraints.txt and constraints-device.txt
	@$(FIND_PYTHON); rm -rf .venv-resolve build; \
	torch=$$(grep '^torch==' constraints.txt); \
	resolve() { $$python -m venv --clear .venv-resolve; \
		.venv-resolve/bin/pip uninstall --quiet --yes setuptools; \
		.venv-resolve/bin/pip install --quiet --disable-pip-version-check $$1 ".$$2"; \
		{ grep '^#' $$3; .venv-resolve/bin/pip freeze --all --exclude pip --exclude fedcore \
			| grep -v '^nvidia-\|^triton==' | sed 's/+[a-z0-9.]*$$//' | LC_ALL=C sort -f; } > $$3.new; \
		mv $$3.new $$3; }; \
	resolve "$$torch" "[sim,dev,docs]" constraints.txt; \
	resolve "" "" constraints-device.txt; \
	rm -rf .venv-resolve build

clean:  ## remove environments and caches; runs/ stays, for it holds keys
	rm -rf .venv .venv-device .venv-flower .venv-bench .venv-kserve .venv-mlserver .venv-resolve
	rm -rf build dist htmlcov *.egg-info
	rm -rf .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
