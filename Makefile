# Every target works from a bare checkout: what it needs is set up first, pinned and with hashes, below .venv and the cache.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
E2E := $(if $(SMOKE),$(wildcard tests/e2e/test_1_*.py),tests/e2e)
# The test cluster is a tool of this checkout, not a part of the distribution.
export PYTHONPATH := $(CURDIR)/hack/testcluster

.PHONY: help demo test lint unit integration faults e2e bench bench-trainer bench-few-shot bench-checkpoint bench-sweep images cluster cluster-down generate lock sbom clean

help: ## this table
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## sets everything up, fine-tunes a real pretrained model on the shipped customer feedback, prints the metrics
	$(BIN)/python examples/customer-feedback/demo.py

test: lint unit integration ## sets everything up; lint, types, unit and integration tests on a real control plane and a real S3 server

lint: $(VENV)/dev.stamp ## format, lint, import layers and types
	ruff format --check .
	ruff check .
	lint-imports
	mypy

unit: $(VENV)/dev.stamp ## unit tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit --numprocesses 2 --dist loadfile

integration: $(VENV)/dev.stamp ## integration tests (the first run builds the Kubernetes binaries: about 10 minutes)
	$(BIN)/python -m testcluster binaries
	$(BIN)/python -m pytest tests/integration --numprocesses 3 --dist loadfile

faults: $(VENV)/dev.stamp ## every crash point of a sweep, and long random schedules (about an hour)
	$(BIN)/python -m testcluster binaries
	FAULTS=1 $(BIN)/python -m pytest tests/integration/test_sweeps.py --timeout 7200

# The model comes before the sandbox, which has no way to a package index.
# Only when it is said on the command line: a KUBECONFIG that happens to be set may be anybody's cluster.
e2e: export PYTHONPATH := $(CURDIR)/hack/testcluster:$(CURDIR)/tests
e2e: $(VENV)/dev.stamp ## a real node with real images, Helm and S3 (root; SMOKE=1: the short part); or KUBECONFIG=... for a cluster of yours
ifeq ($(origin KUBECONFIG),command line)
	KUBECONFIG=$(KUBECONFIG) $(BIN)/python -m e2e $(E2E)
else
	$(BIN)/python -m testcluster.images --node
	$(BIN)/python -m testcluster node-binaries
	$(BIN)/python hack/minilm.py >/dev/null
	env -u KUBECONFIG $(BIN)/python -m testcluster.sandbox $(BIN)/python -m e2e $(E2E)
endif

bench: bench-trainer bench-few-shot bench-checkpoint bench-sweep ## every benchmark; each prints its table and writes build/bench/NAME.json

bench-trainer: $(VENV)/dev.stamp ## the trainer's speed and quality beside Hugging Face's Trainer (about 30 minutes)
	$(BIN)/python benchmarks/trainer.py

bench-few-shot: $(VENV)/demo.stamp ## what 8, 32 and 128 examples of each class are worth, ours beside logistic regression (about 15 CPU-minutes)
	OMP_NUM_THREADS=1 nice $(BIN)/python benchmarks/few_shot.py

bench-checkpoint: $(VENV)/dev.stamp ## what a save costs training beside Hugging Face's Trainer, uploads beside boto3 (about 10 minutes)
	OMP_NUM_THREADS=1 nice $(BIN)/python benchmarks/checkpoint.py

bench-sweep: $(VENV)/dev.stamp ## the search engine beside Optuna and random search, on functions with known minima and in a real sweep (about two hours)
	OMP_NUM_THREADS=1 nice $(BIN)/python benchmarks/sweep.py

cluster: $(VENV)/dev.stamp ## a throw-away Kubernetes with the operator: a real node as root, else (or with NODE=0) pods as processes
	$(BIN)/python -m testcluster $(if $(filter 0,$(NODE)),up,up-node)

images: $(VENV)/dev.stamp ## builds the operator's and the trainer's image with docker, podman or buildah (IMAGE_ARGS: more of its arguments)
	$(BIN)/python -m testcluster.images $(IMAGE_ARGS)

cluster-down: $(VENV)/dev.stamp ## stops what `make cluster` started
	$(BIN)/python -m testcluster down

generate: $(VENV)/dev.stamp ## writes the CRDs, the chart's schema and the reference docs from their sources
	$(BIN)/python hack/generator/generate.py

# The hashes make a changed package an error; the stamps make a second run instant.
$(VENV)/uv.stamp: requirements/bootstrap.txt requirements/build.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/build.txt
	@touch $@

$(VENV)/%.stamp: requirements/%.txt pyproject.toml $(VENV)/uv.stamp
	@echo "installing requirements/$*.txt (PyTorch is large: this takes a minute or more the first time)"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r requirements/$*.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

LOCK := uv pip compile --quiet --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate
lock: $(VENV)/uv.stamp ## writes requirements/*.txt from pyproject.toml
	$(LOCK) --extra operator --extra trainer --extra cli --extra demo --extra dev pyproject.toml -o requirements/dev.txt
	$(LOCK) --extra trainer --extra cli --extra demo pyproject.toml -c requirements/dev.txt -o requirements/demo.txt
	$(LOCK) --extra operator pyproject.toml -c requirements/dev.txt --override requirements/operator-overrides.txt -o requirements/operator.txt
	$(LOCK) --extra trainer pyproject.toml -c requirements/dev.txt -o requirements/trainer.txt
	printf 'mlflow>=3\n' | $(LOCK) - -o requirements/mlflow.txt
	printf 'hatchling>=1.27\neditables\n' | $(LOCK) - -o requirements/build.txt
	printf 'cyclonedx-bom\n' | $(LOCK) - -o requirements/sbom.txt
	printf 'uv\n' | $(LOCK) - -o requirements/bootstrap.txt

sbom: $(VENV)/uv.stamp ## the bill of materials of both images' Python packages, as CycloneDX JSON below build/sbom
	$(BIN)/uv venv --quiet --allow-existing build/sbom/venv
	$(BIN)/uv pip install --quiet --python build/sbom/venv/bin/python --require-hashes -r requirements/sbom.txt
	for part in operator trainer; do \
	  PYTHONWARNINGS=ignore build/sbom/venv/bin/cyclonedx-py requirements requirements/$$part.txt --pyproject pyproject.toml --output-reproducible \
	    --output-file build/sbom/$$part.cdx.json && echo build/sbom/$$part.cdx.json || exit 1; done

clean: ## removes what the other targets made in this checkout (the cache of built binaries stays)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
