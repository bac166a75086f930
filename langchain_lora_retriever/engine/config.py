"""What the engine may use: concurrency, memory, context."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.support.checks import settings

__all__ = ["EngineConfig", "config_of"]

_MAX_COUNT = 1 << 24  # of tokens, requests, adapters
_MAX_BYTES = 1 << 48

_Count = Annotated[int, Field(ge=1, le=_MAX_COUNT, description=f"an integer from 1 to {_MAX_COUNT:,}")]
_CountOrNone = Annotated[
    int | None, Field(ge=1, le=_MAX_COUNT, description=f"an integer from 1 to {_MAX_COUNT:,}, or None")
]
_BytesOrNone = Annotated[
    int | None, Field(ge=1, le=_MAX_BYTES, description=f"an integer from 1 to {_MAX_BYTES:,}, or None")
]
_NumAdapters = Annotated[int, Field(ge=0, le=8)]
_Rank = Annotated[int, Field(ge=1, le=256)]
_AdapterKind = Literal["vocabulary", "dora"]


@settings(slots=True)
class EngineConfig:
    """Limits of one engine. Memory is set aside once, when the model is loaded, and never grows beyond.

    On a CPU the system provides it when it is first used. docs/memory.md has the formula.

    Attributes:
        max_num_seqs: Maximum number of requests running at once; None picks 16 on a CPU and 128 on a GPU.
        max_waiting: Maximum number of requests that wait beside the `max_num_seqs` that may run at once; one more is
            refused with `EngineOverloadedError`. None sets no limit.
        max_num_batched_tokens: Maximum number of tokens computed in one step, >= `max_num_seqs`. A longer prompt is
            prefilled in chunks beside the decoding of others; None picks 512 on a CPU and 2,048 on a GPU, up to which
            steps are captured, and lets a step that ends all prompts have 128 more.
        max_num_prefill_tokens: Maximum number of tokens of one prompt in a step that also serves streams, while those
            are more than the requests that wait for their first token: bounds the pause that a long prompt causes. None
            picks 256 on a GPU and sets no limit on a CPU.
        max_model_len: Maximum number of tokens of prompt and answer together; None takes the model's context window.
        block_size: Tokens per block of the paged KV cache.
        kv_cache_bytes: Size of the KV cache. None sizes it from what is free after loading on a GPU; on a CPU it has
            2,048 tokens for each of `max_num_seqs`, a quarter of what is free at most.
        gpu_memory_utilization: Share of a GPU's memory the engine may fill when it sizes the cache itself.
        lora_cache_bytes: Device memory for adapters; None picks 0.5 GiB on a CPU and a tenth of a GPU's memory.
        pinned_lora_bytes: Maximum page-locked host memory for adapters that are ready to be copied to a GPU, taken as
            they are used; 0 keeps none. None picks four times `lora_cache_bytes`, a quarter of the available memory at
            most.
        max_loras: Maximum number of distinct adapters resident on the device at once.
        max_adapters_per_request: Longest composition (`k`), at most 8.
        enable_prefix_caching: Share the KV of equal prefixes between requests that run the same composition.
        attention_backend: "torch" runs anywhere, "triton" needs the whole model on one device; "auto" picks Triton on
            a GPU and PyTorch elsewhere.
        enable_cuda_graphs: Replay steps of up to 2,048 tokens as CUDA graphs, where the Triton backend runs on a GPU.
        captured_num_adapters: Numbers of adapters per request for which graphs are captured when the engine starts. A
            request with another number takes the next larger one; beyond the largest, steps run without graphs.
        captured_ranks: Ranks up to which adapters find graphs, which are captured when the engine starts: a step takes
            the smallest that none of its adapters exceeds. Beyond the largest, steps run without graphs. The first has
            graphs for steps of up to 2,048 tokens, the others for those of up to 512. Fewer make the start shorter.
        adapter_kinds: Kinds of adapters to be ready for when the engine starts, beside LoRA between embedding and
            output layer. "vocabulary": LoRA on these two, for which every rank takes memory as wide as the vocabulary;
            without, such adapters are refused. "dora": DoRA runs in any case, but on a GPU without this not in CUDA
            graphs. Either doubles the graphs of steps with adapters. None is what the pool has that the engine is
            started with.
        enable_fused_layers: Run decoder layers of a known shape with fused kernels, where the Triton backend runs; the
            result is checked against the model's own layers when the engine starts.
        enable_async_scheduling: Launch a step before the tokens of the last one are known here; None does on a GPU.
        freeze_heap: Keep Python's garbage collector from looking at what is there when the engine starts, until it is
            closed. A full collection holds up every stream, and every event loop, for some 0.2 s.
    """

    max_num_seqs: _CountOrNone = None
    max_waiting: Annotated[
        int | None, Field(ge=0, le=_MAX_COUNT, description=f"an integer from 0 to {_MAX_COUNT:,}, or None")
    ] = None
    max_num_batched_tokens: _CountOrNone = None
    max_num_prefill_tokens: _CountOrNone = None
    max_model_len: _CountOrNone = None
    block_size: _Count = 16
    kv_cache_bytes: _BytesOrNone = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1, description="a number in (0, 1]")] = 0.9
    lora_cache_bytes: _BytesOrNone = None
    pinned_lora_bytes: Annotated[int | None, Field(ge=0, le=_MAX_BYTES, description="0 or more bytes, or None")] = None
    max_loras: _Count = 256
    max_adapters_per_request: Annotated[int, Field(ge=1, le=8, description="an integer from 1 to 8")] = 8
    enable_prefix_caching: bool = True
    attention_backend: Literal["auto", "torch", "triton"] = "auto"
    enable_cuda_graphs: bool = True
    captured_num_adapters: Annotated[
        tuple[_NumAdapters, ...] | list[_NumAdapters], Field(description="a tuple of numbers of 0 to 8")
    ] = (0, 1, 3)
    captured_ranks: Annotated[
        tuple[_Rank, ...] | list[_Rank], Field(min_length=1, description="a tuple of one or more ranks of 1 to 256")
    ] = (16, 64, 256)
    adapter_kinds: Annotated[
        tuple[_AdapterKind, ...] | list[_AdapterKind] | None,
        Field(description='a tuple of "vocabulary" and "dora", or None'),
    ] = None
    enable_fused_layers: bool = True
    enable_async_scheduling: Annotated[bool | None, Field(description="True, False or None")] = None
    freeze_heap: bool = True

    def __post_init__(self) -> None:
        """Keep lists, as files of settings have them, as tuples: a configuration is a key."""
        for name in ("captured_num_adapters", "captured_ranks", "adapter_kinds"):
            values = getattr(self, name)
            object.__setattr__(self, name, values if values is None else tuple(values))


def config_of(limits: dict[str, Any]) -> EngineConfig:
    """Make a configuration of its fields, as files of settings have them.

    Raises:
        InvalidRequestError: If one is unknown or not allowed.
    """
    try:
        return EngineConfig(**limits)
    except TypeError as error:
        allowed = ", ".join(field.name for field in fields(EngineConfig))
        raise InvalidRequestError(f"engine_config={limits!r} is not allowed: pass some of {allowed}.") from error
