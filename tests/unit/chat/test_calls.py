"""What a call takes and what an answer carries, around an engine without a model."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from pydantic import ValidationError

from langchain_lora_retriever import AdapterPool, ChatLoraRetriever
from langchain_lora_retriever.engine import Delta, TokenLogprob, Usage
from langchain_lora_retriever.errors import (
    EngineError,
    InvalidRequestError,
    PromptTooLongError,
)
from langchain_lora_retriever.output.reasoning import ThinkReader
from langchain_lora_retriever.output.stream import Answer, AnswerStream

SQL = "How many users are in the table?"


def _fail_on_bad(prompt: str, names: list[str]) -> str:
    if "bad" in prompt:
        raise EngineError("step failed")
    return "good"


def test_unknown_arguments_are_refused(llm: ChatLoraRetriever) -> None:
    """A misspelt argument is an error, in a call and at construction."""
    with pytest.raises(InvalidRequestError, match="Unknown argument 'tempratur'"):
        llm.invoke(SQL, tempratur=1)
    with pytest.raises(ValidationError, match="tempratur"):
        ChatLoraRetriever(base_model="fake/base", tempratur=1)


@pytest.mark.parametrize(("name", "value"), [("temperature", -1), ("top_p", 2), ("top_k", 0), ("max_tokens", 0)])
def test_bad_settings_are_refused(llm: ChatLoraRetriever, name: str, value: Any) -> None:
    """Out of range is out of range at construction and in a call."""
    with pytest.raises(ValueError, match=name):
        ChatLoraRetriever(base_model="fake/base", **{name: value})
    with pytest.raises(InvalidRequestError, match=name):
        llm.invoke(SQL, **{name: value})


def test_a_bad_engine_config_is_refused() -> None:
    """A misspelt engine limit names the limits there are."""
    with pytest.raises(ValueError, match="max_num_seqs"):
        ChatLoraRetriever(base_model="fake/base", engine_config={"max_seqs": 3})


def test_a_retriever_comes_with_its_own_pool(pool: AdapterPool, llm: ChatLoraRetriever) -> None:
    """Two pools, or an encoder beside a retriever, would be ambiguous."""
    with pytest.raises(ValueError, match="not the retriever's"):
        ChatLoraRetriever(base_model="fake/base", retriever=llm.retriever, pool=AdapterPool())
    with pytest.raises(ValueError, match="its own encoder"):
        ChatLoraRetriever(base_model="fake/base", retriever=llm.retriever, encoder="x")


def test_empty_messages_are_refused(llm: ChatLoraRetriever) -> None:
    """There is nothing to answer."""
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.invoke([])


def test_a_prompt_longer_than_the_context_is_refused(llm: ChatLoraRetriever) -> None:
    """The engine's refusal reaches the caller as it is."""
    with pytest.raises(PromptTooLongError):
        llm.invoke("x" * 3000)


def test_sampling_arguments_arrive(llm: ChatLoraRetriever, engine) -> None:
    """No sampling argument is dropped on the way to the engine."""
    call = {"temperature": 0.5, "sampling_top_k": 4, "top_p": 0.9, "seed": 3, "max_tokens": 7, "stop": ["x"]}
    call |= {"repetition_penalty": 1.2, "stop_token_ids": [4, 9]}
    llm.invoke(SQL, logprobs=1, **call)
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (0.5, 4, 0.9, 3)
    assert (sampling.max_tokens, sampling.stop, sampling.logprobs) == (7, ("x",), 1)
    assert (sampling.repetition_penalty, sampling.stop_token_ids) == (1.2, (4, 9))


def test_stop_of_the_model_and_of_the_call(llm: ChatLoraRetriever, engine) -> None:
    """A call's stop strings take the place of the model's."""
    stopping = llm.model_copy(update={"stop": ["a"]})
    stopping.invoke(SQL)
    stopping.invoke(SQL, stop=["b"])
    assert [request.sampling.stop for request in engine.requests] == [("a",), ("b",)]


