"""The definition of the operation: a plain loop that every other path is tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lora_retriever_kernels.lora.stack import LoraStack


def add_lora_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    stack: LoraStack,
    token_lora_mapping: torch.Tensor,
    token_lora_weights: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> None:
    """Add each token's weighted adapter outputs to `y` in place, token by token, in the dtype of `y`.

    Semantics:
        y[t, slice i] += sum_j w[t, j] * (
            (g[m[t, j], i] - 1) * (y[t, slice i] - bias) + (x[t] @ A[m[t, j], i].T) @ B[m[t, j], i].T
        )
        with gains g of 1 where an adapter has none, and g folded into B where it has.

    Args:
        y: Outputs `[num_tokens, sum(out_features)]`; mutated. float64 gives a reference for all dtypes.
        x: Inputs `[num_tokens, in_features]`; `[num_tokens]` of integers are one-hot.
        stack: The adapters' tensors.
        token_lora_mapping: Slot per token `[num_tokens, k]`, int32; -1 contributes nothing.
        token_lora_weights: Weight per slot `[num_tokens, k]`, fp32.
        bias: What `y` holds beside the base product `[sum(out_features)]`.
    """
    base = y.clone() if bias is None else y - bias.to(y.dtype)
    for t, (slots, weights) in enumerate(zip(token_lora_mapping.tolist(), token_lora_weights.tolist(), strict=True)):
        for slot, weight in zip(slots, weights, strict=True):
            if slot < 0:
                continue
            lo = int(stack.rows.starts[slot])
            offset = 0
            gain = int(stack.rows.gains[slot])
            if gain >= 0:
                y[t] += weight * stack.b[gain].to(y.dtype) * base[t]
            for i, width in enumerate(stack.out_features):
                hi = lo + int(stack.ranks[slot, i])
                a = stack.a[i, lo:hi].to(y.dtype).t()
                v = x[t].to(y.dtype) @ a if x.dim() == 2 else a[x[t]]
                y[t, offset : offset + width] += weight * (v @ stack.b[lo:hi, offset : offset + width].to(y.dtype))
                offset += width
