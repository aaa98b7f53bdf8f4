# make demo    set up, then train, evaluate and compare on real data (5 minutes on 2 idle cores)
# make test    set up, then run the tests, but for those that take long: make test-slow
# make setup   the set-up alone: .venv with everything in it
# make spark   set up, with PySpark (450 MB), for its slow tests; Spark wants Java 17 or later
# make pages   measure speed anew, and write its pages (half an hour on 2 idle cores; docs/benchmarks.md)
# make dist    an sdist and a wheel with the kernels, in dist/
# make lint, coverage, docs   see CONTRIBUTING.md
# EXTRA=gpu    for a machine with an NVIDIA GPU

PYTHON ?= python3
EXTRA ?= cpu
# of the versions that pyproject.toml allows, those that the tests are run with
VERSIONS ?= "torch==2.13.*" "torchrec==1.8.*" "fbgemm-gpu$(if $(filter cpu,$(EXTRA)),-cpu)==1.8.*"
BIN := .venv/bin
STAMP := .venv/installed-$(EXTRA)

# uv reads its own settings; where pip was told of wheels or certificates, uv is told too.
UV_ENV := $(if $(PIP_FIND_LINKS),UV_FIND_LINKS="$(PIP_FIND_LINKS)") \
          $(if $(PIP_CERT),SSL_CERT_FILE="$(PIP_CERT)") \
          $(if $(PIP_INDEX_URL),UV_INDEX_URL="$(PIP_INDEX_URL)")

# Threads that wait spin briefly, then sleep: as fast alone, and where another program wants a core
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

# two at a time, each on one thread; a file's tests share what they set up
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# The floor is two points below what it was when it was set. Folders, not packages: coverage would import
# a package to find it, and torch cannot be imported twice.
coverage: setup
	$(BIN)/python -m pytest tests/ops tests/modules tests/models \
	    --cov=ifa_torchrec/ops --cov=ifa_torchrec/modules --cov-report=term-missing --cov-fail-under=97

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# one after the other, on all cores: nothing else may run beside them
pages: setup
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/serving.py

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# the wheel is for machines like this one; cibuildwheel makes those for others (pyproject.toml)
dist: setup
	$(UV_ENV) $(BIN)/uv build

clean:
	rm -rf .venv runs dist build *.egg-info
