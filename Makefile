# make demo | make test | make setup: each sets up what is missing in .venv and goes.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
RUN ?= runs/demo

# Two tests at a time, each file's in one process; PYTEST="-n 0" runs them one after the other.
PYTEST ?= -n 2 --dist loadfile

.PHONY: setup demo test slow weekly lint audit clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v uv >/dev/null || $(PYTHON) -m pip install --quiet --user uv || $(PYTHON) -m pip install --quiet uv
	@PATH="$$HOME/.local/bin:$$PATH"; [ -x $(BIN)/python ] || uv venv --quiet --python $(PYTHON) $(VENV)
	@PATH="$$HOME/.local/bin:$$PATH"; uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable ".[app,ocr,serve,tensorboard,trackio,wandb]" --group dev
	@touch $@

demo: setup
	$(BIN)/accelerate launch --num_processes 1 -m ddpo.train configs/demo.yaml run.output=$(RUN)

test: setup
	$(BIN)/python -m pytest $(PYTEST)

slow: setup
	$(BIN)/python -m pytest $(PYTEST) -m slow

weekly: setup audit  # an hour: 500 kills, 5,000 iterations
	$(BIN)/python -m pytest $(PYTEST) -m weekly

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

audit: setup  # known vulnerabilities of what is installed; asks the advisory database, so it needs the network
	$(BIN)/pip-audit --skip-editable

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache
