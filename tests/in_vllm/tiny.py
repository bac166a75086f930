"""A model that vLLM loads in no time, and the settings that keep vLLM small."""

from __future__ import annotations

from typing import Any

from makers import make_tiny_model

HEAD_DIM = 32  # vLLM's attention on a CPU has none smaller
NAMES = ("a", "b", "c", "d", "e")
RANKS = (4, 2, 8, 3, 1)


def tiny_model() -> Any:
    """The model."""
    return make_tiny_model(head_dim=HEAD_DIM)


def vllm_arguments(**more: Any) -> dict[str, Any]:
    """What keeps vLLM small."""
    return {
        "dtype": "float32",
        "max_model_len": 128,
        "max_num_seqs": 24,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 64 << 20,
        "block_size": 32,
        "enforce_eager": True,
        **more,
    }
