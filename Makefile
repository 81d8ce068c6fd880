# Every target sets up what it needs on a fresh machine: a .venv of its own, made with the
# machine's python3 (3.10 or newer), and in it deltakit with everything for development.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= auto

.PHONY: help demo test lint format install browser docs clean

help:
	@echo "make demo     the whole story on two small tasks, three to five minutes"
	@echo "make test     the test suite"
	@echo "make lint     ruff and mypy"
	@echo "make format   rewrite the code as ruff formats it"
	@echo "make install  only set up .venv"
	@echo "make browser  install Chromium, with which pages are tested (apt-get, as root)"
	@echo "make docs     build the documentation site into site/, every link checked"
	@echo "make clean    remove .venv and everything built"

install: $(STAMP)

# Set up again when the requirements change, or when .venv is broken (a moved or removed python).
ifneq ($(shell $(BIN)/python -c "import pip" 2>/dev/null && echo good),good)
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "deltakit needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(BIN)/python -c "import pip" 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/deltakit demo

# One thread per worker: the tests are many and small, and idle BLAS threads only contend.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# Without a browser the tests that need one skip themselves.
browser:
	.ci/browser

# Strict: a broken link, a missing anchor or a page without its place stops it. The variable keeps a
# notice of the theme's makers quiet.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	$(BIN)/python docs/check_site.py site
	@echo "open site/index.html"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
