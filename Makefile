# One-line commands; `make help` lists them. CI runs these same targets (.ci/run).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# Tiny models gain nothing from threads, and the exactness tests fix the number of threads.
# Files run beside each other on up to four cores; `TEST_PROCESSES=0` runs one after the other.
TEST_PROCESSES ?= auto
# tests/conftest.py puts the files that take longest first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --maxprocesses=4 \
  --dist loadfile --no-loadscope-reorder

# Compares the tables with a database that is at the newest revision.
define NEW_REVISION
import sys
from alembic import command
from models.migrate import alembic_config, upgrade
url, message = sys.argv[1:]
upgrade(url)
command.revision(alembic_config(url), message, autogenerate=True)
endef
export NEW_REVISION

.PHONY: help setup demo test soak openapi test-fast lint fmt bench-objectives bench-step bench-train bench-selection bench-kernel-term bench-history bench-search bench-auto bench-recommend bench-api golden serve migrate revision clean

help: ## List the targets
	@echo "kdpo: make <target>"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv and install kdpo with everything it needs

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "setup: '$(PYTHON)' was not found; install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; ok = v >= (3, 11); ok or print("setup: found Python %d.%d, need 3.11 or newer; name one: make setup PYTHON=python3.11" % v[:2], file=sys.stderr); sys.exit(not ok)'
	@test -x $(BIN)/pip || { echo "setup: creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "setup: installing kdpo[worker,dev] at the versions of constraints.txt (minutes on the first run)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[worker,dev]'
	@touch $@
	@echo "setup: done; next: make demo"

demo: setup ## Upload, recommend, train and compare on a tiny model, on this machine
	$(BIN)/python examples/demo.py

test: setup ## Run every test, end-to-end ones included (minutes)
	$(PYTEST)

soak: setup ## Run the long tests, kill a search's workers 50 times, send 20,000 good and bad requests (tens of minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak
	SEARCH_KILLS=50 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 7200 tests/integration/test_search_workers.py
	SCHEMA_CASES=20000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 7200 tests/integration/test_schema.py

openapi: setup ## Write docs/openapi.json anew
	$(BIN)/python -m app.openapi_file docs/openapi.json

test-fast: setup ## Run unit and architecture tests (seconds to a minute)
	$(PYTEST) tests/unit tests/architecture

lint: setup ## Check style, format, types and the arrows between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: setup ## Format the code and apply the safe fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# FULL=1 measures the cells that the kept table lacks (an hour for all); it can be stopped and goes on.
bench-objectives: setup ## Report streamed divergences against whole logits and TRL (FULL=1: measure)
	@if [[ -n "$${FULL:-}" ]]; then OMP_NUM_THREADS=1 $(BIN)/python -m bench.objectives; fi
	@$(BIN)/python -m bench.report

bench-step: setup ## Time training steps with each penalty against plain DPO's (minutes)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.step

# FULL=1 measures what the kept table lacks (hours for all); it can be stopped and goes on.
bench-train: setup ## Time training against TRL's DPOTrainer (minutes; FULL=1: measure everything)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.train $(if $(FULL),--full)

# FULL=1 measures what the kept table lacks (half an hour to an hour for all); it can be stopped and goes on.
# DATA=folder and LIMIT=runs are for FULL=1.
bench-selection: setup ## Compare recommendations with trained rankings (FULL=1: measure)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.selection $(if $(FULL),--full) \
	  $(if $(DATA),--data $(DATA)) $(if $(LIMIT),--limit $(LIMIT))

# FULL=1 measures what the kept table lacks (half an hour of one core for all); it can be stopped and goes on.
bench-kernel-term: setup ## Compare uses of kernels in the loss with γ = 0 (FULL=1: measure)
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.kernel_term $(if $(FULL),--full) \
	  $(if $(DATA),--data $(DATA)) $(if $(LIMIT),--limit $(LIMIT))

bench-history: setup ## Compare searches that know finished ones with searches that do not (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.history

# FULL=1 first trains what the table with several settings lacks (hours for all); it can be stopped and goes on.
# DATA=folder and LIMIT=runs are for FULL=1.
bench-search: setup ## Replay search strategies on recorded runs (FULL=1: measure)
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m bench.search $(if $(FULL),--full) \
	  $(if $(DATA),--data $(DATA)) $(if $(LIMIT),--limit $(LIMIT))

# FULL=1 measures the sizes that the kept table lacks (half an hour); it can be stopped and goes on.
# DATA=folder has hh-harmless.jsonl.gz; without it another folder is tried, then the shipped sample.
bench-recommend: setup ## Time a recommendation from its upload on (a minute; FULL=1: all sizes)
	@$(BIN)/python -m bench.recommend $(if $(FULL),--full) $(if $(DATA),--data $(DATA))

# DATA=folder has truthfulqa.jsonl.gz; without it another folder is tried, then the shipped sample.
bench-auto: setup ## Time a whole auto job, and compare its quote with its cost (minutes)
	@$(BIN)/python -m bench.auto $(if $(DATA),--data $(DATA))

bench-api: setup ## Put load on the API: polls, lists, events, streams, a large file (minutes)
	@$(BIN)/python -m bench.api

golden: setup ## Write the golden trajectory anew (say in the commit why the numbers moved)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.unit.worker.training.golden

serve: setup ## Start API and workers on this machine (SQLite, no other server)
	$(BIN)/kdpo serve --model-dir examples/models

migrate: setup ## Bring the database of the settings to the newest revision
	$(BIN)/kdpo migrate

revision: setup ## Write a migration from the tables: make revision m="what changes"
	@test -n "$(m)" || { echo 'revision: say what changes: make revision m="add table x"' >&2; exit 1; }
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	  $(BIN)/python -c "$$NEW_REVISION" "sqlite:///$$folder/newest.db" "$(m)"

clean: ## Remove caches and build outputs (keeps .venv and kdpo-data)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache demo-output
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
