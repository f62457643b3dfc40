# Ebbtide: everything a newcomer types. `make` alone lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SUITE ?= all
TIME ?= 180
FUZZ := cargo +nightly fuzz
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(CURDIR)/$(BIN):$(PATH):/usr/sbin:/sbin

PROTO := $(wildcard proto/ebbtide/v1/*.proto)
RPC := agent/ebbtide/rpc

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

.PHONY: demo
demo: packages-demo build ## Run the main job: protect, have an accident, rewind, prove it
	$(BIN)/ebb demo

.PHONY: test
test: packages-test build ## Run all tests in their short form
	cargo test --workspace --quiet
	$(BIN)/python -m pytest

.PHONY: soak
soak: packages-test build ## Run all tests with the counts the issues state (hours)
	EBB_SOAK=1 PROPTEST_CASES=20000 cargo test --workspace --release --quiet
	EBB_SOAK=1 $(BIN)/python -m pytest --timeout=14400

.PHONY: bench
bench: packages-test packages-bench build ## Run benchmarks: make bench [SUITE=capture] [QUICK=1]
	$(BIN)/python -m bench $(SUITE) $(if $(QUICK),--quick)

.PHONY: fuzz
fuzz: ## Fuzz each parser for TIME=180 seconds (needs nightly Rust and cargo-fuzz)
	EBB_WRITE_CORPUS=1 cargo test -p ebbtide-core --test fuzz_harness --quiet seeds
	for target in $$($(FUZZ) list --fuzz-dir native/fuzz); do \
	  $(FUZZ) run --fuzz-dir native/fuzz -O $$target -- -max_total_time=$(TIME) -print_final_stats=1; done

.PHONY: lint
lint: build $(VENV)/lint.stamp ## Run every linter, warnings are errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest ebbtide._native

.PHONY: fmt
fmt: $(VENV)/lint.stamp ## Format all code
	cargo fmt --all
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .

.PHONY: build
build: $(VENV)/packages.stamp $(RPC)/stubs.stamp ## Build the native module and stubs into .venv
	@command -v cargo >/dev/null || { echo "cargo is missing; hint: install a Rust toolchain >= 1.89 (rustup.rs)" >&2; exit 1; }
	@echo "building the native module"; $(BIN)/maturin develop --release --quiet >$(VENV)/build.log 2>&1 || { cat $(VENV)/build.log >&2; exit 1; }

.PHONY: clean
clean: ## Remove what the build made
	rm -rf $(VENV) target bench/out .cache $(RPC)/*_pb2* $(RPC)/stubs.stamp

.PHONY: packages-demo packages-test packages-bench
packages-demo:
	@.ci/install-packages build demo
packages-test:
	@.ci/install-packages build demo test
packages-bench:
	@.ci/install-packages bench

$(VENV)/bin/python:
	@.ci/install-packages build
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing; hint: apt-get install python3.11, or make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# pip reads dependency groups from 25.1 on; a fresh venv of Python 3.11 has an older one.
$(VENV)/packages.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --group build --group test
	@touch $@

$(VENV)/lint.stamp: $(VENV)/packages.stamp
	$(BIN)/python -m pip install --quiet --group lint
	@touch $@

# protoc names modules by the path of the .proto (ebbtide/v1); they live in ebbtide.rpc.
$(RPC)/stubs.stamp: $(PROTO) $(VENV)/packages.stamp
	@mkdir -p $(RPC) && rm -rf $(VENV)/stubs && mkdir $(VENV)/stubs
	@$(BIN)/python -m grpc_tools.protoc -I proto --python_out=$(VENV)/stubs \
	  --grpc_python_out=$(VENV)/stubs --mypy_out=quiet:$(VENV)/stubs --mypy_grpc_out=quiet:$(VENV)/stubs $(PROTO)
	@sed -i -E 's/ebbtide\.v1( import|\.[a-z]+_pb2)/ebbtide.rpc\1/' $(VENV)/stubs/ebbtide/v1/*.py*
	@mv $(VENV)/stubs/ebbtide/v1/*_pb2* $(RPC)/
	@touch $@
