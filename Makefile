# make demo | demo-backbones | slurm-demo | test | test-slurm | lint | format. Each makes .venv first if it is missing or out of date.
PYTHON311 ?= python3.11
VENV := .venv
PYTHON := $(VENV)/bin/python
SHELL_FILES := .ci/run $(shell find fitscale slurm tools -name '*.sh')
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-backbones slurm-demo test test-slurm lint format

demo: $(INSTALLED)
	$(PYTHON) tools/demo.py

demo-backbones: $(INSTALLED)
	$(PYTHON) tools/demo.py backbones

slurm-demo: $(INSTALLED)
	$(PYTHON) slurm/demo.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slurm"

test-slurm: $(INSTALLED)
	$(PYTHON) -m pytest -n 3 --dist loadfile tests/slurm

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	for file in $(SHELL_FILES); do bash -n $$file || exit 1; done
	$(VENV)/bin/shellcheck $(SHELL_FILES)

format: $(INSTALLED)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	test -x $(PYTHON) || $(PYTHON311) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
