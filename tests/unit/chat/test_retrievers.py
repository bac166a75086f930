"""The retriever as LangChain's own kinds: a retriever of documents, and a decision model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler

from langchain_lora_retriever import AdapterRetriever, ChatLoraRetriever
from langchain_lora_retriever.errors import InvalidRequestError

decisions = pytest.importorskip("langchain_core.decisions", reason="langchain-core before 1.8 has no decision models")

if TYPE_CHECKING:
    from langchain_lora_retriever import AdapterDecisionModel

SQL = "How many users are in the table?"


@pytest.fixture
def decide(llm: ChatLoraRetriever) -> AdapterDecisionModel:
    """A decision model over the pool of three adapters."""
    from langchain_lora_retriever import AdapterDecisionModel

    return AdapterDecisionModel(retriever=llm.retriever)


async def test_adapters_are_documents(llm: ChatLoraRetriever) -> None:
    """Named, scored, and described by their samples; excluded ones stay away; a trace knows the encoder."""
    collector = RunCollectorCallbackHandler()
    retriever = AdapterRetriever(retriever=llm.retriever, top_k=2)
    for found in (retriever.invoke(SQL, {"callbacks": [collector]}), await retriever.ainvoke(SQL)):
        assert (found[0].id, len(found)) == ("sql", 2)
        assert found[0].metadata["score"] > found[1].metadata["score"]
        assert "signed up" in found[0].page_content
    assert "sql" not in [found.id for found in AdapterRetriever(retriever=llm.retriever, exclude=["sql"]).invoke(SQL)]
    (run,) = collector.traced_runs
    assert run.extra["metadata"]["ls_embedding_model"] == "words"


async def test_a_choice_between_adapters_and_descriptions(decide: Any) -> None:
    """A label without a criterion is the adapter of that name; others are their texts or their examples."""
    criteria = {"sql": None, "french": None, "weather": ["Is it sunny?", "Will it rain tomorrow?"], "jokes": "A joke."}
    question = decisions.Choice(instructions="Which kind?", criteria=criteria)
    for state, label in (
        (SQL, "sql"),
        ("Will it rain?", "weather"),
        (HumanMessage("Translate it into French."), "french"),
        ([HumanMessage(SQL), AIMessage("Will it rain?")], "sql"),
        ({"text": "Tell a joke"}, "jokes"),
    ):
        request = {"state": state, "questions": {"kind": question}}
        for response in (decide.invoke(request), await decide.ainvoke(request)):
            answer = response.choices["kind"]
            assert answer.choice == label, state
            assert sum(answer.probabilities.values()) == pytest.approx(1)
            assert answer.confidence == answer.probabilities[label] == max(answer.probabilities.values())
    assert decide.model == response.model == "words"


def test_yes_or_no_and_levels(decide: Any) -> None:
    """Outcomes and levels are described, and the nearer ones weigh more."""
    noul = decisions.Noul(
        instructions="Is it about a table?",
        criteria=decisions.NoulCriteria(true="a table of users", false="a sentence in French"),
    )
    levels = ["a calm note", "an angry user of the table"]
    score = decisions.Score(instructions="How angry?", criteria=levels)
    response = decide.invoke({"state": SQL, "questions": {"noul": noul, "score": score}})
    assert response.nouls["noul"].noul > 0.5
    assert 0.5 < response.scores["score"].score <= 1
    assert response.scores["score"].legend == dict(enumerate(levels))


@pytest.mark.parametrize(
    ("state", "question", "told"),
    [
        (SQL, lambda: decisions.Noul(instructions="Is it?"), "criteria"),
        (SQL, lambda: decisions.Box(instructions="Where?"), "box"),
        ("", lambda: decisions.Choice(instructions="?", criteria={"sql": None}), "no text"),
    ],
)
def test_what_likeness_cannot_answer_is_refused(decide: Any, state: str, question: Any, told: str) -> None:
    """In words that say what to pass."""
    with pytest.raises(InvalidRequestError, match=told):
        decide.invoke({"state": state, "questions": {"x": question()}})


def test_an_agent_chooses_its_model_by_the_pool(llm: ChatLoraRetriever, engine: Any, decide: Any) -> None:
    """LangChain's router asks it, and the model it names answers."""
    middleware = pytest.importorskip("langchain.agents.middleware")
    if not hasattr(middleware, "ModelRouterMiddleware"):
        pytest.skip("this langchain has no router of models")
    from langchain.agents import create_agent

    routes = {
        name: middleware.ModelChoice(model=llm.model_copy(update={"adapters": [name]}), criteria=None)
        for name in ("sql", "french")
    }
    router = middleware.ModelRouterMiddleware(choices=routes, instructions="Which?", classifier=decide)
    create_agent(llm, [], middleware=[router]).invoke({"messages": [("user", "Translate it into French.")]})
    assert engine.requests[-1].names == ["french"]
