# A folder of images becomes a classifier; `make help` lists what can be done.
#
# Every target first sets up what it needs in $(VENV), again only when the dependencies changed. Values from the
# command line reach the recipes through the environment, so no shell reads the spaces, `$` or parentheses in them.

PYTHON ?= python3
VENV ?= .venv
VENV_LOWEST ?= .venv-lowest
PARAMS ?= params.yaml
DEMO_DATA ?= data/demo
BENCH ?= benchmarks/*.py
EXTRAS ?= dev,export,notebook,openclip,parquet,remote,serve,tensorboard,timm
FILE ?= model.onnx
# Test files are shared among processes, each with what its own fixtures made.
PARALLEL := -n auto --maxprocesses=4 --dist=loadfile

VALUES := PYTHON VENV VENV_LOWEST PARAMS DEMO_DATA BENCH EXTRAS SET OVER RUN DATA IMAGES FILE TESTS ARGS
$(foreach name,$(VALUES),$(eval override $(name) := $$(value $(name))))
export $(VALUES)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo-data named-data advise inspect extract train-head sweep finetune evaluate predict export compare demo \
	test test-extras test-lowest torture lint types format bench gpu clean

# $(call settings,NAME,OPTION) turns each setting of $NAME into its own OPTION among the recipe's "$@". A word that does
# not begin with `section.key=` goes on with the value before it, so that values may hold spaces.
define settings
set -f; item=; \
for word in $$$(1); do case "$$word" in \
	[a-z]*.[a-z]*=*) [ -z "$$item" ] || set -- "$$@" $(2) "$$item"; item=$$word;; \
	*) item="$${item:+$$item }$$word";; \
esac; done; \
[ -z "$$item" ] || set -- "$$@" $(2) "$$item"; set +f
endef

# $(load) takes the settings of $SET and defines `verb`. $ARGS is for the verb that was asked for; those that go before
# it take of it only what every verb takes.
define load
set -e; set --; $(call settings,SET,-s); \
verb() { name=$$1; shift; args=; for word in $$ARGS; do case " $(MAKECMDGOALS) :$$word" in \
	*" $$name "*|*:--json|*:-q|*:--quiet|*:-v|*:--verbose) args="$$args $$word";; \
esac; done; "$$VENV/bin/python" -m pipeline "$$name" -p "$$PARAMS" "$$@" $$args; };
endef

# What an environment was made for: its interpreter, the place of the project and its dependencies.
define wanted
{ "$$VENV/bin/python" -V; pwd; sed '/^\[tool\./,$$d' pyproject.toml; } 2>&1
endef

define NAMES_DEMO_DATA
import sys
from pathlib import Path
from pipeline.params import load_params
params, demo, *settings = sys.argv[1:]
sys.exit(load_params(params, settings[1::2]).data.root.resolve() != Path(demo).resolve())
endef
export NAMES_DEMO_DATA

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo '  PARAMS=FILE        params file (default params.yaml; recipes/ has more)'
	@echo '  SET="a.b=c d.e=f"  params for this time: SET="data.root=photos head.kind=svm"'
	@echo '  OVER="a.b=[c, d]"  values for sweep: OVER="head.kind=[logistic, svm] transform.crop=[160, 224]"'
	@echo '  RUN=NAME           a run: path, name or latest (several for compare)'
	@echo '  FILE=model.onnx    what to export a run to (FILE.onnx or FILE.pt2)'
	@echo '  IMAGES="PATH..."   files and folders to predict        DATA=FOLDER  images to evaluate on'
	@echo '  ARGS="--json"      further options of the verb         TESTS=PATH   tests to run'
	@echo '  PYTHON= VENV=      interpreter and environment to set up with (python3, .venv)'

setup: ## install the package and its tools into .venv
	@set -e; stamp="$$VENV/.ready"; \
	if ! { $(wanted); } | cmp -s - "$$stamp"; then \
		rm -f "$$stamp"; \
		echo "Setting up $$VENV (the first time torch is downloaded: some minutes) ..." >&2; \
		if ! "$$VENV/bin/python" -m pip --version > /dev/null 2>&1; then \
			"$$PYTHON" -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else sys.executable + " is older than Python 3.11: name another with make PYTHON=...")'; \
			[ ! -f "$$VENV/pyvenv.cfg" ] || clear=--clear; \
			"$$PYTHON" -m venv $$clear "$$VENV"; \
		fi; \
		"$$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input -e '.[dev]'; \
		{ $(wanted); } > "$$stamp.new"; \
		mv "$$stamp.new" "$$stamp"; \
	fi

demo-data: setup ## write the demo images, scikit-learn's digits, to data/demo
	@"$$VENV/bin/python" -m pipeline demo-data "$$DEMO_DATA"

# A fresh clone's params name the demo images, which are not there yet.
named-data: setup
	@$(load) [ -d "$$DEMO_DATA" ] || \
	! "$$VENV/bin/python" -c "$$NAMES_DEMO_DATA" "$$PARAMS" "$$DEMO_DATA" "$$@" 2> /dev/null || \
	"$$VENV/bin/python" -m pipeline demo-data "$$DEMO_DATA"

extract: named-data ## stage one: images to cached features; only what is new is computed
	@$(load) verb extract "$$@"

advise: named-data ## say what pays for these images: probe, fine-tune or train from scratch
	@$(load) verb advise "$$@"

inspect: extract ## near-duplicates, leaks, doubted labels, outliers (RUN= for its head)
	@$(load) [ -z "$$RUN" ] || set -- "$$RUN" "$$@"; verb inspect "$$@"

train-head: named-data ## stages one and two: a classifier on the features, its scores and a run folder
	@$(load) verb train-head --extract "$$@"

sweep: named-data ## extract and train for all combinations of values (OVER=), and compare them
	@$(load) $(call settings,OVER,--over); verb sweep "$$@"

finetune: $(if $(RUN),extract,train-head) ## stage three: unfreeze the backbone, from the head of stage two (or of RUN=)
	@$(load) [ -z "$$RUN" ] || set -- --from "$$RUN" "$$@"; verb finetune "$$@"

evaluate: setup ## score a run (RUN=, default latest), on other images with DATA=
	@$(load) [ -z "$$DATA" ] || set -- --data "$$DATA" "$$@"; verb evaluate "$${RUN:-latest}" "$$@"

predict: setup ## label images (IMAGES=) with a run (RUN=, default latest)
	@$(load) if [ -z "$$IMAGES" ]; then echo 'Say which images: make predict IMAGES="PATH..."' >&2; exit 2; fi; \
	if [ -e "$$IMAGES" ]; then verb predict "$${RUN:-latest}" "$$IMAGES" "$$@"; \
	else verb predict "$${RUN:-latest}" $$IMAGES "$$@"; fi

export: setup ## write a run (RUN=, default latest) as one proven file (FILE=model.onnx)
	@$(load) "$$VENV/bin/python" -c 'import onnx, onnxruntime, onnxscript, skl2onnx' 2> /dev/null || \
	"$$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input -e '.[export]'; \
	[ -z "$$DATA" ] || set -- --data "$$DATA" "$$@"; verb export "$${RUN:-latest}" "$$FILE" "$$@"

compare: setup ## compare runs (RUN="NAME NAME", default all) in one table
	@$(load) if [ -e "$$RUN" ]; then verb compare "$$RUN" "$$@"; else verb compare $$RUN "$$@"; fi

demo: setup ## every stage on the demo images, then extract again: it costs nothing
	@$(load) set -- -s "data.root=$$DEMO_DATA" "$$@"; verb demo "$$@"

test: setup ## run the tests (TESTS=tests/heads for some)
	@"$$VENV/bin/python" -m pytest $(PARALLEL) $$TESTS $$ARGS

test-extras: setup ## run the tests with all extras installed
	@"$$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-input -e ".[$$EXTRAS]"
	@"$$VENV/bin/python" -m pytest $(PARALLEL) $$TESTS $$ARGS

test-lowest: ## run the tests with the lowest versions that pyproject.toml allows
	@set -e; mkdir -p "$$VENV_LOWEST"; \
	"$$VENV_LOWEST/bin/python" -m pip --version > /dev/null 2>&1 || "$$PYTHON" -m venv "$$VENV_LOWEST"; \
	"$$VENV_LOWEST/bin/python" tests/lowest.py > "$$VENV_LOWEST/lowest.txt"; \
	"$$VENV_LOWEST/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
		-c "$$VENV_LOWEST/lowest.txt" -e '.[dev]'; \
	"$$VENV_LOWEST/bin/python" -m pytest $(PARALLEL) $$TESTS $$ARGS

torture: setup ## run the slow tests: kills, many writers, large folders
	@"$$VENV/bin/python" -m pytest -m slow $$TESTS $$ARGS

lint: setup ## check style, formatting and types
	@"$$VENV/bin/python" -m ruff check
	@"$$VENV/bin/python" -m ruff format --check
	@"$$VENV/bin/python" -m mypy

types: setup ## check types
	@"$$VENV/bin/python" -m mypy

format: setup ## format the code and mend what can be mended
	@"$$VENV/bin/python" -m ruff check --fix
	@"$$VENV/bin/python" -m ruff format

bench: setup ## run the benchmarks (BENCH=benchmarks/NAME.py for one)
	@set -e; for file in $$BENCH; do echo "== $$file"; OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=1000 "$$VENV/bin/python" "$$file" $$ARGS; done

gpu: setup ## on a GPU: its tests, then the benchmarks; ten minutes at most
	@"$$VENV/bin/python" tests/gpu.py $$ARGS

clean: ## remove what tools left behind; cache/, runs/, data/ and .venv stay
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find pipeline tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
