# make demo: a first training run. make test: style, types and tests. make faults: the fault suite,
# whole. make bench: the throughput suite.
# Each makes .venv first. PYTHON chooses the interpreter (3.11 or newer), TORCH what pip installs as
# PyTorch.
PYTHON ?= python3
TORCH ?= torch torchvision
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test faults bench

demo: $(VENV)/installed
	$(RUN) -m fastsmooth.train --method exp

test: $(VENV)/installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest --numprocesses auto --dist worksteal

bench: $(VENV)/installed-test  # it runs the tests of what it measures first
	$(RUN) -m benchmarks.bench_train
	$(RUN) -m benchmarks.bench_kernels
	$(RUN) -m benchmarks.bench_noise
	$(RUN) -m benchmarks.bench_hosts
	$(RUN) -m benchmarks.bench_loader
	$(RUN) -m benchmarks.bench_index
	$(RUN) -m benchmarks.bench_smooth

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastsmooth needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

# Whatever a test compares with or reads by is installed, so that it need not skip.
$(VENV)/installed-test: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[all,ray,bench]'
	touch $@

faults: $(VENV)/installed-test  # the fault suite with all of its cases: under 15 minutes on two cores
	$(RUN) -m pytest tests/faults --full --numprocesses auto --dist worksteal
