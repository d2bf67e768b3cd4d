# make demo: the four notebooks on embedded data.   make test: all tests.   make benchmark: speed against rivals, one table.
# Each installs into .venv first.
# Without make: python3 -m venv .venv; .venv/bin/pip install -r requirements.txt; .venv/bin/python demo.py run
PYTHON ?= python3

demo: .venv/ready
	.venv/bin/python demo.py run

test: .venv/test-ready
	.venv/bin/ruff check .
	.venv/bin/python -m pytest

# The same with the packages of Kaggle's image, in an environment of its own; it needs Python 3.12.
test-kaggle: .venv-kaggle/ready
	.venv-kaggle/bin/python -m pytest

benchmark: .venv/benchmark-ready
	.venv/bin/python benchmarks/all.py

notebooks: demo
	.venv/bin/python demo.py publish

.venv/ready: requirements.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/test-ready: .venv/ready requirements-test.txt
	.venv/bin/python -m pip install --quiet --requirement requirements-test.txt
	touch $@

.venv/benchmark-ready: .venv/ready benchmarks/requirements.txt
	.venv/bin/python -m pip install --quiet --requirement benchmarks/requirements.txt
	touch $@

.venv-kaggle/ready: requirements-kaggle.txt
	test -x .venv-kaggle/bin/python || python3.12 -m venv .venv-kaggle
	.venv-kaggle/bin/python -m pip install --quiet --requirement requirements-kaggle.txt
	touch $@

.PHONY: demo test test-kaggle benchmark notebooks
