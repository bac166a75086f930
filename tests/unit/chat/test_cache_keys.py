"""LangChain's response cache: two configurations that ask the engine for different things never share an answer."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from langchain_core.caches import InMemoryCache
from pydantic import BaseModel

from langchain_lora_retriever import ChatLoraRetriever, LoraRetriever
from langchain_lora_retriever.chat.call import CallOptions
from langchain_lora_retriever.errors import LoraRetrieverError
from langchain_lora_retriever.output.format import answer_format

if TYPE_CHECKING:
    from collections.abc import Mapping

PROMPT = "How many users are in the table?"
STYLED = "{{ style or '' }}{{ tools | tojson if tools else '' }}"


def make_schema(kind: Any) -> type[BaseModel]:
    """A class whose name never differs."""

    class Reply(BaseModel):
        value: kind

    return Reply


TEXT, NUMBER = make_schema(str), make_schema(int)
SHARED = {
    "adapters": st.sampled_from([[], ["sql"], ["dates"], ["sql", "dates"]]),
    "exclude_adapters": st.sampled_from([["sql"], ["dates"]]),
    "composition": st.sampled_from(["selection", "fusion", "mixture"]),
    "top_k": st.integers(1, 3),
    "weights": st.sampled_from(["similarity", "uniform"]),
    "weight_temperature": st.sampled_from([0.05, 0.5]),
    "min_score": st.sampled_from([0.1, 0.4]),
    "temperature": st.sampled_from([0.0, 0.5, 1.0]),
    "max_tokens": st.integers(5, 7),
    "sampling_top_k": st.sampled_from([0, 4]),
    "top_p": st.sampled_from([0.5, 1.0]),
    "seed": st.sampled_from([0, 1]),
    "stop": st.sampled_from([["a"], ["b"]]),
    "stop_token_ids": st.sampled_from([[5], [6]]),
    "repetition_penalty": st.sampled_from([1.0, 1.3]),
    "logprobs": st.sampled_from([True, False, 2]),
    "chat_template_kwargs": st.sampled_from([{"style": "kind"}, {"style": "curt"}]),
    "timeout": st.sampled_from([5.0, 6.0]),
}
CALL_ONLY = {
    "route_text": st.sampled_from([PROMPT, "Translate good morning into French."]),
    "model": st.sampled_from(["sql", "fake/base"]),
    "n": st.integers(1, 2),
    "top_logprobs": st.integers(0, 2),
    "tools": st.sampled_from([[TEXT], [NUMBER], [TEXT.model_json_schema()]]),
    "tool_choice": st.sampled_from(["auto", "any", "Reply", "none"]),
    "parallel_tool_calls": st.booleans(),
    "response_format": st.sampled_from([TEXT, NUMBER, {"type": "json_object"}, {"type": "text"}]),
    "guided": st.sampled_from(
        [{"choice": ["a"]}, {"choice": ["b"]}, {"regex": "a+"}, {"json": TEXT}, {"json": NUMBER}]
    ),
}


def some(strategies: Mapping[str, Any], most: int) -> Any:
    """Dictionaries of some of the keys."""
    names = st.lists(st.sampled_from(sorted(strategies)), unique=True, max_size=most)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: strategies[name] for name in chosen}))


def asked(llm: ChatLoraRetriever, engine: Any, call: Mapping[str, Any]) -> Any:
    """What a call asks of the engine, and what its answer may look like."""
    engine.requests.clear()
    engine.answers = lambda prompt, names: '{"value": "x"}'
    arguments = dict(call)
    stop = arguments.pop("stop", None)
    llm.generate([llm._convert_input(PROMPT).to_messages()], stop=stop, **arguments)
    options = CallOptions.merge(llm, call)
    return [
        (request.prompt, request.sampling, [(a.fingerprint, weight) for a, weight in request.adapters],
         answer_format(options, engine.tokenizer).grammar)
        for request in engine.requests
    ]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some(SHARED, 3), some(SHARED | CALL_ONLY, 3), some(SHARED, 3), some(SHARED | CALL_ONLY, 3))
@example({"stop": ["a"]}, {}, {"stop": ["b"]}, {})
@example({"repetition_penalty": 1.3}, {}, {}, {"repetition_penalty": 1.0})
@example({}, {"stop_token_ids": [5]}, {"stop_token_ids": [6]}, {})
@example({}, {"response_format": TEXT}, {}, {"response_format": NUMBER})
@example({}, {"tools": [TEXT]}, {}, {"tools": [NUMBER]})
@example({}, {"guided": {"json": TEXT}}, {}, {"guided": {"json": NUMBER}})
def test_calls_of_one_key_ask_for_the_same(llm, engine, tokenizer, first, first_call, second, second_call) -> None:
    """If two configurations ask the engine for anything different, their keys differ."""
    engine.tokenizer = copy.deepcopy(tokenizer)
    engine.tokenizer.chat_template = STYLED + tokenizer.chat_template
    try:
        models = [ChatLoraRetriever(engine=engine, retriever=llm.retriever, **own) for own in (first, second)]
        requests = [asked(*pair) for pair in zip(models, [engine] * 2, (first_call, second_call), strict=True)]
        keys = [model._get_llm_string(**call) for model, call in zip(models, (first_call, second_call), strict=True)]
    except (LoraRetrieverError, ValueError):
        assume(False)  # a combination that is refused shares no answer
    assert requests[0] == requests[1] or keys[0] != keys[1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some(SHARED, 4))
def test_a_setting_and_an_argument_of_one_value_share_an_answer(llm, own) -> None:
    """Where a value comes from changes no answer, so it changes no key."""
    try:
        as_setting = ChatLoraRetriever(base_model="fake/base", retriever=llm.retriever, **own)
        as_argument = ChatLoraRetriever(base_model="fake/base", retriever=llm.retriever)
    except ValueError:
        assume(False)
    assert as_setting._get_llm_string() == as_argument._get_llm_string(**own)


def test_what_is_not_a_call_option_is_part_of_the_key_too(llm: ChatLoraRetriever, pool, tokenizer) -> None:
    """Another base model, way of loading, engine, retriever, pool content or output format is another answer."""
    retriever = llm.retriever
    encoder = retriever.encoder
    models = [
        llm,
        ChatLoraRetriever(base_model="fake/base", retriever=retriever),
        ChatLoraRetriever(base_model="fake/other", retriever=retriever),
        ChatLoraRetriever(base_model="fake/base", retriever=retriever, model_name="x"),
        ChatLoraRetriever(base_model="fake/base", retriever=retriever, model_kwargs={"dtype": "float16"}),
        ChatLoraRetriever(base_model="fake/base", retriever=retriever, engine_config={"max_model_len": 64}),
        ChatLoraRetriever(base_model="fake/base", retriever=retriever, output_version="v1"),
        ChatLoraRetriever(base_model="fake/base", retriever=LoraRetriever(pool, encoder, instruction="x ")),
        ChatLoraRetriever(base_model="fake/base", retriever=LoraRetriever(pool, encoder, min_score=0.2)),
        ChatLoraRetriever(base_model="fake/base", retriever=LoraRetriever(pool, encoder, answer_weight=0.2)),
        ChatLoraRetriever(base_model="fake/base"),
    ]
    loaded = [copy.deepcopy(tokenizer) for _ in range(3)]
    models += [
        ChatLoraRetriever(base_model=pair, retriever=retriever, model_name="fake/base")
        for pair in ((loaded[0], loaded[1]), (loaded[0], loaded[2]), (loaded[2], loaded[1]))
    ]
    keys = [model._get_llm_string() for model in models]
    assert len(set(keys)) == len(keys)
    assert ChatLoraRetriever(base_model="fake/base", retriever=retriever)._get_llm_string() == keys[1]


def test_the_order_of_properties_is_part_of_the_key(llm: ChatLoraRetriever) -> None:
    """A schema's properties are generated in their order, so another order is another answer."""
    number, text = {"n": {"type": "integer"}}, {"t": {"type": "string"}}
    schemas = [{"type": "object", "properties": properties} for properties in (number | text, text | number)]
    first, second = (llm._get_llm_string(guided={"json": schema}) for schema in schemas)
    assert first != second


async def test_cached_answers_are_served_and_kept_apart(llm: ChatLoraRetriever, engine) -> None:
    """The cache answers the same call, sync or async, and no other; a stop of the settings counts."""
    cached = llm.model_copy(update={"cache": InMemoryCache()})
    stopping = cached.model_copy(update={"stop": ["x"]})
    first = cached.invoke(PROMPT)
    assert (await cached.ainvoke(PROMPT)).content == first.content
    assert len(engine.requests) == 1
    stopping.invoke(PROMPT)
    cached.invoke(PROMPT, stop=["x"])
    assert len(engine.requests) == 2
    with pytest.raises(LoraRetrieverError):
        cached.invoke(PROMPT, tempratur=1)
