"""Grammars, and reading answers that follow them."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import random
import threading
import time
import typing
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

import pytest
import torch
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel, field_validator
from typing_extensions import TypedDict

from langchain_lora_retriever.chat.call import CallOptions
from langchain_lora_retriever.engine import grammar as constraints
from langchain_lora_retriever.engine.api import Grammar
from langchain_lora_retriever.engine.grammar import GrammarCompiler, compiler_of
from langchain_lora_retriever.errors import EngineError, InvalidRequestError, StructuredOutputError
from langchain_lora_retriever.output.dialects import HERMES
from langchain_lora_retriever.output.format import answer_format
from langchain_lora_retriever.output.grammars import calls_grammar, choice_grammar, json_grammar, regex_grammar
from langchain_lora_retriever.output.json_check import violation
from langchain_lora_retriever.output.tool_calls import CALL_CLOSE, CALL_OPEN
from langchain_lora_retriever.output.tools import to_json_schema
from langchain_lora_retriever.testing import byte_tokenizer
from makers import make_tokenizer, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_lora_retriever import ChatLoraRetriever

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
           "required": ["city", "days"]}  # fmt: skip
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź", "days": 3}}\n</tool_call>'


class Joke(BaseModel):
    """A joke."""

    setup: str
    rating: int

    @field_validator("rating")
    @classmethod
    def _at_most_ten(cls, value: int) -> int:
        if value > 10:
            raise ValueError("the rating is above 10")
        return value


class JokeDict(TypedDict):
    """A joke."""

    setup: str
    rating: int


class LooseJokeDict(typing.TypedDict, total=False):
    """A joke whose keys may be missing."""

    setup: Annotated[str, ..., "how it begins"]
    rating: NotRequired[Annotated[int, 5, "of ten"]]


JOKE = '{"setup": "Why?", "rating": 7}'


@tool
def weather(city: str, days: int) -> str:
    """Forecast."""
    return f"{city} {days}"


def write_calls(tokenizer: Any, tools: Any, **options: Any) -> str:
    """Write the grammar of tool calls for a tokenizer."""
    special = compiler_of(tokenizer).vocabulary.special
    return calls_grammar(tools, special=special, eos_token_id=tokenizer.eos_token_id, **options)


def test_a_tokenizer_that_pads_and_cuts_is_read_as_any() -> None:
    """What it was last told about batches has no part in its vocabulary, and stays as it was."""
    plain, told = make_tokenizer(), make_tokenizer()
    told.backend_tokenizer.enable_padding(length=64)
    told.backend_tokenizer.enable_truncation(4)
    words = [compiler_of(each).vocabulary.tokens for each in (plain, told)]
    assert told.backend_tokenizer.padding is not None
    assert told.backend_tokenizer.truncation is not None
    one, other = (each.tokenize_str("the answer is forty-two, more or less") for each in words)
    assert one == other == plain.encode("the answer is forty-two, more or less", add_special_tokens=False)
    assert {each.eos_token for each in words} == {plain.eos_token_id}
    tokens, again = ([each.decode_bytes([i]) for i in range(each.vocab_size)] for each in words)
    assert tokens == again


def follows(tokenizer: Any, grammar: str, text: str) -> bool:
    """Say whether a grammar lets a text through, token by token, and may end there; forced tokens must agree."""
    constraint = compiler_of(tokenizer).constraint(grammar)
    ids, at = tokenizer.encode(text, add_special_tokens=False), 0
    row = torch.zeros(-(-len(tokenizer) // 32) + 2, dtype=torch.int32)

    def allows(token_id: int) -> bool:
        constraint.fill_bitmask(row)
        return bool((int(row[token_id // 32]) >> (token_id % 32)) & 1)

    while at < len(ids):
        if constraint.is_finished or not allows(ids[at]):
            return False
        constraint.accept(ids[at])
        at += 1
        for forced in constraint.forced_tokens():
            if ids[at : at + 1] != [forced]:
                return False
            constraint.accept(forced)
            at += 1
    return constraint.is_finished or allows(tokenizer.eos_token_id)


def generate(tokenizer: Any, grammar: str, seed: int, limit: int = 400) -> str:
    """Draw a text from a grammar, as a model without any ability would."""
    constraint, rng = compiler_of(tokenizer).constraint(grammar), random.Random(seed)
    row = torch.zeros(-(-len(tokenizer) // 32), dtype=torch.int32)
    ids: list[int] = []
    while len(ids) < limit and not constraint.is_finished:
        constraint.fill_bitmask(row)
        allowed = [i for i in range(len(tokenizer)) if (int(row[i // 32]) >> (i % 32)) & 1]
        # Close strings and numbers soon, so that the text ends.
        ends = [i for i in allowed if tokenizer.decode([i]) in {'"', "}", ","}]
        ids.append(rng.choice(ends if ends and rng.random() < 0.3 else allowed))
        if ids[-1] == tokenizer.eos_token_id:
            return str(tokenizer.decode(ids[:-1]))
        constraint.accept(ids[-1])
        for forced in constraint.forced_tokens():
            ids.append(forced)
            constraint.accept(forced)
    return str(tokenizer.decode(ids))


def test_json_follows_its_schema_without_free_white_space(tokenizer) -> None:
    """Only the separators of `json.dumps` are let through: a weak model would emit blanks for ever."""
    grammar = json_grammar(WEATHER)
    assert follows(tokenizer, grammar, '{"city": "Oslo 你好", "days": 3}')
    for blanks in ('{"city":"Oslo","days":3}', '{ "city": "x", "days": 3}'):
        assert not follows(tokenizer, grammar, blanks), blanks
    for wrong in ('{"city": "x"}', '{"city": "x", "days": "3"}', '{"city": "x", "days": 3, "more": 1}', "text"):
        assert not follows(tokenizer, grammar, wrong), wrong


def test_any_draw_from_a_schema_parses(tokenizer) -> None:
    """Whatever the model's ability, the text is JSON of the schema."""
    for seed in range(10):
        value = json.loads(generate(tokenizer, json_grammar(WEATHER), seed), strict=False)
        assert isinstance(value["city"], str)
        assert isinstance(value["days"], int)


