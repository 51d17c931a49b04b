# Everything starts here: `make serve` serves the demo model, `make test` runs the tests. `make help` lists the rest.
#
#   make serve PORT=8001              another port (and gRPC on 9001; GRPC_PORT=N another one, 0 none)
#   make serve CONFIG=my.yaml         another config
#   make serve GPU=1                  the demo model on a GPU, in an environment of its own (.venv-gpu)
#   make serve PYTHON=python3.12      another Python (3.11 to 3.13)
#   make serve TORCH_INDEX=URL        where torch comes from (README: Two commands; constraints/install.py decides)
#   make serve HASHES=                the pinned versions without their hashes, for an index with files of its own
#   make chaos ARGS='--minutes 1'     arguments of bench, compare and chaos

# The first Python that can make an environment: looked for once, and only by a target that needs it.
usable = $(if $(shell $1 -c 'import ensurepip, venv' 2>&1 || echo no),,$1)
ifeq ($(origin PYTHON),undefined)
PYTHON = $(eval PYTHON := $(or $(call usable,python3.11),$(call usable,python3.12),$(call usable,python3.13)))$(PYTHON)
endif
TORCH_INDEX ?=
HASHES ?= 1
VENV ?= $(if $(GPU),.venv-gpu,.venv)
CONFIG ?= $(if $(GPU),configs/serve.gpu.yaml,configs/serve.yaml)
CONSTRAINTS := constraints/$(if $(GPU),gpu,cpu).txt

# Named by what they were made from, so that a set-up that is done needs neither time nor network, and a changed pin
# makes it again.
KEY := $(shell cat pyproject.toml constraints/cpu.txt constraints/gpu.txt constraints/locks/*.txt | cksum | cut -d ' ' -f 1)
CONTRACTS := tests/api/clients
CLIENTS := .venv-clients/.clients-$(shell cat $(CONTRACTS)/requirements.txt $(CONTRACTS)/package-lock.json | cksum | cut -d ' ' -f 1)
RUNTIME := $(VENV)/.runtime-$(KEY)
DEVELOPMENT := $(VENV)/.development-$(KEY)
INSTALL = $(VENV)/bin/python constraints/install.py --constraint $(CONSTRAINTS) $(if $(GPU),--gpu) \
	$(if $(TORCH_INDEX),--torch-index '$(TORCH_INDEX)')
# $(call locked,runtime): install nothing but files whose hashes are in that lock.
locked = $(if $(HASHES),--lock constraints/locks/$1.txt)
AUDITED = $(VENV)/.audited-$(KEY)-$(shell date +%F)
# Three processes: two for the tests that need a Ray cluster, which mostly wait, and one for the others.
PYTEST = $(VENV)/bin/pytest -n 3

.PHONY: help serve stop test check audit lock contracts client proto bench compare chaos observe clean
.DEFAULT_GOAL := help

help:
	@echo 'make serve   set up, fetch the demo model, and serve it (Ctrl-C stops)'
	@echo 'make stop    stop what make serve started (PORT=N when several run)'
	@echo 'make test    set up, and run the tests'
	@echo 'make check   ruff, mypy, import-linter, deptry, pip-audit and the tests'
	@echo 'make audit   look for known vulnerabilities in the pinned versions (make check: once a day)'
	@echo 'make lock    write constraints/locks, after a pin has changed'
	@echo 'make contracts  install the clients of others (0.7 GB), and try them against the API'
	@echo 'make client  write the blocking client from the asynchronous one'
	@echo 'make proto   write the Python modules of proto/*.proto'
	@echo 'make bench   measure the engine and the service (loadtest/README.md)'
	@echo 'make compare install llama.cpp, transformers serve, vLLM and ray.serve.llm, and measure them beside it'
	@echo 'make chaos   five minutes of load while replicas die: is any answer lost or changed?'
	@echo 'make observe Prometheus (and Grafana, where it is installed) for a service that runs (docs/operations.md#metrics)'
	@echo 'make clean   remove the environments and caches in this folder; fetched models stay'
	@echo 'Variables: PORT, GRPC_PORT, HOST, CONFIG, GPU=1, PYTHON, TORCH_INDEX, HASHES; see the head of the Makefile.'

serve: $(RUNTIME)
	@exec $(VENV)/bin/serve-app serve $(CONFIG) $(if $(PORT),--port $(PORT)) $(if $(GRPC_PORT),--grpc-port $(GRPC_PORT)) \
		$(if $(HOST),--host $(HOST))

stop:
	@if [ -x $(VENV)/bin/serve-app ]; then exec $(VENV)/bin/serve-app stop $(if $(PORT),--port $(PORT)); \
	else echo 'nothing to stop: nothing was set up here'; fi

test: $(DEVELOPMENT)
	$(PYTEST)

check: $(DEVELOPMENT)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/deptry serve_app
	$(VENV)/bin/deptry loadtest scripts constraints tests tests/support tests/models --exclude $(CONTRACTS)/programs --ignore DEP002,DEP004
	@[ -e $(AUDITED) ] || $(VENV)/bin/python -m scripts.audit --done $(AUDITED)
	$(PYTEST)

audit: $(DEVELOPMENT)
	$(VENV)/bin/python -m scripts.audit

lock: $(DEVELOPMENT)
	$(VENV)/bin/python scripts/lock.py

contracts: $(DEVELOPMENT) $(CLIENTS)
	$(VENV)/bin/pytest tests/api/clients

client: $(DEVELOPMENT)
	$(VENV)/bin/python scripts/unasync.py

proto: $(DEVELOPMENT)
	$(VENV)/bin/python scripts/protos.py

bench: $(DEVELOPMENT)
	$(VENV)/bin/python -m loadtest.bench $(ARGS)

compare: $(DEVELOPMENT)
	TORCH_INDEX="$$($(INSTALL) --print-torch-index)" $(VENV)/bin/python -m loadtest.compare $(ARGS)

chaos: $(DEVELOPMENT)
	$(VENV)/bin/python -m loadtest.chaos $(ARGS)

observe: $(RUNTIME)
	@$(VENV)/bin/python scripts/observe.py $(ARGS)

clean:
	rm -rf .venv .venv-gpu .venv-clients $(CONTRACTS)/node_modules build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	@if [ -z "$(PYTHON)" ]; then \
		echo 'Python 3.11, 3.12 or 3.13 is needed, with its venv module (Debian: apt install python3.11-venv).'; \
		echo 'If it has another name: make serve PYTHON=/path/to/python'; exit 1; fi
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13) and \
		"$(PYTHON) is Python %d.%d; 3.11 to 3.13 are supported (make ... PYTHON=python3.11)" % v)'
	$(PYTHON) -m venv $(VENV)

$(CLIENTS):
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --no-deps --requirement $(CONTRACTS)/requirements.txt
	npm ci --prefix $(CONTRACTS) --no-audit --no-fund
	@touch $@

$(RUNTIME): | $(VENV)/bin/pip
	$(INSTALL) $(call locked,runtime) .
	@touch $@

$(DEVELOPMENT): | $(VENV)/bin/pip
	$(INSTALL) $(call locked,development) '.[dev]'
	@touch $(RUNTIME) $@
