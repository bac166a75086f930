"""The PyTorch path: two matrix products over the rows of the adapters in use.

The batch's distinct adapters are gathered once per change of the set, so that a decode step of many tokens with
many adapters is two plain products per group of projections:

    v = x @ A_active            [num_tokens, active rows of every slice]
    y += (v * row_weights) @ B_active

A row that is not used is left out by its mask and not by its weight of 0: inputs that overflow over it are NaN there.
`B_active` is finite. It is block-diagonal: the rows of a slice reach its own outputs only. With more than a few rows
the zeros would cost more than the calls they save, and each slice has a product of its own. `row_weights[t, i]` is the
weight token `t` gives to the adapter that owns row `i`, 0 where it does not use it. In a long prefill most of these
products would be with zeros, so there each adapter visits its own tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Costs in products of a token with a rank row, measured on SmolLM2-135M: one more adapter to visit, and one more pass
# over a token's inputs and outputs.
_SEGMENT_COST = 512
_TOKEN_COST = 40
# For 8 tokens of SmolLM2-135M one product of 8 rows takes 1.2 ms a step, slices apart 2.3; of 64 rows 10.5 and 6.3.
_MAX_BLOCK_DIAGONAL_ROWS = 16


@dataclass(frozen=True)
class Segment:
    """The tokens of one adapter.

    Attributes:
        slot: Adapter slot.
        tokens: Their indices `[n]`, int64; None where they are the contiguous range `begin : begin + n`.
        begin: First token.
        weights: Their weights `[n, 1]`, fp32.
    """

    slot: int
    tokens: torch.Tensor | None
    begin: int
    weights: torch.Tensor


@dataclass(frozen=True)
class Gains:
    """Which tokens have their outputs multiplied, and by what.

    Attributes:
        tokens: Their indices `[n]`, int64.
        rows: The rows of `b` that hold the gains less one of the adapters in use `[m]`, int64.
        weights: What each token gives to each of these adapters `[n, m]`, fp32.
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class DensePlan:
    """One step's grouping for the PyTorch path.

    Attributes:
        slots: Distinct adapters that have rows, in ascending order.
        row_weights: `[num_tokens, sum of their rows]`, fp32; None when `segments` is to be used.
        unused: Where these are 0, `[num_tokens, 1, sum of their rows]`; None if nowhere.
        segments: One per adapter; empty when `row_weights` is to be used.
        gains: Of the adapters that have some; None if none has.
    """

    slots: tuple[int, ...]
    row_weights: torch.Tensor | None
    segments: tuple[Segment, ...]
    unused: torch.Tensor | None = None
    gains: Gains | None = None


def plan_gains(mapping: torch.Tensor, weights: torch.Tensor, gain_rows: torch.Tensor) -> Gains | None:
    """Find the tokens whose adapters have gains.

    Args:
        mapping: Slot per token `[num_tokens, k]`; -1 = none.
        weights: `[num_tokens, k]`, fp32.
        gain_rows: The row of each slot's gains `[max_loras]`; -1 = it has none.
    """
    slots = mapping.unique()
    slots = slots[slots >= 0]
    rows = gain_rows.index_select(0, slots.long())
    slots, rows = slots[rows >= 0], rows[rows >= 0].long()
    if not slots.numel():
        return None
    per_slot = ((mapping.unsqueeze(2) == slots) * weights.unsqueeze(2)).sum(dim=1)
    tokens = per_slot.any(dim=1).nonzero().squeeze(1)
    return Gains(tokens, rows, per_slot.index_select(0, tokens))


def apply_gains(y: torch.Tensor, b: torch.Tensor, gains: Gains, bias: torch.Tensor | None) -> None:
    """Multiply the outputs of tokens by their adapters' gains in place, the bias left out.

    Semantics:
        y[t] += (sum_j w[t, j] * (g[m[t, j]] - 1)) * (y[t] - bias)
    """
    base = y.index_select(0, gains.tokens)
    if bias is not None:
        base -= bias
    factor = torch.mm(gains.weights.to(y.dtype), b.index_select(0, gains.rows))
    y.index_add_(0, gains.tokens, factor * base)


