"""Retrieval tables."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.evaluation import evaluate_retrieval, evaluate_splits, retrieval
from langchain_lora_retriever.retrieval import training

if TYPE_CHECKING:
    from pathlib import Path


def test_table_counts_what_retrieval_finds(benchmark_: Any, encoder: Any) -> None:
    """Templates that differ by a word are told apart; every part of the table agrees with the whole."""
    calls: list[tuple[int, int]] = []
    report = evaluate_retrieval(benchmark_, encoder, top_k=(1, 2), seen=["sql"], progress=lambda *at: calls.append(at))
    assert report.accuracy == {1: 1.0, 2: 1.0}
    assert set(report.per_task) == {"sql", "regex", "french", "german"}
    assert set(report.per_domain) == {"code", "translation"}
    assert report.seen == {1: 1.0, 2: 1.0}
    assert report.unseen == {1: 1.0, 2: 1.0}
    assert (report.num_adapters, report.num_rows, report.num_excluded) == (4, 8, 1)
    assert calls == [(8, 8)]
    json.dumps(report.to_dict())


def test_twins_make_the_ceiling(benchmark_files: tuple[Path, Path], encoder: Any) -> None:
    """Two adapters of the same inputs are twins, their confusions are the error, and half of them is the ceiling."""
    from langchain_lora_retriever.evaluation import load_benchmark

    cards_file, test_file = benchmark_files
    cards, rows = json.loads(cards_file.read_text()), json.loads(test_file.read_text())
    cards.append({"adapter_name": "sql_2", "samples": cards[0]["samples"]})
    rows += [{**row, "task": "sql_2"} for row in rows if row["task"] == "sql" and "domain" in row]
    cards_file.write_text(json.dumps(cards))
    test_file.write_text(json.dumps(rows))
    report = evaluate_retrieval(load_benchmark(cards_file, test_file), encoder)
    assert report.twins == (("sql", "sql_2"),)
    assert report.twin_error == 1.0
    assert report.ceiling == pytest.approx((6 + 4 / 2) / 10)
    assert {(c.task, c.taken_for) for c in report.confusions} == {("sql_2", "sql")}
    assert report.seen is None


def test_splits_train_once_and_are_averaged(
    benchmark_: Any, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each split trains on its share of the adapters, and a second evaluation finds the encoders trained."""
    trained: list[tuple[str, ...]] = []

    def train(samples: Any, _encoder: Any, *, output_dir: Path, config: Any, **_: Any) -> Any:
        trained.append(tuple(samples))
        output_dir.mkdir(parents=True)
        return training.TrainingReport(output_dir, tuple(samples), (), 1, 2.0, {}, {}, config)

    monkeypatch.setattr(retrieval, "train_encoder", train)
    for _ in range(2):
        report = evaluate_splits(
            benchmark_, output_dir=tmp_path, fraction=0.5, seeds=(0, 1), wrap=lambda _folder: encoder
        )
    assert [len(names) for names in trained] == [2, 2]
    assert report.seconds == (2.0, 2.0)
    assert report.mean["all"][1] == 1.0
    assert report.deviation["unseen"][8] == 0.0
    json.dumps(report.to_dict())


def test_no_split_is_refused(benchmark_: Any, tmp_path: Path) -> None:
    """Without a seed there is nothing to average."""
    with pytest.raises(InvalidRequestError, match="seeds is empty"):
        evaluate_splits(benchmark_, output_dir=tmp_path, seeds=())
