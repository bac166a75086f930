"""Whether a prompt offers an adapter's answers."""

from __future__ import annotations

import numpy as np
import pytest

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.evaluation import CardPool
from langchain_lora_retriever.pool.samples import Sample
from langchain_lora_retriever.retrieval.label_penalty import LabelPenalty
from langchain_lora_retriever.retrieval.retriever import LoraRetriever

OPTIONS = "\nOptions:\n- negative\n- positive"
SENTIMENT = [Sample(f"{text}{OPTIONS}", answer) for text, answer in
             (("A fine film.", "positive"), ("Dull.", "negative"), ("I laughed.", "positive"))]  # fmt: skip


def test_a_prompt_that_offers_the_answers_lacks_nothing() -> None:
    """The options may stand anywhere, in any case."""
    assert LabelPenalty(SENTIMENT).lack("Is it NEGATIVE or Positive? The soup was cold.") == 0


def test_a_prompt_that_offers_other_answers_lacks_them_all() -> None:
    """An adapter that only ever says "positive" or "negative" cannot choose between "yes" and "no"."""
    assert LabelPenalty(SENTIMENT).lack("Are these paraphrases?\nOptions:\n- no\n- yes") == 1


def test_part_of_the_answers_is_part_of_the_lack() -> None:
    """What is lacking is counted by how often the adapter says it."""
    assert LabelPenalty(SENTIMENT).lack("Is it positive?") == pytest.approx(1 / 3)


def test_whole_words_count() -> None:
    """A short answer is not found inside a longer word."""
    samples = [Sample("Is it? yes or no", "no"), Sample("Are they? yes or no", "no")]
    assert LabelPenalty(samples).lack("There is nothing.") == 1


@pytest.mark.parametrize(
    "samples",
    [
        [Sample("Translate dogs.", "chiens"), Sample("Translate cats.", "chats")],
        [Sample("Which?\n- tea\n- milk", "tea"), Sample("Which?\n- red\n- blue", "blue")],
        [Sample("Is it? yes or no", None), Sample("Is it? yes or no", None)],
        [Sample("Is it? yes or no", "yes")],
        [],
    ],
    ids=["open", "own-options", "no-outputs", "one", "none"],
)
def test_adapters_without_a_set_of_answers_lack_nothing(samples: list[Sample]) -> None:
    """Answers that differ from sample to sample, or are not known, say nothing about a prompt."""
    assert LabelPenalty(samples).lack("Anything at all") == 0


class AlikeEncoder:
    """Sees nothing but whether a text speaks of negative things."""

    name = "alike"
    dimension = 2

    def encode(self, texts):
        """Return one of two neighbouring unit vectors for each text."""
        rows = np.array([[1.0, 0.2] if "negative" in text else [1.0, 0.5] for text in texts], dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_retrieval_ranks_by_answers_when_asked_to() -> None:
    """With a weight, the adapter whose answers a prompt offers goes before one that is a little nearer."""
    polar = [Sample(f"{text}\nOptions:\n- no\n- yes", "yes") for text in ("Is snow white?", "Is snow cold?")]
    pool = CardPool({"sentiment": SENTIMENT, "polar": polar})
    prompt = "Not negative: is fire hot?\nOptions:\n- no\n- yes"
    assert LoraRetriever(pool, AlikeEncoder()).retrieve(prompt)[0].name == "sentiment"
    retriever = LoraRetriever(pool, AlikeEncoder(), answer_weight=0.5)
    first, second = retriever.retrieve(prompt)
    assert (first.name, second.name) == ("polar", "sentiment")
    assert first.score > second.score
    assert retriever.retrieve(prompt, top_k=1) == [first]
    assert retriever.retrieve(prompt, exclude=["polar"])[0].name == "sentiment"


def test_answers_follow_the_pool() -> None:
    """An adapter added later is judged by its own answers, and one removed is forgotten."""
    pool = CardPool({"sentiment": SENTIMENT})
    retriever = LoraRetriever(pool, AlikeEncoder(), answer_weight=0.5)
    prompt = "Is fire hot?\nOptions:\n- no\n- yes"
    assert [adapter.name for adapter in retriever.retrieve(prompt)] == ["sentiment"]
    pool._replace_state({**pool.state.entries, **CardPool({"open": [Sample("Say hi.", "hi")]}).state.entries}, {})
    assert retriever.retrieve(prompt)[0].name == "open"
    pool.remove("sentiment")
    assert [adapter.name for adapter in retriever.retrieve(prompt)] == ["open"]


@pytest.mark.parametrize("weight", [-0.1, float("inf"), float("nan")])
def test_answer_weights_out_of_range_are_refused(weight: float) -> None:
    """The error names the argument."""
    with pytest.raises(InvalidRequestError, match="answer_weight"):
        LoraRetriever(CardPool({"sentiment": SENTIMENT}), AlikeEncoder(), answer_weight=weight)
