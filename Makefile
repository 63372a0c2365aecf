# make demo: environment, install, the main job, a report.   make test: the same environment, the quick tests.
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
JOBS ?= 2
# A worker that crashed is not replaced: with a replacement, xdist 3.8 waits for ever at the end.
SPREAD := -n $(JOBS) --dist loadfile --max-worker-restart 0
ALL := not gpu and not gpu_target and not tpu and not network

.PHONY: demo test test-all test-matrix test-gpu-targets lint docs wheel check-wheel report clean help

help:
	@echo "make demo              install into $(VENV), run the main job, write report/"
	@echo "make test              the quick tests on $(JOBS) cores (JOBS=n for more)"
	@echo "make test-all          also the slow ones, against torch, real TPU compiles, site and wheel"
	@echo "make test-matrix       the quick tests on every supported Python and jax"
	@echo "make test-gpu-targets  compile for NVIDIA cards without owning one (4.4 GB of wheels)"
	@echo "make lint docs wheel check-wheel report clean"

demo: $(VENV)/.base
	$(BIN)/jaxlm demo --out report

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(SPREAD) -q

test-all: $(VENV)/.all
	$(BIN)/python -m pytest $(SPREAD) -q -m "$(ALL)"

test-matrix:
	python3 scripts/test_matrix.py

test-gpu-targets: .venv-gpu/.targets
	JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 \
	XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false" \
	.venv-gpu/bin/python -m pytest -q -m gpu_target

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

wheel: $(VENV)/.build
	rm -rf dist
	$(BIN)/python -m build --outdir dist

check-wheel: wheel
	$(BIN)/python scripts/check_wheel.py dist

report: $(VENV)/.base
	$(BIN)/python experiments/report.py --out report/experiments.html

# A stamp per set of extras: a second run installs nothing, a changed pyproject.toml installs again.
$(VENV)/.made: scripts/make_env.sh
	scripts/make_env.sh $(VENV)
	touch $@

$(VENV)/.base: $(VENV)/.made pyproject.toml
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e ".[dev]"
	touch $@

$(VENV)/.all: $(VENV)/.dev
	$(PIP) -e ".[dev,torch,eval,serve-test,docs]" build libtpu
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e ".[docs]"
	touch $@

$(VENV)/.build: $(VENV)/.made
	$(PIP) build
	touch $@

.venv-gpu/.targets: scripts/make_env.sh pyproject.toml
	PYTHON="$(or $(PYTHON),python3.11)" scripts/make_env.sh .venv-gpu
	.venv-gpu/bin/python -m pip install --quiet -e ".[dev]" "jax[cuda13]==0.10.2"
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu .venv-matrix build dist site report .pytest_cache .mypy_cache .ruff_cache
