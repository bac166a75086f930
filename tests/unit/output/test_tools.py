"""Tools into prompts, calls out of text."""

from __future__ import annotations

import copy
import gc
import json
import random
import typing
import weakref
from typing import TYPE_CHECKING, Annotated, Any

import pytest
import typing_extensions
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import StructuredTool, tool
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from agent_tools import add
from langchain_lora_retriever.chat.messages import encode_chat
from langchain_lora_retriever.demo.tasks import make_examples
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.output.dialects import HERMES, SECTION, add_tools_section, dialect_of
from langchain_lora_retriever.output.tool_calls import ToolCallParser, call_text
from langchain_lora_retriever.output.tools import to_json_schema, to_tool_choice, to_tools, tool_name

if TYPE_CHECKING:
    from langchain_lora_retriever import ChatLoraRetriever

HERMES_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}</tools>"
    "<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "}\\" {"}}\n</tool_call>'
ARGUMENTS = {"a": 1, "b": '}" {'}


class Person(BaseModel):
    """A person."""

    name: str = Field(description="full name")


class City(TypedDict):
    """A city."""

    name: str


def greet(who: str) -> str:
    """Greet somebody."""
    return who


ADD = to_tools([add], strict=None)


def test_every_kind_of_tool_is_understood() -> None:
    """BaseTools, pydantic classes, TypedDicts, functions and JSON schemas become functions with parameters."""
    schema = {"title": "order", "description": "An order.", "type": "object", "properties": {"n": {"type": "integer"}}}
    tools = to_tools([add, Person, City, greet, schema], strict=None)
    assert [tool_name(t) for t in tools] == ["add", "Person", "City", "greet", "order"]
    assert all(t["function"]["parameters"]["type"] == "object" for t in tools)


@pytest.mark.parametrize("typed_dict", [typing.TypedDict, typing_extensions.TypedDict], ids=["typing", "extensions"])
def test_typed_dicts_have_the_schema_that_they_are_written_for(typed_dict: Any) -> None:
    """Keys that may be missing, LangChain's defaults and descriptions, and pydantic's limits, at every depth."""
    part = typed_dict("Part", {"n": Annotated[int, 3, "how many"], "of": typing_extensions.NotRequired[str]})
    keys = {
        "a": typing_extensions.Required[Annotated[str, ..., "the first"]],
        "b": str,
        "c": typing_extensions.NotRequired[Annotated[part | None, None, "a part"]],
        "d": Annotated[int, Field(ge=1), ..., "limited"],
        "e": list[part],
    }
    whole = typed_dict("Whole", keys, total=False)
    assert to_tools([part], strict=None)[0]["function"].keys() == {"name", "parameters"}  # no docstring: not dict's
    whole.__doc__ = """A whole.

    Args:
        b: the second,
            after the first
    """
    function = to_tools([whole], strict=None)[0]["function"]
    inner = {
        "type": "object",
        "properties": {"n": {"type": "integer", "default": 3, "description": "how many"}, "of": {"type": "string"}},
    }
    assert (function["name"], function["description"]) == ("Whole", "A whole.")
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "string", "description": "the first"},
            "b": {"type": "string", "description": "the second, after the first"},
            "c": {"anyOf": [inner, {"type": "null"}], "description": "a part"},
            "d": {"type": "integer", "minimum": 1, "description": "limited"},
            "e": {"type": "array", "items": inner},
        },
        "required": ["a"],
    }
    total = to_json_schema(typed_dict("Total", {"x": Annotated[int, ..., "x"], "y": Annotated[int, 1]}))
    assert total["required"] == ["x"]


class Loop(TypedDict):
    """Contains itself."""

    loops: list[Loop]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Loop, "the TypedDict Loop contains itself. Write a pydantic class"),
        (TypedDict("Told", {"a": Annotated[int, 1, 2]}), "key 'a' has the description 2, which is no text"),
        (TypedDict("Lost", {"a": "Nowhere"}), "'Nowhere' is not defined"),  # noqa: F821
    ],
    ids=lambda given: getattr(given, "__name__", None),
)
def test_typed_dicts_without_a_schema_are_refused_in_words(given: Any, message: str) -> None:
    """As a tool, and as the schema of an answer."""
    with pytest.raises(InvalidRequestError, match=message):
        to_tools([given], strict=None)
    with pytest.raises(InvalidRequestError, match=message):
        to_json_schema(given)


