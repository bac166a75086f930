"""Windows and chunks are read off a mask exactly, and what is neither is told apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from langchain_lora_retriever.engine.model.attention import MaskPattern
from langchain_lora_retriever.engine.model.mask_pattern import MaskSource, read_pattern

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_positions", [16, 300, 131_072, 10_485_760])
@pytest.mark.parametrize("limit", [1, 2, 7, 255, 256, 8192, 100_000, None])
@pytest.mark.parametrize("kind", ["sliding_window", "chunk_size"])
def test_windows_and_chunks_of_any_size_are_read(kind: str, limit: int | None, num_positions: int) -> None:
    """A limit that no sequence reaches leaves a causal mask; a chunk of one token is a window of one."""
    function: Callable[..., torch.Tensor] = causal_mask_function
    if limit is not None and kind == "sliding_window":
        function = sliding_window_causal_mask_function(limit)
    elif limit is not None:
        function = chunked_causal_mask_function(limit, torch.zeros(1, dtype=torch.int64))
    expected = MaskPattern()
    if limit is not None and limit < num_positions:
        expected = MaskPattern(**{"sliding_window" if limit == 1 else kind: limit})
    assert read_pattern(MaskSource(function, CPU), num_positions) == expected


STRANGE = {
    "bidirectional": bidirectional_mask_function,
    "with sinks": lambda b, h, q, k: (sliding_window_causal_mask_function(64)(b, h, q, k)) | (k < 4) & (k <= q),
    "dilated": lambda _b, _h, q, k: (k <= q) & ((q - k) % 2 == 0),
    "growing": lambda _b, _h, q, k: (k <= q) & (k > q - 600 - q // 1000),
    "shifted chunks": chunked_causal_mask_function(50, torch.tensor([3])),
    "both": and_masks(
        sliding_window_causal_mask_function(40), chunked_causal_mask_function(100, torch.zeros(1, dtype=torch.int64))
    ),
    "nothing": lambda _b, _h, q, k: (q < 0) & (k < 0),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_neither_is_told_apart(name: str) -> None:
    """Also where it only shows beyond the first positions."""
    assert read_pattern(MaskSource(STRANGE[name], CPU), 4096) is None


@pytest.mark.parametrize("pattern", [MaskPattern(), MaskPattern(sliding_window=5), MaskPattern(chunk_size=5)])
def test_a_pattern_is_causal_up_to_its_limit(pattern: MaskPattern) -> None:
    """In a context no longer than a window or chunk every query sees all up to itself."""
    for length in range(1, 12):
        positions = torch.arange(length)
        seen = pattern.sees(positions[:, None], positions)
        assert pattern.is_causal(length) == torch.equal(seen, torch.ones_like(seen).tril())
