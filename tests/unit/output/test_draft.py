"""An answer in a schema beside tools: a draft in words, then the same as JSON."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from langchain_lora_retriever.chat.call import CallOptions
from langchain_lora_retriever.errors import EngineError, InvalidRequestError
from langchain_lora_retriever.output.format import answer_format
from langchain_lora_retriever.output.grammars import json_grammar
from langchain_lora_retriever.output.tools import to_json_schema
from makers import until

if TYPE_CHECKING:
    from langchain_core.messages import AIMessage

    from langchain_lora_retriever import ChatLoraRetriever

SQL = "How many users are in the table?"
CALL = '<tool_call>\n{"name": "count", "arguments": {"table": "users"}}\n</tool_call>'
WORDS = "There are 7 users."
JSON = '{"table": "users", "num": 7}'


class Count(BaseModel):
    """A count."""

    table: str
    num: int


@tool
def count(table: str) -> int:
    """Count the rows of a table."""
    return len(table)


def bound(llm: ChatLoraRetriever, **kwargs: Any) -> Any:
    """The model with the tool and the schema, as `create_agent` binds them."""
    schema = {"type": "json_schema", "json_schema": {"name": "Count", "schema": Count.model_json_schema()}}
    return llm.bind_tools([count], response_format=schema, **kwargs)


async def in_every_way(llm: Any) -> list[AIMessage]:
    """The answer, whole and streamed, blocking and not."""
    chunks, achunks = list(llm.stream(SQL)), [chunk async for chunk in llm.astream(SQL)]
    streamed, astreamed = chunks[0], achunks[0]
    for chunk in chunks[1:]:
        streamed += chunk
    for chunk in achunks[1:]:
        astreamed += chunk
    return [llm.invoke(SQL), await llm.ainvoke(SQL), streamed, astreamed]


async def test_words_are_a_draft_of_the_json(llm: ChatLoraRetriever, engine: Any) -> None:
    """The first request is as free as without a schema, the second goes on from its words in the schema."""
    engine.answers = [WORDS, JSON]
    for message in await in_every_way(bound(llm)):
        assert json.loads(message.text) == {"table": "users", "num": 7}
        assert message.additional_kwargs["reasoning_content"] == WORDS
        assert not message.tool_calls
        assert message.response_metadata["finish_reason"] == "stop"
        assert message.usage_metadata["output_tokens"] == len(WORDS) + len(JSON)
        assert message.usage_metadata["input_tokens"] == len(engine.requests[0].prompt_token_ids)
    draft, answer = engine.requests[:2]
    assert draft.grammar == answer_format(CallOptions(tools=[count]), engine.tokenizer).grammar
    assert answer.grammar == json_grammar(to_json_schema(Count))
    assert answer.prompt == f"{draft.prompt}{WORDS}\n"
    assert answer.names == draft.names


async def test_a_call_is_an_answer(llm: ChatLoraRetriever, engine: Any) -> None:
    """No second request follows it; what is said before it is reasoning, for it is not the JSON asked for."""
    engine.answers = [f"Let me count.\n{CALL}"]
    for message in await in_every_way(bound(llm)):
        assert message.tool_calls[0]["args"] == {"table": "users"}
        assert message.text == ""
        assert message.additional_kwargs["reasoning_content"] == "Let me count."
        assert message.response_metadata["finish_reason"] == "tool_calls"
    assert len(engine.requests) == 4


@pytest.mark.parametrize("text", [JSON, '  {"table":"users",\n "num":7}\n'])
async def test_a_draft_that_satisfies_the_schema_is_the_answer(llm: ChatLoraRetriever, engine: Any, text: str) -> None:
    """However it is spaced; it is not asked for twice, nor shown as reasoning."""
    engine.answers = [text]
    for message in await in_every_way(bound(llm)):
        assert message.text == JSON
        assert "reasoning_content" not in message.additional_kwargs
    assert len(engine.requests) == 4


@pytest.mark.parametrize("text", ['{"table": "users"}', '{"table": "users", "num": "7"}', '{"table": ', "[7]"])
async def test_a_draft_that_breaks_the_schema_is_written_again(llm: ChatLoraRetriever, engine: Any, text: str) -> None:
    """JSON that does not satisfy it is no answer, and nobody's reasoning."""
    engine.answers = [text, JSON]
    for message in await in_every_way(bound(llm)):
        assert message.text == JSON
        assert "reasoning_content" not in message.additional_kwargs
    assert engine.requests[1].prompt.endswith(f"{text}\n")


