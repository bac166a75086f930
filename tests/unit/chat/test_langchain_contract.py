"""What LangChain's users build around a chat model: events, traces, retries, fallbacks, limits, configuration."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import BaseRateLimiter
from langchain_core.runnables import ConfigurableField, RunnablePassthrough
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler

from agent_tools import add
from langchain_lora_retriever import ChatLoraRetriever
from langchain_lora_retriever.errors import EngineDeadError, EngineError, InvalidRequestError, UnknownAdapterError
from makers import until

if TYPE_CHECKING:
    from langchain_core.messages import AIMessageChunk

SQL = "How many users are in the table?"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "<think>\n{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}"
)


class Tokens(BaseCallbackHandler):
    """Remembers every token it is told of."""

    def __init__(self) -> None:
        self.tokens: list[str] = []

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        """One chunk."""
        self.tokens.append(token)


class AsyncTokens(AsyncCallbackHandler):
    """Remembers every token it is told of, in the event loop."""

    def __init__(self) -> None:
        self.tokens: list[str] = []

    async def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        """One chunk."""
        self.tokens.append(token)


def added(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    """Chunks as one message."""
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


# Events


async def test_events_of_a_chain(llm: ChatLoraRetriever) -> None:
    """A chain's events hold one event for every chunk, and the routed answer at the model's end."""
    chain = ChatPromptTemplate.from_template("{question}") | llm | StrOutputParser()
    events = [event async for event in chain.astream_events({"question": SQL}, version="v2")]
    streamed = [event["data"]["chunk"] for event in events if event["event"] == "on_chat_model_stream"]
    assert added(streamed).text == "The answer."
    (message,) = [event["data"]["output"] for event in events if event["event"] == "on_chat_model_end"]
    assert message.response_metadata["adapters"][0]["name"] == "sql"
    assert events[-1]["event"] == "on_chain_end"


async def test_content_block_events(llm: ChatLoraRetriever, engine, tokenizer) -> None:
    """The v3 protocol gives text, reasoning and tool calls as blocks of their own, sync and async."""
    engine.tokenizer = copy.deepcopy(tokenizer)
    engine.tokenizer.chat_template = THINKING
    engine.answers = lambda prompt, names: f"Hm.</think>Sure. {CALL}"
    bound = llm.bind_tools([add])
    stream = llm.stream_events(SQL, version="v3", tools=[add])
    assert list(stream)
    assert "".join(llm.stream_events(SQL, version="v3", tools=[add]).text) == "Sure."
    astream = await llm.astream_events(SQL, version="v3", tools=[add])
    _ = [event async for event in astream]
    for message in (stream.output, await astream.output, bound.invoke(SQL)):
        assert [block["type"] for block in message.content_blocks] == ["reasoning", "text", "tool_call"]
        assert message.tool_calls[0]["args"] == {"a": 1, "b": 2}
        assert message.additional_kwargs["reasoning_content"] == "Hm."
        assert message.response_metadata["adapters"]
        assert message.response_metadata["model_name"] == "fake/base"
        assert message.usage_metadata["output_tokens"] == len(f"Hm.</think>Sure. {CALL}")


async def in_events(llm: ChatLoraRetriever, **settings: Any) -> list[tuple[list[Any], Any]]:
    """A call's events and its message, without an event loop and in one."""
    stream = llm.stream_events(SQL, version="v3", **settings)
    events = list(stream)
    astream = await llm.astream_events(SQL, version="v3", **settings)
    return [(events, stream.output), ([event async for event in astream], await astream.output)]


