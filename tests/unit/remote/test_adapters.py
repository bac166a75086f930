"""What an adapter is on the other side, where no folder is seen by both."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.remote.adapters import AdapterContents


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_dora": True},
        {"alora_invocation_tokens": [7, 8]},
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True, "saves_base": "auto"},
    ],
    ids=["plain", "dora", "activated", "embedding"],
)
def test_an_adapter_that_is_sent_is_the_same(tmp_path: Any, make_checkpoint: Any, lora: dict[str, Any]) -> None:
    """Whatever tensors it has, and whatever its configuration says of when it is active."""
    adapter = read_adapter(make_checkpoint(tmp_path / "a", **lora))
    got = pickle.loads(pickle.dumps(AdapterContents.of(adapter))).to_adapter()
    assert got == adapter
    assert (got.is_dora, got.invocation_tokens, got.num_rows) == (
        adapter.is_dora,
        adapter.invocation_tokens,
        adapter.num_rows,
    )
    assert got.weights.keys() == adapter.weights.keys()
    for path, theirs in adapter.weights.items():
        mine = got.weights[path]
        assert mine.scaling == theirs.scaling
        for name in ("lora_A", "lora_B", "magnitude"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    assert got.base_weights.keys() == adapter.base_weights.keys()
    assert all(torch.equal(got.base_weights[path], weight) for path, weight in adapter.base_weights.items())