def plan_segments(mapping: torch.Tensor, weights: torch.Tensor) -> tuple[Segment, ...]:
    """The tokens of each adapter that a step names."""
    return tuple(_segment(mapping, weights, slot) for slot in mapping.unique().tolist() if slot >= 0)


def _segment(mapping: torch.Tensor, weights: torch.Tensor, slot: int) -> Segment:
    """Collect the tokens of `slot`; a token that names it twice has the sum of both weights."""
    hits = mapping == slot
    tokens = hits.any(dim=1).nonzero().squeeze(1)
    weight = (weights * hits).sum(dim=1, keepdim=True)
    begin, n = int(tokens[0]), tokens.numel()
    if int(tokens[-1]) - begin + 1 == n:
        return Segment(slot, None, begin, weight[begin : begin + n])
    return Segment(slot, tokens, begin, weight[tokens])


def plan_dense(
    mapping: torch.Tensor,
    weights: torch.Tensor,
    counts: torch.Tensor,
    previous: tuple[int, ...] = (),
    gain_rows: torch.Tensor | None = None,
) -> DensePlan:
    """Group a step's tokens by adapter.

    Args:
        mapping: Slot per token `[num_tokens, k]`; -1 = none.
        weights: `[num_tokens, k]`, fp32.
        counts: Rows per slot `[max_loras]`.
        previous: The slots of the step before: kept while they cover this step's and are at most twice as many, so
            that a request that ends does not cause a new gathering.
        gain_rows: The row of each slot's gains `[max_loras]`, -1 for none; None if no slot has any.

    Returns:
        A plan with `row_weights` or with `segments`, whichever costs fewer operations.
    """
    gains = None if gain_rows is None else plan_gains(mapping, weights, gain_rows)
    row_counts = counts.tolist()
    active = tuple(s for s in mapping.unique().tolist() if s >= 0 and row_counts[s])
    num_rows = sum(row_counts[s] for s in active)
    dense_cost = mapping.shape[0] * (num_rows + _TOKEN_COST)
    segments: tuple[Segment, ...] = ()
    if dense_cost > _SEGMENT_COST * len(active):
        segments = tuple(_segment(mapping, weights, s) for s in active)
        cost = sum(s.weights.shape[0] * (row_counts[s.slot] + _TOKEN_COST) + _SEGMENT_COST for s in segments)
        if cost < dense_cost:
            return DensePlan(active, None, segments, gains=gains)
    if set(active) <= set(previous) and len(previous) <= 2 * len(active):
        active = previous
    slots = torch.tensor(active, dtype=mapping.dtype, device=mapping.device)
    per_slot = ((mapping.unsqueeze(2) == slots) * weights.unsqueeze(2)).sum(dim=1)
    repeats = torch.tensor([row_counts[s] for s in active], dtype=torch.int64, device=mapping.device)
    row_weights = per_slot.repeat_interleave(repeats, dim=1)
    unused = row_weights == 0
    return DensePlan(active, row_weights, (), unused[:, None] if unused.any() else None, gains)


class Adapters(NamedTuple):
    """The tensors of a `LoraStack`, and of its rows; in a compiled graph there is no more of it than these."""

    a: torch.Tensor
    b: torch.Tensor
    ranks: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    out_features: Sequence[int]


class Gathered(NamedTuple):
    """The rows of some adapters side by side; those past a slice's own rank are zero.

    Attributes:
        a: `[in_features, num_slices * R]`.
        b: One block-diagonal `[num_slices * R, sum(out_features)]` where R is small, else of each slice
            `[R, out_features]`.
    """

    a: torch.Tensor
    b: tuple[torch.Tensor, ...]


