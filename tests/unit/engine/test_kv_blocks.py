"""The block manager: sharing, reuse, and the salt that keeps adapters apart."""

from __future__ import annotations

from typing import Any

import pytest

from langchain_lora_retriever.engine.kv_blocks import KVCacheManager
from langchain_lora_retriever.engine.request import Request
from langchain_lora_retriever.types import Adapter, SamplingParams


def make_request(tokens: list[int], *fingerprints: str) -> Request:
    """A request without an engine."""
    adapters: Any = tuple((Adapter("same-name", fingerprint, {}), 1.0) for fingerprint in fingerprints)
    return Request(0, tokens, SamplingParams(), adapters, detokenizer=None)  # type: ignore[arg-type]


def compute(cache: KVCacheManager, request: Request) -> None:
    """Pretend that all of a request's tokens were computed."""
    assert cache.allocate(request, request.num_tokens)
    request.num_computed_tokens = request.num_tokens
    cache.commit(request, request.num_computed_tokens)


@pytest.fixture
def cache() -> KVCacheManager:
    """Eight blocks of four tokens."""
    return KVCacheManager(8, 4)


def test_an_equal_prefix_is_found_again(cache: KVCacheManager) -> None:
    """A second request with the same tokens and adapters starts behind the full blocks of the first."""
    first, second = make_request(list(range(10)), "a"), make_request(list(range(10)), "a")
    compute(cache, first)
    cache.match_prefix(second)
    assert second.num_computed_tokens == 8
    assert second.block_ids == first.block_ids[:2]
    cache.check_integrity([first, second])


def test_a_prompt_that_is_all_cached_leaves_a_token_to_compute(cache: KVCacheManager) -> None:
    """The last token is computed even when its block is known, since its logits are needed."""
    first, second = make_request(list(range(8)), "a"), make_request(list(range(8)), "a")
    compute(cache, first)
    cache.match_prefix(second)
    assert second.num_computed_tokens == 4


def test_other_content_under_the_same_name_shares_nothing(cache: KVCacheManager) -> None:
    """An adapter replaced under its old name has another fingerprint, and so never meets the old one's KV."""
    old, new, base = (make_request(list(range(10)), *f) for f in (("old",), ("new",), ()))
    compute(cache, old)
    for request in (new, base):
        cache.match_prefix(request)
        assert request.num_computed_tokens == 0


def test_forgotten_blocks_are_found_by_nobody(cache: KVCacheManager) -> None:
    """Whoever shares them keeps them; a later request with the same tokens computes its own."""
    first, second, third = (make_request(list(range(10)), "a") for _ in range(3))
    compute(cache, first)
    cache.match_prefix(second)
    cache.forget(first)
    cache.free(first)
    cache.match_prefix(third)
    assert (second.num_computed_tokens, third.num_computed_tokens) == (8, 0)
    cache.check_integrity([second, third])


def test_freed_blocks_serve_until_they_are_reused(cache: KVCacheManager) -> None:
    """A finished request's prefix stays findable; once its blocks are needed elsewhere it is forgotten."""
    first = make_request(list(range(8)), "a")
    compute(cache, first)
    cache.free(first)
    again = make_request(list(range(9)), "a")
    cache.match_prefix(again)
    assert again.num_computed_tokens == 8
    cache.free(again)
    compute(cache, hog := make_request(list(range(100, 132))))
    cache.free(hog)
    late = make_request(list(range(9)), "a")
    cache.match_prefix(late)
    assert late.num_computed_tokens == 0
    cache.check_integrity([])


def test_blocks_that_were_never_used_are_the_last_resort() -> None:
    """Once some are warm, what was freed is used again first; whoever runs gets the others all the same."""
    cache = KVCacheManager(8, 4, num_warm_blocks=3)
    used: set[int] = set()
    for start in range(0, 200, 10):
        compute(cache, request := make_request(list(range(start, start + 8))))
        used.update(request.block_ids)
        cache.free(request)
    assert used == {0, 1, 2}
    compute(cache, hog := make_request(list(range(32))))
    assert sorted(hog.block_ids) == list(range(8))
    cache.check_integrity([hog])


def test_allocation_beyond_the_cache_changes_nothing(cache: KVCacheManager) -> None:
    """Asking for more blocks than are free is refused whole."""
    request = make_request(list(range(40)))
    assert not cache.allocate(request, 40)
    assert request.block_ids == []
    assert cache.num_free_blocks == 8


def test_caching_can_be_switched_off() -> None:
    """Without prefix caching nothing is ever found."""
    cache = KVCacheManager(8, 4, enable_prefix_caching=False)
    compute(cache, make_request(list(range(8))))
    second = make_request(list(range(8)))
    cache.match_prefix(second)
    assert second.num_computed_tokens == 0


def test_a_lost_block_is_noticed(cache: KVCacheManager) -> None:
    """`check_integrity` fails when a request forgets a block it holds."""
    request = make_request(list(range(8)))
    compute(cache, request)
    request.block_ids.pop()
    with pytest.raises(AssertionError, match="reference counts"):
        cache.check_integrity([request])
