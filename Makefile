# make demo    set up, then train, evaluate and compare on real data (3 to 5 minutes after the set-up, 2 to
#              the first table, on 2 idle cores)
# make test    set up, then run the fast tests; make test-slow runs the slow ones
# make setup   only set up: .venv with everything in it
# make spark   set up, with PySpark (450 MB), for its slow tests; Spark needs Java 17 or later
# make pages   measure speed again, and write its pages (half an hour on 2 idle cores; docs/benchmarks.md)
# make dist    build an sdist and a wheel with the kernels, in dist/
# make lint, coverage, docs   see CONTRIBUTING.md
# EXTRA=gpu    for a machine with an NVIDIA GPU
# On Linux without a GPU, UV_TORCH_BACKEND=cpu make setup avoids downloading torch's CUDA build

PYTHON ?= python3
EXTRA ?= cpu
# the versions that the tests run with, out of those that pyproject.toml allows
VERSIONS ?= "torch==2.13.*" "torchrec==1.8.*" "fbgemm-gpu$(if $(filter cpu,$(EXTRA)),-cpu)==1.8.*"
BIN := .venv/bin
STAMP := .venv/installed-$(EXTRA)

# uv reads its own settings; pip's settings for wheels and certificates are passed on to it.
UV_ENV := $(if $(PIP_FIND_LINKS),UV_FIND_LINKS="$(PIP_FIND_LINKS)") \
          $(if $(PIP_CERT),SSL_CERT_FILE="$(PIP_CERT)") \
          $(if $(PIP_INDEX_URL),UV_INDEX_URL="$(PIP_INDEX_URL)")

# Waiting threads spin briefly, then sleep: as fast on an idle machine, and if another program needs a core
# too, a training step takes 3 times as long instead of 20.
export GOMP_SPINCOUNT ?= 20000

.PHONY: setup spark demo test test-slow coverage lint docs pages dist clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard ifa_torchrec/ops/kernels/csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(UV_ENV) $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e ".[$(EXTRA),serve,tune,launch,demo,dev,docs]" $(VERSIONS)
	touch $@

spark: setup
	$(UV_ENV) $(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[$(EXTRA),spark]" $(VERSIONS)

demo: setup
	$(BIN)/python examples/complete_journey/demo.py

# two at a time, each on one thread; the tests of a file share their fixtures
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# The minimum is two points below the coverage when it was set. Folders, not packages: coverage would import
# a package to find it, and torch cannot be imported twice.
coverage: setup
	$(BIN)/python -m pytest tests/ops tests/modules tests/models \
	    --cov=ifa_torchrec/ops --cov=ifa_torchrec/modules --cov-report=term-missing --cov-fail-under=97

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# one after the other, on all cores: run nothing else at the same time
pages: setup
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/serving.py

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# the wheel is for machines like this one; cibuildwheel builds those for others (pyproject.toml)
dist: setup
	$(UV_ENV) $(BIN)/uv build

clean:
	rm -rf .venv runs dist build *.egg-info