def gather(adapters: Adapters, slots: Sequence[int]) -> Gathered:
    """Copy the rows of `slots` side by side."""
    a, b, out_features = adapters.a, adapters.b, adapters.out_features
    first, count, rank = adapters.starts.tolist(), adapters.counts.tolist(), adapters.ranks.tolist()
    index = [row for s in slots for row in range(first[s], first[s] + count[s])]
    rows = torch.tensor(index, dtype=torch.int64, device=a.device)
    a_active, b_active = a.index_select(1, rows), b.index_select(0, rows)
    lo = 0
    for s in slots:
        offset = 0
        for i, width in enumerate(out_features):
            a_active[i, lo + rank[s][i] : lo + count[s]] = 0
            b_active[lo + rank[s][i] : lo + count[s], offset : offset + width] = 0
            offset += width
        lo += count[s]
    slices = b_active.split(list(out_features), dim=1)
    is_small = len(index) <= _MAX_BLOCK_DIAGONAL_ROWS
    slices = (torch.block_diag(*slices),) if is_small else tuple(part.contiguous() for part in slices)
    return Gathered(a_active.flatten(0, 1).t().contiguous(), slices)


def add_step(
    y: torch.Tensor,
    x: torch.Tensor,
    adapters: Adapters,
    step: DensePlan,
    batch: Sequence[torch.Tensor],
    gathered: Callable[[], Gathered],
    bias: torch.Tensor | None,
) -> None:
    """Add the adapters' outputs to `y` in place, in the way that the step was planned; see `ops.add_lora`.

    One-hot inputs are looked up adapter by adapter in any case.

    Args:
        y: Outputs.
        x: Inputs.
        adapters: The stack's tensors.
        step: The plan.
        batch: Mapping and weights that it was made from.
        gathered: What `gather` returns for the plan's slots; asked for where it is needed.
        bias: What `y` holds beside the base product.
    """
    if not step.slots:
        return
    if step.gains is not None:
        apply_gains(y, adapters.b, step.gains, bias)
    if x.dim() == 1 or step.row_weights is None:
        add_segments(y, x, adapters, step.segments or plan_segments(*batch))
    else:
        add_dense(y, x, gathered(), adapters.out_features, step.row_weights, step.unused)


def add_dense(
    y: torch.Tensor,
    x: torch.Tensor,
    gathered: Gathered,
    out_features: Sequence[int],
    row_weights: torch.Tensor,
    unused: torch.Tensor | None,
) -> None:
    """Add the adapters' outputs to `y` in place; see `Gathered` and `DensePlan` for the operands."""
    num_tokens, num_rows = row_weights.shape
    v = torch.mm(x, gathered.a).view(num_tokens, -1, num_rows) * row_weights[:, None]
    if unused is not None:
        v.masked_fill_(unused, 0.0)
    if v.dtype != y.dtype:
        v = v.to(y.dtype)
    if len(gathered.b) == 1:
        y.addmm_(v.flatten(1), *gathered.b)
        return
    # Natively, without the Python of `Tensor.split`: it is half of what so small a product takes.
    for v_slice, out, b in zip(v.unbind(1), y.split_with_sizes(out_features, 1), gathered.b, strict=True):
        out.addmm_(v_slice, b)


def add_segments(y: torch.Tensor, x: torch.Tensor, adapters: Adapters, segments: Sequence[Segment]) -> None:
    """Add the adapters' outputs to `y` in place, adapter by adapter.

    Inputs `[num_tokens]` of integers are one-hot: each names the input feature that is 1.
    """
    a, b = adapters.a, adapters.b
    first, rank = adapters.starts.tolist(), adapters.ranks.tolist()
    for segment in segments:
        end = segment.begin + segment.weights.shape[0]
        x_part = x[segment.begin : end] if segment.tokens is None else x[segment.tokens]
        lo = first[segment.slot]
        offset = 0
        for i, width in enumerate(adapters.out_features):
            hi = lo + rank[segment.slot][i]
            if hi > lo:
                v = torch.mm(x_part, a[i, lo:hi].t()) if x.dim() == 2 else a[i, lo:hi].index_select(1, x_part).t()
                v = (v * segment.weights).to(y.dtype)
                b_part = b[lo:hi, offset : offset + width]
                out = y[:, offset : offset + width]
                if segment.tokens is None:
                    out[segment.begin : end].addmm_(v, b_part)
                else:
                    out.index_add_(0, segment.tokens, torch.mm(v, b_part))
            offset += width
