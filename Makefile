# One verb a line; .ci/run calls the same ones. `make help` lists them.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIPELINE ?= wordnet-category
PARTS ?= methods ranks bits laws
MINUTES ?= 20

# Everything that a run leaves behind stays inside the checkout.
export PREFECT_HOME ?= $(CURDIR)/.cache/prefect
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup lock demo test test-all test-unit oldest golden check supply-chain advisories wheel mutants docs site \
  soak evidence format clean

help: ## list the targets
	@grep -E '^[a-z0-9.%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.installed ## the environment: requirements.lock with hashes, then torch; by uv, or by pip where uv cannot

# Where no uv is on the PATH, pip installs the one of requirements.lock first. pip does everything where uv fails: it does
# not read pip's configuration, so an index that only pip.conf names is unknown to it.
# torch apart: its CPU and its CUDA build have the same version and other bytes, and the CUDA build brings its libraries.
# pip knows where the CPU build lies (PIP_FIND_LINKS, pip.conf); uv asks here, and for its own UV_TORCH_BACKEND=cpu.
UV ?= $(shell command -v uv)
TORCH := $(shell sed -n 's/^torch==/&/p' constraints.txt)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
ifneq ($(UV),)
MAKE_VENV := $(UV) venv --quiet --allow-existing --seed --python $(PYTHON) .venv
else
ONLY_UV := awk '/^[^ ]/ {is_uv = /^uv==/} is_uv' requirements.lock
MAKE_VENV := $(PYTHON) -m venv .venv && $(ONLY_UV) >.venv/uv.txt && $(PIP) --no-deps --require-hashes -r .venv/uv.txt
endif
LINKS := $(patsubst %,--find-links %,$(PIP_FIND_LINKS))
# Where Python may not write bytecode, every process would compile the libraries again; pip always compiles.
COMPILED := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)
UV_PIP := $(or $(UV),$(BIN)/uv) pip install --quiet --python $(BIN)/python $(COMPILED) $(LINKS)
install = $(UV_PIP) $(1) || $(PIP) $(1)

.venv/.installed: pyproject.toml constraints.txt requirements.lock
	@echo "making the environment in .venv (about a minute, once; some minutes where only pip can do it)"
	$(MAKE_VENV)
	$(call install,--no-deps --require-hashes -r requirements.lock)
	$(call install,-c constraints.txt $(TORCH))
	$(call install,--no-deps --no-build-isolation -e .)
	@touch $@

# What only the CUDA build of torch brings.
OF_TORCH := torch triton cuda-bindings cuda-pathfinder cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc \
  cuda-runtime cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)

lock: ## make requirements.lock from pyproject.toml and constraints.txt; needs uv and the index
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --extra dev --constraint constraints.txt \
	  $(addprefix --no-emit-package ,$(OF_TORCH)) --no-annotate --custom-compile-command "make lock" \
	  --output-file requirements.lock pyproject.toml

demo: setup ## retrain, gate, package and release an adapter of a real model on real data (PIPELINE=…)
	@mkdir -p $(PREFECT_HOME)
	@$(BIN)/python -m flows.retrain $(PIPELINE)

# The longest files begin (tests/conftest.py).
TWO_AT_ONCE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# What fails beside others is tried once more, alone: what then passes is listed as unsteady and refuses no landing
# (docs/decisions/0085-second-try.md). test-all has no second try.
SECOND_TRY := --last-failed --last-failed-no-failures none -rp
tests = $(BIN)/python -m pytest -m $(1) $(TWO_AT_ONCE) || { test -n "$(SECOND_TRY)" && \
  echo "*** failed beside others: once more, alone. What passes now is unsteady: find out why." && \
  $(BIN)/python -m pytest -m $(1) $(SECOND_TRY); }

test: setup ## what every change has to pass, the whole line on the real model included; slow ones even where a fast one fails
	@failed=0; \
	$(call tests,"not slow") || failed=1; \
	$(call tests,"slow and not ray and not long") || failed=1; \
	exit $$failed

