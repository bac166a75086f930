"""Things of different sizes in a line of fixed length; the least recently used make room."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

__all__ = ["RangeCache"]

Key = TypeVar("Key", bound="Hashable")


class RangeCache(Generic[Key]):
    """Ranges of a line by key. Not thread-safe.

    Args:
        length: Of the line.
        chunk: No range crosses a multiple of this; None sets no such bounds.
    """

    def __init__(self, length: int, chunk: int | None = None) -> None:
        self._length = length
        self._chunk = chunk or max(length, 1)
        self._ranges: OrderedDict[Key, tuple[int, int]] = OrderedDict()  # (start, end), least recently used first

    def __len__(self) -> int:
        return len(self._ranges)

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
        kept = self._ranges.copy()
        dropped: list[Key] = []
        candidates = iter([other for other in self._ranges if may_drop(other)])
        while (start := self._find(size, sorted(kept.values()))) is None:
            victim = next(candidates, None)
            if victim is None:
                return None
            del kept[victim]
            dropped.append(victim)
        kept[key] = (start, start + size)
        self._ranges = kept
        return start, dropped

    def pop(self, key: Key) -> None:
        """Give up a key's range."""
        del self._ranges[key]

    def _find(self, size: int, occupied: list[tuple[int, int]]) -> int | None:
        """First gap of `size`."""
        if size > self._chunk:
            return None
        end = 0
        for start, stop in [*occupied, (self._length, self._length)]:
            place = end
            if place // self._chunk != (place + size - 1) // self._chunk:  # it would cross a bound
                place = -(-place // self._chunk) * self._chunk
            if place + size <= start:
                return place
            end = stop
        return None
