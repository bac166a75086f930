"""Whether scores tell prompts that no adapter is for: leave a domain out, and compare with prompts that have one.

Usage: python tests/benchmarks/bench_abstention.py DATA [--cache FOLDER]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from routing_data import Embedder, load, parse_arguments, report, unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from langchain_lora_retriever.evaluation import Benchmark

TOP_K = 3
DEVIATIONS = (2.0, 2.5, 3.0, 3.5, 4.0)
"""Of an adapter's own samples, how far below their mean a prompt's score may lie."""
KEPT = (0.99, 0.98, 0.95)
"""Shares of all samples that reach one floor for all adapters."""


def main() -> None:
    """Score every signal, with words and without."""
    arguments = parse_arguments(__doc__ or "")
    benchmark = load(arguments.data)
    embedder = Embedder(arguments.encoder, arguments.cache)
    for words in (False, True):
        score(benchmark, embedder, words=words)


def score(benchmark: Benchmark, embedder: Embedder, *, words: bool) -> None:
    """The area under the ROC of each signal, and what thresholds set by the pool's samples do."""
    names = sorted(benchmark.cards)
    domains = benchmark.domains
    rows = benchmark.rows
    queries = embedder.embed([row.input for row in rows], words=words)
    samples = [embedder.embed([s.input for s in benchmark.cards[n]], words=words) for n in names]
    adapters = unit(np.stack([vectors.mean(0) for vectors in samples]))
    own = [leave_one_out(vectors) for vectors in samples]
    signals = {s: {"in": [], "out": []} for s in ("score", "margin", "words", "meaning", "score less own mean", "z")}
    for domain in sorted(set(domains.values())):
        left = [i for i, name in enumerate(names) if domains[name] != domain]
        found = measure(queries, adapters[left], [own[i] for i in left], embedder.dimension)
        is_out = np.array([row.domain == domain for row in rows])
        for signal, values in found.items():
            if signal in signals:
                signals[signal]["out"].append(values[is_out])
                signals[signal]["in"].append(values[~is_out])
    for signal, parts in signals.items():
        if signal in ("words", "meaning") and not words:
            continue
        inside, outside = np.concatenate(parts["in"]), np.concatenate(parts["out"])
        at = {
            f"sent_to_base_at_{loss:g}_lost": round(100 * float((outside < np.quantile(inside, loss / 100)).mean()), 1)
            for loss in (0.5, 1, 2, 5)
        }
        report(bench="abstention", words=words, signal=signal, auc=round(area(inside, outside), 3), **at)
    scores = (queries @ adapters.T).astype(np.float64)
    means, spreads = np.array([o.mean() for o in own]), np.array([o.std() for o in own])
    floors = {f"own mean less {k:g} deviations": means - k * spreads for k in DEVIATIONS}
    floors |= {
        f"one that {k:.0%} of the samples reach": np.full(len(names), np.quantile(np.concatenate(own), 1 - k))
        for k in KEPT
    }
    right = np.array([names.index(row.task) for row in rows])
    for rule, floor in floors.items():
        is_near = scores >= floor
        left_out = []
        for domain in sorted(set(domains.values())):
            is_out = np.array([row.domain == domain for row in rows])
            others = np.where([domains[name] != domain for name in names], scores[is_out], -np.inf)
            left_out.append(is_near_any(others, is_near[is_out]))
        report(
            bench="floors", words=words, rule=rule,
            right_adapter_lost=round(100 * float((~is_near[np.arange(len(right)), right]).mean()), 2),
            sent_to_base_in_distribution=round(100 * float((~is_near_any(scores, is_near)).mean()), 2),
            sent_to_base_of_left_out=round(100 * float((~np.concatenate(left_out)).mean()), 1),
        )  # fmt: skip


def is_near_any(scores: NDArray[np.float64], is_near: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether one of a prompt's best three adapters takes it for near."""
    best = np.argsort(-scores, axis=1)[:, :TOP_K]
    return np.take_along_axis(is_near, best, 1).any(1)


def measure(
    queries: NDArray[np.float32], adapters: NDArray[np.float32], own: list[NDArray[np.float64]], num_meaning: int
) -> dict[str, NDArray[np.float64]]:
    """Signals of each query's nearest adapter."""
    scores = (queries @ adapters.T).astype(np.float64)
    best = scores.argmax(1)
    top = np.sort(scores, axis=1)[:, ::-1]
    means, spreads = np.array([o.mean() for o in own]), np.array([o.std() for o in own])
    nearest = adapters[best]
    parts = {"meaning": slice(0, num_meaning), "words": slice(num_meaning, None)}
    signals = {"score": top[:, 0], "margin": top[:, 0] - top[:, 1], "score less own mean": top[:, 0] - means[best]}
    signals["z"] = signals["score less own mean"] / spreads[best]
    for name, part in parts.items():
        if queries.shape[1] > num_meaning:
            signals[name] = (unit(queries[:, part]) * unit(nearest[:, part])).sum(1).astype(np.float64)
    return signals


def leave_one_out(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Each sample's cosine with the mean of the others."""
    return (vectors * unit(vectors.sum(0) - vectors)).sum(1).astype(np.float64)


def area(inside: NDArray[np.float64], outside: NDArray[np.float64]) -> float:
    """The probability that one of the first is above one of the second."""
    order = np.argsort(np.concatenate([inside, outside]), kind="stable")
    ranks = np.empty(len(order))
    ranks[order] = np.arange(1, len(order) + 1)
    num = len(inside)
    return float((ranks[:num].sum() - num * (num + 1) / 2) / (num * len(outside)))


if __name__ == "__main__":
    main()
