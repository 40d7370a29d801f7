# `make demo` and `make test` need Python >= 3.11 and a package index, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo claims docs tutorials test test-all test-faults test-minimal test-interop test-browser lint lock bench bench-input mechanisms gpu-cifar10 gpu-bench tpu-table dist clean

demo: $(VENV)/.installed
	$(BIN)/simclr-jax simclrv2 --config=simclr_digits --workdir=runs/demo --labels=2 --student-width=0.25 --seeds=3 --scratch-steps=400 --scratch-learning-rate=0.01

# Compiling, which takes most of the time, keeps one core busy per worker.
WORKERS := --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest -m 'not slow and not faults' $(WORKERS)

# Every test once. The fault tests come last and alone: they measure time-outs.
test-all: $(VENV)/.installed lint
	$(BIN)/python -m pytest -m 'not faults' $(WORKERS)
	$(BIN)/python -m pytest -m faults

# Several processes, 60 kills of five commands, 2,470 damaged files, and the launcher with the real program: about an hour.
test-faults: $(VENV)/.installed
	$(BIN)/python -m pytest -m faults

# The quick tests on the oldest versions that setup.py allows, in an environment of its own.
test-minimal:
	$(PYTHON) -m venv $(VENV)-minimal
	$(VENV)-minimal/bin/python -m pip install --quiet uv
	$(VENV)-minimal/bin/uv pip install --quiet --python=$(VENV)-minimal/bin/python --resolution=lowest-direct --editable '.[dev]'
	$(VENV)-minimal/bin/python -m pytest -m 'not slow and not faults' $(WORKERS)

# Weights in and out against PyTorch, timm, transformers, TensorFlow and ONNX Runtime, in an environment of its own; then
# a table of format, network, relative difference and seconds.
INTEROP := $(VENV)-interop/bin/python
test-interop:
	$(PYTHON) -m venv $(VENV)-interop
	$(INTEROP) -m pip install --quiet --editable '.[dev,interop]'
	# One process for each file: PyTorch and TensorFlow cannot be loaded together.
	set -e; for file in tests/test_weights_*.py tests/test_export.py tests/test_import.py tests/test_detection.py; do \
	  $(INTEROP) -m pytest -rs $$file; done
	$(INTEROP) benchmarks/interop_table.py

# Opens the report of a small run in headless Chromium (`apt-get install chromium`).
test-browser: $(VENV)/.installed
	$(BIN)/python -m pytest tests/browser_check.py -s

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy simclr_jax

# The packages that launch/tpu.sh installs on TPU VMs: exact versions and checksums, for Linux on x86-64 and Python >= 3.11.
LOCK := uv pip compile --quiet --upgrade --generate-hashes --no-annotate --custom-compile-command='make lock'
lock: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/$(LOCK) --python-platform=x86_64-manylinux_2_31 --python-version=3.11 --extra=tpu --output-file=launch/requirements.txt setup.py
	echo uv | $(BIN)/$(LOCK) --python-platform=x86_64-manylinux_2_31 --python-version=3.10 --output-file=launch/uv.txt -

# Ratios of one machine, in small, each measured by turns: a CPU training step to PyTorch's (if torch is in $(VENV)),
# NT-Xent in blocks to the whole matrix, a cold start to a warm one, the input pipeline to bare decoding and its rivals
# (DATA: a folder of photographs), images kept on the device to streamed ones. Then the time of a large folder.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/cpu_step.py --rounds=5
	$(BIN)/python benchmarks/nt_xent.py --rows 4096 8192 --rounds=3
	$(BIN)/python benchmarks/start.py --repeats=1
	$(BIN)/python benchmarks/input_pipeline.py --data=$(DATA) --rounds=3 --slow-images=128
	$(BIN)/python benchmarks/input_pipeline.py --device --rounds=3
	$(BIN)/python benchmarks/load.py files --count=20000

# Images/s of the input pipeline, by turns with bare decoding and its rivals: DATA is a folder of photographs.
bench-input: $(VENV)/.installed
	$(BIN)/python benchmarks/input_pipeline.py --data=$(DATA)
	$(BIN)/python benchmarks/input_pipeline.py --data=$(DATA) --memory
	$(BIN)/python benchmarks/input_pipeline.py --device

# CIFAR-10 on one GPU: DATA is a folder with train.npz and test.npz (images or JPEG bytes).
gpu-cifar10:
	$(PYTHON) benchmarks/gpu_cifar10.py --data=$(DATA)
	$(PYTHON) benchmarks/gpu_cifar10.py --data=$(DATA) --recipe=moco_cifar10

# Ratios of training steps on one GPU to PyTorch's; needs torch and torchvision with CUDA, or TORCH=PYTHON that has them.
gpu-bench:
	$(PYTHON) benchmarks/gpu_bench.py --torch-python=$(or $(TORCH),$(PYTHON))

# The mechanisms side by side on CIFAR-10, in small, and MoCo's ablations: DATA is the TFDS folder. An hour.
mechanisms: $(VENV)/.installed
	$(BIN)/python benchmarks/mechanisms.py --data=$(DATA)
	$(BIN)/python benchmarks/mechanisms.py --data=$(DATA) --ablations

# The claims of the papers as small trainings on CIFAR-10, and docs/claims.md: DATA is the TFDS folder. About nine hours of
# one core, resumable; WORKER_COUNT: processes, each on a core. SIZE=full: ResNet-18 for 200 epochs, on a GPU.
claims: $(VENV)/.installed
	$(BIN)/python -m benchmarks.claims --data=$(DATA) --size=$(or $(SIZE),small) --workers=$(or $(WORKER_COUNT),1)

# The table in docs/tpu.md: compiles every ImageNet recipe for five TPUs, minutes each. Resumable.
tpu-table: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[compile-check]'
	$(BIN)/python benchmarks/tpu_table.py

$(VENV)/.installed: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python >= 3.11 is needed, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# The documentation site in build/site, in an environment of its own; warnings are errors.
docs:
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

# The tutorials as notebooks, executed; some minutes.
tutorials: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python docs/tutorials/render.py --execute

# Source distribution and wheel in dist/, with the metadata that PyPI shows.
dist:
	rm -rf dist build
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet build twine
	$(VENV)-dist/bin/python -m build
	$(VENV)-dist/bin/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) $(VENV)-minimal $(VENV)-docs $(VENV)-dist build dist runs .pytest_cache .ruff_cache .mypy_cache *.egg-info
