# make run    the tour: environment, then the three notebooks in order
# make test   the tests
# make app    the page, on the model that was made last
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= tour
BIN := $(VENV)/bin
export PYTHONUNBUFFERED := 1
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: run app test lint doctor browser test-colab log-base clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# make/make/p' Makefile

run: $(VENV)/ready
	$(BIN)/python -m pipelines run --recipe $(RECIPE)

app: $(VENV)/ready
	$(BIN)/python app.py

test: $(VENV)/ready browser
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=10 -m "not ray"
	$(BIN)/python -m pytest -q -m ray tests/features/test_ray_shards.py tests/infra/parallel/test_distributed.py tests/experiments/sweeps/test_sweeps_cluster.py
	$(BIN)/python -m pytest -q -m ray tests/cli/test_commands_cluster.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/nbstripout --verify --keep-id notebooks/*.ipynb

doctor: $(VENV)/ready
	$(BIN)/python -m pipelines doctor

# the base model's transcripts of the tour's test sentences: what every later model is held against
log-base: $(VENV)/ready
	$(BIN)/python -m pipelines features --recipe tour
	$(BIN)/python -m pipelines evaluate --recipe tour --model openai/whisper-tiny --log log_base.csv

# the notebooks on the toy recipe under the versions that Colab has, torch aside
COLAB_VENV ?= .venv-colab
test-colab: $(COLAB_VENV)/ready
	$(COLAB_VENV)/bin/python -m pytest -q --durations=5 tests/cli/test_notebooks.py

$(COLAB_VENV)/ready: requirements.txt tests/requirements.txt tests/constraints-colab.txt
	@echo "making an environment like Colab's in $(COLAB_VENV) (a few minutes, once) ..."
	@test -x $(COLAB_VENV)/bin/python || $(PYTHON) -m venv $(COLAB_VENV)
	$(COLAB_VENV)/bin/python -m pip install -q --disable-pip-version-check -c tests/constraints-colab.txt -r requirements.txt -r tests/requirements.txt
	@touch $@

# one environment for everything; made anew when what it holds is named anew
$(VENV)/ready: requirements.txt constraints.txt tests/requirements.txt
	@echo "making the environment in $(VENV) (a few minutes, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -r requirements.txt -r tests/requirements.txt
	@touch $@

# the browser tests want Debian's chromium: installed where we may, skipped by name where we may not
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && echo "installing chromium ..." && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null; } \
	  || echo "no chromium: the browser tests are skipped (install it with: sudo apt-get install chromium)"

clean:
	rm -rf $(VENV) .venv-colab runs .pytest_cache .ruff_cache
