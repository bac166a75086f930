"""Retrieval tables."""

from __future__ import annotations

import json
from contextlib import nullcontext
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
        output_dir.mkdir(parents=True, exist_ok=True)
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


@pytest.mark.parametrize("fraction", [0, -0.4, 40, float("nan"), "x", None])
def test_what_is_no_share_is_refused(benchmark_: Any, tmp_path: Path, fraction: Any) -> None:
    """A percentage, for one."""
    with pytest.raises(InvalidRequestError, match=r"fraction=.*in \(0, 1\]"):
        evaluate_splits(benchmark_, output_dir=tmp_path, fraction=fraction)


@pytest.mark.parametrize("is_cut_off", [False, True])
def test_an_encoder_of_another_split_is_not_taken(
    benchmark_: Any, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cut_off: bool
) -> None:
    """It may have seen what the table calls unseen; nor is its training gone on with, if it was cut off."""

    def train(samples: Any, _encoder: Any, *, output_dir: Path, config: Any, **_: Any) -> Any:
        if is_cut_off:
            raise KeyboardInterrupt
        return training.TrainingReport(output_dir, tuple(samples), (), 1, 2.0, {}, {}, config)

    def evaluate(**given: Any) -> Any:
        return evaluate_splits(benchmark_, output_dir=tmp_path, seeds=(0,), wrap=lambda _folder: encoder, **given)

    monkeypatch.setattr(retrieval, "train_encoder", train)
    with pytest.raises(KeyboardInterrupt) if is_cut_off else nullcontext():
        evaluate(fraction=0.75)
    for other in ({"fraction": 0.5}, {"fraction": 0.75, "instruction": ""}, {"fraction": 0.75, "encoder": "another"}):
        with pytest.raises(InvalidRequestError, match=r"split-0 has an encoder .* another output_dir"):
            evaluate(**other)
    (tmp_path / "split-0" / "split.json").write_text("{")
    with pytest.raises(InvalidRequestError, match="another output_dir"):
        evaluate(fraction=0.75)


def test_without_unseen_adapters_there_is_no_table_of_them(
    benchmark_: Any, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of one that is no number."""
    monkeypatch.setattr(
        retrieval,
        "train_encoder",
        lambda samples, _, *, output_dir, config, **__: training.TrainingReport(
            output_dir, tuple(samples), (), 1, 2.0, {}, {}, config
        ),
    )
    report = evaluate_splits(benchmark_, output_dir=tmp_path, fraction=1, seeds=(0,), wrap=lambda _folder: encoder)
    assert report.runs[0].unseen is None
    assert set(report.mean) == set(report.deviation) == {"all", "seen"}
    json.dumps(report.to_dict(), allow_nan=False)
