"""Retrieved adapters to a composition, and a composition to the adapters an engine runs.

Selection is one adapter of weight 1, mixture several with weights, and fusion one made of several. So the engine
only ever sees a short list of (adapter, weight).

Source: LoraRetriever, arXiv:2402.09997, section 3.3.
"""

from __future__ import annotations

import math
from numbers import Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.retrieval.fusion import fuse
from langchain_lora_retriever.support.shown import shown
from langchain_lora_retriever.types import (
    Adapter,
    ComposedAdapter,
    Composition,
    CompositionMode,
    RetrievedAdapter,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_lora_retriever.pool.pool import AdapterPool

__all__ = ["Weighting", "compose", "materialize", "pin"]

Weighting: TypeAlias = Literal["uniform", "similarity"]
Members: TypeAlias = "Sequence[tuple[str, float]]"
_NO_TASKS: Mapping[str, Members] = MappingProxyType({})

_MIN_STEPS = 16
"""Similarity shares are multiples of one such part."""


def compose(
    retrieved: Sequence[RetrievedAdapter],
    *,
    mode: CompositionMode,
    weights: Weighting = "uniform",
    temperature: float = 0.05,
    tasks: Mapping[str, Members] = _NO_TASKS,
) -> Composition:
    """Decide which adapters run, and with what weight.

    Semantics:
        selection:        the best adapter, weight 1
        fusion, mixture:  all of them; "uniform" 1 / k, "similarity" softmax(score / temperature), rounded
        Similarity shares are whole multiples of 1/16 (of 1/32 above 4 adapters, 1/64 above 8, and so on) that sum to
        exactly 1, by the method of largest remainders: none moves by a whole step, and none overtakes a better one's.
        Adapters left without a share do not run. So prompts for the same adapters share cached prefixes and fusions.
        A task among those retrieved gives its share to its members by theirs; in a selection the first has all of it.
        Then the largest shares count, scaled to sum to 1: as many as were retrieved, or as the nearest stands for.

    Args:
        retrieved: Adapters of distinct names; none means that the base model answers alone.
        mode: How they are composed.
        weights: How their shares are set; of no effect on selection.
        temperature: The smaller, the more the best one counts; finite and above 0.
        tasks: The members, the largest share first, of names that stand for adapters and are none.

    Raises:
        InvalidRequestError: If an argument is out of its range.
    """
    _check(mode, [adapter.name for adapter in retrieved])
    if weights not in get_args(Weighting):
        raise InvalidRequestError(f"weights={weights!r} is not allowed: pass one of {get_args(Weighting)}.")
    if not _is_finite(temperature) or temperature <= 0:
        raise InvalidRequestError(f"temperature={shown(temperature)} is not allowed: pass a finite number above 0.")
    for adapter in retrieved:
        if not _is_finite(adapter.score):
            raise InvalidRequestError(
                f"score={shown(adapter.score)} of {adapter.name!r} is not allowed: pass a number."
            )
    if not retrieved:
        return Composition(mode)
    ranked = sorted(retrieved, key=lambda adapter: (-adapter.score, adapter.name))
    if mode == "selection":
        ranked = ranked[:1]
    shares = [1 / len(ranked)] * len(ranked)
    if weights != "uniform":
        powers = [math.exp((adapter.score - ranked[0].score) / temperature) for adapter in ranked]
        total = sum(powers)
        shares = [power / total for power in powers]
    has_tasks = not tasks.keys().isdisjoint(adapter.name for adapter in ranked)
    if has_tasks:
        ranked, shares = _expanded(ranked, shares, tasks, num=1 if mode == "selection" else None)
    if has_tasks or weights != "uniform":
        shares = _rounded(shares)
    members = (ComposedAdapter(a.name, share, a.score) for a, share in zip(ranked, shares, strict=True) if share)
    return Composition(mode, tuple(members))


def pin(names: Sequence[str], *, mode: CompositionMode, weights: Sequence[float] | None = None) -> Composition:
    """Compose adapters the caller names, without retrieval.

    Args:
        names: Distinct names; none means that the base model answers alone.
        mode: How they are composed. Selection takes one name at most.
        weights: Their shares, finite and above 0, scaled to sum to 1; equal by default.

    Raises:
        InvalidRequestError: If an argument is out of its range.
    """
    if isinstance(names, str):
        raise InvalidRequestError(f"adapters={names!r} is not allowed: pass a list of names.")
    _check(mode, names)
    if mode == "selection" and len(names) > 1:
        raise InvalidRequestError(
            f"composition='selection' runs one adapter, but {list(names)!r} were pinned. "
            "Pin one, or choose 'mixture' or 'fusion'."
        )
    shares = [1.0] * len(names) if weights is None else list(weights)
    if len(shares) != len(names) or not all(_is_finite(share) and share > 0 for share in shares):
        raise InvalidRequestError(
            f"weights={shown(weights)} is not allowed for {len(names)} adapters: pass one finite number "
            "above 0 for each."
        )
    exponent = math.frexp(max(shares, default=1.0))[1]
    shares = [math.ldexp(share, -exponent) for share in shares]  # so that their sum is finite
    total = sum(shares)
    return Composition(mode, tuple(ComposedAdapter(n, share / total) for n, share in zip(names, shares, strict=True)))


def materialize(composition: Composition, pool: AdapterPool) -> tuple[tuple[Adapter, float], ...]:
    """The adapters to run for a composition, with weights; () for the base model alone. Nothing is computed.

    Args:
        composition: Selection and mixture run their members as they are; a fusion runs as one adapter of weight 1.
        pool: Where the names are looked up.

    Raises:
        UnknownAdapterError: If the pool lacks one of the names.
    """
    members = tuple((pool[member.name], member.weight) for member in composition.adapters)
    if composition.mode != "fusion" or not members:
        return members
    return ((fuse(members), 1.0),)


def _expanded(
    ranked: Sequence[RetrievedAdapter], shares: Sequence[float], tasks: Mapping[str, Members], num: int | None
) -> tuple[list[RetrievedAdapter], list[float]]:
    """Adapters in the place of tasks, and their shares, the largest first.

    One that is found and stands in a task as well, or in two tasks, has all of these shares and the best of the scores.

    Args:
        ranked: What was retrieved, best first.
        shares: Of each.
        tasks: The members of tasks.
        num: How many adapters to keep; by default as many as were retrieved, or as the best stands for.
    """
    totals: dict[str, float] = {}
    scores: dict[str, float] = {}
    for adapter, share in zip(ranked, shares, strict=True):
        members = tasks.get(adapter.name, ((adapter.name, 1.0),))
        whole = math.fsum(part for _, part in members)
        for name, part in members:
            totals[name] = totals.get(name, 0.0) + share * part / whole
            scores.setdefault(name, adapter.score)
    kept = sorted(totals, key=lambda name: (-totals[name], name))
    kept = kept[: num or max(len(ranked), len(tasks.get(ranked[0].name, ())))]
    total = math.fsum(totals[name] for name in kept)
    return [RetrievedAdapter(name, scores[name]) for name in kept], [totals[name] / total for name in kept]


def _rounded(shares: Sequence[float]) -> list[float]:
    """Shares that sum to 1, best first, as multiples of a power of two: by the method of largest remainders."""
    num_steps = max(_MIN_STEPS, 1 << (4 * len(shares) - 1).bit_length())
    counts = [math.floor(share * num_steps) for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i] * num_steps, i))
    for i in order[: num_steps - sum(counts)]:
        counts[i] += 1
    return [count / num_steps for count in counts]


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _check(mode: str, names: Sequence[str]) -> None:
    if mode not in get_args(CompositionMode):
        raise InvalidRequestError(f"composition={mode!r} is not allowed: pass one of {get_args(CompositionMode)}.")
    if len(set(names)) != len(names):
        raise InvalidRequestError(f"adapters={list(names)!r} is not allowed: name each adapter once.")
