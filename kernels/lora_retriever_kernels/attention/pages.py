"""Where the tokens of a packed step live in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Pages(NamedTuple):
    """The step's tokens and their sequences' pages, all on the device.

    Attributes:
        tables: Block ids of every sequence `[num_rows, max_pages]`, int32, contiguous.
        rows: The row of `tables` that each token's sequence has `[num_tokens]`, int64; -1 marks a token that is
            padding: it is neither stored nor attended for.
        positions: Each token's place in its sequence `[num_tokens]`, int64.
    """

    tables: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
