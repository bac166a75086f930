"""Tools into prompts, calls out of text."""

from __future__ import annotations

import copy
import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from langchain_lora_retriever.demo.tasks import make_examples
from langchain_lora_retriever.dialects import HERMES, SECTION, add_tools_section, dialect_of
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.messages import encode_chat
from langchain_lora_retriever.tool_calls import ToolCallParser, call_text
from langchain_lora_retriever.tools import to_tool_choice, to_tools, tool_name

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


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


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
    prompt = engine.requests[0]["prompt"]
    assert f"Let me see.\n{call_text('add', {'a': 1, 'b': 2})}<|im_end|>" in prompt
    assert "<|im_start|>tool\nError: é<|im_end|>" in prompt


def test_an_invalid_call_is_rendered_as_it_came(llm: ChatLoraRetriever, engine) -> None:
    """The model sees its own mistake."""
    bad = {"name": "add", "args": '{"a": ', "id": "1", "error": None, "type": "invalid_tool_call"}
    llm.invoke([HumanMessage("x"), AIMessage("", invalid_tool_calls=[bad]), HumanMessage("again")])
    assert '"arguments": {"a": }' in engine.requests[0]["prompt"]


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
    ],
)
def test_calls_are_found_however_the_text_is_cut(text: str, shown: str, calls: list[Any]) -> None:
    """Text and calls come apart the same way for every division into pieces."""
    for seed in range(100):
        found_text, found = parse(text, seed)
        assert found_text == shown
        assert [(call["name"], json.loads(call["args"])) for call in found] == calls


def test_calls_are_numbered_from_one() -> None:
    """Number 0 belongs to the text before them: LangChain would merge the two."""
    parser = ToolCallParser()
    pieces = [*parser.push(f"text {CALL}"), *parser.finish(is_cut_off=False)]
    assert {piece["index"] for piece in pieces if not isinstance(piece, str)} == {1}


def test_a_call_is_streamed(llm: ChatLoraRetriever, engine) -> None:
    """The name comes first, then the arguments in pieces; they add up to one call with an id."""
    engine.answer = lambda prompt, names: f"Sure. {CALL}"
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
    engine.answer = lambda prompt, names: f"Sure.\n{CALL}\n{CALL}"
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
    engine.answer = lambda prompt, names: text
    bound = llm.bind_tools([add])
    for message in (bound.invoke("go"), _added(bound.stream("go"))):
        assert message.tool_calls == []
        assert len(message.invalid_tool_calls) == 1


def test_without_tools_a_call_is_text(llm: ChatLoraRetriever, engine) -> None:
    """Nothing is read as a call where nothing can be called."""
    engine.answer = lambda prompt, names: CALL
    assert llm.invoke("go").content == CALL
    assert llm.bind_tools([add], tool_choice="none").invoke("go").content == CALL


def test_no_tool_is_shown_where_none_may_be_called(llm: ChatLoraRetriever, engine) -> None:
    """`tool_choice="none"` keeps the tools out of the prompt."""
    llm.bind_tools([add], tool_choice="none").invoke("go")
    assert "add" not in engine.requests[0]["prompt"]


def test_bind_tools_keeps_bound_settings(llm: ChatLoraRetriever, engine) -> None:
    """Settings can be bound along with tools."""
    llm.bind_tools([add], adapters=["sql"], temperature=0.5).invoke([SystemMessage("s"), HumanMessage("go")])
    assert engine.requests[0]["names"] == ["sql"]
    assert engine.requests[0]["sampling"].temperature == 0.5


def test_tokens_of_tools_are_counted(llm: ChatLoraRetriever) -> None:
    """Counting a prompt counts its tools."""
    messages = [HumanMessage("go")]
    assert llm.get_num_tokens_from_messages(messages, tools=[add]) > llm.get_num_tokens_from_messages(messages) + 100
