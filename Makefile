# make help lists the targets. Everything runs in .venv, which is made on first use and renewed when
# pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LTX := $(BIN)/ltx
PROTOCOL ?= quick
ACTIVATIONS := relu,leaky_relu,tanh,sigmoid
DEMO := target=digits protocol=quick output_dir=outputs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu test-lowest lint paper-tables mnist-tables resnet-tables clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(VENV)/.installed  ## make the virtual environment and install ltx into it

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ltx needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version); make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing ltx into $(VENV) (PyTorch takes a minute or two) ..." >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true  # on all cores, which pip does on one
	@touch $@

demo: setup  ## train, prune, construct, verify and evaluate on embedded digits, in about half a minute
	$(LTX) train-target --multirun $(DEMO) activation=relu,tanh
	$(LTX) construct --multirun $(DEMO) activation=relu,tanh construction=L+1,2L seed=0,1,2
	$(LTX) verify --multirun $(DEMO) activation=relu,tanh construction=L+1,2L seed=0,1,2
	$(LTX) eval --multirun $(DEMO) activation=relu,tanh construction=L+1,2L seed=0,1,2
	$(LTX) tables $(DEMO)
	$(LTX) page output_dir=outputs/demo

test: setup  ## the default tests: CPU, no network, a few minutes; MARKED="not gpu" adds the slow ones
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(if $(MARKED),-m "$(MARKED)")

test-slow:  ## the slow tests
	$(MAKE) test MARKED=slow

test-gpu: setup  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-lowest:  ## all tests with the oldest versions that pyproject.toml allows, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) scripts/lowest_versions.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
	  --constraint .venv-lowest/constraints.txt
	touch .venv-lowest/.installed
	$(MAKE) test VENV=.venv-lowest MARKED="not gpu"

lint: setup  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

paper-tables: mnist-tables resnet-tables  ## Tables 1 to 4 (LTX_DATA says where the data are); PROTOCOL=paper|quick trains what is missing
	$(LTX) page

mnist-tables: setup  ## Tables 1 and 2, on MNIST
	$(LTX) train-target --multirun target=mnist activation=$(ACTIVATIONS) protocol=$(PROTOCOL)
	for sweep in mnist_tables "mnist_tables selection=best" mnist_feedback; do \
	  for command in construct verify eval; do \
	    $(LTX) $$command --multirun experiment=$$sweep protocol=$(PROTOCOL) || exit 1; done; done
	$(LTX) construct --multirun experiment=mnist_tables construction=sampled protocol=$(PROTOCOL)
	$(LTX) eval --multirun experiment=mnist_tables construction=sampled protocol=$(PROTOCOL)
	$(LTX) tables target=mnist protocol=$(PROTOCOL) selection=best
	$(LTX) tables target=mnist protocol=$(PROTOCOL)

resnet-tables: setup  ## Tables 3 and 4, on CIFAR-10: sampled as in the paper, explicit beside it
	$(LTX) train-target --multirun target=resnet22 activation=$(ACTIVATIONS) protocol=$(PROTOCOL)
	$(LTX) construct --multirun experiment=resnet22_sampled protocol=$(PROTOCOL)
	$(LTX) eval --multirun experiment=resnet22_sampled protocol=$(PROTOCOL)
	for sweep in resnet22_explicit resnet22_epsilon resnet22_best resnet22_feedback resnet22_feedback_even \
	  resnet22_feedback_2L resnet22_feedback_bound resnet22_tradeoff; do \
	  for command in construct verify eval; do \
	    $(LTX) $$command --multirun experiment=$$sweep protocol=$(PROTOCOL) || exit 1; done; done
	$(LTX) tables target=resnet22 protocol=$(PROTOCOL) m=24 epsilon=0.001 limit=500
	$(LTX) tables target=resnet22 protocol=$(PROTOCOL) selection=best limit=500
	$(LTX) tables target=resnet22 protocol=$(PROTOCOL) limit=2000

clean:  ## remove the virtual environments and what runs wrote, except the kept results
	rm -rf $(VENV) .venv-lowest outputs/demo outputs/targets outputs/tickets outputs/tables outputs/sweeps outputs/subset_sum outputs/figures outputs/bench outputs/bounds outputs/index.html