async def test_a_block_ends_where_the_next_begins(llm: ChatLoraRetriever, engine, tokenizer) -> None:
    """Who shows an answer while it comes knows when reasoning is over; text after a call comes after it."""
    engine.tokenizer = copy.deepcopy(tokenizer)
    engine.tokenizer.chat_template = THINKING
    engine.answers = lambda prompt, names: f"Hm.</think>Sure. {CALL} Done. {CALL.replace('1', '3')}"
    for events, message in await in_events(llm, tools=[add]):
        kinds = [event["event"] for event in events if event["event"] != "content-block-delta"]
        assert kinds == ["message-start", *["content-block-start", "content-block-finish"] * 5, "message-finish"]
        assert [event["index"] for event in events if event["event"] == "content-block-start"] == list(range(5))
        blocks = [event["content"] for event in events if event["event"] == "content-block-finish"]
        assert [block["type"] for block in blocks] == ["reasoning", "text", "tool_call", "text", "tool_call"]
        assert [block["type"] for block in message.content_blocks] == [block["type"] for block in blocks]
        assert (blocks[1]["text"], blocks[3]["text"]) == ("Sure.", "Done.")
        assert [call["args"] for call in message.tool_calls] == [{"a": 1, "b": 2}, {"a": 3, "b": 2}]
        pieces = [event["delta"]["args"] for event in events if event.get("delta", {}).get("type") == "tool-call-delta"]
        assert len(pieces) > 4
        start, finish = events[0], events[-1]
        assert start["metadata"] == {"provider": "lora-retriever", "model": "fake/base"}
        assert start["id"] == message.id
        assert (finish["finish_reason"], finish["normalized_finish_reason"]) == ("tool_calls", "tool_call")


async def test_events_lose_no_log_probabilities(llm: ChatLoraRetriever) -> None:
    """Every token's, as `invoke` has them; usage is left out where it is not wanted."""
    whole = llm.invoke(SQL, logprobs=True).response_metadata["logprobs"]
    for events, message in await in_events(llm, logprobs=True, stream_usage=False):
        assert message.response_metadata["logprobs"] == whole
        assert len(whole["content"]) == len("The answer.")
        assert message.usage_metadata is None
        assert "usage" not in events[-1]


@pytest.mark.parametrize(
    "said",
    [CALL[:-20], CALL.replace('{"a": 1, "b": 2}', "[1]"), CALL.replace('"add"', "7"), ""],
    ids=["broken off", "a list", "no name", "nothing"],
)  # fmt: skip
async def test_events_of_a_call_that_is_none_are_what_invoke_says(llm: ChatLoraRetriever, engine, said: str) -> None:
    """Arguments are not guessed at, and an answer without a text has no block."""
    engine.answers = [said]
    whole = llm.bind_tools([add]).invoke(SQL)
    for events, message in await in_events(llm, tools=[add]):
        assert not message.tool_calls
        assert [call["args"] for call in message.invalid_tool_calls] == [
            call["args"] for call in whole.invalid_tool_calls
        ]
        assert message.text == whole.text
        assert events[-1]["finish_reason"] == whole.response_metadata["finish_reason"]


async def test_events_that_fail_fail_as_a_stream_does(llm: ChatLoraRetriever, engine) -> None:
    """What is wrong with the call is raised; an engine's error ends the events."""
    with pytest.raises(InvalidRequestError, match="cannot be streamed"):
        list(llm.stream_events(SQL, version="v3", n=2))
    with pytest.raises(UnknownAdapterError):
        list(llm.stream_events(SQL, version="v3", model="gone"))
    engine.close()
    with pytest.raises(EngineDeadError):
        list(llm.stream_events(SQL, version="v3"))


# Callbacks and traces


async def test_callbacks_hear_of_every_chunk_once(llm: ChatLoraRetriever, engine) -> None:
    """`on_llm_new_token` is called once per chunk: streamed, asynchronously, and where `invoke` streams inside."""
    engine.answers = lambda prompt, names: f"Sure. {CALL}"
    bound = llm.bind_tools([add])
    handler, ahandler = Tokens(), AsyncTokens()
    chunks = list(bound.stream(SQL, config={"callbacks": [handler]}))
    achunks = [chunk async for chunk in bound.astream(SQL, config={"callbacks": [ahandler]})]
    assert handler.tokens == [chunk.content for chunk in chunks]
    assert ahandler.tokens == [chunk.content for chunk in achunks]
    streaming, inside = llm.model_copy(update={"streaming": True}), Tokens()
    message = streaming.invoke(SQL, config={"callbacks": [inside]})
    assert len(inside.tokens) > 2
    assert "".join(inside.tokens) == message.text


