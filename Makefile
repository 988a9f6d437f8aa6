# Two commands: `make demo` runs the main job, `make test` passes the tests; each sets itself up first.
PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
INSTALLED := .venv/.installed

# Two processes, each with its own tests: those that need Ray, and the others. See tests/conftest.py.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

.PHONY: help install demo test test-slow bench docs links lint house lock
.DEFAULT_GOAL := help

help:
	@echo 'make demo       train on handwritten digits, about 3 minutes'
	@echo 'make test       run the tests, 15 minutes; part of them: make test TESTS=tests/training'
	@echo 'make test-slow  run those that start clusters of their own or take minutes each, 30 minutes'
	@echo 'make bench      measure against the peers, 8 to 13 minutes; benchmarks/README.md has the longer ones'
	@echo 'make docs       build the pages of docs/ into dist/docs'
	@echo 'make links      look whether the pages that docs/ links to are there'
	@echo 'make install    set up .venv alone'
	@echo 'make lint       style and types'
	@echo 'make house      what each file is for'
	@echo 'make lock       resolve the dependencies anew'

install: $(INSTALLED)
ifeq ($(origin PYTHON),command line)
	@test "$$($(BIN)/python -V)" = "$$($(PYTHON) -V)" || { echo ".venv has $$($(BIN)/python -V), not \
	$$($(PYTHON) -V); delete it, or use another clone"; exit 1; }
endif
	@:

# uv lives in the project's own environment; the lock holds every package's version and hash. Bytecode is
# compiled here, once: without it every worker process would spend seconds compiling torch.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import re, sys; v, (low, high) = sys.version_info[1], map(int, re.search( \
	r"requires-python = .>=3\.(\d+),<3\.(\d+)", open("pyproject.toml").read()).groups()); \
	sys.exit(None if low <= v < high else f"diptych needs Python 3.{low} to 3.{high - 1}, not 3.{v}; " \
	f"try make PYTHON=python3.{high - 1} ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-build-isolation --no-deps --editable .
	touch $@

demo: install
	$(BIN)/diptych demo

test: install
	$(PYTEST) -m 'not slow' $(TESTS)

test-slow: install
	$(PYTEST) -m slow $(TESTS)

bench: install
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements-bench.lock
	$(BIN)/python benchmarks/quick.py $(BENCH)

# What docs/ says of settings and commands comes from the code; a broken link is an error.
docs: install
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs dist/docs
	@echo dist/docs/index.html

links: install
	$(BIN)/python -m sphinx -W --keep-going -n -q -b linkcheck docs dist/links

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

house:
	@find pipelines training tuning cluster benchmarks -name '*.py' | sort | xargs awk 'FNR == 1 {gsub(/"""/, ""); \
	print FILENAME ": " $$0}'

lock:
	$(BIN)/uv pip compile --quiet pyproject.toml --group dev --universal --python-version 3.11 \
	--generate-hashes --upgrade -o requirements.lock
	$(BIN)/uv pip compile --quiet --group bench --universal --python-version 3.11 --constraint requirements.lock \
	--generate-hashes --upgrade -o requirements-bench.lock
