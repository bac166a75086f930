"""Scores of answers."""

from __future__ import annotations

import sys

import pytest

from langchain_lora_retriever.errors import MissingDependencyError
from langchain_lora_retriever.evaluation.metrics import (
    bootstrap_difference,
    bootstrap_macro,
    corpus_bleu,
    exact_match,
    score_answers,
)


@pytest.mark.parametrize(
    ("answer", "target", "expected"),
    [("Yes.", "yes", 1.0), (" yes ", "Yes.", 1.0), ("yes!", "yes", 0.0), ("yes..", "yes", 0.0), ("", "yes", 0.0)],
)
def test_exact_match_drops_case_and_one_full_stop(answer: str, target: str, expected: float) -> None:
    """Case, surrounding blanks and one trailing full stop do not count; anything else does."""
    assert exact_match(answer, target) == expected


def test_all_scores_are_shares() -> None:
    """A perfect answer scores 1 by every metric, an unrelated one 0."""
    target = "the cat sat on the mat"
    scores = score_answers([target, "dogs bark"], [target, target])
    assert set(scores) == {"em", "rouge1", "rouge2", "rougeL", "bleu"}
    for values in scores.values():
        assert values[0] == pytest.approx(1)
        assert values[1] == pytest.approx(0, abs=0.05)
    assert corpus_bleu([target], [target]) == pytest.approx(1)


def test_one_metric_alone_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact match works without rouge-score and sacrebleu; the others name what to install."""
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert score_answers(["a"], ["a"], only="em") == {"em": [1.0]}
    with pytest.raises(MissingDependencyError, match="rouge-score"):
        score_answers(["a"], ["a"], only="rougeL")
    with pytest.raises(MissingDependencyError, match="sacrebleu"):
        score_answers(["a"], ["a"], only="bleu")


def test_macro_average_weighs_tasks_alike() -> None:
    """A task of many rows counts as much as one of few, and the interval holds the value."""
    interval = bootstrap_macro({"many": [1.0] * 90 + [0.0] * 10, "few": [0.0, 1.0]})
    assert interval.value == pytest.approx(0.7)
    assert interval.low < 0.7 < interval.high


def test_difference_draws_the_same_rows_for_both() -> None:
    """Two settings with equal scores differ by nothing, however the rows are drawn."""
    scores = {"a": [0.0, 1.0, 1.0], "b": [1.0, 0.0]}
    assert bootstrap_difference(scores, scores) == (0.0, 0.0, 0.0)
