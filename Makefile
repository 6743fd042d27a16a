# Every target sets up what it needs: a virtual environment in $(VENV), with the package and its extras in it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
DOCS_INSTALLED := $(VENV)/docs-installed

# Two workers, a file to each at a time, every annotation checked.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_FLAGS)
HOOK := --jaxtyping-packages=parallel_diffrax,beartype.beartype

.PHONY: demo docs test test-all test-full test-unflagged test-gpu integration fuzz lint bench clean

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,lint,examples]'
	touch $@

$(DOCS_INSTALLED): pyproject.toml $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/quickstart.py

# The site, in `site/`: open `site/index.html`, or serve it for its search, `python -m http.server -d site`. A warning is an
# error, and nothing is loaded from a network.
docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Every claim once.
test: $(INSTALLED)
	$(BIN)/python -m pytest -m messages tests/test_messages.py
	$(PYTEST) $(HOOK) -m "not full and not messages and not gpu"

# Every claim on every case, also compiled as users compile, and the fuzzer.
test-all: test test-full test-unflagged fuzz

test-full: $(INSTALLED)
	$(PYTEST) $(HOOK) -m full

# (Pages and package are tested above: they compile as users do, or nothing.)
test-unflagged: $(INSTALLED)
	PARALLEL_DIFFRAX_TEST_FLAGS=off $(PYTEST) $(HOOK) -m "not messages and not gpu" \
		--ignore tests/test_docs.py --ignore tests/test_package.py

# Every kernel by value, on a GPU.
test-gpu: $(INSTALLED)
	PARALLEL_DIFFRAX_TEST_FLAGS=off $(BIN)/python -m pytest -rs -m gpu tests/gpu

# Other people's programs with our solver, in an environment of their own: they choose the versions of much else. Some need
# Python 3.12, and are skipped without it.
INTEGRATION := $(VENV)-integration
integration:
	test -x $(INTEGRATION)/bin/python || $(PYTHON) -m venv $(INTEGRATION)
	$(INTEGRATION)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test,integration,examples,packages]'
	$(INTEGRATION)/bin/python -m pytest -o filterwarnings=default $(PYTEST_FLAGS) tests/integration

fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzzing $(or $(CASES),2000)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks --quick

clean:
	rm -rf site $(VENV) $(VENV)-integration .pytest_cache .ruff_cache
