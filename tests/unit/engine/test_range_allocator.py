"""Ranges in a line of fixed length."""

from __future__ import annotations

import random

from langchain_lora_retriever.engine.range_allocator import RangeCache


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


def test_the_warm_part_is_used_as_long_as_it_serves() -> None:
    """What may be dropped makes room there; only what may not lets others go beyond."""
    cache: RangeCache[str] = RangeCache(20, warm=8)
    assert cache.put("a", 4, lambda _: True) == (0, [])
    assert cache.put("b", 4, lambda _: True) == (4, [])
    assert cache.put("c", 4, lambda _: True) == (0, ["a"])
    assert cache.put("d", 4, lambda _: False) == (8, [])
    assert cache.put("e", 12, lambda _: True) is not None  # larger than the warm part
    assert cache.put("f", 21, lambda _: True) is None


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


def test_keys_that_are_wanted_together_find_room_if_their_sizes_add_up() -> None:
    """One that lies in the middle is moved, where no gap beside it would hold the other."""
    cache: RangeCache[str] = RangeCache(10)
    for key, size in (("a", 3), ("b", 3), ("c", 4)):
        cache.put(key, size, lambda _: True)
    assert cache.put_all({"b": 3, "large": 7}, lambda _: True) == ({"large": 0, "b": 7}, ["a", "c"])
    assert cache.ranges == [(0, 7), (7, 10)]


def test_keys_that_are_wanted_together_stay_where_they_can() -> None:
    """Nothing is moved or dropped where the others leave room."""
    cache: RangeCache[str] = RangeCache(10)
    cache.put("a", 2, lambda _: True)
    cache.put("b", 3, lambda _: True)
    assert cache.put_all({"a": 2, "c": 5}, lambda _: True) == ({"c": 5}, [])
    assert cache.put_all({"a": 2, "c": 5}, lambda _: True) == ({}, [])
    assert cache.put_all({"a": 2, "d": 5}, lambda key: key != "c") is None
    assert cache.ranges == [(0, 2), (2, 5), (5, 10)]


def test_there_are_no_more_keys_than_allowed() -> None:
    """A key too many makes the least recently used go, although there is room on the line."""
    cache: RangeCache[str] = RangeCache(10, max_keys=2)
    cache.put_all({"a": 1, "b": 1}, lambda _: True)
    assert cache.put("c", 1, lambda _: True) == (0, ["a"])
    assert cache.put_all({"a": 1, "d": 1, "e": 1}, lambda _: True) is None


def test_any_keys_that_fit_the_line_find_room_once_others_may_be_dropped() -> None:
    """Whatever lies where, keys whose sizes add up to the line's length are placed."""
    rng = random.Random(0)
    cache: RangeCache[int] = RangeCache(24)
    size_of = {key: rng.randrange(1, 13) for key in range(40)}
    for _ in range(500):
        wanted = rng.sample(sorted(size_of), 3)
        sizes = {key: size_of[key] for key in wanted}
        placement = cache.put_all(sizes, lambda _: True)
        assert (placement is not None) == (sum(sizes.values()) <= 24)
        ends = [0, *(end for _, end in cache.ranges)]
        assert all(end <= start for end, (start, _) in zip(ends, cache.ranges, strict=False))
        assert ends[-1] <= 24
