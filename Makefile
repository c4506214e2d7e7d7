# make demo   trains the embedded model and shows that it improved
# make test   runs the tests;  make mutants  plants faults and expects the tests to notice each
# make bench  measures RESULTS.md but for a few sections (8 hours);  make bench-smoke  the same in seconds
# make notebook  runs docs/branchgrpo.ipynb from the top, and keeps its outputs (a minute)
# make gpu    measures this machine's GPU in 8 minutes, with nothing downloaded, into bench/results/gpu_CARD.json;
#             make gpu ARGS=--dry-run  walks the same code on the CPU, small
# make reference   proves the preference rewards equal to their official packages (6 GB, an environment of their own);
#                  VideoAlign is cloned from GitHub, or taken from where VIDEOALIGN says
PYTHON ?= python3
PY := .venv/bin/python
VIDEOALIGN ?= runs/VideoAlign

.PHONY: demo test slow mutants reference bench bench-smoke notebook gpu lint
demo: .venv
	$(PY) train_image.py

test: .venv
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

slow: .venv .venv-reference .bitsandbytes
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow
	OMP_NUM_THREADS=1 PYTHONPATH=.bitsandbytes $(PY) -m pytest -m slow tests/test_policies.py -k four_bits

mutants: .venv
	OMP_NUM_THREADS=1 $(PY) tests/mutants.py

reference: .venv .venv-reference $(VIDEOALIGN)
	OMP_NUM_THREADS=1 .venv-reference/bin/python tests/reference/authority.py runs/reference --videoalign $(VIDEOALIGN)
	OMP_NUM_THREADS=1 $(PY) tests/reference/compare.py runs/reference

runs/VideoAlign:
	git clone --quiet https://github.com/KwaiVGI/VideoAlign $@
	git -C $@ checkout --quiet 219ab9d

bench: .venv
	$(PY) bench/run.py

bench-smoke: .venv
	$(PY) bench/run.py --smoke

notebook: .venv
	.venv/bin/jupyter-execute --inplace docs/branchgrpo.ipynb

gpu: .venv
	$(PY) bench/gpu.py $(ARGS)

lint: .venv
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

.PHONY: .venv
.venv: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# A folder of its own: in .venv it would be imported, and take seconds, at every start.
.PHONY: .bitsandbytes
.bitsandbytes: .bitsandbytes/installed

.bitsandbytes/installed: .venv/installed
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target .bitsandbytes "bitsandbytes>=0.50,<0.51"
	touch $@

.PHONY: .venv-reference
.venv-reference: .venv-reference/installed

.venv-reference/installed: requirements-reference.txt
	$(PYTHON) -m venv .venv-reference
	.venv-reference/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-reference.txt
	touch $@
