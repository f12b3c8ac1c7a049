# `make demo` and `make test` do all the set-up they need: a virtual environment in .venv with the package in it.
VENV ?= .venv
PY ?= python3
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
ifneq ($(PIP_FIND_LINKS),)
# uv does not read pip's settings.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
export UV_COMPILE_BYTECODE = 1

.PHONY: setup demo test lint bench clean
setup: $(VENV)/.ok

$(VENV)/.ok: pyproject.toml
	@echo "Setting up $(VENV): PyTorch and a few libraries, one to four minutes the first time."
ifneq ($(UV),)
	$(UV) venv -q --allow-existing --python $(PY) $(VENV)
	$(UV) pip install -q --python $(BIN)/python -e ".[dev]"
else
	$(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
endif
	@touch $@

demo: setup
	$(BIN)/mythos demo

# Two processes of one thread each: tensors in tests are small, and waiting for a second thread costs more than it gives.
JOBS ?= 2
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/mythos bench

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
