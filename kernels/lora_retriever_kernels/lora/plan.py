"""Launch shapes by rule: what each kernel's blocks are for a given step and stack.

Everything here depends on sizes the host knows (tokens, k, widths, the largest rank), never on which adapters the
tokens name: that stays on the device, so a captured graph replays with any mapping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# The unit in which an expand program walks through the rank rows of its tile.
ITEM_ROWS = 16
_FEW_PROGRAMS = 128  # of expand, which leave most of a GPU to others
_MANY_ITEMS = 16  # of a tile: more steps than that take longer than adding up parts
USUAL_ADAPTERS = 64  # of a step, of which each may leave a tile of pairs half empty
MIX_TOKENS = 16  # of a program that mixes
# From how many tokens on the launch that activates gate and up expands them, too.
GATED_EXPAND_TOKENS = 1024


def cdiv(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def pair_block(num_tokens: int, k: int) -> int:
    """Pairs (token, slot) of one adapter that one shrink program takes."""
    return 16 if num_tokens * k <= 512 or num_tokens <= 256 else 64


def token_block(num_tokens: int, k: int, num_active: int) -> int:
    """Tokens that one expand program takes; 1 = each token on its own, without a matrix unit.

    A tile of tokens reads its adapters' B once, tokens on their own read it again for each token. That is as fast while
    few share an adapter, and saves a launch.

    Args:
        num_tokens: Tokens of the step.
        k: Adapters per token.
        num_active: Adapters that the step's tokens name, at most.
    """
    pairs = num_tokens * k
    if num_tokens <= 64 and (num_tokens < 16 or pairs < 48 or pairs < (6 if num_tokens > 32 else 13) * num_active):
        return 1
    return min(max(16, power_of_2(num_tokens)), 32 if k == 1 and num_tokens <= 256 else 64)


def splits_rows(num_tokens: int, k: int, num_active: int, max_rank: int) -> bool:
    """Whether several expand programs share the rank rows of a tile (split-K), where its result may come in parts.

    Args:
        num_tokens: Tokens of the step.
        k: Adapters per token.
        num_active: Adapters that the step's tokens name, at most.
        max_rank: The largest rank among them, or a bound of it.
    """
    block_m = token_block(num_tokens, k, num_active)
    return block_m > 1 and num_tokens <= 256 and max_items(block_m, k, num_active, max_rank) > _MANY_ITEMS


def max_pair_tiles(num_tokens: int, k: int, max_loras: int) -> int:
    """Most tiles that the pairs of a step can fill, grouped by adapter."""
    pairs = num_tokens * k
    return cdiv(pairs, pair_block(num_tokens, k)) + min(max_loras, pairs)


def pair_programs(num_tokens: int, k: int, max_loras: int) -> int:
    """Programs that share the tiles of pairs: for steps of many adapters fewer than there may be tiles.

    A graph is launched for as many tiles as its step might have. What finds none ends at once, and yet takes a place.
    """
    return max_pair_tiles(num_tokens, k, min(max_loras, USUAL_ADAPTERS))


def max_items(block_m: int, k: int, max_loras: int, max_rank: int) -> int:
    """Most blocks of `ITEM_ROWS` rank rows that the adapters of one tile of `block_m` tokens can own."""
    return min(max_loras, block_m * k) * cdiv(max_rank, ITEM_ROWS)


@dataclass(frozen=True)
class ShrinkPlan:
    """Launch shape of `shrink`.

    Attributes:
        slices: Slices one program computes: all of them (rounded up to a power of two) where reading `x` once matters.
        block_r: Rank rows of each slice per program.
        block_k: Input features per step.
        chunk: Input features per program, a multiple of `block_k`.
        num_splits: Programs that share the input features.
    """

    slices: int
    block_r: int
    block_k: int
    chunk: int
    num_splits: int
    num_warps: int
    num_stages: int


def plan_shrink(
    num_tokens: int, k: int, max_rank: int, in_features: int, num_slices: int, itemsize: int, block_m: int
) -> ShrinkPlan:
    """Choose the launch shape of `shrink`; `block_m` is what `token_block` gives for the step."""
    pairs = num_tokens * k
    if pair_block(num_tokens, k) == 16:
        # Reading A is all there is: many small programs, or fewer and longer ones if there are many adapters.
        wide = 256 if itemsize == 2 else 128
        if pairs <= 24:
            chunk = max(wide, cdiv(in_features, 32 * wide) * wide)
            return ShrinkPlan(1, 16, wide, chunk, cdiv(in_features, chunk), 4, 1 if chunk == wide else 2)
        # Tokens on their own read the partial sums again for every block of columns: fewer where there are many pairs.
        chunk = (8 if block_m == 1 and pairs > 128 else 4) * wide
        return ShrinkPlan(1, 16, wide // 2, chunk, cdiv(in_features, chunk), 2, 4)
    # Reading x is most of it: one program takes all slices.
    slices = power_of_2(num_slices)
    block_r = max(16, min(power_of_2(max_rank), 256 // slices, 64))
    block_k = 128 if itemsize == 2 else 64
    while (64 + slices * block_r) * block_k * itemsize > 40960 and block_k > 32:
        block_k //= 2
    num_splits = max(1, min(4, power_of_2(256 // cdiv(pairs, 64) + 1) // 2))
    chunk = cdiv(cdiv(in_features, block_k), num_splits) * block_k
    return ShrinkPlan(slices, block_r, block_k, chunk, cdiv(in_features, chunk), 4 if slices * block_r <= 64 else 8, 4)


@dataclass(frozen=True)
class ExpandPlan:
    """Launch shape of `expand`.

    Attributes:
        block_m: Tokens per program, as `token_block`.
        block_n: Output columns per program.
        block_rows: Rank rows per step.
        num_parts: Programs that share the rows of a tile (split-K), where whoever reads the result adds up the parts.
    """

    block_m: int
    block_n: int
    block_rows: int
    num_warps: int
    num_stages: int
    num_parts: int = 1


def plan_expand(
    block_m: int, num_tokens: int, k: int, max_rank: int, out_features: Sequence[int], *, in_parts: bool = False
) -> ExpandPlan:
    """Choose the launch shape of `expand`; `in_parts` says whether its result may come in parts, see `splits_rows`."""
    widest = max(16, power_of_2(max(out_features)))
    if block_m == 1:
        # One warp per program, with at most 8,192 elements of B in flight.
        rows = max(1, min(power_of_2(max_rank), 32 if k == 1 and max_rank > 16 else 16))
        block_n = 256 if k == 1 and rows <= 16 and num_tokens > 32 else 64 if k > 1 and num_tokens <= 8 else 128
        return ExpandPlan(1, min(block_n, 8192 // (rows * power_of_2(k)), widest), rows, 1, 1)
    if num_tokens <= 256:
        # A program of few goes through a tile's rows step by step, each as long as a load from memory takes.
        is_narrow = in_parts and cdiv(num_tokens, block_m) * sum(cdiv(n, 64) for n in out_features) <= _FEW_PROGRAMS
        return ExpandPlan(block_m, min(64, widest), 64, 4, 3, 4 if is_narrow else 1)
    if num_tokens <= 768:
        return ExpandPlan(block_m, min(64, widest), 64, 4, 2)
    # Most tiles of a step of prompts have one adapter for each of the k; where streams are many, theirs have all.
    has_few_rows = k * max_rank <= 16 and num_tokens > 1024
    return ExpandPlan(block_m, min(128, widest), 16 if has_few_rows else 64, 4, 2)


def mix_parts(num_tokens: int) -> int:
    """Programs that share the rows of `MIX_TOKENS` tokens: fewer where there are many tokens, most of few adapters."""
    return max(1, min(16, 4096 // num_tokens))


def plan_gated_expand(block_m: int, num_tokens: int, k: int, max_rank: int, out_features: Sequence[int]) -> ExpandPlan:
    """Choose the launch shape of the expand that activates; its steps over the rows are those of `plan_expand`."""
    p = plan_expand(block_m, num_tokens, k, max_rank, out_features)
    return ExpandPlan(block_m, min(64, p.block_n), p.block_rows, 4, 2)