test-all: SECOND_TRY :=
test-all: test ## what takes too long before each landing: another instruction set, Ray, the longest, and the soaks
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -m "not slow" $(TWO_AT_ONCE)
	$(BIN)/python -m pytest -m "ray or long"
	$(MAKE) --no-print-directory soak

test-unit: setup ## the tests that take seconds, on two cores
	@$(call tests,"not slow")

# Unit tests of what calls other packages, in an environment below .cache. uv's torch is the CUDA build where no CPU build
# of it is found.
CALLS_OTHERS := tests/settings tests/data tests/adapters tests/merge tests/evaluate tests/registry tests/scaffold \
  tests/cli tests/test_extras.py $(addprefix tests/train/test_,loss.py batches.py optimizers.py checkpoint.py)
# Those need openai and check-jsonschema, which bring newer versions of what is tried.
CALLS_OTHERS += --ignore tests/cli/test_serve.py --ignore tests/scaffold/test_files.py
FOR_TESTS := pytest pytest-timeout hypothesis peft moto[server] ministack
ELSEWHERE = .cache/environments/$@
define try_elsewhere
	$(BIN)/uv venv --quiet --allow-existing --python $(1) $(ELSEWHERE)
	$(BIN)/uv pip install --quiet --python $(ELSEWHERE)/bin/python $(LINKS) $(2) -r pyproject.toml --extra all
	$(BIN)/uv pip install --quiet --python $(ELSEWHERE)/bin/python $(LINKS) -e . $(FOR_TESTS)
	$(ELSEWHERE)/bin/python -m pytest -m "not slow" $(CALLS_OTHERS)
endef

oldest: setup ## unit tests of what calls other packages, with the oldest versions that pyproject.toml allows
	$(call try_elsewhere,3.11,--resolution lowest-direct)

python3.%: setup ## the same tests with the pinned versions under another Python: make python3.13
	$(call try_elsewhere,$(subst python,,$@),-c constraints.txt)

golden: setup ## compare with the record of behaviour that must not change (tests/golden)
	$(BIN)/python -m pytest tests/golden

check: setup ## formatting, lint, types, import directions, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# Patterns of keys and tokens. What only looks random is left out: digests do, and this repository is full of them. The
# words are the passwords of tests; the test of the request log holds what must be removed, made up.
SECRETS := --exclude-files '^(requirements\.lock|tests/serve/test_request_log\.py)$$' --exclude-secrets '^(hunter2|pw|secret|word)$$' \
  $(addprefix --disable-plugin ,HexHighEntropyString Base64HighEntropyString KeywordDetector)

supply-chain: setup ## licences of what is locked, secrets in what git tracks, the bill of materials in build/bom.cdx.json
	$(BIN)/python infra/supply_chain.py licences
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook $(SECRETS)
	$(BIN)/python infra/supply_chain.py sbom build/bom.cdx.json

advisories: setup ## known vulnerabilities of what is locked, by a dump of osv.dev: make advisories OSV=all.zip
	$(BIN)/python infra/supply_chain.py advisories $(OSV)

wheel: setup ## HEAD's wheel in build/dist, built twice and compared
	$(BIN)/python infra/supply_chain.py wheel build/dist

docs: setup ## pages and lists that are made from the code
	$(BIN)/python docs/tree.py
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_memory.py
	$(BIN)/python -m graftline.workflow.graph

site: setup ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html; with a search: $(BIN)/python -m http.server -d build/site"

mutants: setup ## small changes of the code that no test notices, compared with infra/mutants.txt (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python infra/mutants.py $(UPDATE) $(ONLY)

soak: setup ## the store and the server under faults and load, for minutes
	$(BIN)/python -m tests.registry.soak
	$(BIN)/python -m studies soak --parts requests

evidence: setup ## the survey's claims on real data, in parts that resume where they stopped (PARTS=…, MINUTES=20)
	cd studies/survey && PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro
	@mkdir -p $(PREFECT_HOME)
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m studies survey $(PARTS) real codes gradients page --minutes $(MINUTES)

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove runs, caches and the environment (the release store stays)
	rm -rf runs .cache .venv build mutants *.egg-info
