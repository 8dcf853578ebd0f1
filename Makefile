# Every target makes the environment first, from the hash-pinned locks, and only when it is missing or a lock changed.
#   make serve     serve the demo on http://127.0.0.1:8000     (ARGS="--port 9000" is passed on)
#   make test      unit and integration tests, side by side    (ARGS="-k bundle" is passed on)
#   make check     what CI checks beside the tests
#   make bench     throughput ratios against stock vLLM         (ARGS="engine" measures every kind of edit)
#   make setup     only the environment                        (TARGET=cuda for an NVIDIA host)
#   make lock      resolve the locks again, after a change of dependencies

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

TARGET ?= cpu
VENV ?= .venv
PYTHON ?= python3.11
ARGS ?=

BIN := $(VENV)/bin
LOCKS := locks/$(TARGET).txt locks/dev.txt
STAMP := $(VENV)/.trimtab-$(TARGET)
TORCH := $(shell sed -n 's/^torch==\([^ ]*\).*/\1/p' locks/$(TARGET).txt)

.PHONY: help setup system serve test check bench lock clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

serve: $(STAMP)
	$(BIN)/trimtab serve $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile docker/Dockerfile.cpu
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker/compose.yaml
	$(BIN)/kubernetes-validate --strict --quiet docker/kubernetes/*.yaml docker/kubernetes/*/*.yaml
	$(BIN)/shellcheck .ci/run

bench: $(STAMP)
	$(BIN)/trimtab bench $(ARGS)

# What pip cannot bring: a library that vLLM's CPU build links to, and the compiler and Python headers with which
# torch.compile builds kernels when an engine starts. As root on Debian they are installed, otherwise named.
system:
	@$(PYTHON) -c 'import platform, sys; sys.exit((sys.version_info[:2], platform.machine()) != ((3, 11), "x86_64"))' || { \
	  echo 'trimtab: the locks are for CPython 3.11 on x86-64 Linux; name one with: make setup PYTHON=/path/to/python3.11' >&2; exit 1; }
	@missing=(); \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3.11-venv); \
	$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || missing+=(python3.11-dev); \
	$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || missing+=(libnuma1); \
	command -v g++ >/dev/null || missing+=(g++); \
	if [ "$${#missing[@]}" -gt 0 ]; then \
	  echo "trimtab: this system lacks $${missing[*]}" >&2; \
	  if [ "$$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "Install them first; on Debian: sudo apt-get install $${missing[*]}" >&2; exit 1; fi; \
	  apt-get update -qq; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}"; fi

$(BIN)/python:
	@$(MAKE) --no-print-directory system
	$(PYTHON) -m venv $(VENV)

# An index that only has the CUDA build of torch is found by name, before anything is downloaded.
$(STAMP): $(LOCKS) pyproject.toml | $(BIN)/python
	@found="$$($(BIN)/python -m pip --disable-pip-version-check index versions torch 2>/dev/null || true)"; \
	if ! grep -qE '[ (]$(subst +,[+],$(TORCH))([,)]|$$)' <<<"$$found"; then \
	  echo 'trimtab: pip does not find torch $(TORCH) where it looks for packages.' >&2; \
	  echo 'For the CPU build, take the address of the CPU wheel index from "Get started" on pytorch.org and run:' >&2; \
	  echo '  PIP_EXTRA_INDEX_URL=<that address> make setup' >&2; exit 1; fi
	@echo 'trimtab: installing the locked environment into $(VENV) (several GB; minutes the first time, nothing later)'
	$(BIN)/python -m pip --disable-pip-version-check install -qq --require-hashes --no-deps --only-binary :all: $(LOCKS:%=-r %)
	$(BIN)/python -m pip --disable-pip-version-check install -qq --no-deps --no-build-isolation -e .
	@touch $@

# Pins that still satisfy pyproject.toml stay (uv reads the present lock as a preference); to move everything up,
# delete the lock first. UV_FIND_LINKS or UV_EXTRA_INDEX_URL says where the CPU torch is, as PIP_* does for pip.
UV_COMPILE = UV_FIND_LINKS="$${UV_FIND_LINKS-$${PIP_FIND_LINKS-}}" UV_SYSTEM_CERTS=1 $(BIN)/uv pip compile --quiet \
	--python-version 3.11 --python-platform x86_64-manylinux_2_35 --only-binary :all: --index-strategy unsafe-best-match \
	--generate-hashes --no-annotate --custom-compile-command 'make lock'
lock: $(STAMP)
	$(UV_COMPILE) --extra fit --override locks/cpu.overrides -o locks/cpu.txt pyproject.toml locks/cpu.in
	$(UV_COMPILE) --extra fit --extra cuda -o locks/cuda.txt pyproject.toml
	sed -E 's/ *\\$$//; /^ +--hash/d; s/^torch==.*//' locks/cpu.txt >$(VENV)/cpu-pins.txt
	$(UV_COMPILE) --constraint $(VENV)/cpu-pins.txt --group dev -o locks/dev.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
