# make demo: captions for the sample clips     make test: all quick tests     make lab: JupyterLab
# make soak: the long campaigns                make test-oldest: the original's numbers on the oldest transformers
# make gpu: tests and figures on a CUDA GPU, with the packages that PYTHON has; results in notebooks/results
# Each sets up what it needs in .venv on the first call. PYTHON chooses the interpreter (3.10 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install
OUT := runs/demo

.PHONY: demo test soak test-oldest gpu lab clean

demo: $(VENV)/base
	@mkdir -p $(OUT)
	$(BIN)/papermill --log-level ERROR notebooks/01_caption_clips.ipynb $(OUT)/01_caption_clips.ipynb \
		-k python3 -r output_dir $(OUT)
	@$(BIN)/jupyter nbconvert --log-level ERROR --to html $(OUT)/01_caption_clips.ipynb
	@$(BIN)/python -m capkit show $(OUT)/captions.jsonl
	@echo "Executed notebook:  $(CURDIR)/$(OUT)/01_caption_clips.ipynb"
	@echo "To look at:         $(CURDIR)/$(OUT)/01_caption_clips.html"

test: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not soak" -n 2 --dist loadfile --no-loadscope-reorder --durations 15

soak: $(VENV)/dev
	$(BIN)/python -m pytest -m soak -s

lab: $(VENV)/base
	@# By default the server drops messages above 10 MB, and with them clips added in notebook 04, without a word.
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks --ServerApp.tornado_settings='{"websocket_max_message_size": 1073741824}'

test-oldest: .venv-oldest/dev
	.venv-oldest/bin/python -m pytest -m golden tests/video tests/cogvlm2 tests/captioning

GPU_SIZE := full
GPU_PARTS := stages captions batches sweeps second_day grounding compiled loading profiling
GPU_RESULTS := notebooks/results

gpu:
	@# No virtual environment: torch that fits the GPU is there already. Both run, though the first may fail.
	CAPKIT_REQUIRE=cuda CAPKIT_RESULTS=$(GPU_RESULTS) PYTHONPATH=. \
		$(PYTHON) -m pytest tests/cuda -p no:cacheprovider --durations=5; failed=$$?; \
	PYTHONPATH=. $(PYTHON) -m capkit.benchmark --size $(GPU_SIZE) --parts $(GPU_PARTS) --out-folder $(GPU_RESULTS) \
		&& exit $$failed

clean:
	rm -rf .venv .venv-oldest runs

$(VENV)/python-is-there:
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 10) else \
		'capkit needs Python 3.10 or later, this is ' + sys.version.split()[0] + '; try make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/base: pyproject.toml constraints.txt | $(VENV)/python-is-there
	@echo "Installing capkit; on Linux PyPI's torch brings CUDA, a download of several GB."
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

.venv-oldest/dev: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip --disable-pip-version-check install -c constraints-oldest.txt -e . pytest
	@touch $@
