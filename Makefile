# Every target makes the environment it needs in .venv, from Python 3.11 or later and the versions in requirements.lock.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# A proxy that no one listens on: the documentation must build without a network.
NOBODY := http://127.0.0.1:9

.PHONY: demo demo-distributed bench algorithms against-optax collectives test fuzz lint types docs clean

demo: $(VENV)/demo.installed ## train a small GPT with optfn and with torch.optim, side by side
	$(BIN)/python examples/train_gpt.py $(ARGS)

demo-distributed: $(VENV)/demo.installed ## the same on four processes, killed and resumed on two: FSDP2 over the loopback address
	$(BIN)/python examples/demo_distributed.py $(ARGS)

bench: $(VENV)/bench.installed ## optimizer steps, compile times and memory beside torch, TorchOpt, Optax and HeavyBall
	$(BIN)/python benchmarks/run.py $(ARGS)

algorithms: $(VENV)/bench.installed ## docs/algorithms.md: every algorithm, what it keeps and how fast its step is
	$(BIN)/python benchmarks/algorithms.py $(ARGS)

against-optax: $(VENV)/bench.installed ## docs/against-optax.md: every alias that Optax has too trains the demo's model in both
	$(BIN)/python benchmarks/against_optax.py $(ARGS)

collectives: $(VENV)/bench.installed ## docs/collectives.md: what processes say to each other in a step, counted and by formula
	$(BIN)/python benchmarks/processes.py $(ARGS)

test: $(VENV)/dev.installed ## all tests; ARGS="--generated 40" generates code for every fixed case of the fuzzer, not for some
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

fuzz: $(VENV)/dev.installed ## compiled chains against eager ones, from a seed: ARGS="--minutes 20 --seed 7"
	$(BIN)/python tests/fuzz.py $(ARGS)

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.installed ## strict type check of the package
	$(BIN)/basedpyright

docs: $(VENV)/dev.installed ## the documentation, to docs/_build/html
	rm -f docs/_build/built
	http_proxy=$(NOBODY) https_proxy=$(NOBODY) $(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	touch docs/_build/built # tests/test_docs.py reads these pages, while they are newer than what they are made of

# The lock is a constraint: each extra takes what it needs of it. torch comes first and pinned, so that pip
# takes the build that it is configured to find. Modules are compiled afterwards, on all cores: pip takes one.
$(VENV)/%.installed: pyproject.toml requirements.lock | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-compile --constraint requirements.lock torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint requirements.lock --editable '.[$*]'
	$(BIN)/python -m compileall -q -j 0 -x 'site-packages/.*/tests/' $(VENV)/lib >/dev/null || true # some files of packages are templates, and no Python
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("optfn needs Python 3.11 or later, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) docs/_build runs .pytest_cache .hypothesis .ruff_cache
