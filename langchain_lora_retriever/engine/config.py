"""What the engine may use: concurrency, memory, context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from langchain_lora_retriever.errors import InvalidRequestError

__all__ = ["EngineConfig"]

_MAX_COUNT = 1 << 24  # of tokens, requests, adapters
_MAX_BYTES = 1 << 48


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of one engine. Memory is taken once, when the model is loaded, and never grows.

    Attributes:
        max_num_seqs: Most requests running at once; None picks 16 on a CPU and 128 on a GPU.
        max_waiting: Most requests that wait beside the `max_num_seqs` that may run at once; one more is refused with
            `EngineOverloadedError`. None sets no limit.
        max_num_batched_tokens: Most tokens computed in one step, >= `max_num_seqs`. A longer prompt is prefilled
            in chunks beside the decoding of others; None picks 512 on a CPU and 2,048 on a GPU, up to which steps
            are captured.
        max_num_prefill_tokens: Most tokens of one prompt in a step that also serves streams, while those are more than
            the requests that wait for their first token: bounds the pause that a long prompt causes. None picks 256
            on a GPU and sets no limit on a CPU.
        max_model_len: Most tokens of prompt and answer together; None takes the model's context window.
        block_size: Tokens per block of the paged KV cache.
        kv_cache_bytes: Size of the KV cache; None sizes it from what is free after loading.
        gpu_memory_utilization: Share of a GPU's memory the engine may fill when it sizes the cache itself.
        lora_cache_bytes: Device memory for adapters; None picks 0.5 GiB on a CPU and a tenth of a GPU's memory.
        pinned_lora_bytes: Most page-locked host memory for adapters that are ready to be copied to a GPU, taken as they
            are used; 0 keeps none. None picks four times `lora_cache_bytes`, a quarter of the available memory at most.
        max_loras: Most distinct adapters resident on the device at once.
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
        enable_fused_layers: Run decoder layers of a known shape with fused kernels, where the Triton backend runs; the
            result is checked against the model's own layers when the engine starts.
        enable_async_scheduling: Launch a step before the tokens of the last one are known here; None does on a GPU.
        freeze_heap: Keep Python's garbage collector from looking at what is there when the engine starts, until it is
            closed. A full collection holds up every stream, and every event loop, for some 0.2 s.
    """

    max_num_seqs: int | None = None
    max_waiting: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_prefill_tokens: int | None = None
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    lora_cache_bytes: int | None = None
    pinned_lora_bytes: int | None = None
    max_loras: int = 256
    max_adapters_per_request: int = 8
    enable_prefix_caching: bool = True
    attention_backend: Literal["auto", "torch", "triton"] = "auto"
    enable_cuda_graphs: bool = True
    captured_num_adapters: tuple[int, ...] = (0, 1, 3)
    captured_ranks: tuple[int, ...] = (16, 64, 256)
    enable_fused_layers: bool = True
    enable_async_scheduling: bool | None = None
    freeze_heap: bool = True

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run."""
        for name in (
            "max_num_seqs",
            "max_waiting",
            "max_num_batched_tokens",
            "max_num_prefill_tokens",
            "max_model_len",
            "kv_cache_bytes",
            "lora_cache_bytes",
        ):
            value, least = getattr(self, name), int(name != "max_waiting")
            most = _MAX_BYTES if name.endswith("bytes") else _MAX_COUNT
            if value is not None and not _is_whole(value, least, most):
                raise InvalidRequestError(
                    f"EngineConfig({name}={value!r}): pass an integer from {least} to {most:,}, or None."
                )
        for name in ("block_size", "max_loras"):
            if not _is_whole(getattr(self, name), 1, _MAX_COUNT):
                raise InvalidRequestError(
                    f"EngineConfig({name}={getattr(self, name)!r}): pass a positive integer of at most {_MAX_COUNT:,}."
                )
        if self.pinned_lora_bytes is not None and not _is_whole(self.pinned_lora_bytes, 0, _MAX_BYTES):
            raise InvalidRequestError(
                f"EngineConfig(pinned_lora_bytes={self.pinned_lora_bytes!r}): pass 0 or more bytes, or None."
            )
        self._check_choices()

    def _check_choices(self) -> None:
        if not _is_whole(self.max_adapters_per_request, 1, 8):
            raise InvalidRequestError(
                f"EngineConfig(max_adapters_per_request={self.max_adapters_per_request!r}): pass 1 to 8."
            )
        if not _are_whole(self.captured_num_adapters, 0, 8):
            raise InvalidRequestError(
                f"EngineConfig(captured_num_adapters={self.captured_num_adapters!r}): pass numbers of 0 to 8."
            )
        if not (self.captured_ranks and _are_whole(self.captured_ranks, 1, 256)):
            raise InvalidRequestError(
                f"EngineConfig(captured_ranks={self.captured_ranks!r}): pass one or more of 1 to 256."
            )
        for name in ("enable_prefix_caching", "enable_cuda_graphs", "enable_fused_layers", "freeze_heap"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequestError(f"EngineConfig({name}={getattr(self, name)!r}): pass True or False.")
        if self.attention_backend not in {"auto", "torch", "triton"}:
            raise InvalidRequestError(
                f'EngineConfig(attention_backend={self.attention_backend!r}): pass "auto", "torch" or "triton".'
            )
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise InvalidRequestError(
                f"EngineConfig(gpu_memory_utilization={self.gpu_memory_utilization!r}): pass a number in (0, 1]."
            )


def _is_whole(value: object, least: int, most: int) -> bool:
    """Whether a setting is an integer within its limits."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _are_whole(values: object, least: int, most: int) -> bool:
    return isinstance(values, tuple | list) and all(_is_whole(value, least, most) for value in values)
