"""Which names mean the same base model."""

from __future__ import annotations

import time

import pytest

from langchain_lora_retriever.support.base_names import is_same_base_model

HUB = "/root/.cache/huggingface/hub/models--meta-llama--Llama-3.2-1B/snapshots/4e20de362430cd3b72f300e6b0f18e50e7166e08"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("org/tiny-llama", "/models/Tiny-Llama/"),
        ("org/tiny-llama", "C:\\models\\tiny-llama\\"),
        ("meta-llama/Llama-3.2-1B", HUB),
        ("meta-llama/Llama-3.2-1B", HUB + "/"),
        ("unsloth/Llama-3.2-1B-bnb-4bit", HUB),
        ("unsloth/Llama-3.2-1B-unsloth-bnb-4bit", "meta-llama/Llama-3.2-1B"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B-Instruct"),
        ("unsloth/llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "/root/.cache/modelscope/hub/Qwen/Qwen2___5-7B-Instruct"),
        ("neuralmagic/Llama-3.2-1B-FP8-dynamic", "meta-llama/Llama-3.2-1B"),
        ("bartowski/SmolLM2-135M-Instruct-GGUF", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("SmolLM2-135M-Instruct-Q4_K_M.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("out/llama-ft/checkpoint-500", "llama-ft"),
        ("./llama-ft/checkpoint-500/", "out/llama-ft/checkpoint-1000"),
        ("hub/models--gpt2/snapshots/607a30d", "gpt2"),
        ("checkpoint-500", "checkpoint-500"),
        (" org/x ", "org/x"),
    ],
)
def test_names_of_one_model(first, second):
    """Editions, folders, snapshots, checkpoints, case and slashes do not make another model."""
    assert is_same_base_model(first, second)
    assert is_same_base_model(second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2-7B"),
        ("org/tiny-llama", "org/tiny-gemma"),
        ("unsloth/Llama-3.2-1B-bnb-4bit", "unsloth/Llama-3.2-3B-bnb-4bit"),
        ("checkpoint-500", "org/tiny-llama"),
        ("out/a/checkpoint-500", "out/b/checkpoint-500"),
        (HUB, "4e20de362430cd3b72f300e6b0f18e50e7166e08"),
        ("-4bit", "-8bit"),
        ("", "org/tiny-llama"),
    ],
)
def test_names_of_two_models(first, second):
    """Sizes, generations and tunings do."""
    assert not is_same_base_model(first, second)


@pytest.mark.parametrize(
    "name", ["", "/", "///", ".", "..", "-4bit" * 100_000, "models--" * 100_000, "a/" * 500_000, "\udcff"]
)
def test_any_text_is_compared_at_once(name):
    """No name makes the comparison fail or wait."""
    start = time.perf_counter()
    assert is_same_base_model(name, name)
    is_same_base_model(name, "org/tiny-llama")
    assert time.perf_counter() - start < 1
