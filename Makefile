# make demo and make test need python3.11 and a package index; both make .venv first.
PYTHON ?= python3
BIN := .venv/bin
FASHION := examples/fashion_mnist
FOCUS := examples/focus

.PHONY: help demo test test-families test-rtx test-soak soak-camera check bench bench-quantizers gpu-ready test-gpu bench-gpu clean
help:
	@echo "make demo    deploy two real Vision Transformers on this machine; tables, an annotated video, reports"
	@echo "make test    all tests"
	@echo "make test-families   timm and torchvision architectures; downloads several GB"
	@echo "make test-gpu   the engines on the NVIDIA GPU of this machine"
	@echo "make bench-gpu  test-gpu, and what a camera's frame costs on that GPU, into results/"
	@echo "make test-rtx   nine Vision Transformers of real size as TensorRT-RTX engines, without a GPU; ten minutes"
	@echo "make test-soak  200,000 requests of many threads, cancelled, late and broken ones among them; some minutes"
	@echo "make soak-camera MINUTES=30   a camera at full rate: every frame counted, memory and clock where they were"
	@echo "make check   ruff and mypy --strict"
	@echo "make bench   measure against other engines and write results/ and the README tables"
	@echo "make bench-quantizers IMAGES=DIR   measure against other quantizers: an hour or two on labelled images, see benchmarks/quantizers.py"

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[compile,cpu,camera,live,mqtt,hf,rtx,report,data,ray,dev]'
	touch $@

demo: .venv/ready
	@echo "1/3  Fashion-MNIST: a small ViT, accuracy on 10,000 images"
	@$(BIN)/python $(FASHION)/dataset.py
	$(BIN)/vitedge make $(FASHION)/model.py:vit --checkpoint $(FASHION)/vit.safetensors \
	  --images $(FASHION)/.cache/calibration --judge $(FASHION)/.cache/test
	@echo "2/3  focus: a ViT-S/14 that marks what is worth looking at"
	$(BIN)/python $(FOCUS)/fetch.py
	$(BIN)/vitedge make $(FOCUS)/model.py:focus --checkpoint $(FOCUS)/.cache/focus.safetensors \
	  --images $(FOCUS)/.cache/calibration --judge $(FOCUS)/.cache/judge
	@echo "3/3  focus on a video"
	@mkdir -p out
	$(BIN)/vitedge run focus-vits14/int8 --source $(FOCUS)/.cache/bikes.mp4 --save out/bikes.mp4 --json > out/bikes.jsonl
	@echo "annotated video:  out/bikes.mp4, one line a frame in out/bikes.jsonl"
	@echo "reports:          engines/fashion-vit/report.html  engines/focus-vits14/report.html"
	@echo "to go on:         . .venv/bin/activate, then vitedge --help"

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-rtx: .venv/ready
	$(BIN)/python -m pytest -m rtx tests/rtx

test-soak: .venv/ready
	$(BIN)/python -m pytest -m soak tests/soak/test_batcher.py
	@echo "and three at once, which take the processors from each other"
	@runs=; for run in 1 2 3; do SOAK_REQUESTS=30000 $(BIN)/python -m pytest -q -m soak tests/soak/test_batcher.py & runs="$$runs $$!"; done; \
	for run in $$runs; do wait $$run || exit 1; done

MINUTES ?= 30
soak-camera: .venv/ready
	SOAK_MINUTES=$(MINUTES) $(BIN)/python -m pytest -s -m soak tests/soak/test_camera.py tests/runtime

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/cpu_latency.py
	$(BIN)/python -m benchmarks.preprocess
	$(BIN)/python -m benchmarks.viewers
	$(BIN)/vitedge bench fashion-vit/fp32 fashion-vit/int8 --images $(FASHION)/.cache/test --seconds 10 --json results/fashion_vit.json
	$(BIN)/vitedge bench focus-vits14/fp32 focus-vits14/int8 --images $(FOCUS)/.cache/judge --seconds 10 --json results/focus_vits14.json
	$(BIN)/python benchmarks/readme.py

bench-quantizers: .venv/ready
	$(BIN)/python $(FASHION)/dataset.py
	$(BIN)/python $(FOCUS)/fetch.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python -m benchmarks.quantizers --images $(IMAGES)
	$(BIN)/python benchmarks/readme.py

# on a machine with an NVIDIA GPU and nvcc, which PyCUDA is built with; WHEELS: a folder of wheels, where there is no index;
# CUDA: the major release that the driver is for, which NVRTC has to fit
CUDA ?= 13
NVRTC_12 := nvidia-cuda-nvrtc-cu12
NVRTC_13 := nvidia-cuda-nvrtc
gpu-ready: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(WHEELS),--no-index --find-links $(WHEELS)) \
	  pycuda 'cuda-bindings==$(CUDA).*' $(NVRTC_$(CUDA))

test-gpu: gpu-ready
	$(BIN)/python -m pytest tests/gpu

bench-gpu:
	CUDA=$(CUDA) WHEELS=$(WHEELS) sh benchmarks/gpu_all.sh

clean:
	rm -rf .venv .venv-families .cache .*_cache .hypothesis build dist out *.egg-info examples/*/.cache engines/*-vit*

# a slow suite with an environment of its own: timm and torchvision bring a build of torch of several GB
test-families:
	$(PYTHON) -m venv .venv-families
	.venv-families/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[compile,cpu,timm,torchvision]' pytest
	.venv-families/bin/python -m pytest tests/families
