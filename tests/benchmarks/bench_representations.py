"""What samples, fewer samples and a card's prose are worth: how often the right adapter is found by each.

The cards are written here, from a task's name and its domain alone, as an author who says little would.

Usage: python tests/benchmarks/bench_representations.py DATA [--cache FOLDER] [--seeds 5]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from routing_data import Embedder, load, parse_arguments, report, unit

from langchain_lora_retriever.pool.card import parse_card

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from langchain_lora_retriever.evaluation import Benchmark

TOP_K = (1, 3, 5, 8)
NUM_SAMPLES = (20, 10, 5, 3, 1)


def write_card(task: str, domain: str) -> bytes:
    """A model card that says what can be known from a task's name and domain."""
    name, kind = task.replace("_", " "), domain.replace("_", " ")
    prose = f"A LoRA adapter for {kind}, trained on {name}."
    return f"---\ntags: [lora, {domain}]\nlibrary_name: peft\n---\n# {name}\n\n{prose}\n".encode()


def main() -> None:
    """Score every representation with words and without."""
    arguments = parse_arguments(__doc__ or "", seeds={"type": int, "default": 5})
    benchmark = load(arguments.data)
    embedder = Embedder(arguments.encoder, arguments.cache)
    for words in (False, True):
        score(benchmark, embedder, words=words, num_seeds=arguments.seeds)


def score(benchmark: Benchmark, embedder: Embedder, *, words: bool, num_seeds: int) -> None:
    """Score every representation with one encoder."""
    names = sorted(benchmark.cards)
    domains = benchmark.domains
    queries = embedder.embed([row.input for row in benchmark.rows], words=words)
    samples = {n: embedder.embed([s.input for s in benchmark.cards[n]], words=words) for n in names}
    cards = {n: parse_card(write_card(n, domains[n])).text for n in names}
    prose = {n: embedder.embed_card(cards[n], words=words) for n in names}
    right = np.array([names.index(row.task) for row in benchmark.rows])

    def tell(what: str, pools: Sequence[Mapping[str, NDArray[np.float32]]]) -> NDArray[np.int64]:
        ranks = np.stack([ranked(queries, np.stack([pool[n] for n in names]), right) for pool in pools])
        shares = {f"top_{k}": round(float((ranks < k).mean()) * 100, 1) for k in TOP_K}
        report(bench="representations", words=words, what=what, draws=len(pools), rows=len(right), **shares)
        return ranks

    for num in NUM_SAMPLES:
        seeds = range(1 if num == 20 else num_seeds)
        tell(f"{num} samples", [{n: mean(samples[n], num, seed) for n in names} for seed in seeds])
    tell("prose", [prose])
    whole = {n: mean(samples[n], 20, 0) for n in names}
    halves = [
        set(np.random.default_rng(seed).permutation(names)[: len(names) // 2].tolist()) for seed in range(num_seeds)
    ]
    mixed = [{n: prose[n] if n in half else whole[n] for n in names} for half in halves]
    ranks = tell("half of the pool with prose only", mixed)
    for is_prose in (True, False):
        kept = [np.array([(names[i] in half) is is_prose for i in right]) for half in halves]
        shares = {
            f"top_{k}": round(float(np.mean([(r[m] < k).mean() for r, m in zip(ranks, kept, strict=True)])) * 100, 1)
            for k in TOP_K
        }
        what = f"the rows of those with {'prose' if is_prose else 'samples'} in it"
        report(bench="representations", words=words, what=what, draws=num_seeds, **shares)


def mean(vectors: NDArray[np.float32], num: int, seed: int) -> NDArray[np.float32]:
    """The normalised mean of `num` rows drawn at random."""
    return unit(vectors[np.random.default_rng(seed).permutation(len(vectors))[:num]].mean(0))


def ranked(queries: NDArray[np.float32], adapters: NDArray[np.float32], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many adapters come before the right one, for each query."""
    scores = queries @ adapters.T
    return (scores > scores[np.arange(len(right)), right][:, None]).sum(1)


if __name__ == "__main__":
    main()
