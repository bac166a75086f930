"""Scores of generated answers, and how sure they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from langchain_lora_retriever.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

__all__ = ["Interval", "bootstrap_difference", "bootstrap_macro", "exact_match", "normalize_answer", "score_answers"]

_ROUGE = ("rouge1", "rouge2", "rougeL")


class Interval(NamedTuple):
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def normalize_answer(text: str) -> str:
    """Return a text in lower case, without surrounding blanks and without one trailing full stop."""
    return text.strip().lower().removesuffix(".").rstrip()


def exact_match(answer: str, target: str) -> float:
    """Return 1.0 if the normalized texts are equal, else 0.0."""
    return float(normalize_answer(answer) == normalize_answer(target))


def score_answers(answers: Sequence[str], targets: Sequence[str], *, only: str | None = None) -> dict[str, list[float]]:
    """Score each answer.

    Args:
        answers: Generated texts.
        targets: What was expected.
        only: One of the keys, to compute no other; None computes all.

    Returns:
        Scores in [0, 1] by key: `em`, `rouge1`, `rouge2` and `rougeL` (F1, stemmed) and `bleu` (of the sentence; a
        corpus's BLEU is `corpus_bleu`).

    Raises:
        MissingDependencyError: If rouge-score or sacrebleu is not installed and needed.
    """
    scores: dict[str, list[float]] = {}
    pairs = list(zip(answers, targets, strict=True))
    if only in {None, "em"}:
        scores["em"] = [exact_match(answer, target) for answer, target in pairs]
    if only is None or only in _ROUGE:
        scorer = _rouge_scorer()
        rouge = [scorer.score(target, answer) for answer, target in pairs]
        scores |= {key: [row[key].fmeasure for row in rouge] for key in _ROUGE}
    if only in {None, "bleu"}:
        sacrebleu = _sacrebleu()
        scores["bleu"] = [sacrebleu.sentence_bleu(answer, [target]).score / 100 for answer, target in pairs]
    return scores


def corpus_bleu(answers: Sequence[str], targets: Sequence[str]) -> float:
    """Return the BLEU of all answers together, in [0, 1].

    Raises:
        MissingDependencyError: If sacrebleu is not installed.
    """
    return float(_sacrebleu().corpus_bleu(list(answers), [list(targets)]).score) / 100


def bootstrap_macro(scores: Mapping[str, Sequence[float]], *, num_resamples: int = 2000, seed: int = 0) -> Interval:
    """Average over tasks of the mean score per task, rows resampled within each task.

    Args:
        scores: Scores by task.
        num_resamples: How often the rows are drawn anew.
        seed: Of the draws.
    """
    value = float(np.mean([np.mean(values) for values in scores.values()]))
    draws = _resampled_means(list(scores.values()), num_resamples, seed).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def bootstrap_difference(
    first: Mapping[str, Sequence[float]],
    second: Mapping[str, Sequence[float]],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """`bootstrap_macro` of first minus second, row by row: the same rows are drawn for both.

    Args:
        first: Scores by task.
        second: Scores of the same rows in the same order.
        num_resamples: How often the rows are drawn anew.
        seed: Of the draws.
    """
    differences = {task: np.subtract(first[task], second[task]).tolist() for task in first}
    return bootstrap_macro(differences, num_resamples=num_resamples, seed=seed)


def _resampled_means(groups: Sequence[Sequence[float]], num_resamples: int, seed: int) -> NDArray[np.float64]:
    """Means `[num_resamples, len(groups)]` of rows drawn with replacement."""
    generator = np.random.default_rng(seed)
    columns = []
    for group in groups:
        values = np.asarray(group, dtype=np.float64)
        columns.append(values[generator.integers(len(values), size=(num_resamples, len(values)))].mean(axis=1))
    return np.stack(columns, axis=1)


def _rouge_scorer() -> Any:
    try:
        from rouge_score import rouge_scorer  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise MissingDependencyError(_missing("rouge-score")) from error
    return rouge_scorer.RougeScorer(list(_ROUGE), use_stemmer=True)


def _sacrebleu() -> Any:
    try:
        import sacrebleu  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise MissingDependencyError(_missing("sacrebleu")) from error
    return sacrebleu


def _missing(package: str) -> str:
    return f"Scoring needs the package {package}. Install it: pip install 'langchain-lora-retriever[evaluate]'."