def test_strict_closes_the_schema() -> None:
    """With strict=True there are no other properties."""
    assert to_tools([add], strict=True)[0]["function"]["parameters"]["additionalProperties"] is False


def test_a_built_in_tool_of_a_provider_is_refused() -> None:
    """What is no function cannot be called by a local model."""
    with pytest.raises(InvalidRequestError, match="not a function"):
        to_tools([{"type": "web_search"}], strict=None)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("any", "required"),
        ("required", "required"),
        (True, "required"),
        ("none", "none"),
        (False, "none"),
        ("add", ("add",)),
        ({"type": "function", "function": {"name": "add"}}, ("add",)),
    ],
)
def test_every_way_to_write_a_tool_choice(choice: Any, expected: Any) -> None:
    """LangChain's and OpenAI's spellings are the same choice."""
    assert to_tool_choice(choice, ADD) == expected


@pytest.mark.parametrize("choice", ["subtract", {"type": "function", "function": {"name": "subtract"}}, 7])
def test_a_choice_of_no_tool_is_refused(choice: Any) -> None:
    """The error lists the tools there are."""
    with pytest.raises(InvalidRequestError, match="add"):
        to_tool_choice(choice, ADD)


def test_a_forced_call_without_tools_is_refused() -> None:
    """There is nothing to call."""
    with pytest.raises(InvalidRequestError, match="no tools"):
        to_tool_choice("any", [])


def test_a_template_that_ignores_tools_is_found_out(tokenizer) -> None:
    """Templates swallow tools silently; only one that shows them and writes calls is trusted with them."""
    assert dialect_of(tokenizer) == SECTION
    hermes = copy.deepcopy(tokenizer)
    hermes.chat_template = HERMES_TEMPLATE
    assert dialect_of(hermes) == (True, False, HERMES, True)
    half = copy.deepcopy(tokenizer)
    half.chat_template = HERMES_TEMPLATE.replace("<tool_call>", "[CALL]")
    assert dialect_of(half) == SECTION


def test_tools_reach_the_prompt_by_the_template(tokenizer) -> None:
    """A template that knows tools writes them itself, once."""
    hermes = copy.deepcopy(tokenizer)
    hermes.chat_template = HERMES_TEMPLATE
    prompt = hermes.decode(encode_chat(hermes, [{"role": "user", "content": "hi"}], tools=ADD))
    assert prompt.count('"add"') == 1
    assert "# Tools" not in prompt


def test_tools_reach_the_prompt_by_a_section(tokenizer) -> None:
    """For other templates the system message gets a section, whether there was one or not."""
    for system in ([], [{"role": "system", "content": "Be kind."}]):
        prompt = tokenizer.decode(encode_chat(tokenizer, [*system, {"role": "user", "content": "hi"}], tools=ADD))
        assert prompt.count("<|im_start|>system") == 1
        assert json.dumps(ADD[0]) in prompt
        assert ("Be kind.\n\n# Tools" in prompt) == bool(system)


