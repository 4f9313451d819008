# make serve   environment, install, server on :8000 with the bundled model
# make test    the same environment, then the suite
# make tutorials  every block of docs/tutorials, minutes
# make bench   the engines, decoding, and the server as its load grows; bench-peers: the server beside others
# make report  the served version's report again, from the CSV files it carries
# make bench-ray  two Ray nodes on this machine, under load: replicas and nodes killed, versions replaced
# make soak    the server under ten times its load, then 30 minutes of mixed traffic, faults and reloads
# make fuzz    an hour of coverage-guided fuzzing of what strangers send; make coverage: of app/ by the suite
# make mutation  changes the code and sees whether the tests notice; MUTANTS="app.batcher.*" for a part, hours for all
# make docs    the table of docs/settings.md from the code, and every answer that the docs show, from a server
# make audit   known weaknesses of the dependencies; sbom: what is installed; lock: requirements.lock again
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: setup serve test tutorials check report bench bench-peers bench-ray soak fuzz coverage mutation audit sbom lock docs

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
	$(VENV)/bin/pytest -n 2 --dist loadfile

tutorials: setup
	DERMLENS_TUTORIALS=1 $(VENV)/bin/pytest tests/test_tutorials.py

report: setup
	$(VENV)/bin/python -m training.report

bench: setup
	$(VENV)/bin/python benchmarks/engine.py
	$(VENV)/bin/python benchmarks/growth.py

bench-peers: setup
	$(VENV)/bin/python benchmarks/compare.py

bench-ray: setup
	$(VENV)/bin/python benchmarks/ray_cluster.py

soak: setup
	$(VENV)/bin/python benchmarks/overload.py
	$(VENV)/bin/python benchmarks/soak.py

# for each target
FUZZ_SECONDS ?= 1200
fuzz: setup
	$(VENV)/bin/python tests/fuzz/fuzz.py decode -max_total_time=$(FUZZ_SECONDS)
	$(VENV)/bin/python tests/fuzz/fuzz.py multipart -max_total_time=$(FUZZ_SECONDS)
	$(VENV)/bin/python tests/fuzz/fuzz.py v2 -max_total_time=$(FUZZ_SECONDS)

coverage: setup
	$(VENV)/bin/coverage run -m pytest -q tests/app --deselect tests/app/test_privacy.py::test_the_server_opened_no_file_to_write_but_its_audit_log
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report --fail-under=95

mutation: setup
	$(VENV)/bin/pip install --quiet --disable-pip-version-check mutmut==3.8.1
	$(VENV)/bin/mutmut run $(if $(MUTANTS),"$(MUTANTS)")
	$(VENV)/bin/mutmut results

TOOLS := $(VENV)/tools
$(TOOLS)/.installed: | setup
	"$(PYTHON)" -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1 cyclonedx-bom==7.5.0 uv==0.13.9
	@touch $@

audit: $(TOOLS)/.installed
	$(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip -r requirements.lock

sbom: $(TOOLS)/.installed
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment $(VENV)/bin/python --pyproject pyproject.toml --output-reproducible --of JSON -o dist/sbom.json

# What the server needs without torch, and its extras, each file with its hashes
lock: $(TOOLS)/.installed
	{ sed -n '1,3p' requirements.lock; sed -nE '/^(dependencies|clinical|tracing) = \[/,/^\]/s/^ *"(.*)",$$/\1/p' pyproject.toml | \
	  grep -vE '^(torch|torchvision|captum)\b' | $(TOOLS)/bin/uv pip compile --quiet - --constraint constraints.txt \
	  --generate-hashes --no-header --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_28; \
	} > requirements.lock.new && mv requirements.lock.new requirements.lock

# The table of settings, between its two marks; then the answers
docs: setup
	{ sed '/^<!-- make docs -->$$/q' docs/settings.md; $(VENV)/bin/python -m app.settings; sed -n '/^<!-- end -->$$/,$$p' docs/settings.md; \
	} > docs/settings.md.new && mv docs/settings.md.new docs/settings.md
	$(VENV)/bin/python -m tests.answers

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
