.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
LOWEST ?= .venv-lowest
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTS_READY := $(VENV)/.tests-ready
DOCS_READY := $(VENV)/.docs-ready

# pillow-simd replaces Pillow, with the same pixels: never both. It has no wheel and is compiled for AVX2. pip would
# install Pillow over it again with every package.
PILLOW_SIMD := pillow-simd==12.1.1.post0
KEEP_SIMD := [ ! -d $(VENV)/simd ] || { $(BIN)/python -m pip uninstall --quiet --yes pillow pillow-simd && \
	$(BIN)/python -m pip install --quiet --no-deps --no-index --find-links $(VENV)/simd pillow-simd; }

.PHONY: help setup demo test test-quick test-lowest check format docs clean simd no-simd bench-peers

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make the environment (VENV=DIR puts it elsewhere than .venv)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11: name a newer one with make PYTHON=python3.x" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@$(KEEP_SIMD)
	@touch $@

$(TESTS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@$(KEEP_SIMD)
	@touch $@

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@$(KEEP_SIMD)
	@touch $@

demo: $(READY) ## pack, train, evaluate and caption drawn scenes: about 5 minutes on 2 CPU cores
	$(BIN)/python examples/demo.py

# Two processes; the tests of a file run in one of them, so they share its fixtures.
PYTEST_OPTIONS := --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20
PYTEST := $(BIN)/python -m pytest $(PYTEST_OPTIONS)
QUICK := -m "not slow and not external"

test: check ## all checks, then all tests, in two processes
	$(PYTEST)

test-quick: $(TESTS_READY) ## tests without a server, a whole run or a kill: 2 minutes on 2 CPU cores
	$(PYTEST) $(QUICK) --timeout 60

test-lowest: ## the quick tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	$(LOWEST)/bin/python -m pytest $(PYTEST_OPTIONS) $(QUICK)

check: $(TESTS_READY) ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

format: $(TESTS_READY) ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DOCS_READY) ## build the documents into build/site; a dead link or anchor is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html; to search it: $(PYTHON) -m http.server --directory build/site"

simd: $(READY) ## replace Pillow by pillow-simd (a minute; needs a compiler; for JPEGs no faster, see docs/performance.md)
	@$(BIN)/python simd.py $(PILLOW_SIMD) --into $(VENV)/simd --lose "$(LOSE)"
	@$(KEEP_SIMD)
	@$(BIN)/python -c 'import PIL; print("PIL is now pillow-simd", PIL.__version__, "(make no-simd: back to Pillow)")'

no-simd: $(READY) ## replace pillow-simd by the pinned Pillow again
	rm -rf $(VENV)/simd
	$(BIN)/python -m pip uninstall --quiet --yes pillow-simd pillow
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt pillow
	@$(BIN)/python -c 'import PIL; print("PIL is now Pillow", PIL.__version__)'

# Streaming's peers are in a folder that only benchmarks/streaming.py adds to the path, with our torch: img2dataset would
# import what it finds, and take longer to start.
bench-peers: $(PEERS)/.ready ## what the benchmarks compare us with, and plain Pillow, in .venv-peers

$(PEERS)/.ready: benchmarks/peers.txt benchmarks/peers-streaming.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
		|| { echo "error: img2dataset needs Python 3.11 or 3.12: name one with make PYTHON=python3.12 bench-peers" >&2; exit 2; }
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers.txt
	rm -rf $(PEERS)/streaming
	$(PEERS)/bin/python -m pip install --quiet --no-deps --target $(PEERS)/streaming \
		--requirement benchmarks/peers-streaming.txt
	@touch $@

clean: ## delete the environments and the demo's results
	rm -rf $(VENV) $(PEERS) $(LOWEST) runs/demo data/demo
