"""Whatever is added, replaced and removed: the index is the mapping it should be."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from langchain_lora_retriever.retrieval.index import AdapterIndex

DIMENSION = 8
NAMES = st.sampled_from([f"n{i}" for i in range(8)])
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["update", "remove"]), st.lists(NAMES, unique=True, max_size=5), st.integers(0, 10**6)),
    max_size=12,
)


def unit_rows(n, seed):
    """`[n, DIMENSION]` random unit vectors."""
    rows = np.random.default_rng(seed).normal(size=(n, DIMENSION)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def build(operations):
    """The index after the operations, and the mapping it should equal."""
    index, expected = AdapterIndex(DIMENSION), {}
    for kind, names, seed in operations:
        if kind == "update":
            vectors = unit_rows(len(names), seed)
            index.update(names, vectors)
            expected.update(zip(names, vectors, strict=True))
        else:
            index.remove(names)
            for name in names:
                expected.pop(name, None)
    return index, expected


@given(OPERATIONS, st.lists(st.sets(NAMES), min_size=3, max_size=3), st.integers(1, 10))
def test_any_sequence_keeps_the_mapping(operations, exclude, top_k):
    """After any changes the rows are those of a plain dictionary, and so is every search."""
    index, expected = build(operations)
    assert sorted(index.names) == sorted(expected)
    for name, vector in expected.items():
        assert np.array_equal(index.vector(name), vector)
    queries = unit_rows(3, seed=1)
    for query, left_out, found in zip(
        queries, exclude, index.search(queries, top_k=top_k, exclude=exclude), strict=True
    ):
        scores = {name: float(query @ vector) for name, vector in expected.items() if name not in left_out}
        assert len(found) == min(top_k, len(scores))
        assert np.allclose([score for _, score in found], sorted(scores.values(), reverse=True)[:top_k], atol=1e-5)
        assert all(abs(scores[name] - score) < 1e-5 for name, score in found)


@given(OPERATIONS, st.permutations(range(6)))
def test_permuting_queries_permutes_results(operations, order):
    """A query finds the same wherever it stands in the batch."""
    index, _ = build(operations)
    queries = unit_rows(6, seed=2)
    straight, permuted = index.search(queries, top_k=4), index.search(queries[list(order)], top_k=4)
    for row, i in zip(permuted, order, strict=True):
        assert [name for name, _ in row] == [name for name, _ in straight[i]]
        assert np.allclose([score for _, score in row], [score for _, score in straight[i]], atol=1e-6)
