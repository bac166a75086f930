"""Contiguous-range allocator with LRU eviction."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

__all__ = ["Placement", "RangeCache"]

Key = TypeVar("Key", bound="Hashable")
_Range = tuple[int, int]  # (start, end)


class Placement(NamedTuple, Generic[Key]):
    """What `RangeCache.put_all` decided.

    Attributes:
        starts: Where keys begin that are new or were moved; their contents have to be written.
        dropped: Keys that are not there any more.
    """

    starts: dict[Key, int]
    dropped: list[Key]


class RangeCache(Generic[Key]):
    """Ranges of a line by key, the least recently used dropped for new ones. Not thread-safe.

    Args:
        length: Of the line.
        chunk: No range crosses a multiple of this; None sets no such bounds.
        max_keys: Most keys; None sets no limit.
        warm: Ranges go into the first so much of the line while dropping others makes room there; None prefers nothing.
    """

    def __init__(
        self, length: int, chunk: int | None = None, *, max_keys: int | None = None, warm: int | None = None
    ) -> None:
        self._lengths = (length,) if warm is None or warm >= length else (warm, length)
        self._chunk = chunk or max(length, 1)
        self._max_keys = max_keys
        self._ranges: OrderedDict[Key, _Range] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._ranges)

    @property
    def ranges(self) -> list[_Range]:
        """Every `(start, end)`, in order."""
        return sorted(self._ranges.values())

    def get(self, key: Key) -> int | None:
        """Where `key` starts, now the most recently used; None if it is not there."""
        if key not in self._ranges:
            return None
        self._ranges.move_to_end(key)
        return self._ranges[key][0]

    def put(self, key: Key, size: int, may_drop: Callable[[Key], bool]) -> tuple[int, list[Key]] | None:
        """Find a place for a new key, dropping others if it must.

        Args:
            key: A key that is not there.
            size: Length of its range.
            may_drop: Whether a key may be dropped.

        Returns:
            Its start, and the keys that were dropped; None, with nothing changed, if there is no room.
        """
        placement = self.put_all({key: size}, may_drop)
        return None if placement is None else (placement.starts[key], placement.dropped)

    def put_all(self, sizes: Mapping[Key, int], may_drop: Callable[[Key], bool]) -> Placement[Key] | None:
        """Find places for keys that are wanted together, dropping others if it must.

        Those of them that are there already stay where they are, unless they may be dropped and the rest would find
        no place beside them: then they are moved. So keys whose sizes add up to no more than the line always find
        room once all others may be dropped (where no chunks are in the way).

        Args:
            sizes: Lengths of their ranges.
            may_drop: Whether a key may be dropped, or moved.

        Returns:
            New places; None, with no range changed, if there is no room.
        """
        for key in sizes:
            self.get(key)
        if all(key in self._ranges for key in sizes):
            return Placement({}, [])
        placements = (self._put_within(length, sizes, may_drop) for length in self._lengths)
        return next((placement for placement in placements if placement is not None), None)

    def pop(self, key: Key) -> None:
        """Give up a key's range."""
        del self._ranges[key]

    def _put_within(
        self, length: int, sizes: Mapping[Key, int], may_drop: Callable[[Key], bool]
    ) -> Placement[Key] | None:
        kept = self._ranges.copy()
        dropped: list[Key] = []
        # The wanted ones, which come last, are moved only if need be: whoever is moved has to be written again.
        candidates = (key for key in self._ranges if may_drop(key))
        while (placed := self._place_all(length, {k: n for k, n in sizes.items() if k not in kept}, kept)) is None:
            victim = next(candidates, None)
            if victim is None:
                return None
            del kept[victim]
            if victim not in sizes:
                dropped.append(victim)
        self._ranges = kept
        self._ranges.update(placed)
        return Placement({key: start for key, (start, _) in placed.items()}, dropped)

    def _place_all(self, length: int, sizes: Mapping[Key, int], kept: Mapping[Key, _Range]) -> dict[Key, _Range] | None:
        """Places for new keys beside those that are kept, the largest first; None if there is no room."""
        if self._max_keys is not None and len(kept) + len(sizes) > self._max_keys:
            return None
        placed: dict[Key, _Range] = {}
        for key in sorted(sizes, key=lambda key: -sizes[key]):
            start = self._find(length, sizes[key], sorted([*kept.values(), *placed.values()]))
            if start is None:
                return None
            placed[key] = start, start + sizes[key]
        return placed

    def _find(self, length: int, size: int, occupied: Iterable[_Range]) -> int | None:
        """First gap of `size` in the first `length`."""
        if size > self._chunk:
            return None
        end = 0
        for start, stop in [*(span for span in occupied if span[0] < length), (length, length)]:
            place = end
            if place // self._chunk != (place + size - 1) // self._chunk:  # it would cross a bound
                place = -(-place // self._chunk) * self._chunk
            if place + size <= start:
                return place
            end = stop
        return None
