# Everything needs only make and Python 3.10 or newer: the first target that you ask for installs what is missing.
#   make demo                  make test                  make docs
#   make test PYTHON=python3.12 PYTEST_ARGS="-k metrics"

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
FLOOR := .venv-floor

# The tests use tiny models and nothing from the network; more threads than workers only get into each other's way.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
BENCH_ENV := TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# A worker takes tests that lie beside each other, so that what a file builds once is built once.
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-docs test-slow test-nightly fuzz mutants test-floor coverage lint format bench bench-quick bench-gpu dist clean

help: ## Show the targets.
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | while IFS='|' read -r target text; do printf '%-18s %s\n' "$$target" "$$text"; done

demo: $(VENV)/.installed ## Train and evaluate a small model on the data set that comes with the package.
	$(VENV)/bin/mm-transformers demo

test: $(VENV)/.installed ## Run the quick tests.
	$(TEST_ENV) $(VENV)/bin/python $(PYTEST) $(PYTEST_ARGS)

test-docs: $(VENV)/.installed ## Run every code block of the README and of docs/.
	$(TEST_ENV) $(VENV)/bin/python $(PYTEST) -m "not nightly" tests/project/test_docs.py $(PYTEST_ARGS)

docs: $(VENV)/.installed ## Build the site into site/; a link that leads nowhere is an error. Needs Python 3.11.
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

test-slow: $(VENV)/.installed ## Run the tests that take seconds each.
	$(TEST_ENV) $(VENV)/bin/python $(PYTEST) -m slow $(PYTEST_ARGS)

test-nightly: $(VENV)/.installed ## Run the tests that take minutes each.
	$(TEST_ENV) $(VENV)/bin/python $(PYTEST) -m nightly $(PYTEST_ARGS)

MINUTES ?= 60
fuzz: $(VENV)/.installed ## Try random changes of files of all kinds, for MINUTES (60); stops at the first failure.
	$(TEST_ENV) $(VENV)/bin/python tests/security/fuzz.py $(MINUTES)

MUTANTS ?= 200
SEED ?= 0
mutants: $(VENV)/.installed ## Change MUTANTS (200) spots of the code, one at a time; the tests must notice 90%.
	$(TEST_ENV) $(VENV)/bin/python tests/mutants.py --number $(MUTANTS) --seed $(SEED)

test-floor: $(FLOOR)/.installed ## Run the tests with the oldest transformers that is supported.
	$(TEST_ENV) $(FLOOR)/bin/python $(PYTEST) -m "not nightly" $(PYTEST_ARGS)

coverage: $(VENV)/.installed ## Run the tests and show which lines they leave out.
	$(TEST_ENV) $(VENV)/bin/python $(PYTEST) --cov -m "not nightly" $(PYTEST_ARGS)

lint: $(VENV)/.installed ## Check style, types and spelling.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell

format: $(VENV)/.installed ## Format the code and repair what ruff can repair.
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed ## Measure every figure of docs/benchmarks for the CPU (under 30 minutes on 2 cores).
	$(BENCH_ENV) $(VENV)/bin/python benchmarks/run.py cpu

bench-quick: $(VENV)/.installed ## Run all benchmarks in small (under 5 minutes); nothing is kept.
	$(BENCH_ENV) $(VENV)/bin/python benchmarks/run.py quick

bench-gpu: $(VENV)/.installed ## Measure the figures for a GPU.
	$(BENCH_ENV) $(VENV)/bin/python benchmarks/run.py gpu

dist: $(VENV)/.installed ## Build the sdist and the wheel into dist/, and check them. REPOSITORY_URL makes links absolute.
	$(VENV)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[release]'
	rm -rf dist build
	$(VENV)/bin/python -m build
	$(VENV)/bin/twine check --strict dist/*
	$(VENV)/bin/check-wheel-contents dist/*.whl

clean: ## Remove the virtual environments and all that was built or cached.
	rm -rf $(VENV) $(FLOOR) build dist htmlcov site .coverage .coverage.* .hypothesis .mutants .mypy_cache .pytest_cache .ruff_cache
	find . -name '*.egg-info' -prune -exec rm -rf {} +
	find . -name __pycache__ -prune -exec rm -rf {} +

# $(1): virtual environment, $(2): constraints, $(3): extra
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; name one with: make PYTHON=python3.12")'
	@echo "Installing into $(1). This takes minutes on a slow connection: torch is large."
	$(PYTHON) -m venv $(1)
	$(2)
	$(1)/bin/python -m pip install --quiet --upgrade --constraint $(1)/constraints.txt pip
	$(1)/bin/python -m pip install --quiet --constraint $(1)/constraints.txt --editable '.[$(3)]'
	-$(1)/bin/python tests/transformers_tests.py
	@touch $@
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),cp constraints.txt $(VENV)/constraints.txt,dev)

$(FLOOR)/.installed: pyproject.toml constraints.txt constraints-floor.txt
	$(call install,$(FLOOR),awk -F== 'NR == FNR { floor[$$1]; print; next } !($$1 in floor)' constraints-floor.txt constraints.txt > $(FLOOR)/constraints.txt,test)
