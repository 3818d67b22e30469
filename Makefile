# `make demo` and `make test` need nothing but Python 3.11 to 3.14: they set up .venv themselves.
# Any make will do. (.venv/bin/pip is never called: in a clone that was copied or moved it would
# install into the one that it comes from.)

PYTHON ?= python3
BIN = .venv/bin
DEMO = --data_dir data/demo
BEST = --checkpoint checkpoints/demo/StoryGPT_best.pt

.PHONY: demo app check test lint

demo: .venv/requirements
	rm -rf data/demo checkpoints/demo
	$(BIN)/python prepare_data.py --dataset builtin --preset demo $(DEMO)
	$(BIN)/python train.py --preset demo $(DEMO) --checkpoint_dir checkpoints/demo
	$(BIN)/python evaluate.py $(BEST) $(DEMO) --num_stories 50
	@echo "The loss plot is checkpoints/demo/loss_plot.png. Three stories:"
	@$(BIN)/python generate.py $(BEST) --prompt "" --num_samples 3

# The page of space/ with the demo's model, which is trained first if there is none.
app: .venv/requirements-app
	test -f checkpoints/demo/StoryGPT_best.pt || $(MAKE) demo
	rm -rf checkpoints/demo/published
	$(BIN)/python upload_to_hf.py --repo_id you/StoryGPT-demo $(BEST) \
		--gguf none --dry_run --output_dir checkpoints/demo/published
	$(BIN)/python space/app.py --model checkpoints/demo/published --open

# What a change to the core needs, in half a minute; `make test` is everything.
CORE = anchor batches config kernels model optimizer readers token_files tokenizer
check: .venv/requirements-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(CORE:%=tests/test_%.py)

test: .venv/requirements-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/requirements-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# What torch, as requirements.txt bounds it, has no wheels for.
NEEDS = StoryGPT needs Python 3.11 or newer, up to 3.14: make PYTHON=python3.12 demo
INTEL = There is no torch for Intel Macs, nor for an Intel Python on a newer one: take an arm64 one
CHECK = import platform, sys; sys.exit( \
	not (3, 11) <= sys.version_info < (3, 15) and '$(NEEDS)' or \
	(sys.platform, platform.machine()) == ('darwin', 'x86_64') and '$(INTEL)')

# Not .venv: a Python that lacks venv's parts (Debian's, without python3-venv) makes that and fails.
.venv/bin/pip:
	$(PYTHON) -c "$(CHECK)"
	$(PYTHON) -m venv .venv

.venv/requirements: requirements.txt .venv/bin/pip
	@$(BIN)/python -c "$(CHECK)" || (echo ".venv has another Python: remove it first"; exit 1)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/requirements-app: space/requirements.txt .venv/requirements
	$(BIN)/python -m pip install --quiet --requirement space/requirements.txt
	touch $@

.venv/requirements-dev: requirements-dev.txt space/requirements.txt .venv/requirements
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@
