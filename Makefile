# make serve   environment, install, server on :8000 with the bundled model
# make test    the same environment, then the suite
# make bench   the engines, decoding, and the server as its load grows; bench-peers: the server beside others
# make report  the served version's report again, from the CSV files it carries
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: setup serve test check report bench bench-peers

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "dermlens: no python3 found: install Python 3.11 or newer, or give PYTHON=/path/to/python"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dermlens: $(PYTHON) is too old: give PYTHON=/path/to/python3.11"; exit 1; }
	@echo "dermlens: installing into $(VENV); torch is large, the first time takes minutes"
	"$(PYTHON)" -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[training,dev]'
	@touch $@

serve: setup
	$(VENV)/bin/dermlens serve

test: setup
	$(VENV)/bin/pytest

report: setup
	$(VENV)/bin/python -m training.report

bench: setup
	$(VENV)/bin/python benchmarks/engine.py
	$(VENV)/bin/python benchmarks/growth.py

bench-peers: setup
	$(VENV)/bin/python benchmarks/compare.py

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
