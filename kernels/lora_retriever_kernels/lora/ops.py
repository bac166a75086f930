"""The operators as PyTorch sees them: checked wrappers over `torch.library` custom ops."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from lora_retriever_kernels.lora import dense, plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_retriever_kernels.lora.batch import LoraBatch
    from lora_retriever_kernels.lora.stack import LoraStack


def _check(name: str, tensor: torch.Tensor, shape: tuple[int, int], stack: LoraStack) -> None:
    """Raise unless `tensor` is `shape` with unit stride in its rows, and of the stack's dtype and device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != stack.a.dtype:
        raise ValueError(f"{name} must be {stack.a.dtype} like the stack, got {tensor.dtype}")
    if tensor.device != stack.a.device:
        raise ValueError(f"{name} must be on {stack.a.device} like the stack, got {tensor.device}")
    if tensor.stride(1) != 1 and shape[1] > 1:
        raise ValueError(f"{name} must have contiguous rows (stride 1), got strides {tensor.stride()}")


def _check_x(x: torch.Tensor, stack: LoraStack, batch: LoraBatch) -> None:
    """Raise unless `x` is the inputs of the batch's tokens, or which input feature of each is 1."""
    if x.dim() != 1:
        _check("x", x, (batch.num_tokens, stack.in_features), stack)
    elif x.dtype != torch.int64 or x.shape[0] != batch.num_tokens or x.device != stack.a.device or x.stride(0) != 1:
        raise ValueError(
            f"one-hot x must be contiguous int64 [{batch.num_tokens}] on {stack.a.device}, got {x.dtype} "
            f"{list(x.shape)} on {x.device}"
        )


def _check_bias(bias: torch.Tensor | None, stack: LoraStack, batch: LoraBatch) -> None:
    """Raise unless `bias` is one for all outputs of the stack, where it is looked at."""
    if not batch.has_gains:
        return
    shape = (stack.b.shape[1],)
    if bias is not None and (
        tuple(bias.shape) != shape or bias.dtype != stack.b.dtype or bias.device != stack.b.device
    ):
        raise ValueError(
            f"bias must be {stack.b.dtype} {list(shape)} on {stack.b.device}, got {bias.dtype} {list(bias.shape)} on "
            f"{bias.device}"
        )


def _check_batch(stack: LoraStack, batch: LoraBatch) -> None:
    """Raise unless the batch and the stack share their row map."""
    if batch.rows is not stack.rows:
        raise ValueError("batch and stack must share one LoraRows; got two different ones")


def _check_v(v: torch.Tensor, stack: LoraStack, batch: LoraBatch) -> None:
    """Raise unless `v` is what `lora_shrink` returns."""
    expected = (batch.num_tokens, batch.k, stack.num_slices, batch.rank_bound)
    if tuple(v.shape[1:]) != expected or v.dtype != torch.float32 or not v.is_contiguous():
        raise ValueError(
            f"v must be lora_shrink's contiguous float32 [num_splits, {', '.join(map(str, expected))}], got {v.dtype} "
            f"{list(v.shape)}"
        )


def add_lora(
    y: torch.Tensor, x: torch.Tensor, stack: LoraStack, batch: LoraBatch, bias: torch.Tensor | None = None
) -> None:
    """Add each token's weighted adapter outputs to `y` in place.

    Semantics:
        y[t, slice i] += sum_j w[t, j] * (x[t] @ A[m[t, j], i].T) @ B[m[t, j], i].T

        Where an adapter has gains `g` (DoRA), which are folded into its B, it adds
        `w[t, j] * (g[m[t, j], i] - 1) * (y[t, slice i] - bias)` as well, with `y` as it was before.

    Args:
        y: Outputs `[num_tokens, sum(out_features)]`, the stack's dtype, unit stride in a row, any row stride; mutated.
            A token whose slots are all -1 is left untouched.
        x: Inputs `[num_tokens, in_features]`, same dtype, unit stride in a row; or `[num_tokens]`, int64: inputs that
            are one-hot, as an embedding's are, each named by the input feature that is 1.
        stack: The adapters' tensors.
        batch: The step's assignment; `update` must have been called for `num_tokens` tokens.
        bias: What `y` holds beside the base product `[sum(out_features)]`; looked at for gains alone.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree.

    Source: LoraRetriever, arXiv:2402.09997 (mixture); Punica, arXiv:2310.18547 (segments); DoRA, arXiv:2402.09353.
    """
    _check_batch(stack, batch)
    _check_x(x, stack, batch)
    _check_bias(bias, stack, batch)
    _check("y", y, (batch.num_tokens, stack.b.shape[1]), stack)
    if batch.backend == "torch" and not torch.compiler.is_compiling():
        _add_torch(y, x, stack, batch, bias)
        return
    rows = stack.rows
    _add_lora(
        y,
        x,
        stack.a,
        stack.b,
        stack.ranks,
        rows.starts,
        rows.counts,
        list(stack.out_features),
        batch.rank_bound,
        batch.block_m,
        batch.tensors(),
        *_gain_arguments(stack, batch, bias),
    )