@pytest.mark.parametrize("way", ["invoke", "stream", "ainvoke", "astream", "batch", "events", "aevents"])
async def test_the_routed_adapters_are_in_the_trace(llm: ChatLoraRetriever, way: str) -> None:
    """A trace's run holds the adapters, their scores and weights, and the settings that routed."""
    collector = RunCollectorCallbackHandler()
    config: Any = {"callbacks": [collector]}
    if way == "stream":
        list(llm.stream(SQL, config))
    elif way == "astream":
        _ = [chunk async for chunk in llm.astream(SQL, config)]
    elif way == "ainvoke":
        await llm.ainvoke(SQL, config)
    elif way == "batch":
        llm.batch([SQL], config)
    elif way == "events":
        list(llm.stream_events(SQL, config, version="v3"))
    elif way == "aevents":
        _ = [event async for event in await llm.astream_events(SQL, config, version="v3")]
        await until(lambda: collector.traced_runs)  # LangChain ends the run in a task of its own
    else:
        llm.invoke(SQL, config)
    (run,) = collector.traced_runs
    metadata = run.outputs["generations"][0][0]["message"]["kwargs"]["response_metadata"]
    assert metadata["adapters"][0]["name"] == "sql"
    assert metadata["adapters"][0]["score"] > 0
    assert metadata["composition"] == "mixture"
    assert run.extra["invocation_params"]["top_k"] == 3
    assert run.extra["metadata"]["ls_provider"] == "lora-retriever"
    (routing,) = run.child_runs
    assert (routing.run_type, routing.name, routing.error) == ("retriever", "LoraRetriever", None)
    assert routing.inputs == {"query": SQL}
    found = [(found.page_content, found.metadata["score"]) for found in routing.outputs["documents"]]
    assert found == [(adapter["name"], adapter["score"]) for adapter in metadata["adapters"]]
    assert routing.extra["metadata"]["ls_embedding_model"] == "words"


async def test_routing_that_fails_is_seen_to_fail(llm: ChatLoraRetriever) -> None:
    """The routing run holds the error, as the call's does."""
    for is_async in (False, True):
        collector = RunCollectorCallbackHandler()
        config: Any = {"callbacks": [collector]}
        with pytest.raises(UnknownAdapterError):
            _ = await llm.ainvoke(SQL, config, model="gone") if is_async else llm.invoke(SQL, config, model="gone")
        (run,) = collector.traced_runs
        assert "gone" in run.error
        assert "gone" in run.child_runs[0].error


async def test_routing_is_an_event(llm: ChatLoraRetriever) -> None:
    """Whoever follows a chain's events sees the adapters before the first token."""
    events = [event async for event in (llm | StrOutputParser()).astream_events(SQL, version="v2")]
    kinds = [event["event"] for event in events]
    assert kinds.index("on_retriever_end") < kinds.index("on_chat_model_stream")
    (ended,) = [event for event in events if event["event"] == "on_retriever_end"]
    assert ended["data"]["output"][0].page_content == "sql"


def test_parameters_of_a_trace(llm: ChatLoraRetriever) -> None:
    """LangSmith's are those of the call: what it overrides, and the adapter that it pins as a model."""
    params = llm._get_ls_params(stop=["x"], temperature=0.5, max_tokens=9, model="sql")
    assert params == {
        "ls_provider": "lora-retriever", "ls_model_name": "sql", "ls_model_type": "chat",
        "ls_temperature": 0.5, "ls_max_tokens": 9, "ls_stop": ["x"],
    }  # fmt: skip
    assert llm._get_ls_params()["ls_model_name"] == "fake/base"
    assert llm._get_ls_params()["ls_temperature"] == 0.0


@pytest.mark.parametrize(
    ("answer", "reasons"), [("Yes.", ("stop", "stop")), (CALL, ("tool_calls", "tool_call"))], ids=["words", "a call"]
)
async def test_finish_reasons_in_both_vocabularies(
    llm: ChatLoraRetriever, engine, answer: str, reasons: tuple[str, str]
) -> None:
    """OpenAI's word, and langchain-core's for all providers, once each, streamed or not."""
    engine.answers = [answer]
    bound = llm.bind_tools([add])
    achunks = [chunk async for chunk in bound.astream(SQL)]
    for message in (bound.invoke(SQL), added(list(bound.stream(SQL))), added(achunks)):
        metadata = message.response_metadata
        assert (metadata["finish_reason"], metadata["normalized_finish_reason"]) == reasons
    stream = llm.stream_events(SQL, version="v3", tools=[add])
    assert list(stream)
    assert stream.output.response_metadata["normalized_finish_reason"] == reasons[1]


