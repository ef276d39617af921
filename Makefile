.DEFAULT_GOAL := help
.PHONY: help dev demo test lint bench clean engine gvisor image

# The first Python that is new enough; `make PYTHON=… dev` picks another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2])' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
GUEST := images/guest/build/guest
REFUSED := images/guest/build/refused
PROBE := images/guest/build/probe
WRAPPER := images/guest/build/wrapper

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

dev: $(VENV)/.installed $(GUEST) engine gvisor image ## Install what is needed: environment, guest, engine, image

demo: dev ## Run the main job on the example repository and show what happened
	@AGENT_RUNNER=$(CURDIR)/$(BIN)/agent-runner policy/examples/demo/run.sh

test: dev lint ## Check and test everything
	@# What needs no engine shares nothing and runs on two processors; containers take their turns.
	@$(BIN)/python -m pytest tests/unit -n 2 --dist loadfile
	@$(BIN)/python -m pytest tests --ignore=tests/unit

lint: $(VENV)/.installed ## Check style, types and the direction of imports
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports >$(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@echo "lint     clean"

bench: dev ## Measure against docker, cp and a direct connection; print one table of ratios
	@$(BIN)/python -m benchmarks

clean: ## Remove the environment, the compiled guest and caches; the image and the engine stay
	@rm -rf $(VENV) images/guest/build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The guest is linked statically: a compiler alone does not do.
TOOLCHAIN := echo 'int main(void) { return 0; }' | gcc -static -xc -o /dev/null - 2>/dev/null

# Nothing below is meant to be called by hand.

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found: install python3, or call make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || sh images/debian.sh "Python's venv module" python3-venv
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@
	@echo "python   $$($(BIN)/python --version | cut -d' ' -f2) environment in $(VENV)"

$(GUEST) $(REFUSED) $(PROBE) $(WRAPPER) &: $(shell find images/guest images/probe -path images/guest/build -prune -o -type f \( -name '*.[ch]' -o -name Makefile \) -print 2>/dev/null)
	@$(TOOLCHAIN) || sh images/debian.sh "a C compiler" gcc libc6-dev make
	@$(MAKE) --silent --no-print-directory -C images/guest
	@touch $(GUEST) $(REFUSED) $(PROBE) $(WRAPPER)
	@echo "guest    compiled"

engine:
	@sh images/engine.sh

gvisor: engine
	@sh images/gvisor.sh

image: engine
	@sh images/build.sh
