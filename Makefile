.DEFAULT_GOAL := help
.PHONY: run test test-slow lint lock help
export OMP_WAIT_POLICY = PASSIVE
PYTHON ?= python3.11
RUN = runs/in_context/quick
QUICK = -c configs/in_context/quick.yaml --run_dir $(RUN) --ckpt_path last

run: .venv/ready          ## meta-train on scikit-learn's digits, then print the table and draw runs/in_context/quick/test.png
	.venv/bin/metalearn fit $(QUICK)
	.venv/bin/metalearn test $(QUICK)

test: .venv/ready         ## the whole suite, quick
	.venv/bin/pytest -q -n auto --maxprocesses 8 --dist loadfile

test-slow: .venv/ready    ## what takes over a minute
	.venv/bin/pytest -q -m slow --timeout 3600

lint: .venv/ready         ## format, style, types, floors
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	.venv/bin/lint-imports

lock:                     ## pin every dependency anew in constraints.txt (needs uv)
	uv pip compile --universal --all-extras --no-annotate --no-header --python-version 3.11 pyproject.toml \
	  | sed 's/^torch==\([0-9.]*\).*/torch==\1/' > constraints.txt

.venv/ready: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## */\t/' | expand -t 12
