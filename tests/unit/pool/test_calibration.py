"""Which adapters answer a user's samples best: all are tried a little, few of them on all."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from langchain_lora_retriever.errors import InvalidRequestError, InvalidSamplesError
from langchain_lora_retriever.evaluation import AnswerLikelihood
from langchain_lora_retriever.pool.calibration import calibrate
from langchain_lora_retriever.pool.samples import Sample
from langchain_lora_retriever.testing import FakeEngine
from langchain_lora_retriever.types import Adapter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from langchain_lora_retriever import AdapterPool

SAMPLES = [Sample(f"Question {i}?", f"Answer {i}") for i in range(20)]


def make_adapters(num: int) -> dict[str, Adapter]:
    """Adapters `a000`, `a001`, ..., without weights."""
    return {name: Adapter(name, name, {}) for name in (f"a{i:03}" for i in range(num))}


class Scored:
    """Scores an adapter by its number: the higher, the better; and counts."""

    def __init__(self) -> None:
        self.runs: list[str | None] = []

    def __call__(self, runs: Sequence[tuple[Adapter | None, Sample]]) -> Iterator[float]:
        """One score for each run."""
        for adapter, _ in runs:
            self.runs.append(adapter and adapter.name)
            yield -2.0 if adapter is None else -1.0 / (1 + int(adapter.name[1:]))


@pytest.mark.parametrize(("num", "num_runs"), [(1, 20), (10, 200), (21, 330), (200, 1200), (1000, 6000)])
def test_most_adapters_are_scored_on_few_samples(num: int, num_runs: int) -> None:
    """The best are scored on all, and named first; what progress was told adds up."""
    score = Scored()
    told: list[tuple[int, int]] = []
    found = calibrate(make_adapters(num), SAMPLES, score, progress=lambda *args: told.append(args))
    assert len(score.runs) == num_runs + len(SAMPLES)
    assert told == [(i, len(told)) for i in range(1, len(told) + 1)]
    assert len(told) == len(score.runs)
    names = [adapter.name for adapter in found.adapters]
    assert len(names) == num
    assert names[0] == f"a{num - 1:03}"
    full = [adapter for adapter in found.adapters if adapter.num_samples == len(SAMPLES)]
    assert len(full) >= min(16, num)
    assert found.adapters[: len(full)] == tuple(full)
    assert found.base == (found.base.__class__(None, -2.0, 20))


def test_members_are_weighted_by_their_likelihoods() -> None:
    """Softmax of the means over the temperature; those of no weight are left out."""
    found = calibrate(make_adapters(4), SAMPLES, Scored(), keep=2, temperature=0.05)
    ratio = math.exp((1 / 3 - 1 / 4) / 0.05)
    assert found.members == pytest.approx({"a003": ratio / (1 + ratio), "a002": 1 / (1 + ratio)})
    assert list(calibrate(make_adapters(4), SAMPLES, Scored(), temperature=1e-6).members) == ["a003"]
    assert found.to_dict()["members"] == found.members


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"adapters": {}}, InvalidRequestError, "no adapter to calibrate"),
        ({"samples": []}, InvalidSamplesError, "no samples"),
        ({"samples": [Sample("a", "b"), Sample("Which?")]}, InvalidSamplesError, "sample 1 has no output"),
        ({"keep": 0}, InvalidRequestError, "keep=0"),
        ({"keep": 9}, InvalidRequestError, "keep=9 is not allowed: pass an integer from 1 to 8"),
        ({"temperature": 0.0}, InvalidRequestError, r"temperature=0\.0"),
        ({"temperature": math.nan}, InvalidRequestError, "temperature=nan"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    """Before anything is scored."""
    score = Scored()
    given: dict[str, Any] = {"adapters": make_adapters(2), "samples": SAMPLES, "score": score, **arguments}
    with pytest.raises(error, match=match):
        calibrate(**given)
    assert score.runs == []


def test_a_pool_is_calibrated_with_an_engine(pool: AdapterPool) -> None:
    """Answers are scored after their prompts, under each adapter and the base model; a task is made of the outcome."""
    values = {(): -3.0, ("sql",): -1.0, ("dates",): -0.9, ("french",): -2.0}
    engine = FakeEngine(prompt_logprob=lambda _, names: values[tuple(names)])
    samples = [{"input": f"Write poem {i}.", "output": f"Roses are {i}."} for i in range(4)]
    found = pool.calibrate(samples, AnswerLikelihood(engine), keep=2)
    assert [(a.name, a.log_likelihood) for a in found.adapters] == [("dates", -0.9), ("sql", -1.0), ("french", -2.0)]
    assert found.base.log_likelihood == -3.0
    request = engine.requests[0]
    start = request.sampling.prompt_logprobs_from
    assert start is not None
    assert engine.tokenizer.decode(request.prompt_token_ids[start:]).startswith("Roses are")
    assert request.prompt.endswith(engine.tokenizer.decode(request.prompt_token_ids[start:]))
    assert engine.most_running <= 2 * engine.info.max_num_seqs
    task = pool.add_task("poems", found.members, found.samples)
    assert [name for name, _ in task.members] == ["dates", "sql"]
    alone = pool.calibrate(samples, AnswerLikelihood(engine), exclude=["dates", "sql"])
    assert list(alone.members) == ["french"]


def test_samples_that_cannot_be_scored_are_named(pool: AdapterPool) -> None:
    """One that is longer than the context, one whose output is blank."""
    engine = FakeEngine(max_model_len=64)
    with pytest.raises(InvalidSamplesError, match=r"'xxxx.*tokens; allowed are fewer than 64"):
        pool.calibrate([{"input": "x" * 100, "output": "y"}], AnswerLikelihood(engine))
    with pytest.raises(InvalidSamplesError, match="sample 0 has no output"):
        pool.calibrate([{"input": "x"}], AnswerLikelihood(engine))
    assert engine.stats().num_running == 0