def test_several_answers(llm: ChatLoraRetriever, engine) -> None:
    """`n` answers come from one call, each drawn with a seed of its own."""
    result = llm.generate([[HumanMessage(SQL)]], n=3, seed=1, temperature=1.0)
    assert len(result.generations[0]) == 3
    assert [request.sampling.seed for request in engine.requests] == [1, 2, 3]
    with pytest.raises(InvalidRequestError, match="n=2"):
        list(llm.stream(SQL, n=2))


def test_logprobs_are_reported(llm: ChatLoraRetriever) -> None:
    """Log-probabilities come as chat-completion APIs give them, streamed or not."""
    for message in (llm.invoke(SQL, logprobs=2), _added(llm.stream(SQL, logprobs=2))):
        entries = message.response_metadata["logprobs"]["content"]
        assert [entry["token"] for entry in entries] == list("The answer.")
        assert entries[0]["logprob"] == 0.0
        assert [alternative["token"] for alternative in entries[0]["top_logprobs"]] == ["T"]


def _added(chunks: Any) -> AIMessageChunk:
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first


def test_stream_adds_up_to_invoke(llm: ChatLoraRetriever) -> None:
    """Chunks add up to the answer, its usage, and metadata that appears once."""
    chunks = list(llm.stream(SQL))
    assert len(chunks) > 2
    assert chunks[-1].chunk_position == "last"
    full, whole = _added(chunks), llm.invoke(SQL)
    assert full.content == whole.content
    assert full.response_metadata == whole.response_metadata
    assert full.usage_metadata == whole.usage_metadata


def test_the_last_text_and_what_is_known_of_it_are_one_chunk(tokenizer) -> None:
    """An answer that comes whole is one chunk, with its metadata; a text after other pieces keeps its place."""
    whole = Delta("all", (5,), (TokenLogprob(5, -0.5, ()),), "length", Usage(3, 0, 1))
    (chunk,) = AnswerStream(Answer(), tokenizer, {"model_name": "m"}).push(whole)
    message = chunk.message
    assert (message.content, message.chunk_position, message.usage_metadata["total_tokens"]) == ("all", "last", 4)
    assert list(message.response_metadata) == ["logprobs", "model_name", "finish_reason", "normalized_finish_reason"]
    thinking = AnswerStream(Answer([ThinkReader(is_open=True)]), tokenizer, {})
    first, last = thinking.push(whole._replace(text="hm</think>all", logprobs=None))
    assert first.message.additional_kwargs == {"reasoning_content": "hm"}
    assert (first.message.chunk_position, last.message.content, last.message.chunk_position) == (None, "all", "last")


async def test_astream_adds_up_to_ainvoke(llm: ChatLoraRetriever) -> None:
    """The asynchronous stream is the same answer."""
    full = _added([chunk async for chunk in llm.astream(SQL)])
    whole = await llm.ainvoke(SQL)
    assert (full.content, full.response_metadata) == (whole.content, whole.response_metadata)


def test_callbacks_see_every_chunk_once(llm: ChatLoraRetriever) -> None:
    """`on_llm_new_token` is called once per chunk."""
    from langchain_core.callbacks import BaseCallbackHandler

    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tokens: list[str] = []

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            self.tokens.append(token)

    handler = Tokens()
    chunks = list(llm.stream(SQL, config={"callbacks": [handler]}))
    assert handler.tokens == [chunk.content for chunk in chunks]


def test_an_empty_answer_streams(llm: ChatLoraRetriever, engine) -> None:
    """An answer without text is a message all the same."""
    engine.answers = lambda prompt, names: ""
    assert _added(llm.stream(SQL)).content == ""
    assert llm.invoke(SQL).content == ""


def test_every_annotation_can_be_resolved() -> None:
    """LangChain looks at return types at run time, of `bind_tools` behind `with_fallbacks` for one."""
    for kind in ChatLoraRetriever.__mro__:
        if kind.__module__.startswith("langchain_lora_retriever"):
            for member in vars(kind).values():
                if inspect.isfunction(member):
                    get_type_hints(member)


