"""Composition tables, with an engine that answers with the name of its strongest adapter."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from langchain_lora_retriever.errors import InvalidRequestError, MissingDependencyError
from langchain_lora_retriever.evaluation import Setting, evaluate_composition, paper_settings
from langchain_lora_retriever.retrieval.retriever import LoraRetriever

if TYPE_CHECKING:
    from pathlib import Path


def test_settings_are_scored_in_and_out_of_distribution(benchmark_: Any, pool: Any, engine: Any, encoder: Any) -> None:
    """The oracle is always right, the base model never, selection when the right adapter is not masked."""
    report = evaluate_composition(benchmark_, pool, engine, LoraRetriever(pool, encoder), settings=paper_settings())
    overall = {(s.setting.label, s.is_masked): s.overall.value for s in report.scores}
    assert overall["base", False] == 0.0
    assert overall["oracle", False] == 1.0
    assert overall["selection", False] == 1.0
    assert overall["selection", True] == 0.0
    assert ("oracle", True) not in overall
    selected = next(s for s in report.scores if s.setting.label == "selection" and not s.is_masked)
    assert selected.per_task["sql"]["right_adapter"] == 1.0
    assert selected.per_domain == {"code": 1.0, "translation": 1.0}
    assert set(selected.per_task["sql"]) == {"main", "em", "rouge1", "rouge2", "rougeL", "bleu", "right_adapter"}
    json.dumps(report.to_dict())


def test_masking_never_uses_the_right_adapter(benchmark_: Any, pool: Any, engine: Any, encoder: Any) -> None:
    """Under the mask no method composes the adapter of the row's own task."""
    settings = [Setting(method, top_k=3) for method in ("selection", "fusion", "mixture", "soup", "random")]
    report = evaluate_composition(
        benchmark_, pool, engine, LoraRetriever(pool, encoder), settings=settings, masked=[True]
    )
    assert {s.per_task[task]["right_adapter"] for s in report.scores for task in s.per_task} == {0.0}


def test_a_pools_tasks_stand_for_their_members(benchmark_: Any, pool: Any, engine: Any, encoder: Any) -> None:
    """Under every method; one whose only member is masked is not found."""
    plain = evaluate_composition(
        benchmark_, pool, engine, LoraRetriever(pool, encoder), settings=[Setting("soup", top_k=2)], masked=[False]
    )
    for task in benchmark_.domains:
        pool.add_task(f"like {task}", {task: 1.0}, [row.input for row in benchmark_.rows if row.task == task])
    settings = [Setting(method, top_k=2) for method in ("selection", "mixture", "soup", "random")]
    report = evaluate_composition(benchmark_, pool, engine, LoraRetriever(pool, encoder), settings=settings)
    right = {
        (s.setting.method, s.is_masked): {s.per_task[t]["right_adapter"] for t in s.per_task} for s in report.scores
    }
    assert right["selection", False] == {1.0}
    assert all(shares == {0.0} for (_, is_masked), shares in right.items() if is_masked)
    assert right["soup", False] == {plain.scores[0].per_task[task]["right_adapter"] for task in benchmark_.domains}


def test_soup_is_one_for_all_prompts(benchmark_: Any, pool: Any, engine: Any, encoder: Any) -> None:
    """AdapterSoup answers every prompt with the same fusion."""
    report = evaluate_composition(
        benchmark_, pool, engine, LoraRetriever(pool, encoder), settings=[Setting("soup", top_k=2)], masked=[False]
    )
    assert len(engine.requests) == len(benchmark_.rows)
    (scores,) = report.scores
    assert sorted(scores.per_task[task]["right_adapter"] for task in scores.per_task) == [0.0, 0.0, 0.0, 1.0]


def test_answers_are_generated_once(benchmark_: Any, pool: Any, engine: Any, encoder: Any, tmp_path: Path) -> None:
    """Oracle and selection share answers, and a cut-off evaluation goes on from its cache."""
    retriever, cache = LoraRetriever(pool, encoder), tmp_path / "cache" / "answers.jsonl"
    settings = [Setting("oracle"), Setting("selection")]
    calls: list[tuple[int, int]] = []

    def run() -> Any:
        return evaluate_composition(
            benchmark_,
            pool,
            engine,
            retriever,
            settings=settings,
            masked=[False],
            cache=cache,
            progress=lambda *at: calls.append(at),
        )

    first = run()
    assert first.num_generated == len(benchmark_.rows)
    assert calls[-1] == (8, 8)
    lines = cache.read_text().splitlines()
    cache.write_text("\n".join([*lines[:5], lines[5][:10]]))
    second = run()
    assert second.num_generated == 3
    assert second.scores == first.scores


