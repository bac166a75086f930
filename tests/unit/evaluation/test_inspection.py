"""What a pool's samples say about it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.evaluation import CardPool, inspect_pool
from langchain_lora_retriever.evaluation.inspection import find_twins
from langchain_lora_retriever.retrieval.retriever import LoraRetriever


def test_distinct_adapters_are_told_apart(pool: Any, encoder: Any) -> None:
    """Samples find their own adapters, and the calibrated score lets nearly all of them."""
    inspection = inspect_pool(LoraRetriever(pool, encoder))
    assert (inspection.num_adapters, inspection.num_samples) == (4, 16)
    assert inspection.accuracy == 1.0
    assert inspection.twins == ()
    assert inspection.reaches == ()
    retriever = LoraRetriever(pool, encoder, min_score=inspection.min_score)
    assert retriever.retrieve("Write a query that counts the trains.")[0].name == "sql"
    assert retriever.retrieve("Once upon a time") == []
    json.dumps(inspection.to_dict())


def test_copies_are_reported_as_twins(benchmark_: Any, encoder: Any) -> None:
    """An adapter under two names is a pair of twins, and the samples of each reach the other."""
    cards = {**benchmark_.cards, "sql_copy": benchmark_.cards["sql"]}
    inspection = inspect_pool(LoraRetriever(CardPool(cards), encoder))
    (pair,) = inspection.twins
    assert (pair.first, pair.second, pair.similarity) == ("sql", "sql_copy", pytest.approx(1.0))
    assert {(reach.samples_of, reach.find) for reach in inspection.reaches} == {
        ("sql", "sql_copy"),
        ("sql_copy", "sql"),
    }


def test_kept_moves_the_score(pool: Any, encoder: Any) -> None:
    """The fewer samples must be kept, the higher the score may be."""
    retriever = LoraRetriever(pool, encoder)
    assert inspect_pool(retriever, kept=0.5).min_score >= inspect_pool(retriever, kept=1.0).min_score


def test_unusable_requests_are_refused(pool: Any, encoder: Any) -> None:
    """A share above 1 or that is no number, and a pool of one adapter, are refused."""
    retriever = LoraRetriever(pool, encoder)
    odd: list[Any] = [2, "x", None, True]
    for kept in odd:
        with pytest.raises(InvalidRequestError, match=f"kept={kept!r} is not allowed"):
            inspect_pool(retriever, kept=kept)
    for z in ("x", float("nan")):
        with pytest.raises(InvalidRequestError, match=f"z={z!r} is not allowed"):
            find_twins(retriever, z=z)  # type: ignore[arg-type]
    for name in ("sql", "regex", "french"):
        pool.remove(name)
    with pytest.raises(InvalidRequestError, match="1 of 1 adapters"):
        inspect_pool(retriever)
