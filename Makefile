PYTHON ?= python

.PHONY: test test-all lint quickstart
test:            ## the default suite (lint, types, layout included), parallel
	$(PYTHON) -m pytest -n auto -m "not slow"
test-all:        ## everything, heavy cases too
	$(PYTHON) -m pytest -n auto
lint:            ## format and lint in place
	$(PYTHON) -m ruff format . && $(PYTHON) -m ruff check --fix . && $(PYTHON) -m pyright --pythonpath "$$(which $(PYTHON))"
quickstart:      ## the embedded default: offline, CPU, about two minutes
	$(PYTHON) -m nanogpt_fast.train --config quickstart