def test_a_cache_outlives_what_answers_hold_and_runs_that_are_cut_off(
    benchmark_: Any, pool: Any, engine: Any, encoder: Any, tmp_path: Path
) -> None:
    """Line separators of Unicode are no ends of lines; and what follows half a line is a line of its own."""
    cache, answer = tmp_path / "answers.jsonl", engine.answers
    engine.answers = lambda *given: answer(*given) + "\u2028\x85."

    def run() -> Any:
        return evaluate_composition(
            benchmark_, pool, engine, LoraRetriever(pool, encoder), settings=[Setting("oracle")], cache=cache
        )

    assert run().num_generated == 8
    for _ in range(2):
        assert run().num_generated == 0
        lines = cache.read_bytes().rstrip(b"\n").split(b"\n")
        cache.write_bytes(b"\n".join([*lines[:-1], lines[-1][:40]]))
        assert run().num_generated == 1


@pytest.mark.parametrize("content", ['{"input": "a sample"}\n', "# Read me\n", "[1]", "null", "folder"])
def test_what_is_no_cache_is_refused(
    benchmark_: Any, pool: Any, engine: Any, encoder: Any, tmp_path: Path, content: str
) -> None:
    """And left as it is, before anything is generated."""
    cache = tmp_path / "answers.jsonl"
    if content == "folder":
        cache.mkdir()
    else:
        cache.write_text(content)
    with pytest.raises(InvalidRequestError, match=r"cache='.*answers.jsonl' "):
        evaluate_composition(benchmark_, pool, engine, LoraRetriever(pool, encoder), cache=cache)
    assert not engine.requests
    assert content == "folder" or cache.read_text() == content


def test_what_scoring_needs_is_told_before_answers_are_generated(
    benchmark_: Any, pool: Any, engine: Any, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of answers are not thrown away for a package that is not there."""
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(MissingDependencyError, match="sacrebleu"):
        evaluate_composition(benchmark_, pool, engine, LoraRetriever(pool, encoder))
    assert not engine.requests


def test_answers_may_be_longer_than_the_samples(benchmark_: Any, pool: Any, engine: Any, encoder: Any) -> None:
    """The longest answer follows the outputs of the task's samples, unless it is given."""
    limits: dict[str, set[int]] = {"by samples": set(), "given": set()}
    answer = engine.submit

    def note(name: str) -> Any:
        def submit(ids: Any, sampling: Any, adapters: Any = ()) -> Any:
            limits[name].add(sampling.max_tokens)
            return answer(ids, sampling, adapters)

        return submit

    for name, max_tokens in (("by samples", None), ("given", 5)):
        engine.submit = note(name)
        evaluate_composition(
            benchmark_, pool, engine, LoraRetriever(pool, encoder), settings=[Setting("base")], max_tokens=max_tokens
        )
    assert limits == {"by samples": {int(1.5 * len(task)) + 8 for task in benchmark_.cards}, "given": {5}}


def test_default_follows_the_chat_model(benchmark_: Any, pool: Any, engine: Any, encoder: Any) -> None:
    """Without settings the paper's rows are compared with what the chat model does unless told otherwise."""
    report = evaluate_composition(benchmark_, pool, engine, LoraRetriever(pool, encoder), masked=[False])
    labels = [s.setting.label for s in report.scores]
    assert labels == ["base", "oracle", "selection", "fusion k=3", "mixture k=3", "default"]


def test_labels_tell_settings_apart() -> None:
    """A label names the method, k and how weights are made."""
    assert Setting("selection", top_k=5).label == "selection"
    assert Setting("mixture", weights="similarity", temperature=0.02).label == "mixture k=3, softmax(score / 0.02)"


def test_unusable_settings_are_refused(benchmark_: Any, pool: Any, engine: Any, encoder: Any) -> None:
    """A method there is not, k of 0, and a pool without a task's adapter are refused."""
    with pytest.raises(InvalidRequestError, match="method='best'"):
        Setting("best")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="top_k=0"):
        Setting("mixture", top_k=0)
    pool.remove("sql")
    with pytest.raises(InvalidRequestError, match="no adapter for the tasks 'sql'"):
        evaluate_composition(benchmark_, pool, engine, LoraRetriever(pool, encoder))
