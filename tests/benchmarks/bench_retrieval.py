"""Time the index per query, and loading a pool: JSON lines, seeded, warmed up, correctness checked first.

Usage: python tests/benchmarks/bench_retrieval.py [--adapters 10000] [--dimension 384] [--pool FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version

import numpy as np

from langchain_lora_retriever.retrieval.index import AdapterIndex

QUERIES = 256


def unit_rows(n: int, d: int, seed: int) -> np.ndarray:
    """`[n, d]` random unit vectors."""
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def report(**values: object) -> None:
    """Print one result with the machine and the versions."""
    machine = {"cpu_count": os.cpu_count(), "machine": platform.machine(), "faiss": version("faiss-cpu")}
    print(json.dumps(values | machine))


def bench_index(num_adapters: int, dimension: int) -> None:
    """Time a search of one query, alone and excluding adapters, and of a batch; then a change."""
    vectors, queries = unit_rows(num_adapters, dimension, 0), unit_rows(QUERIES, dimension, 1)
    index = AdapterIndex(dimension)
    names = [f"adapter-{i}" for i in range(num_adapters)]
    index.update(names, vectors)
    best = (queries @ vectors.T).argmax(axis=1)
    assert [row[0][0] for row in index.search(queries, top_k=3)] == [names[i] for i in best]
    shared = {"num_adapters": num_adapters, "dimension": dimension}
    for num_excluded in (0, 1, 100, num_adapters // 2):
        exclude = [frozenset(names[:num_excluded])]
        times = []
        for query in queries:
            start = time.perf_counter()
            index.search(query[None], top_k=3, exclude=exclude)
            times.append((time.perf_counter() - start) * 1e3)
        times = sorted(times[16:])
        report(
            bench="search", num_excluded=num_excluded, median_ms=round(statistics.median(times), 4),
            p99_ms=round(times[int(len(times) * 0.99)], 4), **shared,
        )  # fmt: skip
    start = time.perf_counter()
    index.search(queries, top_k=3)
    report(bench="search_batch", ms_per_query=round((time.perf_counter() - start) * 1e3 / QUERIES, 4), **shared)
    start = time.perf_counter()
    index.update(names[:1], vectors[:1])
    report(bench="update_one", ms=round((time.perf_counter() - start) * 1e3, 3), **shared)


def bench_pool(folder: str) -> None:
    """Time loading a pool, imports excluded."""
    from langchain_lora_retriever.pool.pool import AdapterPool  # torch is not needed for the index

    AdapterPool(folder)
    start = time.perf_counter()
    pool = AdapterPool(folder)
    report(bench="load_pool", num_adapters=len(pool), seconds=round(time.perf_counter() - start, 3))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--pool")
    arguments = parser.parse_args()
    bench_index(arguments.adapters, arguments.dimension)
    if arguments.pool:
        bench_pool(arguments.pool)
