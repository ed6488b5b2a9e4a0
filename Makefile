# matfm: `make quickstart` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV   ?= .venv
# On Linux without a GPU this saves gigabytes: make quickstart TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0
PY     := $(VENV)/bin/python
export MPLBACKEND ?= agg
# Compiled modules are kept: without them every process compiles hundreds of files again before it does anything.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart test site lab clean
help:  ## what can be made
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(PY):
	@$(PYTHON) -c 'import sys; v=sys.version_info; sys.exit(0 if (3,11)<=v[:2]<(3,14) else f"matfm needs Python 3.11 to 3.13, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.12 …")'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv "$(VENV)"

$(VENV)/.core: pyproject.toml constraints.txt | $(PY)
	@echo "Installing (the first time this takes a few minutes) …"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(PY) -m uv pip install --quiet --python "$(PY)" -c constraints.txt -e .
	@touch "$@"

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.core
	$(PY) -m uv pip install --quiet --python "$(PY)" -c constraints.txt -e '.[dev]'
	@touch "$@"

quickstart: $(VENV)/.core  ## install, run the main job on the embedded data, print the results and the report's path
	$(PY) -m matfm run e00_quickstart

test: $(VENV)/.dev  ## the whole gate, as CI runs it: sync, layers, lint, types, notebooks, experiments, site
	$(PY) -m pytest -n 2 --dist worksteal

site: $(VENV)/.dev  ## build the documentation into _site/
	$(PY) -m matfm site

lab: $(VENV)/.dev  ## open JupyterLab on the notebooks
	$(PY) -m matfm lab

clean:  ## remove the virtual environment and everything that was built
	rm -rf "$(VENV)" _proc _docs _site runs build ./*.egg-info
