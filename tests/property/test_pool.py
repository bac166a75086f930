"""Whatever is added, updated and removed: pool, folder and retriever agree."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from langchain_lora_retriever.pool.pool import AdapterPool
from langchain_lora_retriever.retrieval.retriever import LoraRetriever

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "update", "remove", "query"]), st.sampled_from("abcd"), st.integers(0, 5)),
    max_size=10,
)


class HashEncoder:
    """A fixed random vector per text."""

    name = "hash"
    dimension = 16

    def encode(self, texts):
        """Embed texts."""
        seeds = [int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts]
        return np.array([np.random.default_rng(seed).normal(size=16) for seed in seeds], dtype=np.float32)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, make_checkpoint):
    """Two checkpoints to choose from."""
    root = tmp_path_factory.mktemp("checkpoints")
    return [make_checkpoint(root / str(i), seed=i, target_modules=["q_proj"]) for i in range(2)]


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_any_sequence_keeps_pool_folder_and_index_together(checkpoints, tmp_path_factory, on_disk, operations):
    """After any changes the pool is the expected mapping, its folder loads as it, and the index finds just it."""
    folder = tmp_path_factory.mktemp("pool") / "pool" if on_disk else None
    pool = AdapterPool(folder, create=True)
    retriever, expected, version = LoraRetriever(pool, HashEncoder()), {}, pool.version
    for kind, name, i in operations:
        samples = [f"sample {i}", f"other {i}"]
        if kind == "query":
            retriever.retrieve(f"query {i}")
        elif kind == "add" and name not in expected:
            pool.add(name, checkpoints[i % 2], samples=samples)
            expected[name] = i
        elif kind == "update" and name in expected:
            pool.update(name, checkpoints[i % 2], samples=samples)
            expected[name] = i
        elif kind == "remove" and name in expected:
            pool.remove(name)
            del expected[name]
        else:
            continue
        assert pool.version >= version
        version = pool.version
    assert pool.names == tuple(sorted(expected))
    assert all(pool.samples(name)[0].input == f"sample {i}" for name, i in expected.items())
    fresh = AdapterPool()
    for name, i in expected.items():
        fresh.add(name, checkpoints[i % 2], samples=[f"sample {i}", f"other {i}"])
    assert pool.fingerprint == fresh.fingerprint
    if on_disk:
        assert AdapterPool(folder, create=True).fingerprint == pool.fingerprint
        assert {path.name for path in folder.iterdir()} - {".lock"} == set(expected)
    found = retriever.retrieve("a query", top_k=10)
    assert sorted(adapter.name for adapter in found) == sorted(expected)
    again = LoraRetriever(fresh, HashEncoder()).retrieve("a query", top_k=10)
    assert [adapter.score for adapter in found] == pytest.approx([adapter.score for adapter in again], abs=2e-6)