@pytest.mark.parametrize("limit", [60, 120, 200])
def test_json_is_closed_to_fit_the_token_limit(tokenizer, limit: int) -> None:
    """A model that never ends a string gets valid JSON all the same, and the answer says that it was shortened."""
    constraint = compiler_of(tokenizer).constraint(json_grammar(WEATHER), fit=limit)
    row = torch.zeros(-(-len(tokenizer) // 32), dtype=torch.int32)
    wanted, ids = tokenizer.encode("a1", add_special_tokens=False), []
    while not constraint.is_finished:
        constraint.fill_bitmask(row)
        allowed = [i for i in range(len(tokenizer)) if (int(row[i // 32]) >> (i % 32)) & 1]
        ids.append(next((i for i in wanted if i in allowed), allowed[0]))
        constraint.accept(ids[-1])
        for forced in constraint.forced_tokens():
            ids.append(forced)
            constraint.accept(forced)
    assert set(json.loads(tokenizer.decode(ids))) == {"city", "days"}
    assert constraint.is_shortened
    assert len(ids) <= limit


def test_json_that_fits_is_not_shortened(tokenizer) -> None:
    """What counts is what is left to close: keys that stand already need no room any more."""
    text = '{"city": "Oslo", "days": 3}'
    ids = tokenizer.encode(text, add_special_tokens=False)
    constraint = compiler_of(tokenizer).constraint(json_grammar(WEATHER), fit=len(ids) + 24)
    row = torch.zeros(-(-len(tokenizer) // 32), dtype=torch.int32)
    for token_id in ids:
        constraint.fill_bitmask(row)
        assert (int(row[token_id // 32]) >> (token_id % 32)) & 1
        constraint.accept(token_id)
    assert not constraint.is_shortened


def test_a_pattern_is_not_closed_early(tokenizer) -> None:
    """Quotes mean nothing outside JSON, so other grammars are left alone."""
    answer = answer_format(CallOptions(guided={"regex": '[a-z"]*'}), tokenizer)
    assert not answer.grammar.is_json
    assert compiler_of(tokenizer).constraint(answer.grammar, fit=4)._limit is None


def test_references_and_unions_are_honoured(tokenizer) -> None:
    """`$defs` and `anyOf` work, as pydantic writes them."""
    schema = {
        "$defs": {"Colour": {"enum": ["red", "blue"]}},
        "type": "object",
        "properties": {"c": {"$ref": "#/$defs/Colour"}, "n": {"anyOf": [{"type": "number"}, {"type": "null"}]}},
        "required": ["c", "n"],
    }
    assert follows(tokenizer, json_grammar(schema), '{"c": "blue", "n": null}')
    assert not follows(tokenizer, json_grammar(schema), '{"c": "green", "n": null}')


@pytest.mark.parametrize("schema", [{"not": {"type": "string"}}, {"type": "nonsense"},
                                    {"type": "array", "uniqueItems": True}])  # fmt: skip
def test_a_schema_that_cannot_be_honoured_raises(llm: ChatLoraRetriever, engine, schema: Any) -> None:
    """It raises before anything is generated."""
    with pytest.raises(InvalidRequestError, match="cannot be constrained"):
        llm.invoke("x", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert not engine.requests


def test_a_forced_call(tokenizer) -> None:
    """A forced call is one call of one of the tools, or several where that is allowed."""
    tools = {"weather": WEATHER, "stop": {"type": "object", "properties": {}}}
    once = write_calls(tokenizer, tools, form=HERMES, is_forced=True, is_repeatable=False)
    many = write_calls(tokenizer, tools, form=HERMES, is_forced=True, is_repeatable=True)
    assert follows(tokenizer, once, CALL)
    assert follows(tokenizer, many, f"{CALL}\n{CALL}")
    assert follows(tokenizer, once, '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>')
    for wrong in (f"{CALL}\n{CALL}", "text", f"text {CALL}", CALL.replace("weather", "wether")):
        assert not follows(tokenizer, once, wrong)


def test_a_free_answer_is_free_until_a_call_begins(tokenizer) -> None:
    """Any text goes, and from the opening tag on only a call of the tools there are."""
    grammar = write_calls(tokenizer, {"weather": WEATHER}, form=HERMES, is_forced=False, is_repeatable=True)
    for right in ("text with <b> and <tool", CALL, f"Let me see.\n{CALL}", f"{CALL}\n{CALL}"):
        assert follows(tokenizer, grammar, right), right
    for wrong in (CALL.replace("weather", "wether"), "<tool_call>text", CALL.replace("3", '"3"')):
        assert not follows(tokenizer, grammar, wrong), wrong


def test_tools_and_a_response_format_together(tokenizer) -> None:
    """An agent with structured output calls a tool or says something, which is then written in the schema."""
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": JokeSchema}}
    both = answer_format(CallOptions(tools=[weather], response_format=response_format), tokenizer)
    assert follows(tokenizer, both.grammar, CALL)
    assert follows(tokenizer, both.grammar, "Well, ...")
    assert follows(tokenizer, both.then, JOKE)
    assert not follows(tokenizer, both.then, "Well, ...")
    forced = answer_format(CallOptions(tools=[weather], tool_choice="any", response_format=response_format), tokenizer)
    assert forced.then is None
    assert not follows(tokenizer, forced.grammar, "Well, ...")


JokeSchema = Joke.model_json_schema()


def test_guided_choice_regex_and_grammar(tokenizer) -> None:
    """An answer can be one of some texts, match a pattern or a grammar."""
    assert follows(tokenizer, choice_grammar(["yes", "né"]), "né")
    assert not follows(tokenizer, choice_grammar(["yes", "no"]), "maybe")
    assert follows(tokenizer, regex_grammar(r"\d{3}-\d{2}"), "123-45")
    assert not follows(tokenizer, regex_grammar(r"\d{3}"), "12")
    lark = answer_format(CallOptions(guided={"grammar": 'start: "a" | "b"'}), tokenizer).grammar
    assert follows(tokenizer, lark, "b")


@pytest.mark.parametrize("guided", [{}, {"json": {}, "regex": "x"}, {"yaml": "x"}])
def test_guided_wants_one_known_kind(llm: ChatLoraRetriever, guided: dict[str, Any]) -> None:
    """No kind, two kinds or an unknown kind is refused."""
    with pytest.raises(InvalidRequestError, match="guided="):
        llm.invoke("x", guided=guided)


def test_guided_goes_alone(llm: ChatLoraRetriever) -> None:
    """It would contradict tools."""
    with pytest.raises(InvalidRequestError, match="without tools"):
        llm.bind_tools([weather], guided={"choice": ["a"]}).invoke("x")


def test_a_response_format_without_a_schema_is_refused(llm: ChatLoraRetriever) -> None:
    """The error shows the form."""
    with pytest.raises(InvalidRequestError, match="holds no schema"):
        llm.invoke("x", response_format={"type": "json_schema"})


@pytest.mark.parametrize("response_format", [{"type": "text"}, None])
def test_plain_text_is_not_constrained(tokenizer, response_format: Any) -> None:
    """The format "text" changes nothing."""
    assert answer_format(CallOptions(response_format=response_format), tokenizer).grammar is None


def test_every_request_has_a_constraint_of_its_own(llm: ChatLoraRetriever, engine) -> None:
    """A constraint advances with its request; two must not share one, though their grammar is compiled once."""
    engine.answers = lambda prompt, names: JOKE
    llm.generate([[HumanMessage("x")]], n=2, response_format=Joke)
    first, second = (request.grammar for request in engine.requests)
    assert first == second == json_grammar(to_json_schema(Joke))
    compiled = compiler_of(engine.tokenizer).compile(first)
    assert compiler_of(engine.tokenizer).compile(second) is compiled
    one, other = compiled.constraint(), compiled.constraint()
    one.accept(engine.tokenizer.encode("{", add_special_tokens=False)[0])
    assert one.forced_tokens() != other.forced_tokens()


@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
@pytest.mark.parametrize("schema", [Joke, JokeDict, JokeSchema], ids=["pydantic", "typeddict", "json_schema"])
def test_every_method_reads_every_schema(llm: ChatLoraRetriever, engine, method: str, schema: Any) -> None:
    """Invoked or streamed, the answer is read and validated."""
    name = "Joke" if schema is Joke or isinstance(schema, dict) else "JokeDict"
    engine.answers = lambda prompt, names: (
        JOKE if method != "function_calling"
        else f'<tool_call>\n{{"name": "{name}", "arguments": {JOKE}}}\n</tool_call>'
    )  # fmt: skip
    chain = llm.with_structured_output(schema, method=method)
    expected: Any = json.loads(JOKE)
    if schema is Joke:
        expected = Joke(**expected)
    assert chain.invoke("x") == expected
    assert list(chain.stream("x"))[-1] == expected


def test_dictionaries_stream_as_they_grow(llm: ChatLoraRetriever, engine) -> None:
    """A dictionary is given part by part, an object only once it is whole."""
    engine.answers = lambda prompt, names: JOKE
    for schema in (JokeDict, LooseJokeDict):
        parts = list(llm.with_structured_output(schema).stream("x"))
        assert len(parts) > 2
        assert parts[-1] == json.loads(JOKE)
    assert len(list(llm.with_structured_output(Joke).stream("x"))) == 1


@pytest.mark.parametrize("text", [JOKE[:-5], '{"setup": "x", "rating": 11}', "no json", ""])
def test_an_answer_that_is_cut_off_or_invalid_raises(llm: ChatLoraRetriever, engine, text: str) -> None:
    """Half an answer is no answer, streamed or not."""
    engine.answers = lambda prompt, names: text
    chain = llm.with_structured_output(Joke)
    with pytest.raises(StructuredOutputError, match="does not satisfy"):
        chain.invoke("x")
    with pytest.raises(StructuredOutputError, match="does not satisfy"):
        list(chain.stream("x"))


def test_a_dictionary_that_is_cut_off_raises(llm: ChatLoraRetriever, engine) -> None:
    """LangChain's own parser would complete it."""
    engine.answers = lambda prompt, names: JOKE[:-5]
    with pytest.raises(StructuredOutputError):
        llm.with_structured_output(JokeDict).invoke("x")


def test_include_raw(llm: ChatLoraRetriever, engine) -> None:
    """The raw message comes along, and a parsing error in place of an exception."""
    chain = llm.with_structured_output(Joke, include_raw=True)
    engine.answers = lambda prompt, names: JOKE
    good = chain.invoke("x")
    assert (good["parsed"].rating, good["parsing_error"], good["raw"].content) == (7, None, JOKE)
    engine.answers = lambda prompt, names: "{"
    bad = chain.invoke("x")
    assert bad["parsed"] is None
    assert isinstance(bad["parsing_error"], StructuredOutputError)


async def test_include_raw_in_a_stream(llm: ChatLoraRetriever, engine) -> None:
    """What comes adds up to what `invoke` returns, for an answer that cannot be read, too."""
    chain = llm.with_structured_output(Joke, include_raw=True)
    for answer, rating in ((JOKE, 7), ("no JSON", None)):
        engine.answers = [answer]
        for chunks in (list(chain.stream("joke")), [chunk async for chunk in chain.astream("joke")]):
            result = {key: value for chunk in chunks for key, value in chunk.items()}
            assert result["raw"].content == answer
            assert (result["parsed"] and result["parsed"].rating) == rating
            assert isinstance(result["parsing_error"], StructuredOutputError) == (rating is None)


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
async def test_a_call_of_another_tool_is_no_answer(llm: ChatLoraRetriever, engine, method: str) -> None:
    """Though its arguments fit the schema: the raw message has the call, and there is nothing to read."""

    class Forecast(BaseModel):
        city: str
        days: int

    chain = llm.with_structured_output(Forecast, method=method, tools=[weather], include_raw=True)
    engine.answers = lambda prompt, names: CALL
    for answer in (chain.invoke("x"), await chain.ainvoke("x")):
        assert [call["name"] for call in answer["raw"].tool_calls] == ["weather"]
        assert (answer["parsed"], answer["parsing_error"]) == (None, None)
    plain = llm.with_structured_output(WEATHER | {"title": "Forecast"}, method=method, tools=[weather])
    assert plain.invoke("x") is None
    assert [chunk for chunk in plain.stream("x") if chunk is not None] == []


@pytest.mark.parametrize("name", ["tools", "tool_choice", "parallel_tool_calls"])
def test_a_schema_that_is_a_tool_is_the_only_one(llm: ChatLoraRetriever, name: str) -> None:
    """Others beside it are refused, with the method that takes them."""
    with pytest.raises(InvalidRequestError, match=f"'{name}' goes with method='json_schema'"):
        llm.with_structured_output(Joke, method="function_calling", **{name: [weather]})


def test_an_unknown_method_is_refused(llm: ChatLoraRetriever) -> None:
    """The methods there are are listed."""
    with pytest.raises(InvalidRequestError, match="function_calling"):
        llm.with_structured_output(Joke, method="yaml")


def test_the_profile_claims_what_is_honoured(llm: ChatLoraRetriever) -> None:
    """Agents choose their strategy by it."""
    assert llm.profile["structured_output"]
    assert llm.profile["tool_calling"]
    assert not llm.profile["image_inputs"]


def test_reasoning_becomes_a_block_of_its_own(llm: ChatLoraRetriever, engine, tokenizer, monkeypatch) -> None:
    """What a model thinks between tags is reasoning, not answer."""
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + "{# </think> #}")
    for answer in ("<think>\nHm.\n</think>\n\nYes.", "Yes."):
        engine.answers = lambda prompt, names, answer=answer: answer
        first, *rest = llm.stream("x")
        for chunk in rest:
            first += chunk
        for message in (first, llm.invoke("x")):
            assert message.text == "Yes."
            kinds = [block["type"] for block in message.content_blocks]
            assert kinds == (["reasoning", "text"] if "think" in answer else ["text"])


class Part(BaseModel):
    """A part, which may have parts."""

    label: str
    parts: list[Part]


ITEM = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"title": "A", "type": "array", "items": {"enum": ["x", "y"]}, "minItems": 2}, '["x", "y"]', '["x"]'),
        ({"title": "B", "anyOf": [ITEM, {"type": "null"}]}, "null", "[]"),
        ({"title": "C", "$ref": "#/$defs/I", "$defs": {"I": ITEM}}, '{"n": 1}', '{"n": 10}'),
        ({"title": "D", "enum": ["x", 1]}, "1", "2"),
        ({"name": "e", "strict": True, "schema": ITEM}, '{"n": 1}', '{"m": 1}'),
        (Part, '{"label": "a", "parts": [{"label": "b", "parts": []}]}', '{"label": "a", "parts": [{"x": 1}]}'),
    ],
    ids=["array", "anyOf", "ref", "enum", "openai", "recursive"],
)
def test_a_schema_constrains_in_every_form(tokenizer, schema, right: str, wrong: str) -> None:
    """Also without top-level properties, in OpenAI's wrapper, and below the first level of a class in itself."""
    grammar = answer_format(CallOptions(response_format=schema), tokenizer).grammar
    assert follows(tokenizer, grammar, right)
    assert not follows(tokenizer, grammar, wrong)


def test_a_tool_may_take_what_contains_itself(tokenizer) -> None:
    """Its arguments are constrained below the first level too, by a class and by a function of it."""

    @tool
    def build(part: Part) -> str:
        """Build a part."""
        return part.label

    part, call = '{"label": "a", "parts": [%s]}', '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
    for given, name, arguments in ((Part, "Part", part), (build, "build", f'{{"part": {part}}}')):
        grammar = answer_format(CallOptions(tools=[given], tool_choice="any"), tokenizer).grammar
        assert follows(tokenizer, grammar, call % (name, arguments % '{"label": "b", "parts": []}'))
        assert not follows(tokenizer, grammar, call % (name, arguments % '{"label": 1}'))


def test_a_function_takes_objects_only(llm) -> None:
    """A schema of lists cannot be the arguments of a call: refused before anything is generated."""
    with pytest.raises(InvalidRequestError, match="a function's arguments are an object"):
        llm.with_structured_output({"title": "A", "type": "array", "items": {}}, method="function_calling")


def chain(length: int) -> dict[str, Any]:
    """A schema whose definitions refer to one another, one after the other."""
    links = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "string"}}}


def nested(depth: int) -> dict[str, Any]:
    """A schema of lists of lists."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def ref_chain_of_patterns(length: int) -> dict[str, Any]:
    """A text that must match a pattern, and a definition, which asks for a pattern and a definition, and so on."""
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}", "pattern": f"a.{{{i}}}b"} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{length}": {"type": "string"}}}


ROUND: dict[str, Any] = {"type": "object"}
ROUND["properties"] = {"self": ROUND}


@pytest.mark.parametrize(
    ("guided", "message"),
    [
        ({"json": chain(2000)}, r"refers to 2001 definitions, at most 500"),
        ({"json": nested(100_000)}, r"nests more than 100 levels"),
        ({"json": ROUND}, r"nests more than 100 levels"),
        ({"json": {"enum": ["x" * 300_000]}}, r"has 300,\d+ characters, at most 262,144"),
        ({"json": {"type": "integer", "multipleOf": 10**9}}, r"multipleOf=1e\+09, which is not allowed"),
        ({"json": {"enum": {1, 2}}}, r"is no JSON"),
        ({"json": {"type": "string", "pattern": "("}}, r"cannot be constrained as asked"),
        ({"choice": [f"choice {i}" for i in range(100_000)]}, r"100,000 texts, at most 10,000"),
        ({"choice": "yes"}, r"pass a list of texts"),
        ({"choice": [1, 2]}, r"non-empty texts"),
        ({"choice": []}, r"non-empty texts"),
        ({"regex": "a" * 300_000}, r"regular expression: 300,000 characters"),
        ({"regex": 7}, r"as text"),
        ({"regex": "("}, r"cannot be constrained as asked"),
        ({"grammar": "start: " + "(" * 20_000}, r"cannot be constrained as asked"),
        ({"grammar": None}, r"Lark grammar as text"),
        ({"regex": "\ud800"}, r"half a surrogate pair"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_beyond_bounds_is_refused_in_words(tokenizer, guided: dict[str, Any], message: str) -> None:
    """Before anything is generated, and before native code recurses over it."""
    with pytest.raises(InvalidRequestError, match=message):
        compiler_of(tokenizer).compile(answer_format(CallOptions(guided=guided), tokenizer).grammar)


def test_long_chains_within_bounds_are_compiled(tokenizer) -> None:
    """A chain of definitions, and one of a grammar's rules, that a thread's usual stack would not hold."""
    compiler_of(tokenizer).compile(json_grammar(chain(490)))
    rules = "\n".join(f"r{i}: r{i + 1}" for i in range(15_000))
    compiler_of(tokenizer).compile(Grammar(f'start: r0\n{rules}\nr15000: "a"\n', is_foreign=True))


def test_thousands_of_choices(tokenizer) -> None:
    """More than the parser takes as rules of their own."""
    grammar = choice_grammar([f"choice {i}" for i in range(5000)])
    assert follows(tokenizer, grammar, "choice 4999")
    assert not follows(tokenizer, grammar, "choice 5000")


def test_too_many_tools_are_refused(tokenizer) -> None:
    """By their number, and by their schemas together."""
    function = {"name": "f", "description": "", "parameters": WEATHER}
    tools = [{"type": "function", "function": {**function, "name": f"f{i}"}} for i in range(1000)]
    with pytest.raises(InvalidRequestError, match=r"1000 tools are bound, at most 512"):
        answer_format(CallOptions(tools=tools, tool_choice="any"), tokenizer)
    large = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}}
    tools = [{"type": "function", "function": {**function, "name": f"f{i}", "parameters": large}} for i in range(20)]
    with pytest.raises(InvalidRequestError, match="tools' schemas together"):
        answer_format(CallOptions(tools=tools, tool_choice="any"), tokenizer)


def write_under(
    tokenizer: Any, constraint: Any, limit: int, choose: Callable[[list[int], list[int]], int]
) -> list[int]:
    """Tokens that a model writes within a limit, which chooses by those there are from those that are allowed."""
    row, ids = torch.zeros(-(-len(tokenizer) // 32), dtype=torch.int32), list[int]()
    while not constraint.is_finished and len(ids) < limit:
        constraint.fill_bitmask(row)
        ids.append(choose(ids, [i for i in range(len(tokenizer)) if (int(row[i // 32]) >> (i % 32)) & 1]))
        constraint.accept(ids[-1])
        for forced in constraint.forced_tokens():
            ids.append(forced)
            constraint.accept(forced)
    return ids


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "exclusiveMinimum": 0},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 2},
        {"type": "object", "properties": {"n": {"type": "number", "exclusiveMaximum": 0}}, "required": ["n"]},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_closed_near_the_limit(tokenizer, schema, seed: int) -> None:
    """Whatever digits a model would go on with, also where a number may not end yet."""
    limit, rng = 40, random.Random(seed)
    constraint = compiler_of(tokenizer).constraint(json_grammar(schema), fit=limit)

    def choose(_: list[int], allowed: list[int]) -> int:
        zeros = [i for i in allowed if tokenizer.decode([i]) in {"0", "."}]
        return zeros[0] if zeros else rng.choice(allowed)

    ids = write_under(tokenizer, constraint, limit, choose)
    assert constraint.is_finished
    json.loads(tokenizer.decode(ids, skip_special_tokens=True))


def test_a_grammar_is_compiled_once_and_holds_up_no_other(tokenizer) -> None:
    """Callers of one grammar share a compilation; another's goes on while it runs."""
    compiler = GrammarCompiler(lambda: compiler_of(tokenizer).vocabulary)
    compile_one, begun, go = compiler._compile, threading.Event(), threading.Event()
    compiled: list[str] = []

    def compile_slowly(grammar: str) -> Any:
        compiled.append(grammar)
        if grammar == slow:
            begun.set()
            assert go.wait(30)
        return compile_one(grammar)

    compiler._compile = compile_slowly  # type: ignore[method-assign]
    slow, quick = regex_grammar("a+"), regex_grammar("b+")
    with ThreadPoolExecutor(2) as executor:
        waiting = [executor.submit(compiler.compile, slow) for _ in range(2)]
        assert begun.wait(30)
        compiler.compile(quick)
        go.set()
        for future in waiting:
            future.result(30)
    assert compiled == [slow, quick]


def test_a_compiler_lives_as_long_as_its_tokenizer(tokenizer) -> None:
    """A closed engine's tokenizer is not kept by what was compiled for it."""
    own = copy.deepcopy(tokenizer)
    compiler_of(own).compile(regex_grammar("a+"))
    compiler, own = weakref.ref(compiler_of(own)), None
    gc.collect()
    assert compiler() is None


def test_a_panic_of_native_code_ends_in_words() -> None:
    """What it raises is no `Exception`; whoever asked for the grammar gets one."""

    class Panic(BaseException):
        """As of native code."""

    def panic() -> Any:
        raise Panic("index out of bounds")

    compiler = GrammarCompiler(panic)
    with pytest.raises(InvalidRequestError, match="index out of bounds"):
        compiler.compile(regex_grammar("a"))


def fill_up(tokenizer: Any, grammar: Grammar, limit: int, wanted: str) -> tuple[str, Any]:
    """What a model writes within a token limit that always wants the same characters."""
    constraint = compiler_of(tokenizer).constraint(grammar, fit=limit)
    wishes = [i for char in wanted for i in tokenizer.encode(char, add_special_tokens=False)]
    ids = write_under(
        tokenizer, constraint, limit, lambda _, allowed: next((i for i in wishes if i in allowed), allowed[0])
    )
    return tokenizer.decode(ids, skip_special_tokens=True), constraint


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
        {"type": "string", "pattern": "^[0-9]*z$"},
        {"type": "string", "minLength": 10},
        {"type": "array", "items": {"type": "string", "format": "date"}, "minItems": 2},
        {"type": "integer", "exclusiveMinimum": 0, "multipleOf": 1000},
        {"type": "integer", "exclusiveMaximum": -5},
        {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "integer"}, "minItems": 2}},
        {
            "type": "array",
            "items": {"anyOf": [{"$ref": "#"}, {"type": "null"}, {"type": "boolean"}]},
            "minItems": 1,
        },
    ],
)
@pytest.mark.parametrize("wanted", ["}", "]", "[", "\\", "0", "9", "a", '"', ",", "é"])
def test_whatever_a_model_writes_is_closed_in_time(tokenizer, schema: dict[str, Any], wanted: str) -> None:
    """Brackets within strings, escapes, characters of two bytes, patterns, and lists in lists: the answer is JSON."""
    text, constraint = fill_up(tokenizer, json_grammar(schema), 70, wanted)
    assert constraint.is_finished or constraint._ending is not None
    assert violation(schema, json.loads(text, strict=False)) is None


