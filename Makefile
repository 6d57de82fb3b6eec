# make demo   distil a real teacher, and look at the report
# make test   lint, types, doctests and tests with coverage (MARKS= runs the slow too)
# make clean  remove the environment and the demo's run

PYTHON ?= python3
MARKS ?= not slow
JOBS ?= 2
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints.txt --editable
NEEDS := setup.cfg pyproject.toml constraints.txt

.PHONY: demo test clean

demo: .venv/demo.installed
	$(BIN)/python -m boot_jax.main --config=configs/digits.py --workdir=runs/digits

test: .venv/test.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -m "$(MARKS)" --durations=25 \
		-n $(JOBS) --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

clean:
	rm -rf .venv runs/digits

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.installed: .venv/bin/python $(NEEDS)
	$(PIP_INSTALL) .
	touch $@

.venv/test.installed: .venv/bin/python $(NEEDS)
	$(PIP_INSTALL) ".[test]"
	touch $@ .venv/demo.installed
