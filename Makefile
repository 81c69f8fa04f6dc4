# `make demo` and `make test` do all the set-up themselves: they need Python 3.10 or newer, gcc and make.

PYTHON      ?= python3
VENV        ?= .venv
JOBS        ?= 2
DEMO_ARGS   ?=
PYTEST_ARGS ?=
RUN         := $(VENV)/bin/python
INPUTS      := pyproject.toml constraints/ci.txt tools/setup_env.py

.PHONY: help demo test lint docs clean

help:
	@echo "make demo   an expert block in FP8 against BF16, on the GPU if there is one   (DEMO_ARGS='--model qwen3-235b')"
	@echo "make test   ruff, mypy and the tests that need no GPU, slow ones left out      (PYTEST_ARGS='-k masked')"
	@echo "make lint   ruff and mypy"
	@echo "make docs   the documentation as a site, under site/; fails on a broken link"
	@echo "make clean  remove the environment and the caches"

demo: $(VENV)/.ready-cli
	$(RUN) -m narrowgemm demo $(DEMO_ARGS)

test: lint
	$(RUN) -m pytest -n $(JOBS) $(PYTEST_ARGS)

lint: $(VENV)/.ready-dev
	$(RUN) -m ruff check src tests tools benchmarks examples
	$(RUN) -m mypy

docs: $(VENV)/.ready-docs
	$(RUN) -m mkdocs build --strict --quiet

# The developer's environment holds everything that the demo needs, so `make demo` is satisfied with either.
$(VENV)/.ready-cli: $(INPUTS)
	$(PYTHON) tools/setup_env.py $(VENV) cli,hf
	@touch $@

$(VENV)/.ready-dev: $(INPUTS)
	$(PYTHON) tools/setup_env.py $(VENV) dev
	@touch $@ $(VENV)/.ready-cli

$(VENV)/.ready-docs: $(INPUTS)
	$(PYTHON) tools/setup_env.py $(VENV) docs
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-triton .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
