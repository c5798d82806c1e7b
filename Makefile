# Nothing has to be installed by hand: `make run` makes .venv with what it needs, the other targets add what they
# need. Where python3 has that already (a GPU machine), it is used. PYTHON=... chooses another interpreter.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help run test test-gpu test-dist test-frameworks host bench docs lint type fmt sanitize dist clean

N ?= 4
ARGS ?=
CUDA ?= cu13
comma := ,
GPU := $(shell nvidia-smi -L 2>/dev/null)
ifneq ($(GPU),)
TORCH ?= torch==$(if $(filter cu12,$(CUDA)),2.10.0,2.13.0)
SIZE := 3 GB to download and 7 GB of disk, most of it torch with CUDA
else
TORCH ?= torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu
SIZE := 0.25 GB to download and 1 GB of disk, most of it torch for the CPU
endif
RUN_NEEDS := torch numpy filelock platformdirs $(if $(GPU),cupy cuda)
TEST_NEEDS := $(RUN_NEEDS) cupy cuda pytest pytest_timeout xdist rich typer
python_with = $(shell python3 -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' \
	$(1) 2>/dev/null && echo python3 || echo .venv/bin/python)
ifdef PYTHON
RUN_PYTHON := $(PYTHON)
else
RUN_PYTHON := $(call python_with,$(RUN_NEEDS))
PYTHON := $(call python_with,$(TEST_NEEDS))
endif
ifeq ($(RUN_PYTHON),.venv/bin/python)
RUN_READY := .venv/.run
endif
ifeq ($(PYTHON),.venv/bin/python)
READY := .venv/.ready
CU12 := .venv-cu12/.ready
endif
CLANG_FORMAT := $(if $(findstring /,$(PYTHON)),$(dir $(PYTHON)))clang-format
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# No host stacks: to get Python's, the tool takes the interpreter lock inside a launch, that is, with the driver's
# locks held; torch allocates the other way round, and virtual ranks are threads of one process.
SANITIZED = --show-backtrace device --error-exitcode 9 --target-processes all $(PYTHON) -m pytest tests/gpu --timeout 1800 $(ARGS)

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

run: $(RUN_READY) ## train a MoE layer over N processes: GPUs if there are any (or one for all), else the CPU
	$(RUN_PYTHON) examples/train.py $(if $(filter file,$(origin N)),,--ranks $(N)) $(ARGS)

test: $(READY) $(CU12) ## what needs no GPU: CPU backend, emulated kernels, compiles   (a bare pytest: all tiers)
	$(PYTHON) -m pytest tests/cpu -n auto --dist worksteal $(ARGS)

test-gpu: $(READY) ## one GPU, virtual ranks
	$(PYTHON) -m pytest tests/gpu $(ARGS)

test-dist: $(READY) ## N GPUs, one process each   (make test-dist N=4)
	EPJIT_TEST_RANKS=$(N) $(PYTHON) -m pytest tests/dist $(ARGS)

test-frameworks: $(READY) ## files of vLLM, SGLang, Megatron, ... fetched and run on compat/
	$(PYTHON) tests/frameworks/fetch.py && $(PYTHON) -m pytest tests/frameworks $(ARGS)

host: $(READY) ## microseconds of the host a call, with the driver stubbed where there is no GPU
	$(PYTHON) bench/host.py $(ARGS)

bench: $(READY) ## times of N GPUs beside the link ceiling   (ARGS="--json out.jsonl --plot out.png")
	$(PYTHON) -m epjit bench --ranks $(N) $(ARGS)

docs: $(READY) ## the site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

lint: $(READY) ## ruff and clang-format
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(MAKE) -s format-cuda MODE='--dry-run -Werror'

type: $(READY) ## mypy
	$(PYTHON) -m mypy

fmt: $(READY) ## format Python and CUDA
	$(PYTHON) -m ruff check --fix-only . && $(PYTHON) -m ruff format . && $(MAKE) -s format-cuda MODE=-i

sanitize: $(READY) ## compute-sanitizer memcheck and racecheck over tests/gpu at small sizes
	EPJIT_TEST_SMALL=1 compute-sanitizer --tool memcheck --report-api-errors no $(SANITIZED)
	EPJIT_TEST_SMALL=1 compute-sanitizer --tool racecheck $(SANITIZED)

dist: $(READY) ## wheel and sdist of epjit and of compat/, checked, in dist/
	$(PYTHON) -m build --outdir dist . && $(PYTHON) -m build --outdir dist compat
	$(PYTHON) -m twine check --strict dist/*

clean: ## remove environments, caches and builds
	rm -rf .venv .venv-cu12 build dist compat/build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} + ; rm -rf ./*.egg-info compat/*.egg-info

.PHONY: format-cuda
format-cuda:
	git ls-files -co --exclude-standard '*.cu' '*.cuh' '*.h' | xargs -r $(CLANG_FORMAT) $(MODE)

# torch alone from its own index, if that is where it comes from: to look for all else there as well takes long.
.venv/.run:
	@echo "installing into .venv what \`make run\` needs: $(SIZE)"
	python3 -m venv .venv
	.venv/bin/python -m pip install -qq --no-deps --retries 1 $(TORCH)
	.venv/bin/python -m pip install -qq -e '.[torch$(if $(GPU),$(comma)$(CUDA))]'
	touch $@

.venv/.ready: pyproject.toml | .venv/.run
	@echo "installing into .venv what tests and docs need: 0.7 GB to download and 1.2 GB of disk more"
	.venv/bin/python -m pip install -qq -e '.[$(CUDA)-rdma,dev]'
	touch $@

# A second, tiny environment: the compile tests run every kernel through CUDA 12's NVRTC too. Beside it, the
# versions of NVSHMEM that the tests link with.
NVSHMEM_COPIES := $(foreach version,3.4.5 3.8.0,$(version)-cu12 $(version)-cu13)
.venv-cu12/.ready:
	@echo "installing into .venv-cu12 compilers of CUDA 12 and four NVSHMEMs to test with: 1.4 GB of disk"
	python3 -m venv .venv-cu12
	PYTHONPATH= .venv-cu12/bin/python -m pip install -qq 'cuda-bindings>=12.8,<13' 'nvidia-cuda-nvrtc-cu12==12.8.*' 'nvidia-nvjitlink-cu12==12.8.*' 'nvidia-cuda-runtime-cu12==12.8.*' nvidia-cuda-cccl-cu12 numpy filelock platformdirs
	for copy in $(NVSHMEM_COPIES); do \
	  .venv-cu12/bin/python -m pip install -qq --no-deps --upgrade --target .venv-cu12/nvshmem/$$copy nvidia-nvshmem-$${copy#*-}==$${copy%-*} || exit 1; \
	done
	touch $@
