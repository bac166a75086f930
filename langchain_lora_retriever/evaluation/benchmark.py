"""Mixed-task benchmarks: cards that say what each adapter was trained on, and test rows of the same tasks.

Two JSON files make a benchmark::

    cards.json  [{"adapter_name": "sst2", "samples": [{"inputs": "...", "targets": "..."}, ...]}, ...]
    test.json   [{"inputs": "...", "targets": "...", "task": "sst2", "domain": "sentiment", "metric": "em"}, ...]

`task` is the `adapter_name` of the adapter trained for the row. `domain` groups tasks in tables; a task is its own
domain if it is missing. `metric` is "em", "rouge" or "bleu"; "em" if it is missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.pool.pool import AdapterPool, PoolEntry
from langchain_lora_retriever.pool.samples import Sample, make_samples
from langchain_lora_retriever.types import Adapter

__all__ = ["Benchmark", "CardPool", "Metric", "TestRow", "benchmark_from_pool", "load_benchmark", "read_cards"]

Metric: TypeAlias = Literal["em", "rouge", "bleu"]


@dataclass(frozen=True, slots=True)
class TestRow:
    """One test prompt.

    Attributes:
        input: The prompt.
        target: The answer expected.
        task: Name of the adapter trained for it.
        domain: Group of the task.
        metric: What counts for the task: exact match, ROUGE-L or BLEU.
    """

    __test__ = False  # for pytest, which collects classes named Test

    input: str
    target: str
    task: str
    domain: str
    metric: Metric = "em"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Cards and the test rows that are not among them.

    Attributes:
        cards: Samples by adapter.
        rows: Test rows, none of whose inputs is a sample's.
        num_excluded: Test rows left out because their input is among the samples.
    """

    cards: Mapping[str, tuple[Sample, ...]]
    rows: tuple[TestRow, ...]
    num_excluded: int = 0

    @property
    def domains(self) -> dict[str, str]:
        """Domain by task, for the tasks that have rows."""
        return {row.task: row.domain for row in self.rows}

    def subset(self, rows_per_task: int, *, seed: int = 0) -> Benchmark:
        """Return the benchmark with at most so many rows of each task, drawn at random."""
        order = np.random.default_rng(seed).permutation(len(self.rows))
        kept: set[int] = set()
        counts: dict[str, int] = {}
        for i in order.tolist():
            task = self.rows[i].task
            if counts.get(task, 0) < rows_per_task:
                counts[task] = counts.get(task, 0) + 1
                kept.add(i)
        return replace(self, rows=tuple(row for i, row in enumerate(self.rows) if i in kept))


class CardPool(AdapterPool):
    """A pool of adapters known by their samples alone: enough to retrieve among, not to run.

    Args:
        cards: Samples by adapter.
    """

    def __init__(self, cards: Mapping[str, Sequence[Sample]]) -> None:
        super().__init__()
        entries = {
            name: PoolEntry(Adapter(name=name, fingerprint="", weights={}), tuple(samples))
            for name, samples in cards.items()
        }
        self._replace_state(entries, {})


def load_benchmark(cards: str | Path, test: str | Path) -> Benchmark:
    """Read a benchmark from its two files. Test rows whose input is among the samples are left out.

    Raises:
        InvalidRequestError: If a file is not what this module describes, or no row is left.
    """
    return _make_benchmark(read_cards(cards), _read_rows(Path(test)), where=str(test))


def benchmark_from_pool(pool: AdapterPool, test: str | Path) -> Benchmark:
    """Make a benchmark of a pool's own samples and a test file. Rows whose input is among the samples are left out.

    Raises:
        InvalidRequestError: If the file is not what this module describes, or no row is left.
    """
    cards = {name: samples for name in pool.names if (samples := pool.samples(name))}
    return _make_benchmark(cards, _read_rows(Path(test)), where=str(test))


def read_cards(file: str | Path) -> dict[str, tuple[Sample, ...]]:
    """Read samples by adapter from a `cards.json`.

    Raises:
        InvalidRequestError: If the file is not what this module describes.
    """
    file = Path(file)
    cards: dict[str, tuple[Sample, ...]] = {}
    for number, card in enumerate(_read_list(file)):
        where = f"{file}, card {number}"
        name, samples = _text(card, "adapter_name", where), card.get("samples")
        if not isinstance(samples, list):
            raise InvalidRequestError(f"{where} ({name!r}): samples is a {type(samples).__name__}; pass a list.")
        if name in cards:
            raise InvalidRequestError(f"{where}: a second card is named {name!r}. Names are distinct.")
        values = [{"input": _text(s, "inputs", f"{where} ({name!r})"), "output": s.get("targets")} for s in samples]
        cards[name] = make_samples(values, where=f"{where} ({name!r})")
    return cards


def _make_benchmark(cards: Mapping[str, tuple[Sample, ...]], rows: Sequence[TestRow], *, where: str) -> Benchmark:
    unknown = sorted({row.task for row in rows} - set(cards))
    if unknown:
        raise InvalidRequestError(
            f"{where}: no adapter has the task{'s'[: len(unknown) > 1]} {', '.join(map(repr, unknown))}. "
            f"A row's task is the name of the adapter trained for it; there are {', '.join(sorted(cards))}."
        )
    samples = {_key(sample.input) for card in cards.values() for sample in card}
    kept = tuple(row for row in rows if _key(row.input) not in samples)
    if not kept:
        raise InvalidRequestError(
            f"{where}: none of its {len(rows)} rows is left once those among the adapters' samples are excluded. "
            "Pass rows that the adapters' samples do not hold."
        )
    return Benchmark(cards, kept, len(rows) - len(kept))


def _key(text: str) -> str:
    return " ".join(text.split()).casefold()


def _read_rows(file: Path) -> list[TestRow]:
    rows = []
    for number, row in enumerate(_read_list(file)):
        where = f"{file}, row {number}"
        metric, task = row.get("metric", "em"), _text(row, "task", where)
        if metric not in get_args(Metric):
            raise InvalidRequestError(f"{where}: metric={metric!r} is not allowed: pass one of {get_args(Metric)}.")
        domain = _text(row, "domain", where) if "domain" in row else task
        rows.append(
            TestRow(_text(row, "inputs", where), _text(row, "targets", where, may_be_blank=True), task, domain, metric)
        )
    return rows


def _read_list(file: Path) -> list[dict[str, Any]]:
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"cannot read {file}: {error}. Pass a JSON file that holds a list.") from error
    if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
        raise InvalidRequestError(f"{file} holds no list of objects. See the form in evaluation/benchmark.py.")
    return values


def _text(value: object, field: str, where: str, *, may_be_blank: bool = False) -> str:
    text = value.get(field) if isinstance(value, Mapping) else None
    if not isinstance(text, str) or not (may_be_blank or text.strip()):
        allowed = "a string" if may_be_blank else "a string that is not blank"
        raise InvalidRequestError(f"{where}: {field}={text!r} is not allowed: pass {allowed}.")
    return text