def test_the_section_is_what_the_demo_adapter_was_trained_on() -> None:
    """The demo's function-calling examples and the chat model write tools, calls and results alike."""
    for example in make_examples("function_calling", "train", 60):
        system, *turns = example.prompt_messages()
        preface = system["content"].partition("# Tools")[0].removesuffix("\n\n")
        chat = [{"role": "system", "content": preface}] if preface else []
        for turn in turns:
            if turn["role"] == "assistant":
                call = json.loads(turn["content"].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
                turn = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": call}]}  # noqa: PLW2901
            chat.append(turn)
        assert add_tools_section(chat, list(example.tools)) == example.prompt_messages()


def test_past_calls_and_results_are_rendered(llm: ChatLoraRetriever, engine) -> None:
    """A conversation with calls, an error and list content reaches the model whole."""
    call = {"name": "add", "args": {"a": 1, "b": 2}, "id": "1", "type": "tool_call"}
    llm.bind_tools([add]).invoke(
        [
            HumanMessage("1 + 2?"),
            AIMessage([{"type": "text", "text": "Let me see."}], tool_calls=[call]),
            ToolMessage([{"type": "text", "text": "Error: é"}], tool_call_id="1", status="error"),
        ]
    )
    prompt = engine.requests[0].prompt
    assert f"Let me see.\n{call_text('add', {'a': 1, 'b': 2})}<|im_end|>" in prompt
    assert "<|im_start|>tool\nError: é<|im_end|>" in prompt


def test_an_invalid_call_is_rendered_as_it_came(llm: ChatLoraRetriever, engine) -> None:
    """The model sees its own mistake."""
    bad = {"name": "add", "args": '{"a": ', "id": "1", "error": None, "type": "invalid_tool_call"}
    llm.invoke([HumanMessage("x"), AIMessage("", invalid_tool_calls=[bad]), HumanMessage("again")])
    assert '"arguments": {"a": }' in engine.requests[0].prompt


def parse(text: str, seed: int) -> tuple[str, list[dict[str, Any]]]:
    """Feed a text in random pieces and put together what comes out."""
    rng, parser, at = random.Random(seed), ToolCallParser(), 0
    pieces: list[Any] = []
    while at < len(text):
        step = rng.randint(1, 7)
        pieces += parser.push(text[at : at + step])
        at += step
    pieces += parser.finish(is_cut_off=False)
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        if not isinstance(piece, str):
            call = calls.setdefault(piece["index"], {"name": None, "args": ""})
            call["name"] = call["name"] or piece["name"]
            call["args"] += piece["args"] or ""
    return "".join(piece for piece in pieces if isinstance(piece, str)), [calls[index] for index in sorted(calls)]


@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("no call < here, nor <tool", "no call < here, nor <tool", []),
        (CALL, "", [("add", ARGUMENTS)]),
        (f"First this. \n{CALL}\n{CALL}", "First this.", [("add", ARGUMENTS)] * 2),
        ('<tool_call>{"arguments": {"a": 2}, "name": "add"}</tool_call>', "", [("add", {"a": 2})]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}</tool_call>', "", [("add", {"a": 2})]),
        ('<tool_call>\n{"name":"add","parameters":{}}\n</tool_call>', "", [("add", {})]),
        ('<tool_call>{"arguments": {"a": "\\ud83d"}, "name": "add"}</tool_call>', "", [("add", {"a": "\ud83d"})]),
    ],
)
def test_calls_are_found_however_the_text_is_cut(text: str, shown: str, calls: list[Any]) -> None:
    """Text and calls come apart the same way for every division into pieces."""
    for seed in range(100):
        found_text, found = parse(text, seed)
        assert found_text == shown
        assert [(call["name"], json.loads(call["args"])) for call in found] == calls
        assert all(call["args"].encode() for call in found)


@pytest.mark.parametrize("head", ['"name": "\\udfff", "arguments": {}', '"arguments": {}, "name": "\\udfff"'])
def test_a_name_with_half_a_character_is_no_call(head: str) -> None:
    """No text holds it: it could not be sent."""
    _, (call,) = parse(f"<tool_call>{{{head}}}</tool_call>", 0)
    assert call["name"] is None
    assert call["args"].encode()


def test_calls_are_numbered_from_one() -> None:
    """Number 0 belongs to the text before them: LangChain would merge the two."""
    parser = ToolCallParser()
    pieces = [*parser.push(f"text {CALL}"), *parser.finish(is_cut_off=False)]
    assert {piece["index"] for piece in pieces if not isinstance(piece, str)} == {1}


def test_a_call_is_streamed(llm: ChatLoraRetriever, engine) -> None:
    """The name comes first, then the arguments in pieces; they add up to one call with an id."""
    engine.answers = lambda prompt, names: f"Sure. {CALL}"
    chunks = list(llm.bind_tools([add]).stream("go"))
    pieces = [piece for chunk in chunks for piece in chunk.tool_call_chunks]
    assert pieces[0]["name"] == "add"
    assert len(pieces) > 3
    full = _added(chunks)
    assert full.content == "Sure."
    assert [(call["name"], call["args"]) for call in full.tool_calls] == [("add", ARGUMENTS)]
    assert full.tool_calls[0]["id"].startswith("call_")
    assert full.response_metadata["finish_reason"] == "tool_calls"


def test_text_and_calls_keep_apart_in_v1_blocks(llm: ChatLoraRetriever, engine) -> None:
    """With `output_version="v1"` the text block and the calls all survive adding chunks up."""
    engine.answers = lambda prompt, names: f"Sure.\n{CALL}\n{CALL}"
    v1 = llm.model_copy(update={"output_version": "v1"}).bind_tools([add])
    for message in (_added(v1.stream("go")), v1.invoke("go")):
        assert [block["type"] for block in message.content_blocks] == ["text", "tool_call", "tool_call"]
        assert message.content_blocks[0]["text"] == "Sure."


