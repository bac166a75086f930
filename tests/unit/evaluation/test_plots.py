"""Pictures, written and looked at only for being there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from langchain_lora_retriever import AdapterPool
from langchain_lora_retriever.errors import InvalidRequestError, MissingDependencyError
from langchain_lora_retriever.evaluation import plots
from langchain_lora_retriever.retrieval.retriever import LoraRetriever

if TYPE_CHECKING:
    from pathlib import Path

DOMAINS = {"sql": "code", "regex": "code", "french": "translation", "german": "translation"}


def test_every_plot_is_written(pool: Any, encoder: Any, tmp_path: Path) -> None:
    """Each function writes its picture, making the folder, and returns where."""
    names, vectors = plots.adapter_vectors(LoraRetriever(pool, encoder))
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    folder = tmp_path / "plots"
    written = [
        plots.plot_similarity(folder / "similarity.png", names, vectors, domains=DOMAINS),
        plots.plot_map(folder / "map.png", names, vectors, domains=DOMAINS),
        plots.plot_accuracy(folder / "accuracy.svg", {"words": {1: 0.5, 3: 0.9}}),
        plots.plot_throughput(folder / "throughput.png", {"here": {1: 10.0, 8: 60.0}}),
    ]
    assert all(file.stat().st_size > 1000 for file in written)


def test_drawing_needs_no_domains(pool: Any, encoder: Any, tmp_path: Path) -> None:
    """A pool whose domains are not known is drawn in one colour."""
    names, vectors = plots.adapter_vectors(LoraRetriever(pool, encoder))
    assert plots.plot_map(tmp_path / "map.png", names, vectors).is_file()


def test_a_pool_in_which_nothing_can_be_found_has_no_vectors(encoder: Any) -> None:
    """It is refused in words, and not by numpy."""
    with pytest.raises(InvalidRequestError, match="the pool has 0 adapters, and none that prompts can find"):
        plots.adapter_vectors(LoraRetriever(AdapterPool(), encoder))


def test_names_and_vectors_must_agree(tmp_path: Path) -> None:
    """Fewer vectors than names, or a map of a single adapter, are refused."""
    with pytest.raises(InvalidRequestError, match=r"shape \(1, 3\)"):
        plots.plot_similarity(tmp_path / "x.png", ["a", "b"], np.ones((1, 3), np.float32))
    with pytest.raises(InvalidRequestError, match="map of 1"):
        plots.plot_map(tmp_path / "x.png", ["a"], np.ones((1, 3), np.float32))


def test_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the error prints the pip install that brings it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"langchain-lora-retriever\[evaluate\]"):
        plots.plot_accuracy(tmp_path / "x.png", {})
