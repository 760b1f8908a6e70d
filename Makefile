# Targets work from nothing: Python 3.11 (or 3.10, 3.12) and a network are enough.
# All packages live in one folder of the user's cache, keyed by the requirements, and are shared by every clone;
# .venv in the clone is a thin layer over it that holds only this clone. With SGLANG=version both are others, of that sglang:
# `make test SGLANG=...` runs the tests against a supported version beside the one that setup.py pins.

PYTHON ?= python3
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sglang-ets
SGLANG ?=
VENV := .venv$(addprefix -,$(SGLANG))
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
RUN := OMP_NUM_THREADS=1 $(PY)

.PHONY: install python demo serve test lint types unit unit-half unit-rest e2e e2e-others bench smollm2 drift fuzz soak clean

install: $(STAMP)

$(STAMP): setup.py pyproject.toml .ci/install.py
	@$(PYTHON) .ci/install.py "$(CACHE)" $(VENV) $(SGLANG) >&2
	@touch $@

python: install
	@echo $(abspath $(PY))

demo: install
	@$(PY) -m bench.demo

serve: install
	@$(PY) -m sglang_ets.launch_server --search ets

# Parts, two at a time, the longest first: each keeps about one core busy. The output of one is shown when it has ended.
test: lint
	@$(MAKE) --no-print-directory -j2 --output-sync=target e2e e2e-others unit-half unit-rest types

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: install
	$(PY) .ci/types.py

# In two halves, one a core: files that start processes or compile kernels, and the others.
HALF := tests/bench tests/kernels tests/patches

unit:
	@$(MAKE) --no-print-directory -j2 --output-sync=target unit-half unit-rest

unit-half: install
	$(RUN) -m pytest -q -m "not server" $(HALF)

unit-rest: install
	$(RUN) -m pytest -q -m "not server" $(HALF:%=--ignore=%)

# One server for most tests. `make e2e OVERLAP=1`: all servers with the overlap schedule, which a CPU does without otherwise.
e2e: install
	$(RUN) -m pytest -q -m server $(OTHERS:%=--ignore=%)

# What needs other servers than that one, so that both parts can run at once.
OTHERS := $(patsubst %,tests/e2e/test_%.py,faults metrics other_servers policy_head prm_formats prm_pool refused_starts trace)
e2e-others: install
	$(RUN) -m pytest -q -m server $(OTHERS)

# Every bench in its smoke mode: shows that they run, not what they measure; the soak fails if one of its rules is broken.
# (real_model needs data and another model.)
BENCHES := soak searches forks capacity fairness throughput ilp kernels attention studies.selection_quality

bench: install
	@$(MAKE) --no-print-directory -j2 --output-sync=target $(BENCHES:%=smoke-%)

smoke-%: install
	$(RUN) -m bench.$* --smoke

# One bench: its file under bench/ names it, ARGS are its options. `make bench-searches ARGS="--grid sweep"`
bench-%: install
	$(RUN) -m bench.$* $(ARGS)

# A real language model as a checkpoint in the user's cache; prints its folder.
smollm2: install
	@$(PY) -m bench.smollm2

# Hostile requests against a server: make fuzz ARGS="--requests 5000 --seed 1"
fuzz: bench-fuzz

# Everything at once for half an hour: make soak ARGS="--minutes 30"
soak: bench-soak

# What another version of sglang would change for the patches: make drift VERSION=..., or none for the installed one.
drift: install
	@$(RUN) -m sglang_ets.patches.drift $(VERSION)

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
