# Needs Python 3.10+, a C and C++ compiler, make, and a package registry that pip can reach. Everything else, cmake and
# ninja where they are missing included, is installed into .venv. `make help` lists the targets.
PYTHON ?= python3
ARGS   ?=
EXTRAS ?= test,test-server

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check --quiet
PIN  := cmake/llama-cpp-python.txt
PINNED := $(shell sed -n 's/^llama-cpp-python==\([^ ]*\).*/\1/p' $(PIN))

export PATH := $(CURDIR)/$(BIN):$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
# One compiler for the wheel and the stock build: scikit-build-core would take the one that built Python, CMake does not.
ifeq ($(origin CC),default)
CC := cc
endif
ifeq ($(origin CXX),default)
CXX := c++
endif
export CC CXX
# where ccache is used: the same objects for the wheel, the stock build and other checkouts
export CCACHE_BASEDIR ?= $(CURDIR)
# PYTHONSAFEPATH (Python 3.11+): what gets tested is the installed package, also where a test starts `python -m`, and not
# the folder of the same name in the working directory
# OPENBLAS_NUM_THREADS: each core has a process of its own, where more threads of NumPy's would wait for each other, spinning
TEST_ENV := PYTHONSAFEPATH=1 OPENBLAS_NUM_THREADS=1 MESA_STOCK_LIB='$(CURDIR)/build/stock/lib'

# a process for each core; the tests of a file stay together, because they share models that take time to make
PARALLEL ?= -n $(CMAKE_BUILD_PARALLEL_LEVEL) --dist loadfile

# what lint looks at the compiled part of: the editable install where there is one, else the package
INSTALLED := $(if $(wildcard $(VENV)/.editable),,$(VENV)/.mesa-gguf)

# $(call remember,file,text): a file that gets a new mtime only when the text changes, as a prerequisite
remember = $(shell mkdir -p build; echo '$(2)' | cmp -s - $(1) || echo '$(2)' > $(1))
SOURCES := CMakeLists.txt pyproject.toml LICENSE $(wildcard README.md) \
           $(sort $(shell find cmake csrc patches mesa_gguf -type f ! -name '*.pyc' 2>/dev/null))
$(call remember,build/sources.txt,$(SOURCES))
$(call remember,build/cmake-args.txt,$(CMAKE_ARGS))

.PHONY: help demo demo-real test test-slow browser models sanitize upstream bench stock dev wheel lint format clean
.DELETE_ON_ERROR:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile

demo: $(VENV)/.mesa-gguf ## install into .venv and run the demonstration
	$(BIN)/mesa-gguf demo $(ARGS)

REAL_MODEL := $(or $(MESA_MODELS),models)/SmolLM2-135M-Instruct.Q4_1.gguf
demo-real: $(VENV)/.mesa-gguf ## the demonstration with SmolLM2 on real text, past its trained length (some minutes; needs make models)
	@test -f '$(REAL_MODEL)' || { echo '$(REAL_MODEL) is not there: run "make models" first, or set MESA_MODELS to its folder'; exit 1; }
	$(BIN)/mesa-gguf demo -m '$(REAL_MODEL)' $(ARGS)

test: $(VENV)/.mesa-gguf build/stock/.built ## the tests, without the slow ones (ARGS="-k plan" for some of them)
	$(TEST_ENV) $(BIN)/pytest $(PARALLEL) $(ARGS)

MARK ?= slow or not slow
test-slow: $(VENV)/.mesa-gguf build/stock/.built ## all tests (MARK=slow: the slow ones alone)
	$(TEST_ENV) $(BIN)/pytest $(PARALLEL) -m "$(MARK)" $(ARGS)

browser: | $(BIN)/python ## what the page's tests drive: Playwright and, as root on Debian, Chromium
	$(PIP) install --group browser
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	    { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -qq --no-install-recommends chromium; } || \
	    { echo 'no Chromium: install it, or set MESA_CHROMIUM' && false; }

models: | $(BIN)/python ## two real models for the tests that read some, into models/ or MESA_MODELS (351 MB, pinned by hash)
	$(BIN)/python scripts/fetch_models.py $(ARGS)

