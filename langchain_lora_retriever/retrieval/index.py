"""Nearest adapters by cosine: a FAISS index whose rows have names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import faiss
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

__all__ = ["AdapterIndex"]


class AdapterIndex:
    """Unit vectors by name, searched exactly. Any thread may search one that no thread changes.

    Args:
        dimension: Length `d` of the vectors.
    """

    def __init__(self, dimension: int) -> None:
        self._faiss: Any = faiss.IndexFlatIP(dimension)
        self._names: list[str] = []

    @property
    def dimension(self) -> int:
        """Length of the vectors."""
        return int(self._faiss.d)

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in the order of the rows."""
        return tuple(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def vector(self, name: str) -> NDArray[np.float32]:
        """The vector `[d]` of a name.

        Raises:
            KeyError: If the index has no such name.
        """
        if name not in self._names:
            raise KeyError(name)
        row: NDArray[np.float32] = self._faiss.reconstruct(self._names.index(name))
        return row

    def update(self, names: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Add vectors; a name that is there already gets the new one.

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
        if not names:
            return
        self.remove(names)
        self._faiss.add(np.ascontiguousarray(vectors, dtype=np.float32))
        self._names.extend(names)

    def remove(self, names: Collection[str]) -> None:
        """Remove names; those that are not there are ignored."""
        gone = set(names)
        rows = [row for row, name in enumerate(self._names) if name in gone]
        if rows:
            self._faiss.remove_ids(np.asarray(rows, dtype=np.int64))  # the rows behind close up, in order
            self._names = [name for name in self._names if name not in gone]

    def copy(self) -> AdapterIndex:
        """An index of the same content; changes of one do not show in the other."""
        twin = AdapterIndex(self.dimension)
        twin._faiss = faiss.clone_index(self._faiss)
        twin._names = [*self._names]
        return twin

    def search(
        self, queries: NDArray[np.float32], *, top_k: int, exclude: Sequence[Collection[str]] = ()
    ) -> list[list[tuple[str, float]]]:
        """The nearest names to each query, best first; equal scores are ordered by name.

        Args:
            queries: `[n, d]`, each row of length 1.
            top_k: How many; fewer come back if the index has fewer.
            exclude: Names to leave out, per query; () excludes none anywhere.
        """
        excluded = [frozenset(names) for names in exclude] or [frozenset[str]()] * len(queries)
        assert len(excluded) == len(queries), "one exclusion per query"
        # Fetching as many more as may be left out finds the same as never looking at them.
        fetch = min(len(self), top_k + max(map(len, excluded), default=0))
        if fetch == 0:
            return [[] for _ in excluded]
        scores, rows = self._faiss.search(np.ascontiguousarray(queries, dtype=np.float32), fetch)
        results = []
        for query_scores, query_rows, left_out in zip(scores.tolist(), rows.tolist(), excluded, strict=True):
            found = [(self._names[row], score) for score, row in zip(query_scores, query_rows, strict=True) if row >= 0]
            kept = [(name, score) for name, score in found if name not in left_out]
            results.append(sorted(kept, key=lambda pair: (-pair[1], pair[0]))[:top_k])
        return results
