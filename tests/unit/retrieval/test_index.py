"""The FAISS index with named rows."""

from __future__ import annotations

import numpy as np
import pytest

from langchain_lora_retriever.retrieval.index import AdapterIndex


def unit_rows(n, d, seed=0):
    """`[n, d]` random unit vectors."""
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def index():
    """Fifty names in 16 dimensions."""
    index = AdapterIndex(16)
    index.update([f"a{i}" for i in range(50)], unit_rows(50, 16))
    return index


def test_search_is_exact(index):
    """Names and scores are those of sorting all inner products."""
    queries = unit_rows(7, 16, seed=1)
    scores = queries @ unit_rows(50, 16).T
    for row, found in zip(scores, index.search(queries, top_k=5), strict=True):
        best = np.argsort(-row)[:5]
        assert [name for name, _ in found] == [f"a{i}" for i in best]
        assert np.allclose([score for _, score in found], row[best], atol=1e-6)


@pytest.mark.parametrize("left_out", [1, 10, 49, 50])
def test_exclusion_is_exact(index, left_out):
    """Excluding names, few or all, finds what an index without them finds."""
    queries, gone = unit_rows(3, 16, seed=2), {f"a{i}" for i in range(left_out)}
    other = AdapterIndex(16)
    keep = [i for i in range(50) if f"a{i}" not in gone]
    other.update([f"a{i}" for i in keep], unit_rows(50, 16)[keep])
    found = index.search(queries, top_k=4, exclude=[gone] * 3)
    expected = other.search(queries, top_k=4)
    assert [[n for n, _ in row] for row in found] == [[n for n, _ in row] for row in expected]


def test_exclusion_is_per_query(index):
    """Each query leaves out its own names only."""
    query = unit_rows(1, 16, seed=3).repeat(2, axis=0)
    best = index.search(query[:1], top_k=2)[0]
    found = index.search(query, top_k=1, exclude=[{best[0][0]}, ()])
    assert [row[0][0] for row in found] == [best[1][0], best[0][0]]


def test_top_k_beyond_the_size_returns_all(index):
    """More than there are is all there are."""
    assert len(index.search(unit_rows(1, 16), top_k=1000)[0]) == 50


def test_empty_index_finds_nothing():
    """Without rows every query finds nothing."""
    assert AdapterIndex(4).search(unit_rows(2, 4), top_k=3) == [[], []]


def test_update_replaces_and_remove_forgets(index):
    """A name has one row, the last one given; a removed name is not found."""
    vector = unit_rows(1, 16, seed=4)
    index.update(["a3"], vector)
    assert len(index) == 50
    assert np.allclose(index.vector("a3"), vector[0])
    index.remove(["a3", "never there"])
    assert "a3" not in index.names
    with pytest.raises(KeyError):
        index.vector("a3")


def test_equal_scores_are_ordered_by_name():
    """Ties do not depend on the order of adding."""
    index = AdapterIndex(2)
    index.update(["b", "c", "a"], np.array([[1, 0]] * 3, dtype=np.float32))
    assert [name for name, _ in index.search(np.array([[1, 0]], dtype=np.float32), top_k=3)[0]] == ["a", "b", "c"]


def test_bad_updates(index):
    """Wrong shapes and repeated names are refused, and change nothing."""
    with pytest.raises(ValueError, match="allowed is"):
        index.update(["x"], unit_rows(1, 15))
    with pytest.raises(ValueError, match="not distinct"):
        index.update(["x", "x"], unit_rows(2, 16))
    assert len(index) == 50


def test_a_copy_goes_its_own_way(index):
    """A copy answers as the index does, and neither sees the other's later changes."""
    copy, queries = index.copy(), unit_rows(4, 16, seed=5)
    assert copy.names == index.names
    assert copy.search(queries, top_k=9) == index.search(queries, top_k=9)
    before = index.search(queries, top_k=50)
    copy.remove(index.names[:30])
    copy.update(["new"], unit_rows(1, 16, seed=6))
    assert index.search(queries, top_k=50) == before
    assert len(copy) == 21


@pytest.fixture(params=[0, 40, 64], ids=["dense", "with words", "words alone"])
def many(request):
    """400 rows and an empty index for them, of whose numbers the last are mostly zeros."""
    rows = unit_rows(400, 64, seed=5)
    rows[:, 64 - request.param :] *= np.random.default_rng(6).random((400, request.param)) < 0.2
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), AdapterIndex(64, num_sparse=request.param)


@pytest.mark.parametrize("num_queries", [1, 7, 8, 150])
def test_what_a_query_lacks_need_not_be_read(many, num_queries):
    """Scores and names are those of sorting all inner products, whichever numbers of a query are zeros."""
    rows, index = many
    index.update([f"a{i}" for i in range(400)], rows)
    index.remove([f"a{i}" for i in range(50)])
    queries = np.roll(rows, 7, axis=0)[:num_queries] + 0.1 * rows[-num_queries:]
    scores = queries @ rows[50:].T
    for top_k in (1, 5, 400):
        for row, found in zip(scores, index.search(queries, top_k=top_k), strict=True):
            best = np.argsort(-row)[:top_k]
            assert np.allclose([score for _, score in found], row[best], atol=1e-5)
            assert np.allclose([row[int(name[1:]) - 50] for name, _ in found], row[best], atol=1e-5)


def test_copies_share_rows_and_no_changes(many):
    """Whatever is added, replaced and removed in one: each finds its own, and so do copies of copies."""
    rows, first = many
    first.update([f"a{i}" for i in range(390)], rows[:390])
    second = first.copy()
    second.update(["new", "a0"], rows[390:392])
    second.remove([f"a{i}" for i in range(1, 300)])
    third = first.copy()
    third.update(["other"], rows[392:393])
    for index, name, row, size in (
        (first, "a0", 0, 390), (second, "new", 390, 92), (second, "a0", 391, 92), (third, "other", 392, 391),
    ):  # fmt: skip
        assert len(index) == len(index.names) == size
        assert np.array_equal(index.vector(name), rows[row])
        assert index.search(rows[row : row + 1], top_k=1)[0][0][0] == name
    assert "new" not in third.names
    assert second.search(rows[1:2], top_k=1)[0][0][0] != "a1"
    assert first.search(rows[1:2], top_k=1)[0][0][0] == "a1"
