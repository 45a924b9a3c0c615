# Two commands for a newcomer: `make demo` and `make test`. Everything else is for developers.
# Needs Python >= 3.11 with venv, a C++ compiler and make; no GPU. Works offline once installed.
SHELL := /bin/bash
PYTHON ?= python3
EXTRAS ?= sim,dev
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs
# Written once, compiled modules spare each of the many processes of the tests a second; an empty value means "write them".
export PYTHONDONTWRITEBYTECODE :=

.PHONY: docs install demo demo-astroclip demo-mmae demo-mosaic demo-galaxy-walker test cases check test-cpus test-cluster soak lint format bench bench-gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo               simulate a small survey, train on it, evaluate: runs/demo/report.html"
	@echo "make demo DATA=PATH     the same on your own pictures (a folder or zip of JPEG/PNG, labels.csv beside it)"
	@echo "make demo-astroclip     images, spectra, their alignment and every evaluation: runs/demo-astroclip/report.html"
	@echo "make demo-mosaic        photometry, masses, histories: any of them from any: runs/demo-mosaic/report.html"
	@echo "make demo-mmae          fill in images and spectra, and say redshifts: runs/demo-mmae/report.html (SEED=1: another seed)"
	@echo "make demo-galaxy-walker neighbours on a simulated sky, with and without: runs/demo-galaxy-walker/report.html (SEED=1)"
	@echo "make test               all tests"
	@echo "make cases              kinds of faults that people ran into: inputs, right value or error, as a table"
	@echo "make check              before each commit: lint, types and the fast tests, which start no ranks, compile nothing and are"
	@echo "                        not marked slow or whole_task; those of kernels only where a kernel's file has changes to commit"
	@echo "make test-cpus          the numeric tests with the instructions of other processors"
	@echo "make test-cluster       trainings on two machines and under Slurm, made of namespaces (as root; three to nine minutes)"
	@echo "make soak               kill training, damage its files, fill its disk, start it twice; compare the bits (a quarter of an hour or more)"
	@echo "make docs               the documentation as a site: site/index.html"
	@echo "make lint | format      ruff, mypy, codespell | rewrite with ruff"
	@echo "make bench              benchmarks of loader and training step on this machine"
	@echo "make bench-gpu          tests and times of all kernels on one GPU, in eight minutes"