# Retries, fallbacks, limits


async def test_retries_and_fallbacks(llm: ChatLoraRetriever, engine) -> None:
    """A failed step is retried, a dead engine falls back, in all four ways of calling."""
    answers = iter([EngineError("step failed"), "second", EngineError("step failed"), "second"])

    def answer(prompt: str, names: list[str]) -> str:
        given = next(answers)
        if isinstance(given, Exception):
            raise given
        return given

    engine.answers = answer
    retrying = llm.with_retry(retry_if_exception_type=(EngineError,), wait_exponential_jitter=False)
    assert retrying.invoke(SQL).text == "second"
    assert (await retrying.ainvoke(SQL)).text == "second"

    dead = llm.bind(route_text="dead")
    engine.close()
    with pytest.raises(EngineDeadError):
        dead.invoke(SQL)
    safe = (dead | StrOutputParser()).with_fallbacks([RunnablePassthrough()], exceptions_to_handle=(EngineError,))
    assert safe.invoke(SQL) == SQL
    assert await safe.ainvoke(SQL) == SQL
    assert "".join(safe.stream(SQL)) == SQL
    assert "".join([piece async for piece in safe.astream(SQL)]) == SQL


class Counting(BaseRateLimiter):
    """Counts who asks."""

    def __init__(self) -> None:
        self.counts = [0, 0]

    def acquire(self, *, blocking: bool = True) -> bool:
        """Let through."""
        self.counts[0] += 1
        return True

    async def aacquire(self, *, blocking: bool = True) -> bool:
        """Let through."""
        self.counts[1] += 1
        return True


async def test_a_rate_limiter_is_asked_once_per_call(llm: ChatLoraRetriever) -> None:
    """Whichever way a call is made, it asks once, and the asynchronous ones ask asynchronously."""
    limiter = Counting()
    limited = llm.model_copy(update={"rate_limiter": limiter})
    limited.invoke(SQL)
    list(limited.stream(SQL))
    limited.batch([SQL, SQL])
    assert limiter.counts == [4, 0]
    await limited.ainvoke(SQL)
    _ = [chunk async for chunk in limited.astream(SQL)]
    await limited.abatch([SQL, SQL])
    assert limiter.counts == [4, 4]


async def test_a_batch_times_out_call_by_call(llm: ChatLoraRetriever, engine) -> None:
    """A timeout of the settings ends the late call of a batch and no other."""
    engine.answers = lambda prompt, names: time.sleep(0.5 if "slow" in prompt else 0) or "done"
    patient = llm.model_copy(update={"timeout": 0.25})
    for results in (
        patient.batch(["slow", "quick"], return_exceptions=True),
        await patient.abatch(["slow", "quick"], return_exceptions=True),
    ):
        assert isinstance(results[0], TimeoutError)
        assert results[1].text == "done"


# Configuration


async def test_settings_are_configurable_per_run(llm: ChatLoraRetriever, engine) -> None:
    """Composition, top_k, adapters and sampling can be set in the config of one run, also inside a chain."""
    runnable = llm.configurable_fields(
        top_k=ConfigurableField(id="top_k"), adapters=ConfigurableField(id="adapters"),
        composition=ConfigurableField(id="composition"), temperature=ConfigurableField(id="temperature"),
    )  # fmt: skip
    chain = ChatPromptTemplate.from_template("{question}") | runnable
    configured = chain.with_config(configurable={"top_k": 1, "composition": "selection"})
    for message in (
        configured.invoke({"question": SQL}),
        await configured.ainvoke({"question": SQL}),
        added(list(configured.stream({"question": SQL}))),
    ):
        metadata = message.response_metadata
        assert (metadata["composition"], [a["name"] for a in metadata["adapters"]]) == ("selection", ["sql"])
    configs = [{"configurable": {"adapters": [name], "temperature": 0.5}} for name in ("dates", "french")]
    messages = runnable.batch([SQL, SQL], configs)
    assert [m.response_metadata["adapters"][0]["name"] for m in messages] == ["dates", "french"]
    assert {request.sampling.temperature for request in engine.requests[-2:]} == {0.5}
    assert len(runnable.invoke(SQL).response_metadata["adapters"]) == 3


