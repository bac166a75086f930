"""Reading benchmarks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from langchain_lora_retriever.errors import InvalidRequestError, InvalidSamplesError
from langchain_lora_retriever.evaluation import CardPool, benchmark_from_pool, load_benchmark

if TYPE_CHECKING:
    from pathlib import Path


def test_rows_among_the_samples_are_excluded(benchmark_: Any) -> None:
    """A test row that is a sample but for case and blanks is left out, and counted."""
    assert len(benchmark_.rows) == 8
    assert benchmark_.num_excluded == 1


def test_domains_and_metrics_have_defaults(benchmark_files: tuple[Path, Path]) -> None:
    """A row without a domain is its own, without a metric counts exact matches, and may expect no words at all."""
    cards, test = benchmark_files
    test.write_text(json.dumps([{"inputs": "Write a query for all.", "targets": "", "task": "sql"}]))
    (row,) = load_benchmark(cards, test).rows
    assert (row.domain, row.metric) == ("sql", "em")


def test_a_pool_is_its_own_cards(benchmark_: Any, benchmark_files: tuple[Path, Path]) -> None:
    """The samples of a pool stand in for a cards file."""
    assert benchmark_from_pool(CardPool(benchmark_.cards), benchmark_files[1]).rows == benchmark_.rows


def test_subset_takes_rows_of_every_task(benchmark_: Any) -> None:
    """A subset has the asked number of rows of each task, in the benchmark's order."""
    small = benchmark_.subset(1, seed=1)
    assert [row.task for row in small.rows] == ["sql", "regex", "french", "german"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ('{"inputs": "a"}', "holds no list"),
        ('[{"inputs": "a", "targets": "b", "task": "poetry"}]', "no adapter has the task 'poetry'"),
        ('[{"inputs": " ", "targets": "b", "task": "sql"}]', "inputs=' '"),
        ('[{"inputs": "a", "targets": "b", "task": "sql", "metric": "f1"}]', "metric='f1'"),
        ('[{"inputs": "Write a query that counts the users.", "targets": "b", "task": "sql"}]', "none of its 1 rows"),
    ],
)
def test_unusable_test_files_are_refused(benchmark_files: tuple[Path, Path], content: str, message: str) -> None:
    """The error says what was wrong, and where."""
    cards, test = benchmark_files
    test.write_text(content)
    with pytest.raises(InvalidRequestError, match=message):
        load_benchmark(cards, test)


@pytest.mark.parametrize(
    ("cards", "error", "message"),
    [
        ([{"adapter_name": "sql"}], InvalidRequestError, "samples is a NoneType"),
        ([{"adapter_name": "sql", "samples": []}], InvalidSamplesError, "has no samples"),
        ([{"samples": []}], InvalidRequestError, "adapter_name=None"),
        ([{"adapter_name": "a", "samples": [{"inputs": "x"}]}] * 2, InvalidRequestError, "second card"),
    ],
)
def test_unusable_cards_are_refused(
    benchmark_files: tuple[Path, Path], cards: list[Any], error: type[Exception], message: str
) -> None:
    """A card without a name, without samples, or named twice is refused."""
    file, test = benchmark_files
    file.write_text(json.dumps(cards))
    with pytest.raises(error, match=message):
        load_benchmark(file, test)
