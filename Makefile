# Each target that needs Python first makes .venv from constraints.txt. `make PYTHON=/path/to/python TARGET`
# uses that environment as it is and makes none (a GPU machine without a network, say).
ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/.stamp
endif
BASE_PYTHON ?= python3
OUT ?= benchmarks/results/gpu
BENCH_JSON ?= .benchmarks/ci.json

.PHONY: help quickstart test test-deep lint format types bench bench-ci mutants faults soak wheels install-check offline-gpu gpu-check clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart  train prototypes, teacher and students on a synthetic corpus, print the table"
	@echo "make test        run the tests"
	@echo "make test-deep   run those that repeat a proof over more sizes or compile for minutes"
	@echo "make lint        check style (ruff)"
	@echo "make format      put the style right (ruff)"
	@echo "make types       check the types of the public modules (mypy)"
	@echo "make bench       time losses, steps and latency on this device (python -m benchmarks.suite --help)"
	@echo "make bench-ci    time a small row of each loss, for benchmarks.compare; JSON in BENCH_JSON ($(BENCH_JSON))"
	@echo "make mutants     break the losses in many ways and see that the tests notice (about an hour)"
	@echo "make faults      kill, stop and starve training runs, damage checkpoints, cut the power (about 25 minutes)"
	@echo "make soak        load metakd serve with good, hostile, slow and too many clients (5 minutes)"
	@echo "make wheels      sdist and wheels into dist/: without kernels, with the CPU's, with CUDA's beside them (RELEASING.md)"
	@echo "make install-check  install the sdist and the wheels into fresh environments, compile and compute there"
	@echo "make models/minilm  fetch the encoder of the configurations (all-MiniLM-L6-v2, checksum verified)"
	@echo "make offline-gpu compile the GPU kernels without a GPU, show registers and spills"
	@echo "make gpu-check   on a GPU machine: build, tests, sanitizer, benchmarks, targets; results in OUT ($(OUT))"
	@echo "                 ARGS='--only verify --seconds 300': some of it, in so much time"
	@echo "make clean       remove the environment and everything built"
	@echo "PYTHON=...       use this environment instead of making .venv;  BASE_PYTHON=... makes .venv with it"

# torch first: the kernels are compiled with its headers, while everything else is fetched. Bytecode of 20,000 files
# that are mostly never imported is half of what pip would do: Python writes that of a module as it imports it.
.venv/.stamp: pyproject.toml constraints.txt setup.py
	$(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install --no-compile -c constraints.txt torch setuptools wheel ninja
	.venv/bin/python metakd/extension.py & \
	METAKD_NO_EXT=1 .venv/bin/python -m pip install --no-compile -c constraints.txt --no-build-isolation -e '.[dev]' && wait
	touch $@

quickstart: $(READY)
	$(PYTHON) -m metakd quickstart

# Two processes, a file each in the order of tests/conftest.py: much of the time is one-threaded (the interpreter,
# compilers).
test: $(READY)
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not deep"

test-deep: $(READY)
	$(PYTHON) -m pytest -n 2 -m deep

lint: $(READY)
	$(PYTHON) -m ruff check .

format: $(READY)
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

types: $(READY)
	$(PYTHON) -m mypy

models/minilm: $(READY)
	$(PYTHON) -c "from metakd.demo import pretrained_encoder; pretrained_encoder('$@')"

bench: $(READY)
	$(PYTHON) -m benchmarks.suite

bench-ci: $(READY)
	mkdir -p $(dir $(BENCH_JSON))
	$(PYTHON) -m pytest -q benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds --benchmark-json=$(BENCH_JSON)

mutants: $(READY)
	$(PYTHON) tests/mutants.py

faults: $(READY)
	$(PYTHON) tests/faults.py --out docs/results/faults.md

soak: $(READY)
	$(PYTHON) tests/soak.py --out docs/results/soak.md

wheels: $(READY)
	$(PYTHON) tests/make_wheels.py --twice --aarch64

install-check: $(READY)
	$(PYTHON) tests/install_check.py --out docs/results/install-check.txt

offline-gpu: $(READY)
	$(PYTHON) tests/compile_triton.py
	$(PYTHON) tests/compile_cuda.py

gpu-check: $(READY)
	$(PYTHON) -m benchmarks.gpu_check --out $(OUT) $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks metakd/libmetakd_*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
