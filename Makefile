# One command each, on a fresh machine with Python 3.11 or newer: make quickstart, make test, make docs.
#
# Where PyPI's torch would bring CUDA packages that you do not want:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make quickstart

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA := quickstart/data
MODEL := quickstart/model
# A model this small gains nothing from more threads, and loses much where others compute as well.
export OMP_NUM_THREADS ?= 1
# This pip checks the hashes of constraints.txt also where not every requirement has one.
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check pip==26.3
endef
INSTALL := -m pip install --quiet --disable-pip-version-check --no-require-hashes -c constraints.txt
# Star Wars, The Empire Strikes Back, Return of the Jedi
HISTORY := 50 172 181

.PHONY: quickstart test test-benchmarks test-conformance test-lineage test-agreement test-adapters test-mutations test-versions test-spark test-postgres test-demo test-daily-job test-fuzz test-processes test-faults lint notebooks docs release clean

quickstart: $(MODEL)/model.safetensors
	$(BIN)/bert4rec evaluate $(MODEL) --data $(DATA)
	$(BIN)/bert4rec recommend $(MODEL) $(HISTORY)
	@echo "next, in a browser: $(BIN)/pip install '.[demo]' && $(BIN)/bert4rec demo $(MODEL)"

$(DATA)/preparation.json: | $(VENV)/installed
	$(BIN)/bert4rec prepare ml-100k --output $(DATA)

# A run that was interrupted goes on from its last checkpoint.
$(MODEL)/model.safetensors: | $(DATA)/preparation.json
	$(BIN)/bert4rec train --config recipes/ml-100k.yaml --data $(DATA) --output_dir $(MODEL) \
		$(if $(wildcard $(MODEL)/checkpoint-*),--resume_from_checkpoint last)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Benchmarks with small sizes.
test-benchmarks: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m benchmarks tests/test_benchmarks.py tests/test_gpu_benchmark.py

# Transformers' own common tests, from its source distribution, on our model classes.
test-conformance: $(VENV)/installed-dev
	$(BIN)/python tests/conformance/run_upstream.py

# RecBole and hopwise, each in an environment of its own, load what `convert --to recbole` writes.
test-lineage: $(VENV)/installed-dev
	$(BIN)/python tests/lineage/return_trip.py $(VENV)/lineage

# Metrics beside ranx and RecTools, leave-one-out beside RecBole and SASRec's file.
test-agreement: $(VENV)/installed-dev
	$(BIN)/python tests/agreement/run.py $(VENV)/agreement

# LoRA by PEFT, torchao's quantised weights, Accelerate's offloading, texts encoded by sentence-transformers.
test-adapters: $(VENV)/adapters/installed
	$(VENV)/adapters/bin/python -m pytest tests/adapters

# Preparation and recommendations on a Spark cluster of two workers; needs Java 17, which Debian has.
test-spark: $(VENV)/databases/installed
	command -v java || (apt-get update -q && apt-get install -q -y openjdk-17-jre-headless)
	$(VENV)/databases/bin/python -m pytest tests/spark

# Logs from a PostgreSQL server, which Debian has and the tests start.
test-postgres: $(VENV)/databases/installed
	ls /usr/lib/postgresql/*/bin/initdb || (apt-get update -q && apt-get install -q -y postgresql)
	$(VENV)/databases/bin/python -m pytest tests/postgres

# The page of `bert4rec demo` in headless Chromium, which Debian has; pictures go to docs/assets with UPDATE=1.
test-demo: $(VENV)/demo/installed
	command -v chromium || (apt-get update -q && apt-get install -q -y chromium)
	$(if $(UPDATE),UPDATE_PICTURES=1) $(VENV)/demo/bin/python -m pytest tests/demo

# Ten days of examples/daily_job.py, with a server.
test-daily-job: $(VENV)/installed-dev
	TEST_DAILY_JOB=1 $(BIN)/python -m pytest tests/daily_job

# Hostile inputs for everything that reads; docs/reliability.md has the figures. INPUTS and SEED choose others.
test-fuzz: $(VENV)/installed-dev
	$(BIN)/python tests/fuzz/run.py $(or $(INPUTS),100000) $(or $(SEED),0)

# Training in two and four processes, DDP and FSDP2, killed and resumed with other numbers of processes.
test-processes: $(VENV)/installed-dev
	TEST_PROCESSES=1 $(BIN)/python -m pytest tests/processes tests/training/test_fsdp_accelerate.py

# Commands that are killed, starved of disk, memory and permission, and long runs; needs root for its small file systems.
test-faults: $(VENV)/installed-dev
	$(BIN)/python tests/faults/killed.py
	$(BIN)/python tests/faults/starved.py
	$(BIN)/python tests/faults/soak.py

# Mistakes, made one after another in a copy of the package: a test must notice each.
test-mutations: $(VENV)/installed-dev
	$(BIN)/python tests/mutations.py

# The whole suite with the oldest allowed, the pinned and the newest versions; writes docs/reference/compatibility.md.
# NEWEST_PYTHON=python3.14 takes another Python for the newest.
test-versions:
	$(PYTHON) tests/versions.py $(VENV)/versions oldest pinned newest=$(NEWEST_PYTHON)

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Executed in a copy, so that a check changes no file; with UPDATE=1 the outputs are stored.
notebooks: $(VENV)/installed-dev
	PYTHONWARNINGS=ignore $(BIN)/jupyter nbconvert --to notebook --execute $(if $(UPDATE),--inplace,--output-dir $(VENV)/notebooks) \
		--ExecutePreprocessor.timeout=900 notebooks/*.ipynb

# The site, built strictly into build/site; its pages' code is run, its reference compared with the package.
docs: $(VENV)/docs/installed
	$(VENV)/docs/bin/codespell README.md CHANGELOG.md CONTRIBUTING.md docs bert4rec_hf benchmarks examples recipes
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/python -m mkdocs build --strict
	$(VENV)/docs/bin/python -m pytest tests/docs/check_pages.py

# Wheel and source distribution in dist/, each installed alone; the quickstart from the wheel; SBOM; audit.
release:
	$(PYTHON) tests/release.py $(VENV)/release dist

$(VENV)/installed: pyproject.toml constraints.txt
	$(call environment,$(VENV))
	PYTHONWARNINGS=ignore $(BIN)/python $(INSTALL) -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	PYTHONWARNINGS=ignore $(BIN)/python $(INSTALL) -e ".[dev]"
	touch $@

$(VENV)/adapters/installed: pyproject.toml constraints.txt
	$(call environment,$(VENV)/adapters)
	PYTHONWARNINGS=ignore $(VENV)/adapters/bin/python $(INSTALL) -e ".[dev,text]" torchao wordllama
	touch $@

$(VENV)/databases/installed: pyproject.toml constraints.txt
	$(call environment,$(VENV)/databases)
	PYTHONWARNINGS=ignore $(VENV)/databases/bin/python $(INSTALL) -e ".[dev]" pyspark "ibis-framework[postgres]" "psycopg[binary]"
	touch $@

$(VENV)/demo/installed: pyproject.toml constraints.txt
	$(call environment,$(VENV)/demo)
	PYTHONWARNINGS=ignore $(VENV)/demo/bin/python $(INSTALL) -e ".[demo]" pytest playwright
	touch $@

$(VENV)/docs/installed: pyproject.toml constraints.txt
	$(call environment,$(VENV)/docs)
	PYTHONWARNINGS=ignore $(VENV)/docs/bin/python $(INSTALL) -e ".[dev,docs]"
	touch $@

clean:
	rm -rf $(VENV) quickstart build/site dist