def test_fallbacks_bind_tools_and_schemas(llm: ChatLoraRetriever) -> None:
    """A chat model with fallbacks is bound as a plain one is."""
    safe = llm.with_fallbacks([llm])
    assert safe.bind_tools([{"title": "add", "type": "object", "properties": {}}]).invoke(SQL).content
    assert safe.with_structured_output({"title": "T", "type": "object", "properties": {}})


def test_engine_errors_reach_the_caller(llm: ChatLoraRetriever, engine) -> None:
    """An exception inside a step is the request's, also in a stream."""
    engine.answers = _fail_on_bad
    with pytest.raises(EngineError, match="step failed"):
        llm.invoke("bad")
    with pytest.raises(EngineError, match="step failed"):
        list(llm.stream("bad"))
    assert llm.invoke("fine").content == "good"


def test_fallbacks_see_the_packages_errors(llm: ChatLoraRetriever, engine) -> None:
    """`with_retry` and `with_fallbacks` work with the exceptions raised here."""
    attempts = iter(["bad", "bad", "good"])

    def answer(prompt: str, names: list[str]) -> str:
        return _fail_on_bad(next(attempts), names)

    engine.answers = answer
    assert llm.with_retry(retry_if_exception_type=(EngineError,), wait_exponential_jitter=False).invoke("x").content
    pinned = llm.bind(adapters=["gone"]).with_fallbacks([llm.bind(adapters=[])])
    engine.answers = lambda prompt, names: "fallback"
    assert pinned.invoke("x").content == "fallback"


def test_tokens_are_counted_by_the_tokenizer(llm: ChatLoraRetriever, tokenizer) -> None:
    """Counts are the base model's own, template included."""
    assert llm.get_num_tokens("abc") == 3
    assert llm.get_num_tokens_from_messages([SystemMessage("a"), HumanMessage("b")]) == len(
        tokenizer.apply_chat_template(
            [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
            add_generation_prompt=True, return_dict=False,
        )
    )  # fmt: skip


def test_v1_output(llm: ChatLoraRetriever) -> None:
    """With `output_version="v1"` content is standard blocks, streamed or not."""
    v1 = llm.model_copy(update={"output_version": "v1"})
    assert v1.invoke(SQL).content == [{"type": "text", "text": "The answer."}]
    assert _added(v1.stream(SQL)).content_blocks[0]["text"] == "The answer."


async def test_event_streams(llm: ChatLoraRetriever) -> None:
    """Both event protocols end with the routed answer."""
    events = [event async for event in llm.astream_events(SQL, version="v2")]
    assert events[-1]["data"]["output"].response_metadata["adapters"]
    stream = llm.stream_events(SQL, version="v3")
    assert list(stream)
    assert stream.output.text == "The answer."


@pytest.mark.parametrize(
    "prompt", [None, 3, b"x", object(), [None], [3], [("user",)], [("nobody", "x")], [{"role": "user"}], {},
               [HumanMessage([{"type": []}])]], ids=repr,
)  # fmt: skip
async def test_what_is_no_prompt_is_refused_in_words(llm: ChatLoraRetriever, engine, prompt: Any) -> None:
    """In every way of calling, and before anything is asked of the engine."""
    for call in (llm.invoke, llm.route, llm.get_num_tokens_from_messages, lambda given: list(llm.stream(given))):
        with pytest.raises(InvalidRequestError):
            call(prompt)
    for acall in (llm.ainvoke, llm.aroute):
        with pytest.raises(InvalidRequestError):
            await acall(prompt)
    assert not engine.requests


def test_tokens_of_any_prompt_are_counted(llm: ChatLoraRetriever) -> None:
    """Whatever `invoke` takes."""
    num = llm.get_num_tokens_from_messages([HumanMessage("b")])
    assert llm.get_num_tokens_from_messages("b") == llm.get_num_tokens_from_messages([("user", "b")]) == num


def test_a_stream_may_leave_usage_out(llm: ChatLoraRetriever) -> None:
    """`stream_usage=False` is heeded by streams; an answer as a whole always says what it used."""
    assert any(chunk.usage_metadata for chunk in llm.stream(SQL))
    assert not any(chunk.usage_metadata for chunk in llm.stream(SQL, stream_usage=False))
    assert llm.invoke(SQL, stream_usage=False).usage_metadata
