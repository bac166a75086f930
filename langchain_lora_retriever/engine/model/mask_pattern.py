"""Read a layer's mask off the function that transformers builds it from: exactly, over every position, and cheaply.

The mask is the truth about windows and chunks. Architectures pass a keyword `sliding_window` to attention or do not, as
they please, because PyTorch's attention only reads the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from langchain_lora_retriever.engine.model.attention import MaskPattern

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MaskSource", "mask_source", "read_pattern", "register_masks"]

_CHUNK = 1 << 18  # positions that are asked for at once
_NUM_FIRST = 256  # positions whose whole mask is compared
_NUM_SAMPLES = 2048  # queries beyond them that are compared near the edges of what they see, and at random keys
_RADIUS = 3  # keys on either side of an edge


class MaskSource(NamedTuple):
    """What a mask was made from: `function(batch, head, query, key)`, elementwise over indices on `device`."""

    function: Callable[..., torch.Tensor]
    device: torch.device

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Bool `[n, m]` for queries `[n, 1]` and keys `[1, m]` or `[n, m]`, on the CPU."""
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=self.device)
        queries, keys = queries.to(self.device)[None, None], keys.to(self.device)[None, None]
        mask = self.function(zero, zero, queries, keys)
        shape = torch.broadcast_shapes(queries.shape, keys.shape)
        return mask.expand(shape)[0, 0].to("cpu", torch.bool)


class _Mask(torch.Tensor):
    """A mask that knows what it was made from, also once it was moved to another device."""

    source: MaskSource | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """As for any tensor, but for the source."""
        result = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if func in _UNCHANGING and isinstance(result, cls) and result.shape == args[0].shape:
            result.source = args[0].source
        return result


# `__getitem__` is what models cut a mask to its keys with: where nothing is cut off, nothing has changed.
_UNCHANGING = frozenset(
    {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.clone, torch.Tensor.__getitem__}
)


def register_masks(implementation: str) -> None:
    """Let models that attend by `implementation` make boolean masks that know what they were made from."""
    AttentionMaskInterface.register(implementation, _make_mask)


def mask_source(mask: torch.Tensor) -> MaskSource | None:
    """What a mask that a layer was given was made from; None if the model made or changed it by itself."""
    return mask.source if isinstance(mask, _Mask) else None


def read_pattern(source: MaskSource, num_positions: int) -> MaskPattern | None:
    """The pattern by which a mask is made, over the positions below `num_positions`; None if it is none of ours."""
    limit = _first_blind(source, num_positions)
    if limit == 0:
        return None
    pattern = MaskPattern()
    if limit is not None:
        is_chunked = limit > 1 and not source(torch.tensor([[limit]]), torch.ones(1, 1, dtype=torch.int64)).item()
        pattern = MaskPattern(chunk_size=limit) if is_chunked else MaskPattern(sliding_window=limit)
    return pattern if _follows(source, pattern, num_positions) else None


def _first_blind(source: MaskSource, num_positions: int) -> int | None:
    """The first query that does not see token 0; None if all do."""
    for start in range(0, num_positions, _CHUNK):
        queries = torch.arange(start, min(start + _CHUNK, num_positions))[:, None]
        sees = source(queries, torch.zeros(1, 1, dtype=torch.int64))[:, 0]
        if not sees.all():
            return start + int(sees.int().argmin())
    return None


def _follows(source: MaskSource, pattern: MaskPattern, num_positions: int) -> bool:
    """Compare mask and pattern: everywhere among the first positions, further on at edges and at random."""
    first = torch.arange(min(_NUM_FIRST, num_positions))
    if not torch.equal(source(first[:, None], first[None]), pattern.sees(first[:, None], first[None])):
        return False
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(num_positions, (_NUM_SAMPLES, 1), generator=generator)
    limit = pattern.sliding_window or pattern.chunk_size or num_positions
    edges = torch.arange(1, min(_NUM_SAMPLES, num_positions // limit + 1)) * limit
    near = (edges[:, None] + torch.arange(-_RADIUS, _RADIUS + 1)).view(-1, 1)
    queries = torch.cat([queries, near, torch.tensor([[num_positions - 1]])]).clamp(0, num_positions - 1)
    around = torch.arange(-_RADIUS, _RADIUS + 1)[None]
    keys = torch.cat(
        [
            queries + around,
            queries - limit + around,
            queries // limit * limit + around,
            torch.randint(num_positions, (len(queries), 16), generator=generator),
        ],
        1,
    ).clamp(0, num_positions - 1)
    return torch.equal(source(queries, keys), pattern.sees(queries, keys))


def _make_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Transformers' mask signature; makes the mask even where PyTorch could do without."""
    wanted = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: torch.Tensor | None = sdpa_mask(*args, **{**kwargs, **wanted})
    if mask is None:
        return None
    known = mask.as_subclass(_Mask)
    known.source = MaskSource(kwargs["mask_function"], mask.device)
    return known
