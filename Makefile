# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

FUZZ_SECONDS ?= 60 # of each target
FUZZ_TARGETS := header index recipe journal ledger manifest

.PHONY: help demo test crash fuzz docs lint format clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "streammerge needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## merge a small long-to-short pair by six methods, and show accuracy and length of each
	$(BIN)/streammerge demo --out demo

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -q -n auto --dist loadfile

crash: $(READY) ## run the long version of what is killed and stopped
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "full or not full" tests/crash

fuzz: $(READY) ## look for inputs that break a parser: 140,000 drawn, each guard taken out once, FUZZ_SECONDS=60 with atheris
	$(BIN)/python -m pytest -q -n auto -m full tests/fuzz tests/test_mutations.py
	$(BIN)/pip install --quiet --constraint constraints.txt atheris
	for target in $(FUZZ_TARGETS); do mkdir -p fuzz/$$target && $(BIN)/python tests/fuzz/guided.py $$target \
		-max_total_time=$(FUZZ_SECONDS) -timeout=5 -artifact_prefix=fuzz/$$target- \
		fuzz/$$target tests/fuzz/corpus/$$target || exit 1; done

docs: $(READY) ## write docs/methods.md anew from the methods' docstrings
	$(BIN)/streammerge methods --markdown > docs/methods.md.new
	mv docs/methods.md.new docs/methods.md

lint: $(READY) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what make made
	rm -rf $(VENV) demo fuzz build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
