# Targets work from nothing: Python 3.11 (or 3.10, 3.12) and a network are enough.
# All packages live in one folder of the user's cache, keyed by the requirements, and are shared by every clone;
# .venv in the clone is a thin layer over it that holds only this clone.

PYTHON ?= python3
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sglang-ets
PY := .venv/bin/python
STAMP := .venv/.installed
RUN := OMP_NUM_THREADS=1 $(PY)

.PHONY: install python demo serve test lint types unit e2e e2e-formats bench bench-ilp bench-kernels bench-attention bench-clusters bench-kv bench-sweep \
	bench-throughput bench-coverage bench-selection bench-variants bench-real smollm2 drift clean

install: $(STAMP)

$(STAMP): setup.py pyproject.toml .ci/install.py
	@$(PYTHON) .ci/install.py "$(CACHE)" >&2
	@touch $@

python: install
	@echo $(abspath $(PY))

demo: install
	@$(PY) -m bench.demo

serve: install
	@$(PY) -m sglang_ets.launch_server --search ets

# Three parts, two at a time: each keeps about one core busy. The output of one is shown when it has ended.
test: lint types
	@$(MAKE) --no-print-directory -j2 --output-sync=target e2e unit e2e-formats

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: install
	$(PY) -m mypy

unit: install
	$(RUN) -m pytest -q -m "not server"

# One server for most tests.
e2e: install
	$(RUN) -m pytest -q -m server --ignore=$(FORMATS)

# A server for each PRM format.
FORMATS := tests/e2e/test_prm_formats.py
e2e-formats: install
	$(RUN) -m pytest -q -m server $(FORMATS)

# Every bench in its smoke mode: shows that they run, not what they measure. (bench-real needs data and another model.)
BENCHES := throughput kv_footprint coverage_term sweep bench_clusters cluster_variants selection_quality bench_ilp \
	bench_kernels bench_attention

bench: install
	@$(MAKE) --no-print-directory -j2 --output-sync=target $(BENCHES:%=smoke-%)

smoke-%: install
	$(RUN) -m bench.$* --smoke

bench-ilp: install
	$(RUN) -m bench.bench_ilp $(ARGS)

bench-kernels: install
	$(RUN) -m bench.bench_kernels $(ARGS)

bench-attention: install
	$(RUN) -m bench.bench_attention $(ARGS)

bench-clusters: install
	$(RUN) -m bench.bench_clusters $(ARGS)

bench-kv: install
	$(RUN) -m bench.kv_footprint $(ARGS)

bench-sweep: install
	$(RUN) -m bench.sweep $(ARGS)

bench-throughput: install
	$(RUN) -m bench.throughput $(ARGS)

bench-coverage: install
	$(RUN) -m bench.coverage_term $(ARGS)

bench-selection: install
	$(RUN) -m bench.selection_quality $(ARGS)

bench-variants: install
	$(RUN) -m bench.cluster_variants $(ARGS)

# Needs ARGS="--data gsm8k math500", or files; see bench/datasets.py.
bench-real: install
	$(RUN) -m bench.real_model $(ARGS)

# A real language model as a checkpoint in the user's cache; prints its folder.
smollm2: install
	@$(PY) -m bench.smollm2

# What another version of sglang would change for the patches: make drift VERSION=..., or none for the installed one.
drift: install
	@$(RUN) -m sglang_ets.patches.drift $(VERSION)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