RECORD = {"type": "object", "properties": {key: {"type": "string"} for key in ("first_name", "last_name", "city")}}
RECORDS = {
    "type": "object",
    "properties": {"people": {"type": "array", "items": {**RECORD, "required": list(RECORD["properties"])}}},
    "required": ["people"],
}


@pytest.mark.parametrize("limit", range(120, 330, 7))
def test_a_list_of_records_is_closed_in_time(tokenizer, limit: int) -> None:
    """The next record is begun only where it can be ended; what is wanted is many of them, as JSON writes them."""
    row = dict.fromkeys(RECORD["properties"], "v")
    wanted = tokenizer.encode(json.dumps({"people": [row] * 20}), add_special_tokens=False)
    constraint = compiler_of(tokenizer).constraint(json_grammar(RECORDS), fit=limit)

    def choose(ids: list[int], allowed: list[int]) -> int:
        is_as_wanted = ids == wanted[: len(ids)] and wanted[len(ids)] in allowed
        return wanted[len(ids)] if is_as_wanted else allowed[0]

    ids = write_under(tokenizer, constraint, limit, choose)
    assert len(ids) <= limit
    people = json.loads(tokenizer.decode(ids, skip_special_tokens=True))["people"]
    assert len(people) >= (limit - 60) // 62
    assert people[0] == row


