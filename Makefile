# Two commands need nothing before them: `make serve` and `make test`.
PYTHON ?= python3
ARGS ?=
# HOST from the command line only: some shells keep the machine's name in a variable of that name
OPTIONS := $(if $(filter command,$(origin HOST)),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(if $(MODEL),--model $(MODEL))
BIN := .venv/bin
COMPOSE := docker compose --env-file /dev/null -f docker-compose.yml

.PHONY: serve test check format compose-test bench bench-engine clean

serve: .venv/serve.stamp
	@exec $(BIN)/headgate serve $(OPTIONS) $(ARGS)

test: .venv/dev.stamp
	@$(BIN)/python -m pytest $(ARGS)

check: .venv/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/hadolint deploy/*.Dockerfile tests/compose/*.Dockerfile
	@if docker compose version >/dev/null 2>&1; then $(COMPOSE) config -q && $(COMPOSE) -f deploy/compose.gpu.yml config -q; \
	else echo "no docker client with compose: its files were not checked"; fi

format: .venv/dev.stamp
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# the composed services, for real; needs a docker engine
compose-test: .venv/dev.stamp
	@$(BIN)/python -m tests.compose

bench: .venv/dev.stamp
	@$(BIN)/python -m benchmarks $(ARGS)

bench-engine: .venv/dev.stamp .venv/bench.stamp
	@$(BIN)/python -m benchmarks engine

.venv/serve.stamp: pyproject.toml constraints.txt
	@$(PYTHON) deploy/venv.py .venv
	@touch $@

.venv/dev.stamp: pyproject.toml constraints.txt
	@$(PYTHON) deploy/venv.py .venv dev
	@touch $@ .venv/serve.stamp

# engines to compare with: where they cannot be installed, the run goes on and says so
.venv/bench.stamp: pyproject.toml constraints.txt
	@$(PYTHON) deploy/venv.py .venv bench && touch $@ || true

clean:
	rm -rf .venv build dist worker/native/cpu/built *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
