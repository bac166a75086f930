"""A pool in two dimensions: the principal components of its adapters' embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from langchain_lora_retriever.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["PoolMap", "check_rows", "make_map"]


class PoolMap(NamedTuple):
    """Where adapters lie, and where any other text would.

    Attributes:
        names: Of the adapters.
        places: `[len(names), 2]`.
        explained: Share of the embeddings' variance that the two dimensions hold.
        mean: `[d]`, the middle of the adapters' embeddings, which lies at (0, 0).
        directions: `[2, d]`, the principal components; zeros where there are too few adapters.
    """

    names: tuple[str, ...]
    places: NDArray[np.float64]
    explained: float
    mean: NDArray[np.float64]
    directions: NDArray[np.float64]

    def place(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return where embeddings `[n, d]` lie, `[n, 2]`."""
        return (vectors - self.mean) @ self.directions.T


def make_map(names: Sequence[str], vectors: NDArray[np.floating[Any]]) -> PoolMap:
    """Lay adapters out by the two directions in which their embeddings differ most.

    Args:
        names: Of the adapters.
        vectors: `[len(names), d]`, rows of length 1.

    Raises:
        InvalidRequestError: If there are not as many vectors as names.
    """
    check_rows(names, vectors)
    mean = vectors.mean(axis=0, dtype=np.float64) if len(names) else np.zeros(vectors.shape[1])
    centred = vectors.astype(np.float64) - mean
    _, sizes, found = np.linalg.svd(centred, full_matrices=False)
    directions = np.zeros((2, vectors.shape[1]))
    directions[: len(found[:2])] = found[:2]
    # A component points either way: the same pool is always drawn the same way round.
    largest = directions[np.arange(2), np.abs(directions).argmax(axis=1)]
    directions *= np.where(largest < 0, -1.0, 1.0)[:, None]
    total = float((sizes**2).sum())
    explained = float((sizes[:2] ** 2).sum()) / total if total > 0 else 1.0
    return PoolMap(tuple(names), centred @ directions.T, explained, mean, directions)


def check_rows(names: Sequence[str], vectors: NDArray[np.floating[Any]]) -> None:
    """Refuse vectors that are not one for each name.

    Raises:
        InvalidRequestError: If there are not as many vectors as names.
    """
    if vectors.ndim != 2 or len(vectors) != len(names):
        raise InvalidRequestError(
            f"vectors of shape {vectors.shape} are not allowed: pass one row per name, {len(names)}."
        )
