# Each target installs what it needs into .venv first. PYTHON=python3.12 make demo takes another Python.
PYTHON ?= python3
BIN := .venv/bin
# Not compiled ahead: Python compiles the tenth of it that is imported, which takes a third of the time.
INSTALL := $(BIN)/python -m pip install -q --no-compile -c constraints.txt

.PHONY: help install demo chat test test-kernels test-transformers4 test-slurm test-machines soak fuzz lint

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*## */  make \1\t/' | expand -t 22

install: .venv/installed  ## what the scripts need, into .venv

demo: .venv/installed  ## train the tiny demo model and see it reply
	rm -rf demo_output
	$(BIN)/python scripts/sft.py recipes/demo.yaml
	@echo; echo "Talk to it: make chat"

chat: .venv/installed | demo_output/config.json  ## talk to the demo's model
	$(BIN)/python scripts/chat.py demo_output

demo_output/config.json:
	$(MAKE) demo

# Each of two processes begins with a half of the tests, so that a module's fixtures are made once, and takes over what
# the other has left.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

test: .venv/tests lint  ## everything, two tests at a time
	$(PYTEST)

test-kernels: .venv/tests .venv/liger  ## the Triton kernels, ours and Liger's, without a GPU, in Triton's interpreter (1 GB)
	PYTHONPATH=.venv/liger TRITON_INTERPRET=1 $(PYTEST) tests/training/test_adamw.py tests/training/test_cross_entropy.py tests/training/test_neox.py

test-transformers4: .venv/tests .venv/transformers4  ## what a run saves and an export, read by transformers 4
	$(PYTEST) tests/run/test_model_files.py tests/test_export.py

soak: .venv/tests  ## kill runs 20 times each, and other long tests; alone on the machine, since it takes a while
	$(BIN)/python -m pytest -q -s -m soak

test-slurm: .venv/tests  ## runs started, warned, preempted and queued again by a Slurm of its own; as root
	$(BIN)/python -m pytest -q -p no:xdist -m slurm

test-machines: .venv/tests  ## runs on two machines, which are network namespaces here; cables are pulled; as root
	$(BIN)/python -m pytest -q -p no:xdist -m machines

fuzz: .venv/tests  ## damage what is read back, thousands of times; FUZZ_CASES=N of each kind
	$(PYTEST) -m fuzz

lint: .venv/tests  ## ruff's checks and its formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -r requirements.txt
	touch $@

.venv/tests: .venv/installed requirements-eval.txt requirements-web.txt requirements-lora.txt requirements-dev.txt
	$(INSTALL) -r requirements-eval.txt -r requirements-web.txt -r requirements-lora.txt -r requirements-dev.txt
	touch $@

.venv/liger: | .venv/installed
	$(BIN)/python -m pip install -q --no-deps --target $@ "liger-kernel>=0.8.5,<0.9" triton

.venv/transformers4: | .venv/installed
	$(BIN)/python -m pip install -q --no-deps --target $@ transformers==4.57.6 "tokenizers>=0.22,<0.23" "huggingface_hub>=0.34,<1"
