# Two commands do all the set-up: `make quickstart` and `make test`. They need Python >= 3.11 with pip and venv, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch first and pinned: a range would let pip take a CUDA build of several gigabytes where a CPU build is wanted
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test lab site lint gpu-test demo-update clean help

help:
	@echo "make quickstart  install, run the quick comparison (minutes, CPU), build the site"
	@echo "make test        everything that CI runs"
	@echo "make lab         open the notebooks"
	@echo "make site        build the site into site/"
	@echo "make demo-update the catalog's update, review and refresh against a local feed server (a minute, no network)"
	@echo "make lint        ruff, pyright, import contracts"
	@echo "make gpu-test    the device tests, on a machine with a CUDA card"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed (PYTHON=... chooses one)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(INSTALL) torch
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[compare,notebooks,docs]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.run

quickstart: $(VENV)/.run
	$(BIN)/latentcot compare quickstart
	$(BIN)/latentcot site
	@echo
	@echo "Done. Where things are:"
	@echo "  results    out/quickstart/report.html   (table.md, results.json and plots/ beside it)"
	@echo "  site       site/index.html              (make site builds it anew)"
	@echo "  notebooks  notebooks/01_quickstart.ipynb (make lab opens it)"
	@echo "  next       latentcot compare quickstart --seeds 3 --out out/three-seeds; latentcot papers search 'looped transformer'"

test: $(VENV)/.dev
	./.ci/browser
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/latentcot papers check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

lab: $(VENV)/.run
	$(BIN)/jupyter lab notebooks

site: $(VENV)/.run
	$(BIN)/latentcot site

demo-update: $(VENV)/.run
	$(BIN)/python -m latentcot.catalog.demo_update

gpu-test: $(VENV)/.dev
	$(BIN)/python -m pytest tests/gpu -m gpu -q

clean:
	rm -rf build dist site *.egg-info
