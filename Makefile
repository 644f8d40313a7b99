# `make demo` and `make test` do their own set-up; see README.md.
PYTHON ?= python3
VENV := .venv/bin
# Nothing here downloads a model: the built-in one is made on the spot.
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: help setup demo test test-fast bench ruler gpu-check gpu-wheel vllm-contract sanitize warnings lint format clean

help:
	@echo "make demo        set up, build the built-in model, serve it with magicpig, ask it questions"
	@echo "make demo MODEL=name-or-path   the same with any Hugging Face model"
	@echo "make test        set up, run every test (about 22 minutes on two cores)"
	@echo "make test-fast   without the tests that start a vLLM engine"
	@echo "make bench       speed and accuracy on this CPU, about half an hour; BENCH_ARGS=--quick takes 4 minutes"
	@echo "make ruler       RULER's tasks on the built-in model; MODEL=name-or-path RULER_ARGS=\"--lengths 32768\""
	@echo "make gpu-check GPU_CHECK_ARGS=\"--stage first\"   with an NVIDIA GPU, 4 minutes, and a report; then \"--stage second\", 8"
	@echo "make gpu-wheel   the wheel that a gpu-check elsewhere carries along; GPU_WHEEL_PYTHON=python3.12"
	@echo "make vllm-contract   our use of vLLM against the sources of every supported release (fetches 330 MB each)"
	@echo "make sanitize    the native tests and 10 minutes of fuzz under GCC's sanitizers"
	@echo "make warnings    all C++ for each level of x86-64 with warnings as errors, 2 minutes on two cores"
	@echo "make lint        ruff, mypy and clang-format"
	@echo "make setup       .venv with vLLM, this package and its tools"

setup:
	@$(PYTHON) scripts/setup_env.py

# A model by name has to come from the hub.
demo: setup
	$(if $(MODEL),HF_HUB_OFFLINE=0) $(VENV)/python examples/demo.py $(if $(MODEL),--model "$(MODEL)")

# Files of tests side by side, each on a core of its own (tests/conftest.py), in their own order: those that
# start engines come first, as they take longest.
PYTEST_WORKERS ?= 2
PARALLEL = -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder

# The console script, not `python -m pytest`: that would put the repository root on sys.path, and
# vLLM would take the folder triton_kernels/ for OpenAI's package of that name.
test: setup
	$(VENV)/pytest -q $(PARALLEL) $(PYTEST_ARGS)

test-fast: setup
	$(VENV)/pytest -q $(PARALLEL) -m "not e2e" $(PYTEST_ARGS)

# Expected on two idle cores: one layer 10 minutes, the index 6, the engine 9; each JSON says what it took.
# Folder of the results: bench_results, or BENCH_ARGS="--output FOLDER".
bench: setup
	$(VENV)/python examples/bench_decode_attention.py $(BENCH_ARGS)
	$(VENV)/python examples/bench_index.py $(BENCH_ARGS)
	$(VENV)/python examples/bench_generate.py $(BENCH_ARGS)

ruler: setup
	$(if $(MODEL),HF_HUB_OFFLINE=0) $(VENV)/python examples/ruler.py $(if $(MODEL),--model "$(MODEL)") $(RULER_ARGS)

gpu-check: setup
	$(VENV)/python scripts/gpu_check.py $(GPU_CHECK_ARGS)

# For machines with that Python; see docs/gpu_check.md.
GPU_WHEEL_PYTHON ?= python3.12
gpu-wheel:
	$(GPU_WHEEL_PYTHON) scripts/gpu_check_wheel.py build gpu_wheel

vllm-contract: setup
	$(VENV)/python scripts/vllm_contract.py $(CONTRACT_ARGS)

sanitize: setup
	$(VENV)/python scripts/sanitize.py $(SANITIZE_ARGS)

warnings: setup
	$(VENV)/python scripts/check_warnings.py $(WARNINGS_ARGS)

lint: setup
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy
	$(VENV)/clang-format --dry-run --Werror cpu_kernels/* examples/*.cpp

format: setup
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .
	$(VENV)/clang-format -i cpu_kernels/* examples/*.cpp

clean:
	rm -rf .venv build .models .logs *.egg-info vllm_magicpig/*.so
