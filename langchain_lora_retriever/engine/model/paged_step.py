"""One step's attention with Triton: every length is read on the device, so that a step can be captured and replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from lora_retriever_kernels.attention import Projected, attend_decode, attend_prefill, choose_num_splits, write_kv

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_lora_retriever.engine.model.attention import PagedCache
    from langchain_lora_retriever.engine.model.probe import AttentionGeometry
    from lora_retriever_kernels.attention import Pages, QueryKeyNorm, Rotary

__all__ = ["PagedStep", "QueryTiles"]


class QueryTiles(NamedTuple):
    """How a step's queries are shared out.

    Attributes:
        decode_tokens: Tokens that are their sequence's only one in the step `[n]`, int64; -1 is padding. All tokens of
            the step, where there are no pieces of others.
        prefill_tiles: First token and number of tokens of pieces of the other sequences `[n, 2]`, int64.
        num_decodes: How many of the first are to be reckoned with; fewer of them share out each one's keys further.
    """

    decode_tokens: torch.Tensor
    prefill_tiles: torch.Tensor
    num_decodes: int


class PagedStep:
    """An `AttentionStep` in Triton, for a model that lies on one device.

    Args:
        caches: Each layer's cache, by `layer_idx`.
        pages: Where the step's tokens live.
        tiles: How its queries are shared out.
    """

    def __init__(self, caches: Mapping[int, PagedCache], pages: Pages, tiles: QueryTiles) -> None:
        self._caches = caches
        self._pages = pages
        self._tiles = tiles

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the step's keys and values, then attend."""
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        projected = Projected(key, value, None, None, None)
        return self._attend(self._caches[layer_idx], query, projected, scaling, softcap, sinks)

    def attend_projected(
        self,
        layer_idx: int,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        delta: torch.Tensor | None,
        geometry: AttentionGeometry,
        rotary: Rotary | None,
        norm: QueryKeyNorm | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same from what the projections gave, rotation and head norms included.

        Args:
            layer_idx: Whose cache.
            projected: Queries, keys and values, each `[num_tokens, ...]` with unit stride in a row; mutated.
            delta: What is to be added to them, side by side `[num_tokens, ...]`, contiguous, or parts of it; None for
                nothing.
            geometry: The layer's.
            rotary: Rotation of the step's tokens; None leaves them as they are.
            norm: Norms of queries and keys, if the layer has them.
            sinks: The heads' sinks, if the layer has them.

        Returns:
            `[num_tokens, num_heads * value_dim]`.
        """
        query, key, value = projected
        num_tokens = query.shape[0]
        query = query.unflatten(1, (geometry.num_heads, geometry.head_dim))
        key = key.unflatten(1, (geometry.num_kv_heads, geometry.head_dim))
        value = value.unflatten(1, (geometry.num_kv_heads, geometry.value_dim))
        prepared = Projected(key, value, rotary, norm, delta)
        out = self._attend(self._caches[layer_idx], query, prepared, geometry.scaling, geometry.softcap, sinks)
        return out.view(num_tokens, -1)

    def _attend(
        self,
        cache: PagedCache,
        query: torch.Tensor,
        projected: Projected,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        keys, values, (sliding_window, chunk_size) = cache
        num_tokens, num_heads, _ = query.shape
        out = torch.empty(num_tokens, num_heads, values.shape[-1], dtype=query.dtype, device=query.device)
        tokens, tiles, num_decodes = self._tiles
        has_prompts = tiles.shape[0] > 0
        if has_prompts:
            key, value, rotary, norm, delta = projected
            write_kv(query, key, value, keys, values, self._pages, rotary, norm, delta)
        if tokens.shape[0]:
            attend_decode(
                out, query, keys, values, self._pages, tokens, None if has_prompts else projected, scaling=scaling,
                sliding_window=sliding_window, chunk_size=chunk_size, softcap=softcap, sinks=sinks,
                num_splits=choose_num_splits(num_decodes, keys.shape[2]),
            )  # fmt: skip
        if has_prompts:
            attend_prefill(
                out, query, keys, values, self._pages, tiles, scaling=scaling, sliding_window=sliding_window,
                chunk_size=chunk_size, softcap=softcap, sinks=sinks,
            )  # fmt: skip
        return out
