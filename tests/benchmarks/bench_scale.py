"""Routing over up to 10,000 adapters: quality, time, memory, and changes while queries run.

The cards' samples are split into adapters of five, so that a task has several right answers; the others are generated
tasks, of two samples each, whose prompts share words and subjects with the real ones.

Usage: python tests/benchmarks/bench_scale.py DATA [--cache FOLDER] [--sizes 192 1000 10000] [--changes 1000]
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import threading
import time
from typing import TYPE_CHECKING

import faiss
import numpy as np
from routing_data import Embedder, load, parse_arguments, report, unit

from langchain_lora_retriever import AdapterPool, LoraRetriever
from langchain_lora_retriever.pool.entry import PoolEntry
from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder
from langchain_lora_retriever.retrieval.index import AdapterIndex
from langchain_lora_retriever.types import Adapter
from makers import make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from langchain_lora_retriever.evaluation import Benchmark

TOP_K = (1, 3, 5, 8)
SAMPLES_PER_ADAPTER = 5
ACTIONS = (
    "Summarize", "Translate into French", "Classify", "Rewrite in plain words", "Answer a question about",
    "Extract the names from", "Extract the dates from", "Continue", "Shorten", "Correct the grammar of",
    "Write a title for", "List the key points of", "Say whether the tone is positive or negative of",
    "Turn into JSON", "Write SQL for", "Explain to a child", "Write a reply to", "Find the topic of", "Say who wrote",
    "Convert the units in",
)  # fmt: skip
THINGS = (
    "email", "news article", "contract", "recipe", "tweet", "product review", "movie review", "lecture", "poem",
    "invoice", "support ticket", "chat", "research abstract", "log file", "job advertisement", "weather report",
    "patent", "letter", "table", "medical record", "speech", "diary entry", "travel guide", "court ruling",
    "press release",
)  # fmt: skip
SUBJECTS = (
    "banking", "football", "astronomy", "cooking", "politics", "insurance", "gardening", "music", "chemistry",
    "fashion", "aviation", "history", "biology", "software", "tourism", "farming", "energy", "education",
    "real estate", "art",
)  # fmt: skip


def main() -> None:
    """Score and time every size."""
    arguments = parse_arguments(
        __doc__ or "",
        sizes={"type": int, "nargs": "+", "default": [48, 192, 1000, 3000, 10_000]},
        changes={"type": int, "default": 1000},
    )
    benchmark = load(arguments.data)
    embedder = Embedder(arguments.encoder, arguments.cache)
    queries = embedder.embed([row.input for row in benchmark.rows], words=True)
    real, whole = real_adapters(benchmark, embedder, SAMPLES_PER_ADAPTER), real_adapters(benchmark, embedder, 20)
    others = generated_adapters(embedder, max(arguments.sizes) - len(real))
    for size in arguments.sizes:
        adapters = whole if size <= len(whole) else {**real, **dict(itertools.islice(others.items(), size - len(real)))}
        score(benchmark, queries, adapters)
    change(benchmark, embedder, {**real, **others}, arguments.changes)


def real_adapters(benchmark: Benchmark, embedder: Embedder, num: int) -> dict[str, NDArray[np.float32]]:
    """The cards as adapters of `num` samples each, named `task/number`."""
    adapters = {}
    for task, samples in benchmark.cards.items():
        vectors = embedder.embed([sample.input for sample in samples], words=True)
        for start in range(0, len(vectors), num):
            adapters[f"{task}/{start // num}"] = unit(vectors[start : start + num].mean(0))
    return adapters


def generated_adapters(embedder: Embedder, num: int) -> dict[str, NDArray[np.float32]]:
    """Tasks that nobody asks for, in random order."""
    tasks = list(itertools.product(ACTIONS, THINGS, SUBJECTS))
    chosen = [tasks[i] for i in np.random.default_rng(0).permutation(len(tasks))[:num]]
    texts = [
        text
        for action, thing, subject in chosen
        for text in (
            f"{action} the following {thing} on {subject}:\n\nThe {thing} begins with a note on {subject}.",
            f"Here is a {thing} for people in {subject}. {action} it.\n\nOPTIONS:\n- yes\n- no",
        )
    ]
    vectors = embedder.embed(texts, words=True).reshape(len(chosen), 2, -1)
    return {f"generated/{'-'.join(task)}": unit(pair.mean(0)) for task, pair in zip(chosen, vectors, strict=True)}


def score(benchmark: Benchmark, queries: NDArray[np.float32], adapters: Mapping[str, NDArray[np.float32]]) -> None:
    """How often an adapter of the right task is among the first, and what a search costs."""
    names, vectors = list(adapters), np.stack(list(adapters.values()))
    start = time.perf_counter()
    index = AdapterIndex(vectors.shape[1], num_sparse=1024)
    index.update(names, vectors)
    seconds = time.perf_counter() - start
    found = index.search(queries, top_k=max(TOP_K))
    tasks = [row.task for row in benchmark.rows]
    _, exact = faiss.knn(queries, vectors, max(TOP_K), metric=faiss.METRIC_INNER_PRODUCT)
    rows = [([name for name, _ in f], [names[i] for i in e]) for f, e in zip(found, exact, strict=True)]
    shares: dict[str, float] = {}
    for k in TOP_K:
        is_right = [t in {n.partition("/")[0] for n in f[:k]} for t, (f, _) in zip(tasks, rows, strict=True)]
        shares[f"top_{k}"] = round(100 * statistics.mean(is_right), 1)
        shares[f"as_exact_{k}"] = round(100 * statistics.mean(set(f[:k]) == set(e[:k]) for f, e in rows), 2)
    times = []
    for query in queries[:500]:
        begin = time.perf_counter()
        index.search(query[None], top_k=3)
        times.append((time.perf_counter() - begin) * 1e3)
    report(
        bench="scale", num_adapters=len(names), dimension=vectors.shape[1], **shares,
        median_ms=round(statistics.median(times), 3), p99_ms=round(float(np.quantile(times, 0.99)), 3),
        build_seconds=round(seconds, 3), index_mib=round(index.num_bytes / 2**20, 1),
    )  # fmt: skip


def change(benchmark: Benchmark, embedder: Embedder, adapters: dict[str, NDArray[np.float32]], num: int) -> None:
    """Add and remove adapters while another thread retrieves; each change must show in the next query."""
    checkpoint = make_checkpoint(tempfile.mkdtemp())
    pool = AdapterPool()
    entries = {n: PoolEntry(Adapter(name=n, fingerprint="", weights={}), embedding=v) for n, v in adapters.items()}
    pool._replace_state(entries, {})
    retriever = LoraRetriever(pool, HybridEncoder(embedder))
    texts = [row.input for row in benchmark.rows]
    start = time.perf_counter()
    retriever.refresh()
    seconds = time.perf_counter() - start
    retriever.embed(texts)
    times: list[float] = []
    is_done = threading.Event()

    def query() -> None:
        for text in itertools.cycle(texts):
            if is_done.is_set():
                return
            begin = time.perf_counter()
            retriever.retrieve(text)
            times.append((time.perf_counter() - begin) * 1e3)
            time.sleep(0.001)  # a query at a time, not a race for the interpreter

    alone = []
    for text in texts[:500]:
        begin = time.perf_counter()
        retriever.retrieve(text)
        alone.append((time.perf_counter() - begin) * 1e3)
    thread = threading.Thread(target=query)
    thread.start()
    visible = []
    vector = retriever.embed(texts[:1])[0]
    for number in range(num // 2):
        pool.add(f"new-{number}", checkpoint, embedding=vector)
        begin = time.perf_counter()
        assert retriever.retrieve(texts[0], top_k=1)[0].name == f"new-{number}"
        visible.append((time.perf_counter() - begin) * 1e3)
        pool.remove(f"new-{number}")
        assert retriever.retrieve(texts[0], top_k=1)[0].name != f"new-{number}"
    is_done.set()
    thread.join()
    report(
        bench="changes", num_adapters=len(adapters), num_changes=num, first_refresh_seconds=round(seconds, 3),
        alone_median_ms=round(statistics.median(alone), 3), alone_p99_ms=round(float(np.quantile(alone, 0.99)), 3),
        num_queries=len(times), beside_median_ms=round(statistics.median(times), 3),
        beside_p99_ms=round(float(np.quantile(times, 0.99)), 3), beside_max_ms=round(max(times), 1),
        next_query_median_ms=round(statistics.median(visible), 3), next_query_max_ms=round(max(visible), 1),
    )  # fmt: skip


if __name__ == "__main__":
    main()
