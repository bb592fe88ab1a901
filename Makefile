PYTHON ?= python

.PHONY: test test-all lint bench bench-compare kernels-hub quickstart
test:            ## the default suite (lint, types, layout included), parallel
	$(PYTHON) -m pytest -n auto --dist worksteal -m "not slow"
test-all:        ## everything, heavy cases too
	$(PYTHON) -m pytest -n auto
lint:            ## format and lint in place
	$(PYTHON) -m ruff format . && $(PYTHON) -m ruff check --fix . && $(PYTHON) -m pyright --pythonpath "$$(which $(PYTHON))"
bench:           ## ops and a step by pytest-benchmark, saved and compared with the run before
	$(PYTHON) -m pytest bench
BASE ?= HEAD
bench-compare:   ## this working copy's step beside that of BASE=revision, in turn
	$(PYTHON) bench/against_revision.py $(BASE)
kernels-hub:     ## build/hub/nanogpt-kernels, the folder that Hugging Face's kernel hub carries
	$(PYTHON) kernels/build_hub.py
quickstart:      ## the embedded default: offline, CPU, about two minutes
	$(PYTHON) -m nanogpt_fast.train --config quickstart
