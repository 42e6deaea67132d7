# Two commands, each with all its own set-up: `make demo` and `make test`.
#
# TORCH is what pip installs first. The default is the release that this version was tested with. For another build, for
# example CUDA 12.6 (V100):  make demo TORCH="torch --index-url https://download.pytorch.org/whl/cu126"
TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/demo.done
	$(BIN)/python scripts/demo.py

test: .venv/test.done
	$(BIN)/python -m pytest $(ARGS)

.venv/torch.done:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

.venv/%.done: .venv/torch.done setup.py
	$(BIN)/pip install --quiet -e '.[$*]'
	touch $@

clean:
	rm -rf .venv runs datasets/digits
