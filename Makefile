# make demo   trains the embedded model and shows that it improved
# make test   runs the tests;  make mutants  plants faults and expects the tests to notice each
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test slow mutants lint
demo: .venv
	$(PY) train_image.py

test: .venv
	OMP_NUM_THREADS=1 $(PY) -m pytest

slow: .venv
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow

mutants: .venv
	OMP_NUM_THREADS=1 $(PY) tests/mutants.py

lint: .venv
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

.PHONY: .venv
.venv: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
