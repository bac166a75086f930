"""Attention over a paged KV cache, in Triton, with every length read from device memory.

    write_kv(query, key, value, keys, values, pages, rotary=..., norm=...)      # rotate, normalise, store
    attend_decode(out, query, keys, values, pages, tokens, projected, ...)      # sequences with one query
    attend_prefill(out, query, keys, values, pages, tiles, ...)                 # sequences with several

`attend_decode` does what `write_kv` does itself where it is given what the projections gave (`Projected`).

`Pages` says where each token of a packed step lives: nothing else about the step is known on the host, so a captured
CUDA graph replays for any sequences.
"""

from lora_retriever_kernels.attention.decode import Projected, attend_decode, choose_num_splits
from lora_retriever_kernels.attention.heads import QueryKeyNorm, Rotary
from lora_retriever_kernels.attention.pages import Pages
from lora_retriever_kernels.attention.prefill import attend_prefill, queries_per_tile
from lora_retriever_kernels.attention.write import write_kv

__all__ = [
    "Pages",
    "Projected",
    "QueryKeyNorm",
    "Rotary",
    "attend_decode",
    "attend_prefill",
    "choose_num_splits",
    "queries_per_tile",
    "write_kv",
]