def _added(chunks: Any) -> AIMessageChunk:
    first, *rest = chunks
    for chunk in rest:
        first += chunk
    return first


@pytest.mark.parametrize("text", [CALL[:50], CALL[:56], "<tool_call>nonsense</tool_call>", '<tool_call>\n{"na'])
def test_a_broken_call_is_never_run(llm: ChatLoraRetriever, engine, text: str) -> None:
    """A call that is cut off, or is no JSON, is an invalid call; LangChain would complete its arguments otherwise."""
    engine.answers = lambda prompt, names: text
    bound = llm.bind_tools([add])
    for message in (bound.invoke("go"), _added(bound.stream("go"))):
        assert message.tool_calls == []
        assert len(message.invalid_tool_calls) == 1


def test_without_tools_a_call_is_text(llm: ChatLoraRetriever, engine) -> None:
    """Nothing is read as a call where nothing can be called."""
    engine.answers = lambda prompt, names: CALL
    assert llm.invoke("go").content == CALL
    assert llm.bind_tools([add], tool_choice="none").invoke("go").content == CALL


def test_no_tool_is_shown_where_none_may_be_called(llm: ChatLoraRetriever, engine) -> None:
    """`tool_choice="none"` keeps the tools out of the prompt."""
    llm.bind_tools([add], tool_choice="none").invoke("go")
    assert "add" not in engine.requests[0].prompt


def test_bind_tools_keeps_bound_settings(llm: ChatLoraRetriever, engine) -> None:
    """Settings can be bound along with tools."""
    llm.bind_tools([add], adapters=["sql"], temperature=0.5).invoke([SystemMessage("s"), HumanMessage("go")])
    assert engine.requests[0].names == ["sql"]
    assert engine.requests[0].sampling.temperature == 0.5


def test_tokens_of_tools_are_counted(llm: ChatLoraRetriever) -> None:
    """Counting a prompt counts its tools."""
    messages = [HumanMessage("go")]
    assert llm.get_num_tokens_from_messages(messages, tools=[add]) > llm.get_num_tokens_from_messages(messages) + 100


class Tree(BaseModel):
    """A tree."""

    label: str
    trees: list[Tree] = []


def plant(tree: Tree) -> str:
    """Plant a tree."""
    return tree.label


@pytest.mark.parametrize(
    "given",
    [
        Tree,
        plant,
        tool(plant),
        {"title": "Tree", "$ref": "#/$defs/Tree", "$defs": Tree.model_json_schema()["$defs"]},
        StructuredTool(name="t", description="", func=print, args_schema=Tree.model_json_schema()),
    ],
    ids=["class", "function", "tool", "dict", "dict of a tool"],
)
def test_what_contains_itself_is_described_at_every_depth(given: Any) -> None:
    """LangChain's conversion says nothing of what is below the first level."""
    parameters = to_tools([given], strict=None)[0]["function"]["parameters"]
    tree = parameters["$defs"]["Tree"]
    assert parameters["type"] == "object"
    assert tree["properties"]["trees"]["items"] == {"$ref": "#/$defs/Tree"}


def test_definitions_are_written_out_for_the_model() -> None:
    """Where nothing contains itself; templates look for the properties."""

    class Inner(BaseModel):
        x: int

    class Outer(BaseModel):
        title: Inner

    parameters = to_tools([Outer], strict=None)[0]["function"]["parameters"]
    assert "$defs" not in parameters
    assert parameters["properties"]["title"] == {
        "type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]
    }  # fmt: skip


def test_definitions_that_double_are_not_written_out() -> None:
    """Forty of them, each meant twice by the one before, would be a million million."""
    defs = {f"d{i}": {"properties": {key: {"$ref": f"#/$defs/d{i + 1}"} for key in "ab"}} for i in range(40)}
    schema = {"title": "t", "$ref": "#/$defs/d0", "$defs": {**defs, "d40": {"type": "string"}}}
    assert len(str(to_tools([schema], strict=None))) < 10_000


