# make demo, make test: each installs what it needs into .venv first. PYTHON=python3.12 make demo takes another Python.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-liger soak lint

demo: .venv/installed  ## train the tiny demo model and see it reply
	rm -rf demo_output
	$(BIN)/accelerate launch scripts/sft.py recipes/demo.yaml

test: .venv/installed lint  ## everything, two tests at a time
	$(BIN)/python -m pytest -q -n 2

test-liger: .venv/installed .venv/liger  ## the loss with Liger's kernel, without a GPU, in Triton's interpreter
	PYTHONPATH=.venv/liger TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/test_cross_entropy.py

soak: .venv/installed  ## kill a plain and a ZeRO-2 run 20 times each; alone on the machine, since it takes a while
	$(BIN)/python -m pytest -q -s -m soak

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt requirements-eval.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt -r requirements-eval.txt -r requirements-dev.txt -c constraints.txt
	touch $@

.venv/liger: | .venv/installed  ## 1 GB
	$(BIN)/python -m pip install -q --no-deps --target $@ "liger-kernel>=0.8.5,<0.9" triton
