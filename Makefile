# The commands that people and CI use. `make` without a target lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed
# pip's Linux build of torch installs gigabytes of CUDA libraries. On a machine without a GPU, name an index with the CPU build:
#   make up TORCH_INDEX=URL        (docs/how-to/run.md has the URL)
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help install up train bench test test-long test-browser test-docker test-bulk test-cluster lock images audit sbom lint types format env-example docs docs-tables clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Only a changed pyproject.toml or lock file starts a new installation, so that a second start is quick.
$(STAMP): pyproject.toml $(wildcard requirements/*.txt)
	@test -n "$(PYTHON)" || { echo "python3.11 is not on PATH; name one: make PYTHON=…"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	requirements/install.sh $(BIN)/python $(TORCH_INDEX)
	@touch $@

install: $(STAMP) ## create .venv and install everything, by the lock files' hashes (TORCH_INDEX=URL for the CPU build of torch)

up: $(STAMP) ## serve on this machine until Ctrl-C (PORT=8000, MLFLOW=1 for MLflow's page)
	@$(BIN)/gradserve up $(if $(filter-out 0,$(MLFLOW)),--mlflow)

train: $(STAMP) ## train by the released model's recipe (ARGS="--epochs 1 --subset 2000" for a short try)
	@$(BIN)/gradserve train --config training/released.toml $(ARGS)

bench: $(STAMP) ## run every benchmark, for hours; each writes a JSON report that the docs quote, or says what it needs
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || failed="$$failed $$script"; done; \
	[ -z "$$failed" ] || { echo "make bench: these did not run to their end:$$failed"; exit 1; }

# Two processes, each for whole files (tests/conftest.py). PARALLEL= runs all in one process.
# One thread each: two processes that compute with two threads wait for each other. Compiled code is kept also where the
# environment says otherwise: every process that a test starts would compile everything again.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## unit and integration tests, real TorchServe included (ARGS=… goes to pytest)
	@OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m 'not long and not docker and not browser and not bulk and not cluster' $(PARALLEL) $(ARGS)

test-long: $(STAMP) ## run the tests that take minutes
	@$(BIN)/python -m pytest -m long $(ARGS)

test-browser: $(STAMP) ## use the page in Chromium (apt-get install chromium), in front of the real stack
	@$(BIN)/python -m pytest -m browser tests/browser $(ARGS)

DOCKER ?= docker
# Debian's Compose 1.29 is the command `docker-compose`; Compose v2 is a part of the Docker client.
COMPOSE ?= $(shell $(DOCKER) compose version >/dev/null 2>&1 && echo $(DOCKER) compose || echo docker-compose)

images: ## build the three images (BUILD_NETWORK=host, TORCH=cuda, PIP_… are passed to the builds: docs/how-to/containers.md)
	$(COMPOSE) build prepare gateway mlflow

test-docker: $(STAMP) ## build and run the containers (needs a Docker engine, takes minutes)
	@$(DOCKER) info >/dev/null 2>&1 || { echo "make test-docker: no Docker engine answers '$(DOCKER) info'; nothing was tested"; exit 1; }
	@DOCKER="$(DOCKER)" COMPOSE="$(COMPOSE)" $(BIN)/python -m pytest -m docker tests/containers $(ARGS)

test-bulk: .venv/bulk ## score images on Ray, which it installs into .venv; also on two nodes in network namespaces (root and iproute2)
	@$(BIN)/python -m pytest -m bulk tests/control/bulk $(ARGS)

.venv/bulk: requirements/bulk.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/bulk.txt
	@touch $@

HELM ?= helm

test-cluster: $(STAMP) ## check the Helm chart; two agents and gateways in network namespaces (needs helm 3 or later, npm, iproute2, root)
	@command -v $(HELM) >/dev/null || { echo "make test-cluster: no helm on PATH; set HELM to its path; nothing was tested"; exit 1; }
	@$(BIN)/python -c 'import kubernetes_validate' 2>/dev/null || { echo "make test-cluster: kubernetes-validate is missing: run make install; nothing was tested"; exit 1; }
	@command -v npm >/dev/null || { echo "make test-cluster: no npm on PATH: install Node.js; nothing was tested"; exit 1; }
	@command -v ip >/dev/null || { echo "make test-cluster: no ip on PATH: install iproute2; nothing was tested"; exit 1; }
	@command -v nsenter >/dev/null && command -v setpriv >/dev/null || { echo "make test-cluster: no nsenter or no setpriv on PATH: install util-linux; nothing was tested"; exit 1; }
	@[ "$$(id -u)" = 0 ] || { echo "make test-cluster: only root may make network namespaces; nothing was tested"; exit 1; }
	@$(MAKE) --no-print-directory .venv/crds
	@HELM="$$(command -v $(HELM))" $(BIN)/python -m pytest tests/deploy $(ARGS)
	@$(BIN)/python -m pytest -m cluster tests/integration $(ARGS)

# Validators of the chart's objects that are no part of Kubernetes, by their lock file.
.venv/crds: $(wildcard tests/deploy/crds/*) $(STAMP)
	@rm -rf $@ && mkdir $@ && cp tests/deploy/crds/* $@ && npm ci --silent --no-audit --no-fund --prefix $@ && touch $@

lock: ## write requirements/*.txt again from pyproject.toml (needs uv on PATH; SOURCE=… for the CPU build of torch, UPGRADE=1)
	@UPGRADE=$(UPGRADE) requirements/lock.sh $(SOURCE)

# Without torch-cpu.txt: no database has a local version such as 2.13.0+cpu; torch-cuda.txt has the same torch.
audit: ## check for known vulnerabilities in the locked packages (needs pip-audit on PATH)
	@for lock in gateway serving training dev docs bulk torch-cuda; do \
	  echo "== $$lock"; pip-audit --strict --disable-pip --require-hashes -r requirements/$$lock.txt || exit 1; done

sbom: $(STAMP) ## list the packages of each image and of the wheel in sbom/, as CycloneDX (TORCH=cuda for the build with CUDA)
	@requirements/sbom.sh $(BIN)

lint: $(STAMP) ## ruff: rules and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict
	@$(BIN)/mypy

format: $(STAMP) ## ruff: fix what it can, and format
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

env-example: $(STAMP) ## write .env.example again from the settings
	@$(BIN)/python -m control.env_example > .env.example

docs: .venv/docs ## build the documentation as a site in build/site (REPOSITORY_URL=… for links to the code)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "open build/site/index.html"

.venv/docs: requirements/docs.txt $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/docs.txt
	@touch $@

docs-tables: $(STAMP) ## write the tables and the reference in docs/ again, from the reports and the code
	@$(BIN)/python docs/make_tables.py

clean: ## remove the environment, caches, logs, the local plan and its audit log; trained models and API keys stay
	rm -rf .venv .gradserve/logs .gradserve/run .gradserve/history .gradserve/plan.json .gradserve/audit.jsonl .gradserve/*.lock build sbom *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
