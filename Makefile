# What a person types; .ci/run calls the same targets. `make help` explains them.
#
#   PORT=8090 make up        another port; everything else is derived from it
#   PYTHON=python3.13 VENV=.venv-3.13 make test
#   CONSUL=/path/to/consul   a Consul of your own, accepted everywhere

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8080
# Compared with in tests, never served with, and never locked: see [oracle] in pyproject.toml. Where the plain wheel is
# the CUDA build of several gigabytes, point pip at a CPU build (PIP_FIND_LINKS, PIP_INDEX_URL) before `make install`.
TORCH ?= torch==2.13.0

export PORT CONSUL
PY := $(VENV)/bin/python
# Quiet for people and logs alike; the versions are fixed, so nothing interesting scrolls by.
PIP := $(PY) -m pip --disable-pip-version-check -qq

# A stamp's name carries the hash of what it was made from, so a rerun is instant and a change is never missed.
# dev.txt holds all of run.txt, with the same versions.
hash = $(firstword $(shell cat $(1) | sha256sum | cut -c1-12))
HAS_RUN := $(VENV)/.has-run-$(call hash,requirements/run.txt)
HAS_ORACLE := .venv-oracle/.has-$(call hash,requirements/oracle.txt)-$(subst =,,$(TORCH))
HAS_GENAI := .venv-genai/.has-$(call hash,requirements/genai.txt)-$(subst =,,$(TORCH))
HAS_LLAMACPP := .venv-llamacpp/.has-$(call hash,requirements/llamacpp.txt)
HAS_MUTMUT := .tools/mutmut/.has-$(call hash,requirements/mutants.txt)
HAS_DEV := $(VENV)/.has-dev-$(call hash,requirements/dev.txt requirements/beside-torch.txt)-$(subst =,,$(TORCH))

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help install up consul system-deps test test-slow unit e2e lint types format oracle genai llamacpp mutants bench
.PHONY: bench-first bench-engine bench-failover bench-export bench-exporters model lock clean

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

up: $(HAS_RUN) model  ## everything on this machine: one router, two nodes; prints the URL; Ctrl-C stops it
	@exec $(PY) scripts/up

install: $(HAS_DEV)  ## all of it, the tests' needs included (torch too)

consul:  ## put a Consul binary into .tools/ (Debian, no root)
	@scripts/get-consul

system-deps:  ## what the tests need from the system (Debian, root)
	@scripts/system-deps

test:  ## install, lint, types, unit and end-to-end tests
	@scripts/check-system
	@$(MAKE) --no-print-directory $(HAS_DEV)
	@$(MAKE) --no-print-directory lint types unit e2e

test-slow: $(HAS_DEV) $(HAS_ORACLE)  ## the tests marked slow
	@scripts/check-system
	$(PY) -m pytest -m slow

unit: $(HAS_DEV)
	$(PY) -m pytest -m "not slow" --ignore=tests/e2e

e2e: $(HAS_DEV)
	$(PY) -m pytest -m "not slow" tests/e2e

lint: $(HAS_DEV)  ## ruff: mistakes and format
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(HAS_DEV)  ## ruff: mend what it can
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

types: $(HAS_DEV)  ## mypy --strict
	$(PY) -m mypy

oracle: $(HAS_ORACLE)  ## optimum's exporter in .venv-oracle: the tests compare its logits with ours

genai: $(HAS_GENAI)  ## onnxruntime-genai's model builder in .venv-genai, measured beside ours

llamacpp: $(HAS_LLAMACPP)  ## llama.cpp in .venv-llamacpp, measured beside ours

mutants: $(HAS_DEV) $(HAS_MUTMUT)  ## mutation testing of the session machine and the event log: docs/mutants.md
	@PYTHONPATH=.tools/mutmut $(PY) scripts/mutants

bench: bench-first bench-engine bench-failover bench-export bench-exporters  ## all measurements

bench-first: $(HAS_DEV) model  ## export, tokens/s, time to first token, what the router adds
	$(PY) -m tests.bench.first

bench-engine: $(HAS_DEV) $(HAS_ORACLE) $(HAS_GENAI) $(HAS_LLAMACPP) model  ## the engine's targets, on two cores with nothing else to do
	$(PY) -m tests.bench.engine $(if $(ONLY),--only $(ONLY)) $(if $(RESUME),--resume)

bench-failover: $(HAS_DEV) model  ## pauses when nodes die or drain, the journal's cost, slow readers: ten minutes
	$(PY) -m tests.bench.failover $(if $(ONLY),--only $(ONLY))

bench-export: $(HAS_DEV)  ## the exporter at GPT-OSS-20B's full shape: 45 GB of disk (SCRATCH), most of an hour
	$(PY) -m tests.bench.export

bench-exporters: $(HAS_DEV) $(HAS_ORACLE) $(HAS_GENAI)  ## other exporters and ours side by side: 16 GB of memory
	$(PY) -m tests.oracle.side_by_side

model: $(HAS_RUN)
	@$(PY) scripts/build-model --out releases/smollm2-135m >/dev/null

lock: $(HAS_DEV)  ## write requirements/*.txt again; `make lock UPGRADE=1` takes newer versions
	$(PY) scripts/lock $(if $(UPGRADE),--upgrade)
	$(PY) scripts/oracle-lock $(if $(UPGRADE),--upgrade)

clean:  ## forget everything built or installed here, except data/ and releases/
	rm -rf $(VENV) .venv-oracle .venv-genai .venv-llamacpp .tools .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis mutants build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@scripts/make-venv $(PYTHON) $(VENV)

# Environments of their own: what they hold cannot live beside what the tests need.
$(HAS_ORACLE) $(HAS_GENAI): .venv-%: | $(PY)
	@echo "installing requirements/$(firstword $(subst /, ,$*)).txt and $(TORCH) into .venv-$(firstword $(subst /, ,$*))"
	@scripts/make-venv $(PYTHON) $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check -qq install $(TORCH)
	@$(@D)/bin/python -m pip --disable-pip-version-check -qq install --require-hashes --no-deps \
		-r requirements/$(firstword $(subst /, ,$*)).txt
	@rm -f $(@D)/.has-* && touch $@

# Laid beside the tests' own environment, of which it lacks only these.
$(HAS_MUTMUT): $(HAS_DEV)
	@echo "installing requirements/mutants.txt into $(@D)"
	@rm -rf $(@D)
	@$(PIP) install --require-hashes --no-deps --target $(@D) -r requirements/mutants.txt
	@touch $@

$(HAS_LLAMACPP): | $(PY)
	@echo "installing requirements/llamacpp.txt into $(@D)"
	@scripts/make-venv $(PYTHON) $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check -qq install --require-hashes -r requirements/llamacpp.txt
	@rm -f $(@D)/.has-* && touch $@

$(HAS_RUN): | $(PY)
	@echo "installing what the services need (requirements/run.txt)"
	@$(PIP) install --require-hashes -r requirements/run.txt
	@rm -f $(VENV)/.has-* && touch $@

$(HAS_DEV): | $(PY)
	@echo "installing what the tests need (requirements/dev.txt, $(TORCH))"
	@$(PIP) install --require-hashes -r requirements/dev.txt
	@$(PIP) install $(TORCH)
	@$(PIP) install --require-hashes --no-deps -r requirements/beside-torch.txt
	@rm -f $(VENV)/.has-* && touch $@ $(HAS_RUN)
