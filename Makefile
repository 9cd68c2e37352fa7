# Two commands do all the set-up: `make demo` shows the whole method, `make test` runs the tests.
# Both make a virtual environment in .venv first (a few minutes, most of it the download of PyTorch).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Small matrices on many threads are slower than on one, and the tests already run in parallel.
TEST_ENV := OMP_NUM_THREADS=1 MPLBACKEND=Agg
# Studies on real tissue need CRCHistoPhenotypes and DINOv2 ViT-S/14, which users download; see docs/evidence/README.md.
LRMIL_TEST_DATA ?= ../shared/data
CRCHISTO ?= $(LRMIL_TEST_DATA)/crchisto
DINOV2 ?= $(LRMIL_TEST_DATA)/weights/vit_small_patch14_dinov2_fp16.safetensors
STUDY := OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/lrmil study
PUBLISH := --publish docs/evidence

.PHONY: help setup demo test lint format evidence clean

help:
	@echo "make demo    the whole method on a simulated cohort, offline; ends with demo/report.html"
	@echo "make test    the tests"
	@echo "make evidence  the studies of evidence/ (hours; resumes); results go to docs/evidence"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff format the code"
	@echo "make clean   remove the virtual environment and caches"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/lrmil demo

test: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Each study resumes where it was, and repeats nothing that is finished.
evidence: setup
	@for v in 100 050 000; do $(STUDY) probe evidence/visibility-$$v.yaml $(PUBLISH) || exit 1; done
	$(STUDY) look evidence/visibility-000.yaml evidence/visibility-050.yaml evidence/visibility-100.yaml --count 6 \
		--out docs/evidence/look
	$(STUDY) ceiling evidence/ceiling.yaml $(PUBLISH)
	$(STUDY) curve docs/evidence/visibility-*_summary.json --recipe quick --embedding cls \
		--ceiling docs/evidence/ceiling.csv --out docs/evidence/recovery
	$(STUDY) controls evidence/controls-stage2.yaml $(PUBLISH)
	$(BIN)/lrmil run evidence/out/controls-stage2/run/config.yaml --set deploy=false --set evaluation.timed_slides=0
	@for f in md csv; do cp evidence/out/controls-stage2/run/tables/results.$$f docs/evidence/controls-stage2_run_results.$$f; done
	$(BIN)/lrmil sensitivity evidence/out/controls-stage2/run/config.yaml --of magnification --values '[0.5, 1], [0.5, 4]' \
		--set evaluation.timed_slides=5
	@for f in results.csv differences.csv paper.md figure_auc_against_seconds.png; do \
		cp evidence/out/controls-stage2/run/sensitivity/magnification/$$f docs/evidence/controls-stage2_magnification_$$f; done
	@for s in stage1 stage2; do $(STUDY) screen evidence/screen-$$s.yaml $(PUBLISH) || exit 1; done
	@for s in confirmation paper-recipe paper-recipe-anew paper-recipe-few eleven-methods survival-status slides-120 slides-100 slides-100-spread; do $(STUDY) slides evidence/$$s.yaml $(PUBLISH) || exit 1; done
	@if [ -d "$(CRCHISTO)" ]; then \
		$(STUDY) gaps evidence/tissue-gaps.yaml $(PUBLISH) --set crchisto=$(CRCHISTO) && \
		$(STUDY) slides evidence/tissue-slides.yaml $(PUBLISH) --set crchisto=$(CRCHISTO); \
	else echo "no real tissue at $(CRCHISTO): tissue-gaps and tissue-slides left out"; fi
	@if [ -d "$(CRCHISTO)" ] && [ -f "$(DINOV2)" ]; then \
		$(STUDY) probe evidence/probe-tissue.yaml $(PUBLISH) \
			--set fields.crchisto=$(CRCHISTO) --set encoder.weights=$(DINOV2); \
	else echo "no real tissue at $(CRCHISTO), or no weights at $(DINOV2): probe-tissue left out"; fi

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
