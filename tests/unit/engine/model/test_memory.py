"""Memory that does not suffice and settings that are no sizes are refused in words; each device has its own memory."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from langchain_lora_retriever.engine import BaseModel, EngineConfig
from langchain_lora_retriever.engine.model.attention import MaskPattern
from langchain_lora_retriever.engine.model.memory import longest_sequence, plan_memory
from langchain_lora_retriever.engine.model.probe import AttentionGeometry, LinearGroup, ModelProbe
from langchain_lora_retriever.engine.model.runner import ModelRunner
from langchain_lora_retriever.errors import EngineError, InvalidRequestError
from lora_retriever_kernels.host_memory import lazy_zeros
from makers import make_tiny_model

SIZES = ["max_num_seqs", "max_num_batched_tokens", "max_num_prefill_tokens", "max_model_len", "kv_cache_bytes",
         "lora_cache_bytes", "block_size", "max_loras", "pinned_lora_bytes", "max_adapters_per_request"]  # fmt: skip


@pytest.fixture
def base(byte_tokenizer: Any) -> BaseModel:
    """A small model."""
    return BaseModel(make_tiny_model("llama"), byte_tokenizer, "tiny")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 1.5, "16", True, 10**30, [1]], ids=repr)
@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_no_size_is_refused(name: str, value: Any) -> None:
    """Before a model is touched."""
    with pytest.raises(InvalidRequestError, match=name):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"gpu_memory_utilization": math.nan},
        {"gpu_memory_utilization": "0.9"},
        {"captured_num_adapters": 3},
        {"captured_num_adapters": (math.nan,)},
        {"captured_ranks": ()},
        {"captured_ranks": (0,)},
        {"captured_ranks": (16, 257)},
        {"captured_ranks": None},
        {"adapter_kinds": ("dora", "vera")},
        {"adapter_kinds": "dora"},
    ],
    ids=str,
)
def test_shares_and_lists_are_checked_too(settings: dict[str, Any]) -> None:
    """By their names."""
    with pytest.raises(InvalidRequestError, match=next(iter(settings))):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kv_cache_bytes": 1}, "0 blocks of the KV cache"),
        ({"block_size": 1 << 24}, "0 blocks of the KV cache"),
        ({"lora_cache_bytes": 1}, "lora_cache_bytes=1 is less"),
        ({"kv_cache_bytes": 1 << 48}, "does not fit into the memory of cpu"),
        ({"lora_cache_bytes": 1 << 48}, "rank rows of adapters"),
    ],
    ids=str,
)
def test_too_little_and_too_much_are_refused_in_words(settings: dict[str, Any], words: str, base: BaseModel) -> None:
    """And the model attends as before."""
    small = {"max_num_seqs": 2, "kv_cache_bytes": 1 << 20, "lora_cache_bytes": 1 << 20}
    before = base.model.config._attn_implementation
    with pytest.raises(EngineError, match=words):
        ModelRunner(base, EngineConfig(**{**small, **settings}))
    assert base.model.config._attn_implementation == before


def test_a_model_that_does_not_say_how_long_it_is_needs_a_length() -> None:
    """`max_model_len` says it."""
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=SimpleNamespace))
    with pytest.raises(EngineError, match="max_model_len"):
        longest_sequence(model, EngineConfig())
    assert longest_sequence(model, EngineConfig(max_model_len=99)) == 99


@pytest.mark.parametrize("devices", [("cuda:1", "cuda:1"), ("cuda:0", "cuda:1"), ("cuda:1", "cpu")], ids=str)
def test_each_device_is_asked_for_its_own_memory(
    devices: tuple[str, str], base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cache and adapters take, on every device, what its layers need there; the device with the least room decides."""
    total = {"cuda:0": 10 << 30, "cuda:1": 2 << 30}
    asked = set()

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.add(str(device))
        return total[str(device)], total[str(device)]

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    places = [torch.device(device) for device in devices]
    layers = {
        i: AttentionGeometry(8, 64, 64, torch.float16, place, 8, 1.0, MaskPattern(), None)
        for i, place in enumerate(places)
    }
    groups = tuple(LinearGroup((f"m{i}",), 1000, (1000,), torch.float16, place) for i, place in enumerate(places))
    plan = plan_memory(base, ModelProbe(layers, {}, groups), EngineConfig(gpu_memory_utilization=0.5))
    assert asked == {device for device in devices if device != "cpu"}
    num_here = devices.count("cuda:1")
    num_lora_rows = plan.num_lora_rows + plan.num_staging_rows
    assert num_lora_rows * num_here * 4000 <= 0.1 * total["cuda:1"]
    used = num_lora_rows * num_here * 4000 + plan.num_blocks * num_here * 16 * 8 * 128 * 2
    assert 0.45 * total["cuda:1"] < used < 0.5 * total["cuda:1"]


@pytest.mark.parametrize(
    ("num_parameters", "num_warm_tokens", "num_warm_rows"), [(1 << 20, 2048, 128), (1 << 28, 32768, 256)]
)
def test_a_small_model_keeps_little(
    num_parameters: int, num_warm_tokens: int, num_warm_rows: int, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU: prefixes and adapters that nobody runs are measured by the weights, unless sizes were given."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=64 << 30))
    cpu = torch.device("cpu")
    model: Any = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=8192)),
        parameters=lambda: [torch.empty(num_parameters, device="meta")],
    )
    layers = {0: AttentionGeometry(8, 64, 64, torch.float32, cpu, 8, 1.0, MaskPattern(), None)}
    probe = ModelProbe(layers, {}, (LinearGroup(("m",), 1 << 16, (1 << 16,), torch.float32, cpu),))
    plan = plan_memory(BaseModel(model, base.tokenizer, "any"), probe, EngineConfig())
    assert plan.num_blocks * 16 == 16 * 2048
    assert plan.num_warm_blocks * 16 == num_warm_tokens
    assert (plan.num_lora_rows, plan.num_warm_rows) == (1024, num_warm_rows)
    told = EngineConfig(kv_cache_bytes=1 << 20, lora_cache_bytes=1 << 30)
    plan = plan_memory(BaseModel(model, base.tokenizer, "any"), probe, told)
    assert (plan.num_warm_blocks, plan.num_warm_rows) == (plan.num_blocks, plan.num_lora_rows)


def test_zeros_cost_nothing_before_they_are_written() -> None:
    """A gigabyte of them is no more in memory than what was written; small ones are ordinary."""
    process = psutil.Process()
    before = process.memory_info().rss
    zeros = lazy_zeros((4, 1 << 26), dtype=torch.float32, device="cpu")
    zeros[3, :1024] = 1
    assert process.memory_info().rss - before < 64 << 20
    assert zeros[3, :2048].sum() == 1024
    assert not zeros[0, :1024].any()
    small = lazy_zeros((2, 3), dtype=torch.bfloat16, device="cpu")
    assert (small.shape, small.dtype, small.sum()) == ((2, 3), torch.bfloat16, 0)
    with pytest.raises(RuntimeError, match="no room"):
        lazy_zeros((1 << 60,), dtype=torch.float32, device="cpu")
