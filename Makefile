# Two commands, each with all its own set-up: `make demo` and `make test`.
#
# TORCH is what pip installs first. The default is the newest release that all tests have passed with. For another build, for
# example CUDA 12.6 (V100):  make demo TORCH="torch --index-url https://download.pytorch.org/whl/cu126"
# What is installed afterwards may not exchange it for another (torch-fidelity asks for torchvision, which asks for one torch).
TORCH ?= -r requirements-torch.txt
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/demo.done
	$(BIN)/python scripts/demo.py

test: .venv/test.done
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(ARGS)

.venv/torch.done: requirements-torch.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > .venv/constraints.txt
	touch $@

.venv/%.done: .venv/torch.done setup.py
	$(BIN)/pip install --quiet -c .venv/constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf .venv runs datasets/digits