def _gain_arguments(
    stack: LoraStack, batch: LoraBatch, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The rows of the gains and the bias; both None for a step without gains."""
    return (stack.rows.gains, bias) if batch.has_gains else (None, None)


def _add_torch(y: torch.Tensor, x: torch.Tensor, stack: LoraStack, batch: LoraBatch, bias: torch.Tensor | None) -> None:
    """Run the PyTorch path with the gathered rows of the step before, where they still fit."""
    step = batch.dense
    gathered = partial(stack.gather, (step.slots, stack.rows.version), step.slots)
    dense.add_step(y, x, stack.adapters, step, batch.tensors(), gathered, bias)


@torch.library.custom_op("lora_retriever_kernels::add_lora", mutates_args=("y",))
def _add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    out_features: list[int],
    max_rank: int,
    block_m: int,
    batch: list[torch.Tensor],
    gains: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    if x.shape[0] == 0:
        return
    if len(batch) == 2:
        step = dense.plan_dense(batch[0], batch[1], counts, gain_rows=gains)
        adapters = dense.Adapters(a, b, ranks, starts, counts, out_features)
        dense.add_step(y, x, adapters, step, batch, partial(dense.gather, adapters, step.slots), bias)
        return
    v = _lora_shrink(x, a, ranks, starts, max_rank, block_m, batch)
    _lora_expand(y, v, b, ranks, starts, out_features, block_m, [], batch, gains, bias)


@_add_lora.register_fake
def _(*args: object) -> None:
    """Nothing to shape: `y` is mutated."""


def lora_shrink(x: torch.Tensor, stack: LoraStack, batch: LoraBatch) -> torch.Tensor:
    """Project each token's input onto the rank rows of its adapters.

    Semantics:
        v.sum(0)[t, j, i, :r] = x[t] @ A[m[t, j], i].T, with r the rank of slice i; what lies beyond is undefined.

    Args:
        x: Inputs `[num_tokens, in_features]`, the stack's dtype, unit stride in a row; or one-hot, as in `add_lora`.
        stack: The adapters' tensors.
        batch: The step's assignment.

    Returns:
        Partial sums `v [num_splits, num_tokens, k, num_slices, rank_bound]`, fp32. The programs that share a token's
        input features each write their own; `lora_expand` adds them in order, so no atomics are needed.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree.
    """
    _check_batch(stack, batch)
    _check_x(x, stack, batch)
    rows = stack.rows
    v: torch.Tensor = _lora_shrink(
        x, stack.a, stack.ranks, rows.starts, batch.rank_bound, batch.block_m, batch.tensors()
    )
    return v


def _empty_v(x: torch.Tensor, a: torch.Tensor, max_rank: int, block_m: int, batch: list[torch.Tensor]) -> torch.Tensor:
    """Allocate the partial sums."""
    num_tokens, k = batch[0].shape
    splits = 1
    if len(batch) > 2 and x.dim() == 2:
        splits = plan.plan_shrink(num_tokens, k, max_rank, x.shape[1], a.shape[0], x.element_size(), block_m).num_splits
    return torch.empty(splits, num_tokens, k, a.shape[0], max_rank, dtype=torch.float32, device=x.device)


@torch.library.custom_op("lora_retriever_kernels::lora_shrink", mutates_args=())
def _lora_shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,
    starts: torch.Tensor,
    max_rank: int,
    block_m: int,
    batch: list[torch.Tensor],
) -> torch.Tensor:
    v = _empty_v(x, a, max_rank, block_m, batch)
    if v.numel() == 0:
        return v
    if len(batch) == 2:
        for slot in batch[0].unique().tolist():
            lo, hits = int(starts[slot]), (batch[0] == slot).unsqueeze(2)
            for i, rank in enumerate(ranks[slot].tolist() if slot >= 0 else ()):
                part = a[i, lo : lo + rank].float().t()
                product = x.float() @ part if x.dim() == 2 else part.index_select(0, x)
                v[0, :, :, i, :rank] = torch.where(hits, product.unsqueeze(1), v[0, :, :, i, :rank])
        return v
    from lora_retriever_kernels.lora.shrink import look_up, shrink  # noqa: PLC0415 - Triton is optional

    if x.dim() == 1:
        look_up(v, x, a, ranks, starts, batch)
        return v
    shrink(v, x, a, ranks, starts, block_m, batch)
    return v


@_lora_shrink.register_fake
def _(
    x: torch.Tensor,
    a: torch.Tensor,
    ranks: torch.Tensor,  # noqa: ARG001 - the schema's
    starts: torch.Tensor,  # noqa: ARG001 - the schema's
    max_rank: int,
    block_m: int,
    batch: list[torch.Tensor],
) -> torch.Tensor:
    return _empty_v(x, a, max_rank, block_m, batch)


def lora_mix(v: torch.Tensor, stack: LoraStack, batch: LoraBatch) -> list[torch.Tensor]:
    """Do the part of `lora_expand` that needs no output yet, so that it can run beside what computes the output.

    Args:
        v: What `lora_shrink` returned for the same stack and batch.
        stack: The adapters' tensors.
        batch: The step's assignment.

    Returns:
        What `lora_expand` takes as `mixed`; empty where there is nothing to prepare.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree.
    """
    _check_batch(stack, batch)
    _check_v(v, stack, batch)
    if batch.backend == "torch" or batch.block_m == 1 or v.numel() == 0:
        return []
    rows = stack.rows
    mixed: list[torch.Tensor] = _lora_mix(
        v, stack.b, stack.ranks, rows.starts, list(stack.out_features), batch.block_m, batch.tensors()
    )
    return mixed


@torch.library.custom_op("lora_retriever_kernels::lora_mix", mutates_args=())
def _lora_mix(
    v: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    starts: torch.Tensor,
    out_features: list[int],
    block_m: int,
    batch: list[torch.Tensor],
) -> list[torch.Tensor]:
    from lora_retriever_kernels.lora.expand import mix  # noqa: PLC0415 - Triton is optional

    return mix(v, b, ranks, starts, out_features, block_m, batch)


@_lora_mix.register_fake
def _(
    v: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    starts: torch.Tensor,  # noqa: ARG001 - the schema's
    out_features: list[int],
    block_m: int,
    batch: list[torch.Tensor],  # noqa: ARG001 - the schema's
) -> list[torch.Tensor]:
    from lora_retriever_kernels.lora.expand import mixed_shapes  # noqa: PLC0415 - Triton is optional

    shape, rows_shape = mixed_shapes(v, b.shape[0], ranks.shape[0], out_features, block_m)
    return [b.new_empty(shape), b.new_empty(rows_shape, dtype=torch.int32)]


def lora_expand(
    y: torch.Tensor,
    v: torch.Tensor,
    stack: LoraStack,
    batch: LoraBatch,
    mixed: Sequence[torch.Tensor] = (),
    bias: torch.Tensor | None = None,
) -> None:
    """Add the weighted products of `lora_shrink`'s result with B to `y` in place.

    Semantics:
        y[t, slice i] += sum_j w[t, j] * v.sum(0)[t, j, i, :r] @ B[m[t, j], i].T, and what gains add as in `add_lora`.

    Args:
        y: Outputs `[num_tokens, sum(out_features)]`, the stack's dtype, unit stride in a row, any row stride; mutated.
        v: What `lora_shrink` returned for the same stack and batch.
        stack: The adapters' tensors.
        batch: The step's assignment.
        mixed: What `lora_mix` returned for them, if it was called.
        bias: As in `add_lora`.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree.
    """
    _check_batch(stack, batch)
    _check("y", y, (batch.num_tokens, stack.b.shape[1]), stack)
    _check_v(v, stack, batch)
    _check_bias(bias, stack, batch)
    rows = stack.rows
    _lora_expand(
        y,
        v,
        stack.b,
        stack.ranks,
        rows.starts,
        list(stack.out_features),
        batch.block_m,
        list(mixed),
        batch.tensors(),
        *_gain_arguments(stack, batch, bias),
    )


@torch.library.custom_op("lora_retriever_kernels::lora_expand", mutates_args=("y",))
def _lora_expand(
    y: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    starts: torch.Tensor,
    out_features: list[int],
    block_m: int,
    mixed: list[torch.Tensor],
    batch: list[torch.Tensor],
    gains: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    if v.numel() == 0:
        return
    if len(batch) > 2:
        from lora_retriever_kernels.lora.expand import expand  # noqa: PLC0415 - Triton is optional

        expand(y, v, b, ranks, starts, out_features, block_m, mixed, batch, gains, bias)
        return
    mapping, weights = batch
    step_gains = None if gains is None else dense.plan_gains(mapping, weights, gains)
    if step_gains is not None:
        dense.apply_gains(y, b, step_gains, bias)
    total = v.sum(0)
    for slot in mapping.unique().tolist():
        if slot < 0:
            continue
        lo, offset = int(starts[slot]), 0
        weight = (weights * (mapping == slot)).unsqueeze(2)
        for i, width in enumerate(out_features):
            rank = int(ranks[slot, i])
            part = torch.where(weight != 0, total[:, :, i, :rank] * weight, 0.0).sum(1)
            y[:, offset : offset + width] += (part @ b[lo : lo + rank, offset : offset + width].float()).to(y.dtype)
            offset += width


@_lora_expand.register_fake
def _(*args: object) -> None:
    """Nothing to shape: `y` is mutated."""


def lora_delta(
    v: torch.Tensor,
    stack: LoraStack,
    batch: LoraBatch,
    mixed: Sequence[torch.Tensor] = (),
    *,
    takes_parts: bool = False,
) -> torch.Tensor:
    """Do what `lora_expand` does, for whoever adds the result to the outputs: nothing of it waits for these.

    Args:
        v: What `lora_shrink` returned for the same stack and batch.
        stack: The adapters' tensors.
        batch: The step's assignment.
        mixed: What `lora_mix` returned for them, if it was called.
        takes_parts: Whether the caller can add up parts.

    Returns:
        `[num_tokens, sum(out_features)]`, the stack's dtype; 0 for a token without adapters. Or parts of it, whose sum
        it is, `[num_parts, num_tokens, sum(out_features)]`, each in that dtype, where they come sooner.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree.
    """
    _check_batch(stack, batch)
    _check_v(v, stack, batch)
    delta: torch.Tensor = _lora_delta(
        v,
        stack.b,
        stack.ranks,
        stack.rows.starts,
        list(stack.out_features),
        batch.block_m,
        list(mixed),
        batch.tensors(),
        takes_parts and batch.splits_rows,
    )
    return delta


@torch.library.custom_op("lora_retriever_kernels::lora_delta", mutates_args=())
def _lora_delta(
    v: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,
    starts: torch.Tensor,
    out_features: list[int],
    block_m: int,
    mixed: list[torch.Tensor],
    batch: list[torch.Tensor],
    in_parts: bool,
) -> torch.Tensor:
    if v.numel() == 0 or len(batch) == 2:
        delta = b.new_zeros(v.shape[1], sum(out_features))
        _lora_expand(delta, v, b, ranks, starts, out_features, block_m, mixed, batch)
        return delta
    from lora_retriever_kernels.lora.expand import expand  # noqa: PLC0415 - Triton is optional

    delta = _empty_delta(v, b, out_features, block_m, in_parts=in_parts)
    expand(delta, v, b, ranks, starts, out_features, block_m, mixed, batch, add=False, in_parts=in_parts)
    return delta


def _empty_delta(
    v: torch.Tensor, b: torch.Tensor, out_features: list[int], block_m: int, *, in_parts: bool
) -> torch.Tensor:
    """Allocate the result, or its parts."""
    _, num_tokens, k, _, max_rank = v.shape
    num_parts = plan.plan_expand(block_m, num_tokens, k, max_rank, out_features, in_parts=in_parts).num_parts
    return b.new_empty(*((num_parts,) if num_parts > 1 else ()), num_tokens, sum(out_features))


@_lora_delta.register_fake
def _(
    v: torch.Tensor,
    b: torch.Tensor,
    ranks: torch.Tensor,  # noqa: ARG001 - the schema's
    starts: torch.Tensor,  # noqa: ARG001 - the schema's
    out_features: list[int],
    block_m: int,
    mixed: list[torch.Tensor],  # noqa: ARG001 - the schema's
    batch: list[torch.Tensor],
    in_parts: bool,
) -> torch.Tensor:
    if len(batch) == 2:
        return b.new_empty(v.shape[1], sum(out_features))
    return _empty_delta(v, b, out_features, block_m, in_parts=in_parts)


def can_expand_gated(stack: LoraStack, batch: LoraBatch) -> bool:
    """Whether `lora_expand_gated` can be called, and is faster than `lora_delta` and an activation that adds it.

    Args:
        stack: The adapters' tensors of gate and up: of both, or of one module that is both.
        batch: The step's assignment.
    """
    return (
        batch.backend == "triton"
        and batch.block_m > 1
        and batch.num_tokens >= plan.GATED_EXPAND_TOKENS
        and not batch.has_gains
        and stack.b.shape[1] % 2 == 0
        and len(stack.out_features) in {1, 2}
        and stack.out_features[0] == stack.out_features[-1]
    )


def lora_expand_gated(
    y: torch.Tensor, stack: LoraStack, batch: LoraBatch, mixed: Sequence[torch.Tensor], activation: str
) -> torch.Tensor:
    """Add what adapters add to gate and up, and multiply the activation of the first with the second, in one launch.

    Args:
        y: The base's outputs `[num_tokens, 2 * width]`, the stack's dtype, unit stride in a row: gate, then up.
        stack: The adapters' tensors.
        batch: The step's assignment, for which `can_expand_gated` says yes.
        mixed: What `lora_mix` returned for them.
        activation: One of `decoder.ACTIVATIONS`.

    Returns:
        `[num_tokens, width]`, the stack's dtype.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree, or there is nothing mixed.
    """
    _check_batch(stack, batch)
    _check("y", y, (batch.num_tokens, stack.b.shape[1]), stack)
    if len(mixed) != 2 or batch.has_gains:
        raise ValueError("lora_expand_gated takes what lora_mix returned for a step of tiles without gains")
    out: torch.Tensor = _lora_expand_gated(
        y, list(mixed), stack.b, list(stack.out_features), batch.rank_bound, activation, batch.tensors()
    )
    return out


@torch.library.custom_op("lora_retriever_kernels::lora_expand_gated", mutates_args=())
def _lora_expand_gated(
    y: torch.Tensor,
    mixed: list[torch.Tensor],
    b: torch.Tensor,
    out_features: list[int],
    max_rank: int,
    activation: str,
    batch: list[torch.Tensor],
) -> torch.Tensor:
    from lora_retriever_kernels.lora.expand import expand_gated  # noqa: PLC0415 - Triton is optional

    out = y.new_empty(y.shape[0], y.shape[1] // 2)
    expand_gated(out, y, mixed, b, out_features, max_rank, activation, batch)
    return out


@_lora_expand_gated.register_fake
def _(
    y: torch.Tensor,
    mixed: list[torch.Tensor],  # noqa: ARG001 - the schema's
    b: torch.Tensor,  # noqa: ARG001 - the schema's
    out_features: list[int],  # noqa: ARG001 - the schema's
    max_rank: int,  # noqa: ARG001 - the schema's
    activation: str,  # noqa: ARG001 - the schema's
    batch: list[torch.Tensor],  # noqa: ARG001 - the schema's
) -> torch.Tensor:
    return y.new_empty(y.shape[0], y.shape[1] // 2)