def test_a_way_to_the_end_is_not_looked_for_without_end(tokenizer) -> None:
    """A grammar may have none within reach; then the answer is cut off, and no step has taken more than its share."""
    schema = {"type": "string", "minLength": 5000}
    text, constraint = fill_up(tokenizer, json_grammar(schema), 120, "a")
    assert text == '"' + "a" * 119
    assert constraint._masks_left <= 0 or constraint._ending is None


@pytest.mark.parametrize(
    ("guided", "message"),
    [
        ({"grammar": json.dumps({"grammars": [{"json_schema": chain(2000)}]})}, r"pass a Lark grammar"),
        ({"grammar": "start: %json " + json.dumps(chain(2000))}, r"refers to 2001 definitions"),
        ({"grammar": "start: %json\n" + "[" * 10_000}, r"must be followed by JSON"),
        ({"grammar": 'start: %json {"type": "integer", "multipleOf": 1000003}'}, r"multipleOf=1e\+06"),
        ({"grammar": 'start: "%json"'}, r"must be followed by JSON"),
        ({"grammar": 'start: a::0x0\na::_: "x" | a::set_bit(1)'}, r"parametric rules"),
        ({"grammar": "start: T\nT: " + " & ".join(f"/.*a.{{{i}}}b/" for i in range(4))}, r"3 intersections"),
        ({"grammar": "start: T\nT: ~(~/a.*/ | ~/b.*/)"}, r"3 intersections and complements"),
        ({"json": {"allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(40)]}}, r"40 or more patterns"),
        ({"json": ref_chain_of_patterns(20)}, r"patterns that are combined"),
        ({"json": {"patternProperties": {f"^a{i}_": {} for i in range(300)}}}, r"300 patternProperties"),
        ({"json": {"allOf": [{"multipleOf": 997}, {"multipleOf": 1009}]}}, r"multipleOf=997, 1009"),
        ({"json": {"type": "number", "multipleOf": 1e-300}}, r"multipleOf=1e-300"),
        ({"json": {"enum": ["x" * 100_000] * 200_000}}, r"characters, at most 262,144"),
        ({"json": {"enum": [float("nan")]}}, r"is no JSON"),
        ({"json": {"enum": [10**5000]}}, r"is no JSON"),
        ({"json": {"\ud800": 1, "type": "string"}}, r"half a surrogate pair"),
        ({"json": {"foo": 1}}, r"no keyword of JSON schema"),
        ({"json": {"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}}, r"cannot be constrained"),
        ({"json": {"$ref": "#"}}, r"cannot be constrained"),
        ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}}}},
         r"cannot be constrained"),
        ({"choice": (str(i) for i in itertools.count())}, r"pass a list of texts"),
        ({"regex": "(ab)" * 4000}, r"16,000 characters, at most 8,192"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_ways_around_the_bounds_are_refused_too(tokenizer, guided: dict[str, Any], message: str) -> None:
    """Schemas within grammars, other notations, multiples of multiples, and what shows at the first token only."""
    with pytest.raises(InvalidRequestError, match=message):
        compiler_of(tokenizer).compile(answer_format(CallOptions(guided=guided), tokenizer).grammar)


def test_a_grammar_of_a_caller_may_say_colons_and_comments(tokenizer) -> None:
    """What is refused outside of strings, patterns and comments may stand within."""
    text = '// a::b\n# "\nstart: "std::" /x::y/ "\\"::" T\nT: /[a-z]+/ // c::d\n'
    assert follows(tokenizer, answer_format(CallOptions(guided={"grammar": text}), tokenizer).grammar, 'std::x::y"::q')


@pytest.mark.parametrize("rules", ['s: s s s s s | "a" | "aa" |', 's: "a" s | s "a" | s s |'])
def test_an_ambiguous_grammar_ends_its_own_request(tokenizer, rules: str) -> None:
    """What it would cost grows with every token: the matcher gives up before a step takes long."""
    constraint = compiler_of(tokenizer).constraint(Grammar(f"start: s\n{rules}\n", is_foreign=True))
    row = torch.zeros(-(-len(tokenizer) // 32), dtype=torch.int32)
    token_id = tokenizer.encode("a", add_special_tokens=False)[0]
    slowest = 0.0

    def follow() -> None:
        nonlocal slowest
        for _ in range(3000):
            begun = time.monotonic()
            constraint.fill_bitmask(row)
            constraint.accept(token_id)
            slowest = max(slowest, time.monotonic() - begun)

    with pytest.raises(EngineError, match="failed while it was followed"):
        follow()
    assert slowest < 1


def test_long_constants_are_not_forced_all_at_once(tokenizer) -> None:
    """A hundred thousand forced tokens would have to be found before one is taken; they come one by one instead."""
    for grammar in (json_grammar({"const": "ab" * 50_000}), choice_grammar(["ab" * 50_000])):
        assert compiler_of(tokenizer).constraint(grammar).forced_tokens() == []
    assert compiler_of(tokenizer).constraint(json_grammar({"const": "ab"})).forced_tokens()


def test_parts_that_are_combined_stay_open(tokenizer) -> None:
    """Closed, each of `allOf` would forbid what the other brings."""
    parts = [{"type": "object", "properties": {name: {"type": "null"}}, "required": [name]} for name in "ab"]
    assert follows(tokenizer, json_grammar({"allOf": parts}), '{"a": null, "b": null}')
    assert follows(tokenizer, json_grammar({**parts[0], "anyOf": [parts[1]]}), '{"a": null, "b": null}')
    assert not follows(tokenizer, json_grammar({"anyOf": parts}), '{"a": null, "b": null}')


def test_a_grammar_that_fails_to_compile_is_refused_anew_for_each_caller(tokenizer) -> None:
    """An exception that all of them shared would gather their frames."""
    errors = []
    for _ in range(2):
        with pytest.raises(InvalidRequestError) as caught:
            compiler_of(tokenizer).compile(regex_grammar("("))
        errors.append(caught.value)
    assert errors[0] is not errors[1]


def test_compiled_grammars_are_kept_within_bounds(tokenizer, monkeypatch) -> None:
    """By the characters of their texts: those used least recently go."""
    monkeypatch.setattr(constraints, "_MAX_GRAMMARS_CHARACTERS", 1000)
    compiler = GrammarCompiler(lambda: compiler_of(tokenizer).vocabulary)
    for i in range(30):
        compiler.compile(choice_grammar([f"choice {i}" * 10]))
        assert compiler._num_characters == sum(len(grammar.text) for grammar in compiler._compiled) <= 1000
    assert compiler._compiled


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"title": "A", "type": "array", "items": {"type": "string"}}, "[1]"),
        ({"title": "A", "type": "array", "items": {"type": "string"}}, "{}"),
        ({"title": "B", "anyOf": [ITEM, {"type": "null"}]}, '{"n": 10}'),
        ({"title": "C", "$ref": "#/$defs/I", "$defs": {"I": ITEM}}, '{"n": "x"}'),
        ({"title": "D", "enum": ["x", 1]}, "true"),
        ({"name": "e", "schema": ITEM}, "{}"),
        (JokeDict, '{"setup": "x", "rating": "y"}'),
        ({"title": "F", "type": "array"}, "[" * 20_000),
    ],
)
def test_every_answer_is_checked(llm: ChatLoraRetriever, engine, schema: Any, text: str) -> None:
    """Whatever let it through: an answer beside its schema, or nested beyond reading, is no answer."""
    engine.answers = lambda prompt, names: text
    with pytest.raises(StructuredOutputError, match="does not satisfy"):
        llm.with_structured_output(schema).invoke("x")


def test_lists_stream_as_they_grow(llm: ChatLoraRetriever, engine) -> None:
    """As dictionaries do."""
    engine.answers = lambda prompt, names: '["first", "second", "third"]'
    parts = list(llm.with_structured_output({"title": "A", "type": "array", "items": {"type": "string"}}).stream("x"))
    assert len(parts) > 2
    assert parts[-1] == ["first", "second", "third"]


OBJECT = {"type": "object", "properties": {"a": {"type": "null"}}}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": ["integer", "null"]}, "null", '"a"'),
        ({"enum": [1, "a", None, {"b": [1]}]}, '{"b": [1]}', "2"),
        ({"const": [1.5, True]}, "[1.5, true]", "[1.5, false]"),
        ({"allOf": [{"minimum": 1}, {"maximum": 2}], "type": "integer"}, "2", "3"),
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, "1", "null"),
        ({**OBJECT, "required": ["a"]}, '{"a": null}', "{}"),
        (OBJECT, "{}", '{"b": 1}'),
        ({**OBJECT, "additionalProperties": {"type": "integer"}}, '{"a": null, "b": 1}', '{"b": "x"}'),
        ({"type": "object", "patternProperties": {"^x": {"type": "null"}}, "additionalProperties": False},
         '{"xy": null}', '{"y": null}'),
        ({"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2, "maxProperties": 2},
         '{"a": null, "b": null}', '{"a": null}'),
        ({"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2}, "[null]", "[null, null, null]"),
        ({"type": "array", "prefixItems": [{"type": "null"}], "items": False}, "[null]", "[null, null]"),
        ({"type": "array", "items": [{"type": "null"}], "additionalItems": False}, "[null]", "[null, null]"),
        ({"type": "array", "items": {"enum": [1]}, "uniqueItems": False}, "[1, 1]", "[2]"),
        ({"type": "string", "minLength": 2, "maxLength": 2}, '"ab"', '"a"'),
        ({"type": "string", "pattern": "^a+$"}, '"aa"', '"ab"'),
        ({"type": "string", "pattern": "a"}, '"bab"', '"bb"'),
        *(({"type": "string", "format": name}, f'"{text}"', '"?"') for name, text in {
            "date-time": "2024-02-29T12:00:00Z", "time": "12:00:00Z", "date": "2024-02-29", "duration": "P1D",
            "email": "a@b.org", "hostname": "b.org", "ipv4": "1.2.3.4", "ipv6": "::1",
            "uuid": "123e4567-e89b-12d3-a456-426614174000", "uri": "http://b.org/x"}.items()),
        ({"type": "integer", "minimum": 3, "exclusiveMaximum": 12}, "11", "12"),
        ({"type": "number", "exclusiveMinimum": 0.5, "maximum": 2}, "0.51", "0.5"),
        ({"type": "integer", "multipleOf": 7}, "21", "22"),
        ({"type": "number", "multipleOf": 0.25}, "0.75", "0.8"),
        ({"type": "null", "title": 1, "deprecated": True, "x-own": {}, "contentEncoding": "base64"}, "null", "1"),
    ],
)  # fmt: skip
def test_keywords_that_are_honoured(tokenizer, schema: dict[str, Any], right: str, wrong: str) -> None:
    """Each lets through what satisfies it and nothing else; docs/tools.md lists them."""
    grammar = json_grammar(schema)
    assert follows(tokenizer, grammar, right)
    assert not follows(tokenizer, grammar, wrong)
    assert violation(schema, json.loads(right)) is None


@pytest.mark.parametrize(
    "schema",
    [
        *({key: {"type": "string"}} for key in ("not", "if", "contains", "propertyNames", "unevaluatedItems")),
        {"unevaluatedProperties": False},
        {"type": "array", "uniqueItems": True},
        {"dependentRequired": {"a": ["b"]}},
        {"dependentSchemas": {"a": {}}},
        {"dependencies": {"a": ["b"]}},
        {"$dynamicRef": "#a"},
        {"$ref": "#/$defs/nowhere"},
        {"$ref": "http://example.com/schema"},
        {"properties": {"next": {"$ref": "#", "type": "object"}}},
        {"oneOf": [{"type": "string"}, {"minLength": 2}]},
        {"patternProperties": {"^a": {}, "^ab": {}}},
        {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 2},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "string", "format": "colour"},
        {"type": "number", "maximum": 1e300, "minimum": -1e300},
        {"type": "integer", "multipleOf": 20_000},
        {"type": "integer", "minimum": 2, "maximum": 1},
        {"type": "string", "enum": [1]},
        {"enum": []},
        {"type": "any"},
        {"required": "a"},
        {"properties": []},
        {"minLength": -1},
    ],
)
def test_keywords_that_are_refused(tokenizer, schema: dict[str, Any]) -> None:
    """Before anything is generated; docs/tools.md lists them."""
    with pytest.raises(InvalidRequestError):
        compiler_of(tokenizer).compile(json_grammar(schema))


def test_so_many_grammars_are_compiled_at_once_and_no_more(tokenizer, monkeypatch) -> None:
    """Others wait; whatever one of them does, all are answered, and no thread is left."""
    monkeypatch.setattr(constraints, "_MAX_COMPILING", 3)
    running, most, go = set(), [0], threading.Event()

    def work(index: int) -> int:
        running.add(index)
        most[0] = max(most[0], len(running))
        assert go.wait(30)
        running.discard(index)
        if index % 5 == 0:
            raise ValueError(index)
        return index

    pool = constraints._LargeStacks()
    futures = [pool.submit(partial(work, index)) for index in range(20)]
    wait_until(lambda: len(running) == 3)
    go.set()
    errors = [future.exception(30) for future in futures]
    assert [error is None for error in errors] == [bool(index % 5) for index in range(20)]
    assert most[0] == 3
    wait_until(lambda: pool._num_threads == 0)
    assert pool.submit(lambda: 7).result(30) == 7


@pytest.mark.parametrize(
    "guided",
    [
        {"choice": ["<|im_end|>x"]},
        {"regex": r"a<\|im_end\|>[xy]"},
        {"json": {"const": "<|im_end|>"}},
        {"json": {"type": "object", "properties": {"<|im_end|>": {"const": 1}}, "required": ["<|im_end|>"]}},
        {"grammar": 'start: "<|im_end|>" /[xy]/'},
    ],
    ids=["choice", "regex", "value", "key", "grammar"],
)
def test_text_that_reads_like_a_control_token_is_text(tokenizer: Any, guided: Any) -> None:
    """In all that an answer may be held to: the token itself, which would end the answer, is not let through for it."""
    text = generate(tokenizer, answer_format(CallOptions(guided=guided), tokenizer).grammar, seed=0)
    assert "<|im_end|>" in text
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in tokenizer.encode(text, split_special_tokens=True)


def test_calls_of_models_whose_tags_are_tokens_keep_their_forced_tokens() -> None:
    """The tag that a free answer may come to stands in the grammar, and costs it none of them."""
    own = byte_tokenizer()
    own.add_special_tokens({"additional_special_tokens": [CALL_OPEN, CALL_CLOSE]})
    grammar = write_calls(own, {"add": {"type": "object"}}, form=HERMES, is_forced=False, is_repeatable=True)
    constraint = compiler_of(own).constraint(grammar)
    constraint.accept(own.convert_tokens_to_ids(CALL_OPEN))
    assert own.decode(constraint.forced_tokens()).strip().startswith('{"name": "add"')