@pytest.mark.parametrize(
    "given",
    [
        {"type": "function", "function": {"name": "f", "parameters": ADD[0]["function"]["parameters"]}},
        {"type": "function", "name": "f", "parameters": ADD[0]["function"]["parameters"]},
        {"name": "f", "parameters": ADD[0]["function"]["parameters"]},
        {"name": "f", "input_schema": ADD[0]["function"]["parameters"]},
        {"toolSpec": {"name": "f", "inputSchema": {"json": ADD[0]["function"]["parameters"]}}},
        {"title": "f", **ADD[0]["function"]["parameters"]},
    ],
    ids=["OpenAI", "OpenAI's responses", "function", "Anthropic", "Bedrock", "schema"],
)
def test_every_dictionary_that_providers_take_is_a_tool(given: dict[str, Any]) -> None:
    """In any wrapping, and a titled schema without properties as well."""
    assert to_tools([given], strict=None)[0]["function"]["parameters"] == ADD[0]["function"]["parameters"]


def test_a_titled_schema_without_properties_keeps_its_parts() -> None:
    """LangChain's conversion throws them away."""
    item = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    parameters = to_tools([{"title": "f", "anyOf": [item]}], strict=None)[0]["function"]["parameters"]
    assert parameters == {"anyOf": [item], "type": "object"}


def test_strict_tools_require_every_property_at_every_depth() -> None:
    """And allow no others; a tool that says otherwise contradicts."""
    parameters = to_tools([Tree], strict=True)[0]["function"]["parameters"]
    for part in (parameters, parameters["$defs"]["Tree"]):
        assert part["required"] == ["label", "trees"]
        assert part["additionalProperties"] is False
    lax = {"type": "function", "function": {"name": "f", "parameters": {}, "strict": False}}
    with pytest.raises(InvalidRequestError, match="strict=True is asked for"):
        to_tools([lax], strict=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"name": name, "parameters": {}}], "name")
        for name in ('a"b', "a\\b", "", "<tool_call>", "a\nb", "x" * 300, 7, "\ud800")
    ]
    + [
        ([ADD[0], {"name": "add", "parameters": {}}], "Two different tools are named 'add'"),
        ([{"name": "f", "parameters": {"type": "array"}}], "arguments are an object"),
        ([{"name": "f", "parameters": [1]}], "pass a JSON object"),
        ([{"name": "f", "parameters": {"enum": [{1}]}}], "no JSON"),
        ([{"name": "f", "description": "x" * 100_000}], "description"),
        ([{"type": "function", "function": None}], "not a function"),
        ([None], "not a function"),
        ([lambda: None], "name"),
        (ADD[0], "pass a list of tools"),
        ([{"name": f"t{i}"} for i in range(100_000)], "100000 tools are bound, at most 512"),
    ],
)
def test_tools_that_cannot_be_written_are_refused_in_words(given: Any, message: str) -> None:
    """Odd names would break the calls that hold them, and one of two would be lost."""
    with pytest.raises(InvalidRequestError, match=message):
        to_tools(given, strict=None)


def test_names_with_what_json_takes_as_it_is(tokenizer) -> None:
    """Blanks, dots, brackets and letters of any alphabet make names, and the same tool twice is one."""
    names = ["größer als", "mcp.files/read", "Box[int]", "a-b:c"]
    tools = to_tools([{"name": name, "parameters": {}} for name in [*names, names[0]]], strict=None)
    assert [tool_name(each) for each in tools] == names


@pytest.mark.parametrize("body", ['{"name": "a\\q", "arguments": {}}', '{"name": "f", "arguments": ' + "[" * 5000])
def test_calls_that_cannot_be_read_are_invalid_ones(llm: ChatLoraRetriever, engine, body: str) -> None:
    """An escape that JSON lacks, or lists without end, come back as the model wrote them."""
    engine.answers = lambda prompt, names: f"<tool_call>\n{body}\n</tool_call>"
    answer = llm.bind_tools([add]).invoke("go")
    assert not answer.tool_calls
    assert len(answer.invalid_tool_calls) == 1


def test_past_calls_that_are_no_json_are_refused() -> None:
    """They would stand in the prompt."""
    with pytest.raises(InvalidRequestError, match="no JSON"):
        call_text("f", {"a": {1}})


def test_what_is_known_of_a_template_lives_as_long_as_its_tokenizer(tokenizer) -> None:
    """A closed engine's tokenizer is not kept by what its template was found to do."""
    own = copy.deepcopy(tokenizer)
    dialect_of(own)
    reference, own = weakref.ref(own), None
    gc.collect()
    assert reference() is None