def test_json_may_hold_what_is_a_tag_elsewhere(llm: ChatLoraRetriever, engine: Any) -> None:
    """Calls are looked for in the draft alone."""
    odd = json.dumps({"table": CALL, "num": 7})
    engine.answers = [WORDS, odd]
    message = bound(llm).invoke(SQL)
    assert json.loads(message.text)["table"] == CALL
    assert not message.tool_calls


def test_a_long_draft_is_left_out(llm: ChatLoraRetriever, engine: Any) -> None:
    """Where prompt, draft and answer do not fit together, the answer is written without the draft."""
    engine.answers = ["x" * 1900, JSON]
    assert bound(llm, max_tokens=100).invoke(SQL).text == JSON
    assert engine.requests[1].prompt == engine.requests[0].prompt


def test_a_schema_that_cannot_be_honoured_is_told_at_once(llm: ChatLoraRetriever, engine: Any) -> None:
    """Before a draft is generated."""
    schema = {"type": "object", "properties": {"n": {"not": {"type": "string"}}}, "required": ["n"]}
    with pytest.raises(InvalidRequestError, match="cannot be constrained"):
        llm.bind_tools([count], response_format=schema).invoke(SQL)
    assert not engine.requests


def test_each_of_several_answers_has_its_own(llm: ChatLoraRetriever, engine: Any) -> None:
    """One calls, another answers."""
    answers = {0: CALL, 1: WORDS}
    given = iter(range(2))
    engine.answers = lambda prompt, names: JSON if prompt.endswith(f"{WORDS}\n") else answers[next(given)]
    result = llm.generate([[HumanMessage(SQL)]], **bound(llm).kwargs, n=2)
    messages = [generation.message for generation in result.generations[0]]
    assert sorted((message.text, len(message.tool_calls)) for message in messages) == [("", 1), (JSON, 0)]


async def test_leaving_ends_whichever_request_runs(llm: ChatLoraRetriever, engine: Any) -> None:
    """In the draft and in the answer, by closing a stream and by a timeout."""
    engine.answers = [WORDS, JSON]
    engine.delay = 0.01
    for place in (1, len(WORDS) // 3 + 2):
        engine.answers = engine.answers
        before, stream = engine.num_aborted, bound(llm).astream(SQL)
        for _ in range(place):
            await anext(stream)
        await stream.aclose()
        await until(lambda before=before: engine.num_aborted == before + 1)
        assert engine.stats().num_running == 0
    engine.answers = lambda prompt, names: time.sleep(0.3) or JSON if prompt.endswith(f"{WORDS}\n") else WORDS
    for call in (bound(llm, timeout=0.25).invoke, lambda text: list(bound(llm, timeout=0.25).stream(text))):
        with pytest.raises(TimeoutError):
            call(SQL)


async def test_what_fails_in_the_answer_fails_the_call(llm: ChatLoraRetriever, engine: Any) -> None:
    """As in the draft."""

    def answer(prompt: str, names: list[str]) -> str:
        if prompt.endswith(f"{WORDS}\n"):
            raise EngineError("step failed")
        return WORDS

    engine.answers = answer
    for way in (bound(llm).invoke, lambda text: list(bound(llm).stream(text))):
        with pytest.raises(EngineError, match="step failed"):
            way(SQL)
    with pytest.raises(EngineError, match="step failed"):
        await bound(llm).ainvoke(SQL)
