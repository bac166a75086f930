"""What a pool's own samples say about it: which adapters look alike, and which score is too low to trust.

Every sample is looked for with its adapter's embedding made of the *other* samples, so nothing is found through itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.support.checks import is_allowed
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from langchain_lora_retriever.retrieval.retriever import LoraRetriever

__all__ = ["PoolInspection", "Reach", "TwinPair", "find_twins", "inspect_pool"]


@dataclass(frozen=True, slots=True)
class TwinPair:
    """Two adapters whose samples the encoder tells apart no better than a coin.

    Attributes:
        first: A name.
        second: Another.
        similarity: Cosine of their embeddings.
    """

    first: str
    second: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Reach:
    """Samples of one adapter that find another adapter first."""

    samples_of: str
    find: str
    share: float


@dataclass(frozen=True, slots=True)
class PoolInspection:
    """What the samples of a pool say about it.

    Attributes:
        num_adapters: Adapters with two samples or more; others are not looked at.
        num_samples: Their samples.
        accuracy: Share of the samples that find their own adapter first.
        min_score: The score that `kept` of the samples reach with their own adapter: a value for `min_score=`.
        kept: That share.
        strangers: Share of the samples that would still reach `min_score` if the pool lacked their adapter. The
            smaller, the more `min_score` helps to send prompts to the base model that no adapter is for.
        twins: Adapters that look alike.
        reaches: Adapters that samples of others find first, the largest share first.
    """

    num_adapters: int
    num_samples: int
    accuracy: float
    min_score: float
    kept: float
    strangers: float
    twins: tuple[TwinPair, ...]
    reaches: tuple[Reach, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the inspection as JSON-ready values."""
        return asdict(self)


def inspect_pool(retriever: LoraRetriever, *, kept: float = 0.98) -> PoolInspection:
    """Look for each sample among the adapters of the retriever's pool, and calibrate `min_score`.

    Args:
        retriever: Its pool is inspected, with its encoder. Its own `min_score` has no effect.
        kept: Share of the samples that the calibrated `min_score` lets find their adapter.

    Raises:
        InvalidRequestError: If fewer than two adapters have two samples, or `kept` is no share.
    """
    if not is_allowed(kept, Annotated[float, Field(gt=0, le=1)]):
        raise InvalidRequestError(f"kept={shown(kept)} is not allowed: pass a number in (0, 1].")
    groups = _embed_samples(retriever)
    if len(groups) < 2:
        raise InvalidRequestError(
            f"{len(groups)} of {len(retriever.pool)} adapters have two samples or more; an inspection compares at "
            "least two. Give adapters a dozen samples each."
        )
    names = list(groups)
    labels = np.repeat(np.arange(len(names)), [len(group) for group in groups.values()])
    scores = np.concatenate([_scores(groups, name) for name in names])
    own = scores[np.arange(len(labels)), labels]
    others = scores.copy()
    others[np.arange(len(labels)), labels] = -np.inf
    best = np.where(own > others.max(axis=1), labels, others.argmax(axis=1))
    min_score = float(np.quantile(own, 1 - kept))
    reaches = [
        Reach(name, names[other], float((best[labels == i] == other).mean()))
        for i, name in enumerate(names)
        for other in np.unique(best[labels == i])
        if other != i
    ]
    return PoolInspection(
        num_adapters=len(names),
        num_samples=len(labels),
        accuracy=float((best == labels).mean()),
        min_score=round(min_score, 4),
        kept=kept,
        strangers=float((others.max(axis=1) >= min_score).mean()),
        twins=_twins(groups),
        reaches=tuple(sorted(reaches, key=lambda reach: (-reach.share, reach.samples_of, reach.find))),
    )


def find_twins(retriever: LoraRetriever, *, z: float = 1.645) -> tuple[TwinPair, ...]:
    """Find pairs of adapters whose own samples the encoder cannot tell apart.

    Each sample of the two is put to the nearer one's mean. The two are twins if that is right no more often than a
    coin would be in 95 % of the cases.

    Args:
        retriever: Its pool is looked at, with its encoder.
        z: Standard deviations of the coin's count that a pair must exceed to be told apart.

    Raises:
        InvalidRequestError: If `z` is no finite number.
    """
    if not is_allowed(z, float):
        raise InvalidRequestError(f"z={shown(z)} is not allowed: pass a finite number, such as 1.645.")
    return _twins(_embed_samples(retriever), z)


def _embed_samples(retriever: LoraRetriever) -> dict[str, NDArray[np.float64]]:
    """`[num_samples, d]` by adapter, for those with two samples or more that the encoder can embed."""
    retriever.refresh()
    entries = retriever.pool.state.entries.items()
    return {
        name: retriever.embed([sample.input for sample in entry.samples]).astype(np.float64)
        for name, entry in entries
        if len(entry.samples) > 1 and name not in retriever.rejected
    }


def _scores(groups: dict[str, NDArray[np.float64]], name: str) -> NDArray[np.float64]:
    """`[num_samples, num_adapters]`: cosines of the samples of `name`, their own adapter being without each."""
    group = groups[name]
    scores = np.stack([group @ _unit(other.sum(axis=0)) for other in groups.values()], axis=1)
    without = group.sum(axis=0) - group
    scores[:, list(groups).index(name)] = (group * _unit(without)).sum(axis=1)
    return scores


def _twins(groups: dict[str, NDArray[np.float64]], z: float = 1.645) -> tuple[TwinPair, ...]:
    scores = {name: _scores(groups, name) for name in groups}
    means = {name: _unit(group.sum(axis=0)) for name, group in groups.items()}
    twins = []
    for (i, first), (j, second) in combinations(enumerate(groups), 2):
        is_right = np.concatenate(
            [scores[first][:, i] > scores[first][:, j], scores[second][:, j] > scores[second][:, i]]
        )
        if is_right.sum() <= len(is_right) / 2 + z * np.sqrt(len(is_right)) / 2:
            twins.append(TwinPair(first, second, round(float(means[first] @ means[second]), 4)))
    return tuple(sorted(twins, key=lambda pair: -pair.similarity))


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    unit: NDArray[np.float64] = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return unit
