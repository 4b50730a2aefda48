# make demo, make test: each installs what it needs into .venv first. PYTHON=python3.12 make demo takes another Python.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test soak lint

demo: .venv/installed  ## train the tiny demo model and see it reply
	rm -rf demo_output
	$(BIN)/accelerate launch scripts/sft.py recipes/demo.yaml

test: .venv/installed lint  ## everything, two tests at a time
	$(BIN)/python -m pytest -q -n 2

soak: .venv/installed  ## kill a plain and a ZeRO-2 run 20 times each; alone on the machine, since it takes a while
	$(BIN)/python -m pytest -q -s -m soak

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt requirements-eval.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt -r requirements-eval.txt -r requirements-dev.txt -c constraints.txt
	touch $@