sanitize: $(VENV)/.mesa-gguf ## the engine's tests under AddressSanitizer and UndefinedBehaviorSanitizer, or --thread (GCC, Linux)
	$(BIN)/python scripts/sanitize.py $(ARGS)

upstream: $(VENV)/.mesa-gguf ## llama.cpp's and llama-cpp-python's own tests, patched and unpatched side by side
	$(BIN)/python scripts/upstream_tests.py $(ARGS)

bench: $(VENV)/.mesa-gguf build/stock/.built ## the benchmarks, against the stock build
	MESA_STOCK_LIB='$(CURDIR)/build/stock/lib' $(BIN)/mesa-gguf bench $(ARGS)

stock: build/stock/.built ## the same llama.cpp, unpatched, with the same flags, into build/stock/lib

dev: $(VENV)/.llama-cpp-python ## editable install: Python edits count at once, C++ edits at the next make dev
	$(PIP) install --no-build-isolation --check-build-dependencies --editable '.[$(EXTRAS)]'
	@rm -f $(VENV)/.mesa-gguf
	@touch $(VENV)/.editable

DIST ?= dist
# note: in a build folder of its own, because options stay in one until they are given anew
wheel: $(VENV)/.llama-cpp-python ## a wheel for every machine of this kind, not only this one's CPU, into dist/
	CMAKE_ARGS='-DMESA_PORTABLE=ON $(CMAKE_ARGS)' $(PIP) wheel --no-build-isolation --check-build-dependencies --no-deps \
	    --config-settings build-dir='build/portable-{wheel_tag}' --wheel-dir '$(DIST)' .

CXX_FILES = $(sort $(shell find csrc -name '*.cpp' -o -name '*.h'))

lint: $(VENV)/.lint $(INSTALLED) ## ruff, mypy, stubtest and clang-format; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy
	PYTHONSAFEPATH=1 $(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml mesa_gguf._core

format: $(VENV)/.lint ## bring Python and C++ into their form
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

clean: ## remove what make made, the downloaded llama.cpp included; models/ stays
	rm -rf build dist $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mesa-gguf needs Python 3.10 or newer (make PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)

# What builds the packages, kept in .venv rather than in pip's isolated environments: their paths change with each
# build, and with them what has to be compiled. The backend itself says whether cmake and ninja are missing.
$(VENV)/.tools: pyproject.toml | $(BIN)/python
	$(PIP) install --upgrade pip
	$(PIP) install 'scikit-build-core>=0.11' 'pybind11>=2.13'
	$(BIN)/python -c 'from scikit_build_core.build import get_requires_for_build_wheel as g; print(*g(), sep="\n")' > $@.txt
	$(PIP) install -r $@.txt
	@touch $@

# llama-cpp-python without a llama.cpp of its own: it loads the one in mesa_gguf/lib (LLAMA_CPP_LIB_PATH).
# note: --no-cache-dir, or pip would keep the wheel without libraries and hand it to other projects
$(VENV)/.llama-cpp-python: $(PIN) | $(VENV)/.tools
	$(BIN)/python cmake/fetch_llama_cpp.py --pin $(PIN) --download-dir build/download
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(PIP) install --no-build-isolation --no-cache-dir --no-deps --force-reinstall \
	    build/download/llama_cpp_python-$(PINNED).tar.gz
	@touch $@

$(VENV)/.mesa-gguf: $(SOURCES) build/sources.txt build/cmake-args.txt $(VENV)/.llama-cpp-python
	@echo 'Building and installing mesa-gguf. The first time compiles llama.cpp, which takes minutes.'
	$(PIP) install --no-build-isolation --check-build-dependencies '.[$(EXTRAS)]'
	@rm -f $(VENV)/.editable
	@touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.tools
	$(PIP) install --group lint
	@touch $@

build/stock/.built: CMakeLists.txt cmake/fetch_llama_cpp.py $(PIN) build/cmake-args.txt | $(VENV)/.tools
	@echo 'Building llama.cpp without patches, to compare with.'
	cmake -S . -B build/stock -G Ninja -DMESA_BUILD_STOCK=ON -DPython_EXECUTABLE='$(CURDIR)/$(BIN)/python' $(CMAKE_ARGS) \
	    > build/stock.log
	cmake --build build/stock >> build/stock.log || { tail -40 build/stock.log; exit 1; }
	@touch $@
