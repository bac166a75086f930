"""Per-sample LoRA for packed batches in which every token has its own weighted list of adapters.

    rows = LoraRows(max_loras, max_rank, device)                   # which rank rows belong to which slot
    rows.assign(slot, start, count); rows.release(slot)
    stack = LoraStack(rows, num_rows, in_features, out_features, dtype)     # A and B of one group of projections
    stack.load(slot, start, [(lora_A, lora_B, scaling) or None, ...]); stack.unload(slot)
    batch = LoraBatch(rows, max_num_tokens, max_k)                 # which adapters each token uses
    batch.update(token_lora_mapping, token_lora_weights)           # once per step
    add_lora(y, x, stack, batch)                                   # once per group of projections and layer
    v = lora_shrink(x, stack, batch); lora_expand(y, v, stack, batch)       # the same in two steps
    packing = LoraPacking(stacks)                                  # whole adapters, to all stacks of a model at once
    packing.pack(rank, weights, flat); packing.load(slot, start, rank, weights, flat_on_device)

Semantics:
    y[t, slice i] += sum_j w[t, j] * (x[t] @ A[m[t, j], i].T) @ B[m[t, j], i].T

    Inputs may be one-hot (an embedding's tokens), and an adapter may multiply the outputs themselves (DoRA's gains).

Triton runs it on a GPU; without Triton, or on a CPU, PyTorch does. `add_lora_reference` defines the result.
"""

from lora_retriever_kernels.lora.batch import LoraBatch
from lora_retriever_kernels.lora.ops import (
    add_lora,
    can_expand_gated,
    lora_delta,
    lora_expand,
    lora_expand_gated,
    lora_mix,
    lora_shrink,
)
from lora_retriever_kernels.lora.packing import LoraPacking
from lora_retriever_kernels.lora.reference import add_lora_reference
from lora_retriever_kernels.lora.rows import LoraRows
from lora_retriever_kernels.lora.stack import LoraSlice, LoraStack

__all__ = [
    "LoraBatch",
    "LoraPacking",
    "LoraRows",
    "LoraSlice",
    "LoraStack",
    "add_lora",
    "add_lora_reference",
    "can_expand_gated",
    "lora_delta",
    "lora_expand",
    "lora_expand_gated",
    "lora_mix",
    "lora_shrink",
]
