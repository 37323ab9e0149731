# Two commands do all set-up: `make quickstart` and `make test`, in either order.
# PYTHON, VENV, TORCH, EXTRAS and NO_UV steer the set-up; .ci/bootstrap.py says how.

PYTHON ?= python3
VENV ?= .venv
MLFLOW_TRACKING_URI ?= sqlite:///mlflow.db
# Each test computes on one thread.
TEST_PROCESSES ?= 2
export PYTHON VENV TORCH EXTRAS NO_UV
export MLFLOW_DISABLE_TELEMETRY = true

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test notebook mlflow reference gpu-check
# A machine lent for minutes has torch and Lightning, and no time for a set-up.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)

help: ## what can be made
	@sed -n 's/^\([a-z-]*\): [a-z]*[ ]*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: ## the environment; free when it is there already
	@$(PYTHON) .ci/bootstrap.py

quickstart: setup ## train a small decoder, sample, score and report
	$(VENV)/bin/rudolph run experiments/quickstart.yaml

test: setup ## all tests, a file per process; PYTEST=tests/test_masks.py chooses
	$(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST)

notebook: setup ## JupyterLab in notebooks/
	$(VENV)/bin/jupyter lab notebooks

# SQLAlchemy's default pool is too small for 32 runs that write at once.
mlflow: setup ## the tracking server, light: one worker, no job queue
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_SQLALCHEMYSTORE_POOL_SIZE=40 \
	MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW=40 $(VENV)/bin/mlflow server \
		--workers 1 --host 127.0.0.1 --backend-store-uri $(MLFLOW_TRACKING_URI)

reference: setup ## the published packages that experiments/speed compare with
	$(VENV)/bin/python -m pip install --no-deps --target data/reference \
		rudolph==0.0.1rc10 rudalle==1.1.3 taming-transformers==0.0.1

gpu-check: ## check and measure on one GPU; GPU_FLAGS="--minutes 5" or --smoke
	$(GPU_PYTHON) -m rudolph.gpu_check $(GPU_FLAGS)
