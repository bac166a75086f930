"""The gathering backend of attention against plain attention over each sequence's own keys."""

from __future__ import annotations

import pytest
import torch

from langchain_lora_retriever.engine.model.attention import GatheringStep, PagedCache, QuerySpan

PAGE, HEADS, KV_HEADS, DIM = 4, 4, 2, 8
# Decoding sequences of several lengths, some in one group; a whole prompt, and one behind a cached prefix.
SPANS = [(1, 1), (1, 9), (1, 14), (1, 16), (6, 6), (3, 11), (1, 40)]


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_others_left_in_the_pages_is_not_read(junk: float, softcap: float | None) -> None:
    """In a cache full of junk, with padding pages that are somebody's, each sequence meets its own tokens alone."""
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    num_pages = [-(-context // PAGE) for _, context in SPANS]
    blocks = (torch.randperm(sum(num_pages), generator=generator) + 1).tolist()  # block 0 is nobody's
    cache = PagedCache(*(torch.full((len(blocks) + 1, PAGE, KV_HEADS, DIM), junk) for _ in range(2)))
    spans, expected, new = [], [], []
    for (num_queries, context), num in zip(SPANS, num_pages, strict=True):
        mine = [blocks.pop() for _ in range(num)]
        spans.append(QuerySpan(num_queries, context, [*mine, 0]))  # a page that is allocated and not yet written
        query, key, value = rand(num_queries, HEADS, DIM), rand(context, KV_HEADS, DIM), rand(context, KV_HEADS, DIM)
        for position in range(context - num_queries):
            cache.keys[mine[position // PAGE], position % PAGE] = key[position]
            cache.values[mine[position // PAGE], position % PAGE] = value[position]
        new.append((query, key[context - num_queries :], value[context - num_queries :]))
        scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(HEADS // KV_HEADS, 1)) * 0.3
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        seen = torch.arange(context)[None] <= torch.arange(context - num_queries, context)[:, None]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(HEADS // KV_HEADS, 1)))
    query, key, value = (torch.cat(parts) for parts in zip(*new, strict=True))
    step = GatheringStep(spans, {0: cache})
    got = step.attend(0, query, key, value, scaling=0.3, softcap=softcap)
    torch.testing.assert_close(got, torch.cat(expected))
