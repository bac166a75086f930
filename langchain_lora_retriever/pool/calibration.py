"""Which adapters answer a user's own examples best, found without scoring all of them on all examples."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from langchain_lora_retriever.errors import InvalidRequestError, InvalidSamplesError
from langchain_lora_retriever.pool.task import MAX_MEMBERS
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from langchain_lora_retriever.pool.samples import Sample
    from langchain_lora_retriever.types import Adapter

__all__ = ["CalibratedAdapter", "Calibration", "Progress", "Score", "calibrate", "check_answered"]

Score: TypeAlias = "Callable[[Sequence[tuple[Adapter | None, Sample]]], Iterable[float]]"
"""Tells the mean log-likelihood of each sample's output under an adapter, or under the base model; in their order."""
Progress: TypeAlias = Callable[[int, int], None]
"""Is told how many answers were scored, and of how many."""

_MIN_SURVIVORS = 16
"""Adapters that are scored on all samples whatever the first few say."""
_NUM_HALVINGS = 3


@dataclass(frozen=True, slots=True)
class CalibratedAdapter:
    """How well an adapter answers the samples.

    Attributes:
        name: Its name in the pool; None is the base model alone.
        log_likelihood: Mean over samples of the mean log-likelihood of an answer's tokens.
        num_samples: Samples it was scored on; fewer than all if the first ones ruled it out.
    """

    name: str | None
    log_likelihood: float
    num_samples: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What adapters make of a user's samples.

    Attributes:
        samples: The samples.
        adapters: Every adapter, the best first; those that were ruled out early come last.
        base: The base model alone.
        members: The best adapters and their shares, softmax(log_likelihood / temperature): what a task entry stands
            for.
    """

    samples: tuple[Sample, ...]
    adapters: tuple[CalibratedAdapter, ...]
    base: CalibratedAdapter
    members: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the table and the members as JSON-ready values."""
        table = [asdict(adapter) for adapter in self.adapters]
        return {"adapters": table, "base": asdict(self.base), "members": dict(self.members)}


def calibrate(
    adapters: Mapping[str, Adapter],
    samples: Sequence[Sample],
    score: Score,
    *,
    keep: int = 3,
    temperature: float = 0.05,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Score adapters by what the user's own answers are worth to them.

    By successive halving: all adapters are scored on an eighth of the samples, the better half of them on a quarter,
    and so on; 16 at least are scored on all.

    Args:
        adapters: By name.
        samples: A dozen to some dozens, each with an output.
        score: Scores answers.
        keep: How many of the best a task entry stands for.
        temperature: Of their shares, in units of mean log-likelihood; the smaller, the more the best counts.
        seed: Of the order in which samples are taken.
        progress: Told after every answer.

    Raises:
        InvalidRequestError: If there is no adapter, or a setting is out of its range.
        InvalidSamplesError: If there is no sample, or one has no output.
    """
    if not adapters:
        raise InvalidRequestError("There is no adapter to calibrate: the pool has none, or all are left out.")
    if not isinstance(keep, int) or isinstance(keep, bool) or not 1 <= keep <= MAX_MEMBERS:
        raise InvalidRequestError(f"keep={shown(keep)} is not allowed: pass an integer from 1 to {MAX_MEMBERS}.")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise InvalidRequestError(f"temperature={shown(temperature)} is not allowed: pass a finite number above 0.")
    check_answered(samples)
    shuffled = random.Random(seed).sample(list(samples), len(samples))  # noqa: S311 - no secret
    rounds = list(_rounds(len(adapters), len(shuffled), max(_MIN_SURVIVORS, keep)))
    total = len(shuffled) + sum(num * (stop - start) for num, start, stop in rounds)
    tally = _Tally(score, progress, total)
    base = tally.add(None, None, shuffled)
    survivors = sorted(adapters)
    for num, start, stop in rounds:
        survivors = sorted(survivors, key=tally.rank)[:num]
        tally.add_all({name: adapters[name] for name in sorted(survivors)}, shuffled[start:stop])
    table = [tally.mean(name) for name in sorted(adapters, key=tally.rank)]
    best = [adapter for adapter in table if adapter.num_samples == len(shuffled)][:keep]
    powers = [math.exp((adapter.log_likelihood - best[0].log_likelihood) / temperature) for adapter in best]
    members = {a.name: power / sum(powers) for a, power in zip(best, powers, strict=True) if a.name and power}
    return Calibration(tuple(samples), tuple(table), base, members)


def check_answered(samples: Sequence[Sample]) -> None:
    """Refuse samples that a calibration cannot use.

    Raises:
        InvalidSamplesError: If there is none, or one has no output.
    """
    if not samples:
        raise InvalidSamplesError("A calibration has no samples: pass some dozens with an input and an output.")
    for place, sample in enumerate(samples):
        if not (sample.output or "").strip():
            raise InvalidSamplesError(
                f"sample {place} has no output: a calibration tells how likely each adapter holds the right answer, so "
                "every sample needs one."
            )


def _rounds(num_adapters: int, num_samples: int, num_survivors: int) -> Iterator[tuple[int, int, int]]:
    """For each round how many adapters it scores, and on which samples: from, and to before."""
    start = 0
    for halving in range(_NUM_HALVINGS, -1, -1):
        num = max(min(num_survivors, num_adapters), num_adapters >> (_NUM_HALVINGS - halving))
        stop = num_samples if not halving else max(1, num_samples >> halving)
        if stop > start:
            yield num, start, stop
        start = max(start, stop)


class _Tally:
    """The scores so far.

    Args:
        score: Scores answers.
        progress: Told after every answer.
        total: How many answers there will be.
    """

    def __init__(self, score: Score, progress: Progress | None, total: int) -> None:
        self._score = score
        self._progress = progress
        self._total = total
        self._num_done = 0
        self._scores: dict[str | None, list[float]] = {}

    def add(self, name: str | None, adapter: Adapter | None, samples: Sequence[Sample]) -> CalibratedAdapter:
        """Score the samples under an adapter, or the base model."""
        self._run([(name, adapter, sample) for sample in samples])
        return self.mean(name)

    def add_all(self, adapters: Mapping[str, Adapter], samples: Sequence[Sample]) -> None:
        """Score the samples under each of the adapters; those of one adapter follow one another."""
        self._run([(name, adapter, sample) for name, adapter in adapters.items() for sample in samples])

    def mean(self, name: str | None) -> CalibratedAdapter:
        """What is known of an adapter."""
        scores = self._scores[name]
        return CalibratedAdapter(name, math.fsum(scores) / len(scores), len(scores))

    def rank(self, name: str) -> tuple[int, float, str]:
        """A key that sorts the best first: those that were scored longest, by their means."""
        scores = self._scores.get(name)
        return (0, 0.0, name) if scores is None else (-len(scores), -math.fsum(scores) / len(scores), name)

    def _run(self, runs: list[tuple[str | None, Adapter | None, Sample]]) -> None:
        scores = self._score([(adapter, sample) for _, adapter, sample in runs])
        for (name, _, _), value in zip(runs, scores, strict=True):
            self._scores.setdefault(name, []).append(value)
            self._num_done += 1
            if self._progress is not None:
                self._progress(self._num_done, self._total)
