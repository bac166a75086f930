"""What LangChain's agents build around the chat model: loops with schemas, middleware, checkpoints, trimming."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage, trim_messages

from agent_tools import Weather, get_weather
from langchain_lora_retriever import ChatLoraRetriever, registry
from langchain_lora_retriever.engine import start

if TYPE_CHECKING:
    from collections.abc import Iterator

agents = pytest.importorskip("langchain.agents", reason="the extra `examples` is not installed")

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Lisbon"}}\n</tool_call>'
WORDS = "It is sunny in Lisbon, 21 degrees."
JSON = '{"city": "Lisbon", "degrees": 21}'
QUESTION = "What is the weather in Lisbon?"


def done_in_words(prompt: str, names: list[str]) -> str:
    """Call the tool, and be done in words once its result is there; write JSON where words came first."""
    if prompt.endswith(f"{WORDS}\n"):
        return JSON
    return WORDS if "sunny and 21" in prompt else CALL


async def test_an_agent_with_a_schema_ends(llm: ChatLoraRetriever, engine: Any) -> None:
    """It calls a tool as often as it would without the schema, and says the rest in it."""
    engine.answers = done_in_words
    agent = agents.create_agent(llm, [get_weather], response_format=Weather)
    asked: Any = {"messages": [("user", QUESTION)]}
    for state in (agent.invoke(asked, {"recursion_limit": 6}), await agent.ainvoke(asked, {"recursion_limit": 6})):
        assert state["structured_response"] == Weather(city="Lisbon", degrees=21)
        assert [message.type for message in state["messages"]] == ["human", "ai", "tool", "ai"]
    assert sum(request.prompt.endswith(f"{WORDS}\n") for request in engine.requests) == 2


def test_an_agent_streams_its_answer(llm: ChatLoraRetriever, engine: Any) -> None:
    """The pieces of the JSON come beside the words before it, which are reasoning."""
    engine.answers = done_in_words
    agent = agents.create_agent(llm, [get_weather], response_format=Weather)
    text, reasoning = "", ""
    for chunk, _ in agent.stream({"messages": [("user", QUESTION)]}, stream_mode="messages"):
        if isinstance(chunk, AIMessage):
            text += chunk.text
            reasoning += chunk.additional_kwargs.get("reasoning_content", "")
    assert (text, reasoning) == (JSON, WORDS)


def test_middleware_sees_and_changes_the_call(llm: ChatLoraRetriever, engine: Any) -> None:
    """A dynamic prompt, settings per call and a limit of calls are LangChain's own, and hold here."""
    from langchain.agents.middleware import ModelCallLimitMiddleware, dynamic_prompt, wrap_model_call

    @dynamic_prompt
    def prompt(request: Any) -> str:
        return f"You know {len(request.messages)} messages."

    @wrap_model_call
    def pin(request: Any, handler: Any) -> Any:
        return handler(request.override(model_settings={"adapters": ["french"]}))

    engine.answers = [CALL]
    limit = ModelCallLimitMiddleware(run_limit=2, exit_behavior="end")
    agent = agents.create_agent(llm, [get_weather], middleware=[prompt, pin, limit])
    agent.invoke({"messages": [("user", QUESTION)]})
    assert [request.names for request in engine.requests] == [["french"], ["french"]]
    assert "You know 3 messages." in engine.requests[-1].prompt


def test_a_summary_does_not_route(llm: ChatLoraRetriever, engine: Any) -> None:
    """What middleware writes in the human's name is context: the human's own words choose the adapters."""
    summary = HumanMessage("Translate the sentence into French.", additional_kwargs={"lc_source": "summarization"})
    asked = HumanMessage("How many users signed up in May?")
    for messages in ([summary, asked], [asked, AIMessage("7"), summary]):
        assert llm.route(messages).names[0] == "sql"
    assert llm.route([summary]).names[0] == "french"


def test_a_checkpointed_thread_routes_every_turn(llm: ChatLoraRetriever, engine: Any) -> None:
    """Turns of one thread run different adapters; what a checkpoint keeps of them survives being written down."""
    from langgraph.checkpoint.memory import InMemorySaver

    saver = InMemorySaver()
    agent = agents.create_agent(llm, [], checkpointer=saver)
    config: Any = {"configurable": {"thread_id": "1"}}
    for question in ("How many users signed up in May?", "How do you say good morning in French?"):
        agent.invoke({"messages": [("user", question)]}, config)
    kept = agents.create_agent(llm, [], checkpointer=saver).get_state(config).values["messages"]
    routed = [m.response_metadata["adapters"][0]["name"] for m in kept if isinstance(m, AIMessage)]
    assert routed == ["sql", "french"]
    assert json.dumps([m.response_metadata for m in kept])
    assert "signed up in May" in engine.requests[-1].prompt


def test_trimming_counts_without_the_model(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat that is far too long is trimmed by this model's own counts, before any weights are loaded."""
    monkeypatch.setattr(registry, "load_tokenizer", lambda *_, **__: tokenizer)
    monkeypatch.setattr(start, "load_base_model", lambda *_, **__: pytest.fail("the model was loaded"))
    llm = ChatLoraRetriever(base_model="fake/base")
    turns = [message for i in range(200) for message in (HumanMessage(f"{i} " * 40), AIMessage("ok"))]
    for options in ({}, {"start_on": "human", "include_system": True}, {"strategy": "first"}):
        kept = trim_messages([SystemMessage("Be brief."), *turns], max_tokens=1000, token_counter=llm, **options)
        assert 1 < len(kept) < 20
        assert llm.get_num_tokens_from_messages(kept) <= 1000
    assert llm.get_num_tokens("abc") == 3


@pytest.fixture
def strict_tokenizer(tokenizer: Any) -> Iterator[Any]:
    """One whose template insists that the user begins."""
    before = tokenizer.chat_template
    check = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('Who asked?') }}{% endif %}"
    tokenizer.chat_template = check + before
    yield tokenizer
    tokenizer.chat_template = before


@pytest.mark.usefixtures("strict_tokenizer")
def test_parts_of_chats_are_counted_that_no_template_would_render(llm: ChatLoraRetriever) -> None:
    """`trim_messages` asks about chats that begin with an answer, and about chats backwards."""
    chat = [HumanMessage("x" * 50), AIMessage("y" * 50), ToolMessage("z", tool_call_id="1")]
    assert llm.get_num_tokens_from_messages(chat[1:]) > 50
    assert len(trim_messages(chat, max_tokens=120, token_counter=llm)) == 2