def test_a_copy_with_other_fields_shares_the_retriever(llm: ChatLoraRetriever) -> None:
    """What LangChain copies for every configured run embeds no pool again."""
    runnable: Any = llm.configurable_fields(top_k=ConfigurableField(id="top_k"))
    copied, _ = runnable._prepare({"configurable": {"top_k": 1}})
    assert copied is not llm
    assert copied.retriever is llm.retriever


# Answers


def test_reasoning_is_switched_by_the_templates_variable(llm: ChatLoraRetriever, engine, tokenizer) -> None:
    """`enable_thinking` reaches the template; what is thought is a reasoning block, in both output versions."""
    engine.tokenizer = copy.deepcopy(tokenizer)
    engine.tokenizer.chat_template = THINKING
    engine.answers = lambda prompt, names: "Yes." if prompt.endswith("</think>\n\n") else "Hm.\n</think>\n\nYes."
    for version in (None, "v1"):
        model = llm.model_copy(update={"output_version": version})
        for message in (model.invoke("x"), added(list(model.stream("x")))):
            blocks = message.content_blocks
            assert [(b["type"], b.get("reasoning") or b.get("text")) for b in blocks] == [
                ("reasoning", "Hm."), ("text", "Yes."),
            ]  # fmt: skip
        quiet = model.invoke("x", chat_template_kwargs={"enable_thinking": False})
        assert [block["type"] for block in quiet.content_blocks] == ["text"]
    assert model.with_config().invoke("x").text == "Yes."


async def test_v1_content_is_standard_blocks(llm: ChatLoraRetriever, engine) -> None:
    """With `output_version="v1"` content is text and tool-call blocks, whichever way it is asked for."""
    engine.answers = lambda prompt, names: f"Sure. {CALL}"
    bound = llm.model_copy(update={"output_version": "v1"}).bind_tools([add])
    for message in (
        bound.invoke(SQL),
        await bound.ainvoke(SQL),
        added(list(bound.stream(SQL))),
        added([chunk async for chunk in bound.astream(SQL)]),
    ):
        assert [block["type"] for block in message.content] == ["text", "tool_call"]


def test_log_probabilities_of_several_answers(llm: ChatLoraRetriever) -> None:
    """Every one of n answers carries its own, and LangChain counts the tokens of all."""
    result = llm.generate([[HumanMessage(SQL)]], n=3, logprobs=True, top_logprobs=2)
    for generation in result.generations[0]:
        entries = generation.message.response_metadata["logprobs"]["content"]
        assert [entry["token"] for entry in entries] == list("The answer.")
        assert [alternative["token"] for alternative in entries[0]["top_logprobs"]] == ["T"]


def test_the_profile(llm: ChatLoraRetriever, engine, tokenizer) -> None:
    """The context window and reasoning are known once the model is; a profile of the user's own is left alone."""
    from langchain_core.language_models import ModelProfile

    assert llm.profile["max_input_tokens"] == engine.info.max_model_len
    llm = ChatLoraRetriever(base_model="fake/base", retriever=llm.retriever)
    assert set(llm.profile) <= set(ModelProfile.__annotations__)
    assert llm.profile["structured_output"]
    assert llm.profile["tool_calling"]
    assert not any(value for key, value in llm.profile.items() if key.startswith(("image", "audio", "video", "pdf")))
    assert "max_input_tokens" not in llm.profile  # "fake/base" is neither loaded nor on this disk


def test_the_profile_of_a_loaded_model(tokenizer) -> None:
    """A model that is already loaded tells its window at once, and an engine's limit makes it shorter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**tiny, num_attention_heads=1, max_position_embeddings=640))
    assert ChatLoraRetriever(base_model=(model, tokenizer)).profile["max_input_tokens"] == 640
    limited = ChatLoraRetriever(base_model=(model, tokenizer), engine_config={"max_model_len": 100})
    assert limited.profile["max_input_tokens"] == 100
    own = ChatLoraRetriever(base_model=(model, tokenizer), profile={"max_input_tokens": 7})
    assert own.profile == {"max_input_tokens": 7}