# Torch comes first and pinned: an unpinned one would fetch another build with every dependency that asks for it.
$(VENV)/.dependencies: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Armillary needs Python >= 3.11; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	@command -v c++ >/dev/null || { echo "Armillary needs a C++ compiler (Debian/Ubuntu: apt install g++)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Cannot make a virtual environment (Debian/Ubuntu: apt install python3-venv python3-dev)"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools wheel pybind11
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	touch $@ $(VENV)/.extension

# The extension alone is rebuilt when its sources change; this needs no network.
$(VENV)/.extension: $(VENV)/.dependencies setup.py $(wildcard csrc/*)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

install: $(VENV)/.extension

# One thread a rank: the smoke model's matrices are too small to share.
# The survey is kept and reused; training starts afresh each time. An interrupted step resumes by hand with its command.
DEMO := $(RUNS)/demo$(if $(DATA),-pictures)
demo: install
ifdef DATA
	$(BIN)/armillary data build '$(DATA)' --out $(DEMO)/survey --test-fraction 0.25
else
	$(BIN)/armillary data simulate --count 5000 --out $(DEMO)/survey
endif
	rm -rf $(DEMO)/training
	$(call train,dinov2_vitl,$(if $(DATA),pictures,smoke),$(DEMO)) --name training
	$(BIN)/armillary evaluate $(DEMO)/training --data $(DEMO)/survey --out $(DEMO) --tasks baselines collapse pictures patches

# Recipe, preset, folder.
train = OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(BIN)/deepspeed --num_accelerators 2 \
  --master_port $$((20000 + RANDOM % 20000)) recipes/$(1).py --preset $(2) --device cpu --data.path $(3)/survey --out $(3)

# Three stages, then the networks that are trained on labels, for comparison.
PAIRS := $(RUNS)/demo-astroclip
demo-astroclip: install
	$(BIN)/armillary data simulate --spectra --count 5000 --out $(PAIRS)/survey
	rm -rf $(addprefix $(PAIRS)/,dinov2 specformer astroclip tokens resnet18 conv_attention photometry)
	$(call train,dinov2_vitl,smoke,$(PAIRS)) --name dinov2
	$(call train,specformer,smoke,$(PAIRS)) --name specformer
	$(call train,astroclip,smoke,$(PAIRS)) --name astroclip --data.token-cache $(PAIRS)/tokens \
	  --method.image-from $(PAIRS)/dinov2 --method.spectrum-from $(PAIRS)/specformer
	$(call train,supervised,smoke,$(PAIRS)) --name resnet18
	$(call train,supervised,smoke_conv_attention,$(PAIRS)) --name conv_attention
	$(call train,supervised,smoke_photometry,$(PAIRS)) --name photometry
	$(BIN)/armillary evaluate $(PAIRS)/astroclip --data $(PAIRS)/survey --out $(PAIRS) \
	  --compare $(PAIRS)/resnet18 $(PAIRS)/conv_attention $(PAIRS)/photometry

# One network for every question; its answers are corrected by held-out galaxies before they are judged.
MOSAIC := $(RUNS)/demo-mosaic
demo-mosaic: install
	$(BIN)/armillary data simulate-photometry --count 8000 --validation-fraction 0.1 --out $(MOSAIC)/survey
	rm -rf $(MOSAIC)/mosaic
	$(call train,mosaic,smoke,$(MOSAIC)) --name mosaic
	$(BIN)/armillary calibrate $(MOSAIC)/mosaic
	$(BIN)/armillary evaluate $(MOSAIC)/mosaic --data $(MOSAIC)/survey --out $(MOSAIC) --tasks queries

# Both models of MMAE, and beside them networks that are trained on the redshift alone.
MMAE := $(RUNS)/demo-mmae
SEED ?= 0
demo-mmae: install
	$(BIN)/armillary data simulate --spectra --count 5000 --validation-fraction 0.16 --out $(MMAE)/survey
	rm -rf $(addprefix $(MMAE)/,improved published cnn photometry)
	$(call train,mmae,smoke_improved,$(MMAE)) --name improved --seed $(SEED)
	$(call train,mmae,smoke,$(MMAE)) --name published --seed $(SEED)
	$(call train,supervised,smoke,$(MMAE)) --views.targets redshift --train.steps 800 --name cnn --seed $(SEED)
	$(call train,supervised,smoke_photometry,$(MMAE)) --views.targets redshift --name photometry --seed $(SEED)
	$(BIN)/armillary evaluate $(MMAE)/improved --data $(MMAE)/survey --out $(MMAE) --tasks missing lines \
	  --compare $(MMAE)/published $(MMAE)/cnn $(MMAE)/photometry

# Stage 1: geometry prompts of galaxies in groups; the same without neighbours, and with shuffled ones. Stage 2 on its tokens: a
# tiny language model is asked about the galaxies.
WALKER := $(RUNS)/demo-galaxy-walker
SPACES := euclidean hyperbolic spherical
shuffled = --views.neighbours.graphs $(SPACES:%=%-k5-leak-free-shuffled0)
demo-galaxy-walker: install
	$(BIN)/armillary data simulate --spectra --grouped --count 2000 --out $(WALKER)/survey
	for space in $(SPACES); do \
	  $(BIN)/armillary data graph $(WALKER)/survey --space $$space --mode leak-free && \
	  $(BIN)/armillary data graph $(WALKER)/survey --space $$space --mode leak-free --shuffle-seed 0 || exit 1; done
	rm -rf $(addprefix $(WALKER)/,alone neighbours shuffled)
	$(call train,galaxy_walker_stage1,smoke,$(WALKER)) --seed $(SEED) --name alone --views.neighbours.fan-outs 0 0
	$(call train,galaxy_walker_stage1,smoke,$(WALKER)) --seed $(SEED) --name neighbours
	$(call train,galaxy_walker_stage1,smoke,$(WALKER)) --seed $(SEED) --name shuffled $(shuffled)
	$(BIN)/armillary evaluate $(WALKER)/alone --data $(WALKER)/survey --out $(WALKER) \
	  --compare $(WALKER)/neighbours $(WALKER)/shuffled --tasks ablation
	$(BIN)/armillary embed $(WALKER)/neighbours --data $(WALKER)/survey --readout geometry -o $(WALKER)/geometry.parquet
	rm -rf $(WALKER)/stage2
	$(call train,galaxy_walker_stage2,smoke,$(WALKER)) --seed $(SEED) --name stage2 --views.geometry $(WALKER)/geometry.parquet
	$(BIN)/armillary evaluate $(WALKER)/stage2 --data $(WALKER)/survey --out $(WALKER)/stage2/evaluation \
	  --tasks properties questions --labels redshift log_mstar

# A process a core; tests/conftest.py says in which order.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --dist loadfile --no-loadscope-reorder -m "not cluster"

# Part of `make test`, too; here with their table.
cases: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/cases --table

# What a change needs before each commit. The kernels' tests, under Triton's interpreter, are a good part of all. Files that
# are not in git yet count as changes too.
CHANGED_KERNELS = $(shell git status --porcelain kernels tests/kernels 2>&1)
# One core would be idle while mypy looks at everything, so lint runs beside the tests and speaks after them.
check: install
	@$(MAKE) --no-print-directory lint > $(VENV)/lint.log 2>&1 & lint=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --dist loadfile \
	  -m "not dist and not cluster and not slow and not whole_task and not aot$(if $(CHANGED_KERNELS),, and not kernel)"; tests=$$?; \
	wait $$lint; lint=$$?; cat $(VENV)/lint.log; exit $$((tests | lint))

# The numeric modules as other processors would run them.
test-cpus: install
	$(BIN)/python tests/cpus.py

# Needs root and `apt-get install --no-install-recommends iproute2 openssh-server pdsh munge slurm-wlm`; without them it skips.
test-cluster: install
	$(BIN)/python -m pytest -q tests/cluster

soak: install
	$(BIN)/python tests/soak.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# The notice that it leaves out is about a successor of mkdocs.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/step.py

# Without `install`: it needs neither the network nor most dependencies. The environment's Python, where there is one.
bench-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu

clean:
	rm -rf build site $(RUNS)/demo $(addprefix $(RUNS)/demo-,astroclip mmae mosaic galaxy-walker) armillary/_C*.so
