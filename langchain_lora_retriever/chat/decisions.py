"""The retriever as one of LangChain's decision models: which label is a text most like?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from langchain_core.messages import BaseMessage
from pydantic import ConfigDict, Field

from langchain_lora_retriever.chat.messages import content_text, routing_text
from langchain_lora_retriever.errors import InvalidRequestError, MissingDependencyError
from langchain_lora_retriever.retrieval.retriever import LoraRetriever
from langchain_lora_retriever.support.shown import shown

try:
    from langchain_core.decisions import (
        BaseDecisionModel,
        Choice,
        ChoiceAnswer,
        ClassifierResponse,
        Noul,
        NoulAnswer,
        Question,
        Score,
        ScoreAnswer,
    )
except ImportError as error:
    raise MissingDependencyError(
        'Decision models came with langchain-core 1.8: pip install --upgrade "langchain-core>=1.8"'
    ) from error

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["AdapterDecisionModel"]


class AdapterDecisionModel(BaseDecisionModel):
    """Answers questions about a text by what its embedding is near: adapters' samples, or texts that describe labels.

    A label of a `Choice` is described by a text, by a list of examples, or, where its criterion is None and the pool
    has an adapter of that name, by that adapter's samples. So an agent's `ModelRouterMiddleware` can go by the pool, in
    a few milliseconds and without a call of a model. A `Noul` needs both its criteria, a `Score` is the mean of its
    levels. A `Box` is refused.

    Probabilities are a softmax of cosines, and the confidence is the chosen label's: good for an order, and for a
    threshold that you have tried on your own texts, but no calibrated probabilities.

    Attributes:
        retriever: Embeds, and knows the pool; a chat model has one (`llm.retriever`).
        temperature: Of the softmax; lower favours the nearest more.
        model: The name in traces; the encoder's by default.

    Example:
        >>> decide = AdapterDecisionModel(retriever=llm.retriever)  # doctest: +SKIP
        >>> question = Choice(instructions="Which kind?", criteria={"sql": None, "chat": "Small talk."})
        ... # doctest: +SKIP
        >>> decide.invoke({"state": "How many users?", "questions": {"kind": question}}).choices["kind"].choice
        ... # doctest: +SKIP
        'sql'
    """

    retriever: LoraRetriever = Field(exclude=True)
    temperature: float = Field(default=0.05, gt=0)
    model: str = ""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def model_post_init(self, context: Any) -> None:
        """Name the encoder where no name was given."""
        super().model_post_init(context)
        self.model = self.model or self.retriever.encoder.name

    @property
    def _provider(self) -> str:
        return "lora-retriever"

    def _classify(self, state: Any, questions: Mapping[str, Question]) -> ClassifierResponse:
        """Answer questions about a state; see `BaseDecisionModel.invoke`.

        Raises:
            InvalidRequestError: If the state holds no text, or a question cannot be answered by likeness.
            EncoderError: If the encoder fails.
        """
        text = _text_of(state)
        if not text.strip():
            raise InvalidRequestError(f"state={shown(state)} holds no text to decide on.")
        (vector,) = self.retriever.embed([text])
        answers: dict[str, Any] = {name: self._answer(vector, question) for name, question in questions.items()}
        return ClassifierResponse(model=self.model, answers=answers)

    def _answer(self, vector: NDArray[np.float32], question: Question) -> ChoiceAnswer | NoulAnswer | ScoreAnswer:
        if isinstance(question, Choice):
            shares = self._shares(vector, question.criteria)
            best = max(shares, key=lambda label: shares[label])
            return ChoiceAnswer(type="choice", choice=best, probabilities=shares, confidence=shares[best])
        if isinstance(question, Noul):
            criteria = question.criteria
            if criteria is None or criteria.true is None or criteria.false is None:
                raise InvalidRequestError(
                    "A Noul is answered by likeness here: pass criteria that describe both outcomes, "
                    "NoulCriteria(true=..., false=...)."
                )
            shares = self._shares(vector, {"true": criteria.true, "false": criteria.false})
            return NoulAnswer(type="noul", noul=shares["true"])
        if isinstance(question, Score):
            levels = dict(enumerate(question.criteria))
            by_level = self._shares(vector, {str(level): criterion for level, criterion in levels.items()})
            shares_of = {level: by_level[str(level)] for level in levels}
            return ScoreAnswer(
                type="score",
                score=sum(level * share for level, share in shares_of.items()),
                legend=levels,
                probabilities=shares_of,
                confidence=max(shares_of.values()),
            )
        raise InvalidRequestError(f"A question of type {question.type!r} cannot be answered by likeness of texts.")

    def _shares(self, vector: NDArray[np.float32], criteria: Mapping[str, Any]) -> dict[str, float]:
        """A softmax of the cosines between a vector `[d]` and what stands for each label."""
        of_adapters = [label for label, criterion in criteria.items() if criterion is None]
        adapters = self.retriever.adapter_vectors(of_adapters) if of_adapters else {}
        rows = [
            adapters[label] if label in adapters else self._embedded(label, criterion)
            for label, criterion in criteria.items()
        ]
        scores = (np.stack(rows) @ vector).astype(np.float64) / self.temperature
        weights = np.exp(scores - scores.max())
        return dict(zip(criteria, (weights / weights.sum()).tolist(), strict=True))

    def _embedded(self, label: str, criterion: Any) -> NDArray[np.float32]:
        """Embed what describes a label: a text, examples of it, or else its own name."""
        described = label if criterion is None else criterion
        texts = described if isinstance(described, list) and described else [described]
        mean = self.retriever.embed([text if isinstance(text, str) else _written(text) for text in texts]).mean(axis=0)
        unit: NDArray[np.float32] = mean / max(float(np.linalg.norm(mean)), 1e-12)
        return unit


def _text_of(state: Any) -> str:
    """Return what a decision goes by: a text, the last human message of several, or JSON."""
    if isinstance(state, str):
        return state
    if isinstance(state, BaseMessage):
        return content_text(state)
    if isinstance(state, Sequence) and state and all(isinstance(item, BaseMessage) for item in state):
        return routing_text([item for item in state if isinstance(item, BaseMessage)])
    return _written(state)


def _written(value: Any) -> str:
    return json.dumps(
        value,
        ensure_ascii=False,
        default=lambda item: content_text(item) if isinstance(item, BaseMessage) else shown(item),
    )
