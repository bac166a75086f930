"""The running requests' pages on the device, kept up to date by what changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from langchain_lora_retriever.engine.pinned_copy import copy_to_device

if TYPE_CHECKING:
    from collections.abc import Iterable

    from langchain_lora_retriever.engine.request import Request

__all__ = ["BlockTables"]


class BlockTables:
    """Block ids of every running request, at its `row`.

    Args:
        num_rows: Most running requests.
        max_pages: Most pages of a request.
        device: Where the tables live.

    Attributes:
        tables: `[num_rows, max_pages]`, int32; past a request's pages the content is undefined.
    """

    def __init__(self, num_rows: int, max_pages: int, device: torch.device) -> None:
        self.tables = torch.zeros(num_rows, max_pages, dtype=torch.int32, device=device)
        self._mirrored: list[tuple[list[int] | None, int]] = [(None, 0)] * num_rows  # whose list, and how much of it

    def sync(self, requests: Iterable[Request]) -> None:
        """Copy the pages that the requests gained since the last call, in the order of the current stream."""
        places: list[int] = []
        pages: list[int] = []
        max_pages = self.tables.shape[1]
        for request in requests:
            block_ids = request.block_ids
            owner, count = self._mirrored[request.row]
            if owner is not block_ids:  # another request, or the same one after preemption
                count = 0
            if count < len(block_ids):
                start = request.row * max_pages
                places += range(start + count, start + len(block_ids))
                pages += block_ids[count:]
            self._mirrored[request.row] = (block_ids, len(block_ids))
        if places:
            # One copy, of the places' int64 as pairs of int32 and of the pages behind them.
            changes = torch.cat([torch.tensor(places).view(torch.int32), torch.tensor(pages, dtype=torch.int32)])
            on_device = copy_to_device(changes, self.tables.device)
            where, what = on_device.split([2 * len(places), len(places)])
            self.tables.view(-1).index_copy_(0, where.view(torch.int64), what)
