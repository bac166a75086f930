"""Ranges in a line of fixed length."""

from __future__ import annotations

import random

from langchain_lora_retriever.engine.range_cache import RangeCache


def test_the_least_recently_used_makes_room() -> None:
    """A key that was asked for stays; the other one goes, and says so."""
    cache: RangeCache[str] = RangeCache(10)
    assert cache.put("a", 4, lambda _: True) == (0, [])
    assert cache.put("b", 4, lambda _: True) == (4, [])
    assert cache.get("a") == 0
    assert cache.put("c", 6, lambda _: True) == (4, ["b"])
    assert cache.get("b") is None


def test_what_may_not_be_dropped_stays() -> None:
    """Without room nothing changes, not even for the keys that might have been dropped."""
    cache: RangeCache[str] = RangeCache(10)
    cache.put("a", 4, lambda _: True)
    cache.put("b", 4, lambda _: True)
    assert cache.put("c", 8, lambda key: key == "b") is None
    assert (cache.get("a"), cache.get("b"), len(cache)) == (0, 4, 2)


def test_no_range_crosses_a_bound() -> None:
    """A range that would begin in one chunk and end in the next begins in the next; larger ones never fit."""
    cache: RangeCache[str] = RangeCache(20, chunk=10)
    assert cache.put("a", 6, lambda _: True) == (0, [])
    assert cache.put("b", 6, lambda _: True) == (10, [])
    assert cache.put("c", 4, lambda _: True) == (6, [])
    assert cache.put("d", 11, lambda _: True) is None


def test_ranges_never_overlap() -> None:
    """Whatever comes and goes, keys lie apart, within the line and within a chunk."""
    rng = random.Random(0)
    cache: RangeCache[int] = RangeCache(64, chunk=16)
    sizes: dict[int, int] = {}
    for key in range(500):
        size = rng.randrange(1, 18)
        found = cache.put(key, size, lambda _: rng.random() < 0.7)
        if found is not None:
            sizes[key] = size
            for dropped in found[1]:
                del sizes[dropped]
        if sizes and rng.random() < 0.2:
            gone = rng.choice(list(sizes))
            cache.pop(gone)
            del sizes[gone]
        taken: set[int] = set()
        for other, length in sizes.items():
            start = cache.get(other)
            assert start is not None
            places = set(range(start, start + length))
            assert not places & taken
            assert start // 16 == (start + length - 1) // 16 < 4
            taken |= places
        assert len(cache) == len(sizes)
