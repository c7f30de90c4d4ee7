# make run        create the environment, then run the tour: the three notebooks in order
# make pages      write the notebooks that were run, with their outputs, as HTML into runs/tour/pages/
# make app        start the app with the newest model
# make lint       check code style, also of the app's JavaScript, and that notebooks have no outputs
# make test       run the fast tests: under 5 minutes, offline
# make test-slow  run the other tests: browser, Ray, processes that are killed, every documented command
# make test-all   run both
# make doctor     check this machine
# make solutions  write the solved exercises for teachers into notebooks/exercises/solutions
# make clean      remove the environment and all runs
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= tour
BIN := $(VENV)/bin
export PYTHONUNBUFFERED := 1
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: solutions pages run app test test-slow test-all lint lint-js doctor browser test-colab log-base clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make/make/p' Makefile

run: $(VENV)/ready
	$(BIN)/python -m pipelines run --recipe $(RECIPE)

pages: $(VENV)/ready
	$(BIN)/jupyter nbconvert --to html --output-dir runs/$(RECIPE)/pages runs/$(RECIPE)/notebooks/*.ipynb
	@echo "Open runs/$(RECIPE)/pages/01_feature_pipeline.html in a browser"

app: $(VENV)/ready
	$(BIN)/python app.py

PYTEST := $(BIN)/python -m pytest -q

# worksteal: a worker that has finished takes tests of the other; one thread each, because there are two workers
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal --durations=10 -m "not slow"
	@echo "The fast tests passed. Next: make lint, then make test-slow before a pull request"

# loadfile: fixtures of a file are expensive. A second Ray cluster in one process may wait for ever
test-slow: $(VENV)/ready browser
	$(PYTEST) -n 2 --dist loadfile --durations=10 -m "slow and not ray"
	$(PYTEST) -m ray --ignore tests/cli/test_commands_cluster.py
	$(PYTEST) -m ray tests/cli/test_commands_cluster.py
	@echo "The slow tests passed"

test-all: test test-slow

lint: $(VENV)/ready lint-js
	$(BIN)/ruff check .
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb notebooks/exercises/*.ipynb

# JavaScript and CSS of the app, by biome; the folder's name has the version, so that a new one is installed
BIOME := 2.6.8
BIOME_FOLDER := .lint/biome-$(BIOME)
lint-js:
	@if ! command -v npm >/dev/null; then \
	  echo "no npm: the JavaScript check is skipped (install it with: sudo apt-get install npm)"; \
	else \
	  test -x $(BIOME_FOLDER)/node_modules/.bin/biome \
	    || npm install --silent --no-audit --no-fund --prefix $(BIOME_FOLDER) @biomejs/biome@$(BIOME) \
	  && $(BIOME_FOLDER)/node_modules/.bin/biome check --config-path=.ci pipelines; \
	fi

doctor: $(VENV)/ready
	$(BIN)/python -m pipelines doctor

# the base model's transcripts of the tour's test sentences: every later model is compared with them
solutions: $(VENV)/ready
	$(BIN)/python tests/solve_exercises.py notebooks/exercises/solutions

log-base: $(VENV)/ready
	$(BIN)/python -m pipelines features --recipe tour
	$(BIN)/python -m pipelines evaluate --recipe tour --model openai/whisper-tiny --log log_base.csv

# run the notebooks on the toy recipe with the versions that Colab has, except torch
COLAB_VENV ?= .venv-colab
test-colab: $(COLAB_VENV)/ready
	$(COLAB_VENV)/bin/python -m pytest -q --durations=5 tests/cli/test_notebooks.py

$(COLAB_VENV)/ready: requirements.txt tests/requirements.txt tests/constraints-colab.txt
	@echo "creating an environment like Colab's in $(COLAB_VENV) (a few minutes, once) ..."
	@test -x $(COLAB_VENV)/bin/python || $(PYTHON) -m venv $(COLAB_VENV)
	$(COLAB_VENV)/bin/python -m pip install -q --disable-pip-version-check -c tests/constraints-colab.txt -r requirements.txt -r tests/requirements.txt
	@touch $@

# one environment for everything; created again when a list of requirements changes
$(VENV)/ready: requirements.txt constraints.txt tests/requirements.txt
	@echo "creating the environment in $(VENV) (a few minutes, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -r requirements.txt -r tests/requirements.txt
	@touch $@

# the browser tests need Debian's chromium: it is installed if we are root, otherwise they are skipped
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && echo "installing chromium ..." && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null; } \
	  || echo "no chromium: the browser tests are skipped (install it with: sudo apt-get install chromium)"

clean:
	rm -rf $(VENV) .venv-colab runs .pytest_cache .ruff_cache
