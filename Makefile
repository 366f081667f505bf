# make chat and make test do all their set-up from nothing: they find Python, make .venv, install, fetch what is missing.
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt scripts/setup.sh $(wildcard edger1/kernels/src/*)

# Tests wait for something nearly half of their time: one process more than there are cores.
AT_ONCE := -q --numprocesses $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n + 1 : 4))) --dist worksteal

.PHONY: chat test lint families parity bench sanitize fuzz soak screenshots clean
.DEFAULT_GOAL := help

help: ## Show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

chat: $(VENV)/.installed ## Talk to the default model
	@$(BIN)/edger1 chat

test: $(VENV)/.installed-dev ## Run the tests (fetches the 98 MB test model once)
	@$(BIN)/edger1 pull smollm2-135m
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(AT_ONCE) --ignore tests/parity

lint: $(VENV)/.installed-dev ## Run the linters, and the type checker on the installed package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q --no-deps --no-build-isolation --target build/typed \
		--config-settings wheel.cmake=false .
	cd build/typed && MYPYPATH=. $(CURDIR)/$(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml -p edger1

families: $(VENV)/.installed-dev ## Try every model family of mlx-lm: kernels, streamed experts, adapters
	$(BIN)/python -m pytest $(AT_ONCE) -m "families or parity" tests/test_*.py tests/parity/test_kernel_families.py

parity: $(VENV)/.installed-parity ## Compare with other people's code (needs torch)
	@$(BIN)/edger1 pull smollm2-135m
	$(BIN)/python -m pytest -q -m parity tests/parity

bench: $(VENV)/.installed-dev ## Run the benchmarks, EdgeR1 beside its peers (over an hour; builds llama.cpp once)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.chat
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.blocks
	$(BIN)/python -m benchmarks.latent_memory
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.pretrain
	$(BIN)/python -m benchmarks.finetune
	$(BIN)/python -m benchmarks.policy
	$(BIN)/python -m benchmarks.caches
	$(BIN)/python -m benchmarks.quantization
	$(BIN)/python -m benchmarks.streaming
	$(BIN)/python -m benchmarks.windows
	$(BIN)/python -m benchmarks.convert
	$(BIN)/python -m benchmarks.readme

sanitize: $(VENV)/.installed-dev ## Run the kernels' tests with address, undefined and thread sanitizers
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/sanitize.py

fuzz: $(VENV)/.installed-fuzz ## Feed the readers of weights mutated headers (1.2 million; half an hour)
	$(BIN)/python scripts/fuzz.py

soak: $(VENV)/.installed-dev ## Use the chat for half an hour, with keys and engine at random
	$(BIN)/python scripts/soak.py

screenshots: $(VENV)/.installed-dev ## Draw the pictures of the chat anew
	$(BIN)/python docs/screenshots.py

$(VENV)/.installed: $(SOURCES)
	@scripts/setup.sh $(VENV)
	@touch $@

$(VENV)/.installed-dev: $(SOURCES)
	@scripts/setup.sh $(VENV) dev
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-parity: $(SOURCES)
	@scripts/setup.sh $(VENV) dev parity
	@touch $@ $(VENV)/.installed-dev $(VENV)/.installed

$(VENV)/.installed-fuzz: $(SOURCES)
	@scripts/setup.sh $(VENV) dev fuzz
	@touch $@ $(VENV)/.installed-dev $(VENV)/.installed

clean: ## Remove the virtual environment and everything built
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
