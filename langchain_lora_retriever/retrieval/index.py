"""Nearest adapters by cosine: rows with names, which FAISS searches, and which change beside those who search."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

import faiss
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

__all__ = ["AdapterIndex"]

_MAX_DEAD_ROWS = 256
"""Rows of names that are gone, or have another row, before the others are moved together."""
_MIN_CAPACITY = 16
_NUM_QUERIES_AT_ONCE = 64
_MIN_QUERIES_MULTIPLIED = 8
"""Queries from which one product over all columns is faster than one for each over the columns that it needs."""


class AdapterIndex:
    """Unit vectors by name, searched exactly. Any thread may search one that no thread changes; a copy costs little.

    Args:
        dimension: Length `d` of the vectors.
        num_sparse: How many of the last numbers of a query are mostly zeros: of these only the others are read.
    """

    def __init__(self, dimension: int, *, num_sparse: int = 0) -> None:
        self._rows = _Rows(dimension, num_sparse, _MIN_CAPACITY)
        self._names: list[str | None] = []  # by row; None where the name is gone or has another row
        self._places: dict[str, int] = {}

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return self._rows.dimension

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the rows."""
        return tuple(self._places)

    @property
    def num_bytes(self) -> int:
        """What the vectors take, room for more included."""
        return self._rows.num_bytes

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def vector(self, name: str) -> Vectors:
        """The vector `[d]` of a name.

        Raises:
            KeyError: If the index has no such name.
        """
        row: Vectors = self._rows.vectors([self._places[name]])[0]
        return row

    def update(self, names: Sequence[str], vectors: Vectors) -> None:
        """Add vectors; a name that is there already gets the new one. Copies of the index stay as they are.

        Args:
            names: Distinct names.
            vectors: `[len(names), d]`, each row of length 1.

        Raises:
            ValueError: If shapes disagree or names repeat.
        """
        if vectors.shape != (len(names), self.dimension):
            raise ValueError(f"vectors have shape {vectors.shape}, allowed is {(len(names), self.dimension)}.")
        if len(set(names)) != len(names):
            raise ValueError(f"the names to add are not distinct: {list(names)!r}.")
        self.remove(names)
        size = len(self._names)
        if not self._rows.has_room(size, len(names)):
            self._move(len(names))
            size = len(self._names)
        self._rows.append(vectors, size)
        self._names.extend(names)
        self._places.update(zip(names, range(size, size + len(names)), strict=True))

    def remove(self, names: Collection[str]) -> None:
        """Remove names; those that are not there are ignored. Copies of the index stay as they are."""
        for name in names:
            row = self._places.pop(name, None)
            if row is not None:
                self._names[row] = None
        if len(self._names) - len(self._places) > _MAX_DEAD_ROWS:
            self._move(0)

    def copy(self) -> AdapterIndex:
        """An index of the same content; changes of one do not show in the other."""
        twin = copy(self)
        twin._names = self._names.copy()  # noqa: SLF001 - one of us
        twin._places = self._places.copy()  # noqa: SLF001 - one of us
        return twin

    def search(
        self, queries: Vectors, *, top_k: int, exclude: Sequence[Collection[str]] = ()
    ) -> list[list[tuple[str, float]]]:
        """The nearest names to each query, best first; equal scores are ordered by name.

        Args:
            queries: `[n, d]`, each row of length 1.
            top_k: How many; fewer come back if the index has fewer.
            exclude: Names to leave out, per query; () excludes none anywhere.
        """
        excluded = [frozenset(names) for names in exclude] or [frozenset[str]()] * len(queries)
        assert len(excluded) == len(queries), "one exclusion per query"
        # Fetching as many more as may be left out finds the same as never looking at them; one more tells of a tie.
        size = len(self._names)
        fetch = min(size, top_k + max(map(len, excluded), default=0) + size - len(self._places) + 1)
        if not self._places or not len(queries):
            return [[] for _ in excluded]
        results = []
        for number, (scores, rows) in enumerate(self._rows.search(queries, size, fetch)):
            found = self._kept(scores, rows, excluded[number], top_k)
            if fetch < size and found and found[-1][1] == scores[-1]:  # others that were not fetched may score as high
                ((all_scores, all_rows),) = self._rows.search(queries[number : number + 1], size, size)
                found = self._kept(all_scores, all_rows, excluded[number], top_k)
            results.append(found)
        return results

    def _kept(
        self, scores: Sequence[float], rows: Sequence[int], left_out: Collection[str], top_k: int
    ) -> list[tuple[str, float]]:
        """The best of what was fetched that are neither gone nor left out."""
        names = [self._names[row] for row in rows]
        kept = [(n, s) for n, s in zip(names, scores, strict=True) if n is not None and n not in left_out]
        return sorted(kept, key=lambda pair: (-pair[1], pair[0]))[:top_k]

    def _move(self, num_more: int) -> None:
        """Put the rows that are left together, where there is room for more; copies keep the old ones."""
        places = list(self._places.values())
        capacity = max(_MIN_CAPACITY, (len(places) + num_more) * 5 // 4)
        rows = _Rows(self.dimension, self._rows.num_sparse, capacity)
        rows.append(self._rows.vectors(places), 0)
        self._rows = rows
        self._names = list(self._places)
        self._places = {name: row for row, name in enumerate(self._places)}


class _Rows:
    """Vectors that are only ever added to, so that indices of different sizes share them.

    Args:
        dimension: Length `d` of the vectors.
        num_sparse: How many of their last numbers are kept column by column.
        capacity: Most of them.
    """

    def __init__(self, dimension: int, num_sparse: int, capacity: int) -> None:
        self.dimension = dimension
        self.num_sparse = num_sparse
        self._dense = np.empty((capacity, dimension - num_sparse), np.float32)
        self._sparse = np.empty((num_sparse, capacity), np.float32)
        self._num_used = 0

    @property
    def num_bytes(self) -> int:
        """What they take."""
        return self._dense.nbytes + self._sparse.nbytes

    def vectors(self, rows: Sequence[int]) -> Vectors:
        """Some of them, `[len(rows), d]`."""
        return np.concatenate([self._dense[rows], self._sparse[:, rows].T], axis=1)

    def has_room(self, size: int, num: int) -> bool:
        """Whether `num` rows can be added behind the first `size`: nobody else has done so, and there is space."""
        return size == self._num_used and size + num <= len(self._dense)

    def append(self, vectors: Vectors, size: int) -> None:
        """Add rows behind the first `size`."""
        assert self.has_room(size, len(vectors)), "the index looked for room before"
        end = size + len(vectors)
        num_dense = self._dense.shape[1]
        self._dense[size:end] = vectors[:, :num_dense]
        self._sparse[:, size:end] = vectors[:, num_dense:].T
        self._num_used = end

    def search(self, queries: Vectors, size: int, fetch: int) -> Iterator[tuple[list[float], list[int]]]:
        """Yield scores and rows of the nearest of the first `size` rows, `fetch` for each query."""
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if not self.num_sparse:
            scores, rows = faiss.knn(queries, self._dense[:size], fetch, metric=faiss.METRIC_INNER_PRODUCT)
            yield from zip(scores.tolist(), rows.tolist(), strict=True)
            return
        for start in range(0, len(queries), _NUM_QUERIES_AT_ONCE):
            for scores in self._scores(queries[start : start + _NUM_QUERIES_AT_ONCE], size):
                best = np.arange(size) if fetch == size else np.argpartition(scores, size - fetch)[size - fetch :]
                best = best[np.argsort(-scores[best], kind="stable")]
                yield scores[best].tolist(), best.tolist()

    def _scores(self, queries: Vectors, size: int) -> Vectors:
        """Inner products `[len(queries), size]`."""
        num_dense = self._dense.shape[1]
        scores: Vectors = queries[:, :num_dense] @ self._dense[:size].T
        if len(queries) >= _MIN_QUERIES_MULTIPLIED:
            return scores + queries[:, num_dense:] @ self._sparse[:, :size]
        for number, query in enumerate(queries):
            (places,) = np.nonzero(query[num_dense:])
            scores[number] += query[num_dense + places] @ self._sparse[places, :size]
        return scores
