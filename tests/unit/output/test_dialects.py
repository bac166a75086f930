"""Models that write tool calls in a format of their own: found out, read while they stream, and constrained."""

from __future__ import annotations

import copy
import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from transformers import PreTrainedTokenizerFast

from langchain_lora_retriever.chat.call import CallOptions
from langchain_lora_retriever.chat.messages import encode_chat
from langchain_lora_retriever.engine.grammar import compiler_of
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.output.dialects import HERMES, SECTION, dialect_of
from langchain_lora_retriever.output.format import answer_format
from langchain_lora_retriever.output.readers import Reasoning, read
from langchain_lora_retriever.output.response_template import TemplateReader

if TYPE_CHECKING:
    from langchain_lora_retriever import ChatLoraRetriever

SYSTEM = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
PROMPT_END = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chat_template(call: str, *, between: str = "", end: str = "<|im_end|>\n") -> str:
    """A ChatML template that shows tools and writes each call `c` as `call` says."""
    return (
        f"{SYSTEM}{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}"
        f"{{% for c in m.tool_calls or [] %}}{{% if not loop.first %}}{between}{{% endif %}}{call}{{% endfor %}}"
        f"{end}{{% endfor %}}{PROMPT_END}"
    )


def fields(tool_calls: dict[str, Any]) -> dict[str, Any]:
    """A response template with reasoning and an answer beside the calls."""
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
            "tool_calls": {"repeats": True, "content": "json", **tool_calls},
            "content": {"content": "text"},
        },
    }


NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
BRACKETS = (
    chat_template("[CALL]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}[/CALL]"),
    fields({"open_pattern": r"\[CALL\](?P<name>\w+)\[ARGS\]", "close": "[/CALL]", "transform": NAMED}),
    ["[CALL]", "[ARGS]", "[/CALL]"],
)
OBJECTS = (
    chat_template(
        '<call>{"tool": "{{ c.function.name }}", "with": {{ c.function.arguments | tojson }}}</call>',
        between="{{ '\n' }}",
    ),
    fields({
        "open_pattern": r"\s*<call>", "close": "</call>",
        "transform": {"function": {"name": "{content.tool}", "arguments": "{content.with}"}},
    }),
    [],
)  # fmt: skip
XML = (
    chat_template(
        "<call><function={{ c.function.name }}>{% for k, v in c.function.arguments.items() %}"
        "<parameter={{ k }}>{{ v }}</parameter>{% endfor %}</function></call>"
    ),
    fields({
        "open_pattern": r"<call><function=(?P<name>[^>\n]+)>", "close_pattern": r"</function>\s*</call>",
        "content": "xml-inline", "transform": NAMED,
        "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
    }),
    ["<call>", "</call>"],
)  # fmt: skip
CHANNELS = (
    chat_template("<|channel|>to={{ c.function.name }}<|say|>{{ c.function.arguments | tojson }}<|call|>"),
    {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "thinking": {"open": "<|channel|>thought<|say|>", "close": "<|end|>", "content": "text"},
            "tool_calls": {
                "open_pattern": r"<\|channel\|>to=(?P<name>\w+)<\|say\|>", "close": "<|call|>", "content": "json",
                "repeats": True, "transform": NAMED,
            },
            "content": {"open": "<|channel|>final<|say|>", "close": "<|end|>", "content": "text"},
        },
    },
    ["<|channel|>", "<|say|>", "<|call|>", "<|end|>"],
)  # fmt: skip
WAYS = {"brackets": BRACKETS, "objects": OBJECTS, "xml": XML, "channels": CHANNELS}
BRACKET_CALL = '[CALL]add[ARGS]{"a": 1, "b": "]\\" "}[/CALL]'


@tool
def add(a: int, b: str) -> str:
    """Add."""
    return f"{a}{b}"


def with_answers(tokenizer: Any, way: tuple[str, dict[str, Any], list[str]]) -> Any:
    """A tokenizer of that chat template, response template and special tokens."""
    template, answers, special = way
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.add_special_tokens(special)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", response_template=answers)
    made.chat_template = template
    return made


def follows(tokenizer: Any, grammar: str, text: str) -> bool:
    """Say whether a grammar lets a text through, token by token, and may end there."""
    constraint = compiler_of(tokenizer).constraint(grammar)
    row = torch.zeros(-(-len(tokenizer) // 32), dtype=torch.int32)
    for token_id in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]:
        constraint.fill_bitmask(row)
        if not (int(row[token_id // 32]) >> (token_id % 32)) & 1:
            return constraint.is_finished and token_id == tokenizer.eos_token_id
        constraint.accept(token_id)
    return True


def read_all(tokenizer: Any, text: str, *, prefix: str = "", is_cut_off: bool = False, seed: int = 0) -> list[Any]:
    """Feed a text in random pieces; return what comes out, texts and calls put together."""
    rng, reader, at = random.Random(seed), TemplateReader(tokenizer, prefix, answer_tools(tokenizer)), 0
    pieces: list[Any] = []
    while at < len(text):
        step = rng.randint(1, 9)
        pieces += read([reader], text[at : at + step], is_last=False, is_cut_off=False)
        at += step
    pieces += read([reader], "", is_last=True, is_cut_off=is_cut_off)
    joined: list[Any] = []
    for piece in pieces:
        if isinstance(piece, dict):
            joined.append((piece["name"], piece["args"]))
        elif joined and type(joined[-1]) is type(piece):
            joined[-1] = Reasoning(joined[-1].text + piece.text) if isinstance(piece, Reasoning) else joined[-1] + piece
        else:
            joined.append(piece)
    return joined


def answer_tools(tokenizer: Any) -> list[Any]:
    """The tool, as it reaches a reader."""
    return answer_format(CallOptions(tools=[add]), tokenizer).tools


@pytest.mark.parametrize("way", WAYS)
def test_a_format_is_found_out_by_rendering_it(tokenizer, way: str) -> None:
    """The template shows tools and writes a call that the tokenizer's response template reads back."""
    dialect = dialect_of(with_answers(tokenizer, WAYS[way]))
    assert dialect.by_template
    assert dialect.by_response_template
    assert (dialect.form is None) == (way == "xml")
    assert dialect.is_told_by_opening == (way in {"brackets", "objects"})


def test_the_form_of_a_call_is_taken_from_the_template(tokenizer) -> None:
    """What stands around a name and arguments, and between two calls, is what the template writes."""
    brackets = dialect_of(with_answers(tokenizer, BRACKETS)).form
    assert brackets == ("[CALL]", "", "[ARGS]", "[/CALL]", "")
    assert brackets.write({"add": {"a": 1}}) == '[CALL]add[ARGS]{"a": 1}[/CALL]'
    objects = dialect_of(with_answers(tokenizer, OBJECTS)).form
    assert objects == ("<call>", '{"tool": "', '", "with": ', "}</call>", "\n")


def test_a_response_template_that_reads_other_calls_is_not_trusted(tokenizer) -> None:
    """If it does not read what the chat template writes, tools and calls are described in the system message."""
    template, _, special = BRACKETS
    assert dialect_of(with_answers(tokenizer, (template, OBJECTS[1], special))) == SECTION
    silent = with_answers(tokenizer, BRACKETS)
    silent.chat_template = silent.chat_template.replace(SYSTEM, "")
    assert dialect_of(silent) == SECTION


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no call, [CALL nor [ARGS]", ["no call, [CALL nor [ARGS]"]),
        (BRACKET_CALL, [("add", '{"a": 1, "b": "]\\" "}')]),
        (f"Sure. \n{BRACKET_CALL}\n{BRACKET_CALL}", ["Sure.", *[("add", '{"a": 1, "b": "]\\" "}')] * 2]),
        ("<think>\nHm.\n</think>\n\nYes.\n", [Reasoning("Hm."), "Yes."]),
        ('[CALL]add[ARGS]{"a": "7", "b": 3}[/CALL]', [("add", '{"a": 7, "b": 3}')]),
        ('Sure.[CALL]add[ARGS]{"a": nonsense[/CALL] Done.', ["Sure.", (None, '{"a": nonsense]'), "Done."]),
    ],
)
def test_answers_are_read_however_they_are_cut(tokenizer, text: str, expected: list[Any]) -> None:
    """Reasoning, answer, calls and broken calls come apart the same way for every division into pieces."""
    own = with_answers(tokenizer, BRACKETS)
    for seed in range(40):
        assert read_all(own, text, seed=seed) == expected


def test_what_the_prompt_has_begun_is_gone_on_with(tokenizer) -> None:
    """A prompt that opens a block of reasoning has the answer begin inside it."""
    own = with_answers(tokenizer, BRACKETS)
    prefix = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert read_all(own, "Hm.</think>Yes.", prefix=prefix) == [Reasoning("Hm."), "Yes."]


@pytest.mark.parametrize("way", ["brackets", "xml"])
def test_a_call_that_is_cut_off_is_never_run(tokenizer, way: str) -> None:
    """Half the arguments are no arguments, even where the format would let them pass."""
    own = with_answers(tokenizer, WAYS[way])
    text = {"brackets": '[CALL]add[ARGS]{"a": 1', "xml": "<call><function=add><parameter=a>1</parameter>"}[way]
    ((name, arguments),) = read_all(own, text, is_cut_off=True)
    assert name is None
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)


def test_xml_arguments_get_their_types(tokenizer) -> None:
    """Arguments that are written as text become what the tool's schema says."""
    own = with_answers(tokenizer, XML)
    text = "<call><function=add><parameter=a>7</parameter><parameter=b>7</parameter></function></call>"
    assert read_all(own, text) == [("add", '{"a": 7, "b": "7"}')]


@pytest.mark.parametrize("way", ["brackets", "objects"])
def test_calls_are_constrained_in_the_models_own_format(tokenizer, way: str) -> None:
    """Free text goes until the call begins, and from there on only a call of the tools there are."""
    own = with_answers(tokenizer, WAYS[way])
    form = dialect_of(own).form
    call = form.write({"add": {"a": 1, "b": "x"}})
    auto = answer_format(CallOptions(tools=[add]), own)
    assert auto.is_free_text
    for right in ("text", "<|im_start|>text", call, f"Well. {call}", f"{call}{form.separator}{call}"):
        assert follows(own, auto.grammar, right), right
    for wrong in (call.replace("add", "adds"), call.replace("1", '"1"'), f"Well. {form.opening}text"):
        assert not follows(own, auto.grammar, wrong), wrong
    forced = answer_format(CallOptions(tools=[add], tool_choice="any", parallel_tool_calls=False), own).grammar
    assert follows(own, forced, call)
    assert not follows(own, forced, f"Well. {call}")
    assert not follows(own, forced, f"{call}{form.separator}{call}")


def test_a_tag_that_is_a_token_is_let_through(tokenizer) -> None:
    """Qwen's `<tool_call>` and `<think>` are tokens; a grammar of their letters would forbid them."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    qwen = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    call = HERMES.write({"add": {"a": 1, "b": "x"}})
    auto = answer_format(CallOptions(tools=[add]), qwen).grammar
    assert len(qwen.encode("<tool_call>")) == 1
    for right in (call, f"<think>Hm.</think>{call}\n{call}", "<think>Hm.</think>"):
        assert follows(qwen, auto, right), right
    assert not follows(qwen, auto, "<think>Hm.</think><tool_call>text")
    forced = answer_format(CallOptions(tools=[add], tool_choice="add"), qwen).grammar
    assert follows(qwen, forced, call)


def test_a_format_that_no_grammar_can_write_is_free_where_it_may_be(tokenizer) -> None:
    """In auto mode the model writes as it likes; a forced call is asked for in a form that can be constrained."""
    own = with_answers(tokenizer, XML)
    auto = answer_format(CallOptions(tools=[add]), own)
    assert auto.grammar is None
    assert auto.dialect.by_response_template
    forced = answer_format(CallOptions(tools=[add], tool_choice="any"), own)
    assert forced.dialect == SECTION
    prompt = own.decode(
        encode_chat(own, [{"role": "user", "content": "hi"}], tools=forced.tools, dialect=forced.dialect)
    )
    assert "# Tools" in prompt
    assert follows(own, forced.grammar, HERMES.write({"add": {"a": 1, "b": "x"}}))


def test_an_opening_that_other_text_shares_is_not_constrained_in_auto_mode(tokenizer) -> None:
    """Where every part of an answer begins with one token, forbidding it outside calls would forbid answering."""
    own = with_answers(tokenizer, CHANNELS)
    assert answer_format(CallOptions(tools=[add]), own).grammar is None
    forced = answer_format(CallOptions(tools=[add], tool_choice="any"), own).grammar
    assert follows(own, forced, '<|channel|>to=add<|say|>{"a": 1, "b": "x"}<|call|>')


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_chat_model_reads_its_own_format(llm: ChatLoraRetriever, engine, tokenizer, is_stream: bool) -> None:
    """Reasoning, text and calls come out of an answer, streamed or not; the engine leaves special tokens in."""
    engine.tokenizer = with_answers(tokenizer, BRACKETS)
    engine.answers = lambda prompt, names: f"<think>Hm.</think>Sure. {BRACKET_CALL}"
    bound = llm.bind_tools([add])
    chunks = list(bound.stream("go")) if is_stream else [bound.invoke("go")]
    message = chunks[0]
    for chunk in chunks[1:]:
        message += chunk
    assert message.text == "Sure."
    assert message.additional_kwargs["reasoning_content"] == "Hm."
    assert [(call["name"], call["args"]) for call in message.tool_calls] == [("add", {"a": 1, "b": ']" '})]
    assert message.response_metadata["finish_reason"] == "tool_calls"
    assert not engine.requests[0].sampling.skip_special_tokens
    assert '"name": "add"' in engine.requests[0].prompt
    assert "# Tools" not in engine.requests[0].prompt


def test_without_tools_a_call_is_text(llm: ChatLoraRetriever, engine, tokenizer) -> None:
    """Reasoning is still found by the response template, but nothing can be called."""
    engine.tokenizer = with_answers(tokenizer, BRACKETS)
    engine.answers = lambda prompt, names: f"<think>Hm.</think>{BRACKET_CALL}"
    message = llm.invoke("go")
    assert message.text == BRACKET_CALL
    assert message.additional_kwargs["reasoning_content"] == "Hm."
    assert message.tool_calls == []


def test_forced_calls_and_agents_use_the_own_format(llm: ChatLoraRetriever, engine, tokenizer) -> None:
    """A forced call is read in the model's own format, and so is an agent's choice between a call and JSON."""
    engine.tokenizer = with_answers(tokenizer, BRACKETS)
    engine.answers = lambda prompt, names: BRACKET_CALL
    schema = {"title": "Answer", "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert llm.bind_tools([add], tool_choice="any").invoke("go").tool_calls[0]["name"] == "add"
    both = llm.bind_tools([add], response_format=response_format)
    assert both.invoke("go").tool_calls[0]["name"] == "add"
    engine.answers = lambda prompt, names: '{"n": 3}'
    assert json.loads(both.invoke("go").text) == {"n": 3}


def test_a_response_template_that_is_invalid_is_named(llm: ChatLoraRetriever, engine, tokenizer) -> None:
    """The error says what is wrong with it and how to do without."""
    engine.tokenizer = with_answers(tokenizer, (BRACKETS[0], {"version": 9, "fields": {"content": {}}}, []))
    with pytest.raises(InvalidRequestError, match=r"response_template cannot be used.*version: 9"):
        llm.invoke("go")


@pytest.mark.parametrize("choice", [None, "auto"])
def test_a_schema_that_cannot_be_honoured_leaves_auto_mode_possible(
    llm: ChatLoraRetriever, engine, tokenizer, choice: Any
) -> None:
    """Arguments are then any JSON object; where a call is forced or the tool is strict it raises before generating."""
    parameters = {"type": "object", "properties": {"n": {"not": {"type": "string"}}}, "required": ["n"]}
    odd = {"type": "function", "function": {"name": "odd", "description": "", "parameters": parameters}}
    engine.answers = lambda prompt, names: HERMES.write({"odd": {"n": 3}})
    message = llm.bind_tools([odd, add], tool_choice=choice).invoke("go")
    assert message.tool_calls[0]["args"] == {"n": 3}
    grammar = answer_format(CallOptions(tools=[odd, add]), tokenizer).grammar
    assert follows(tokenizer, grammar, HERMES.write({"odd": {"n": 3, "m": []}}))
    assert not follows(tokenizer, grammar, HERMES.write({"add": {"n": 3}}))
    strict = {**odd, "function": {**odd["function"], "strict": True}}
    for bound in (llm.bind_tools([odd], tool_choice="any"), llm.bind_tools([strict])):
        with pytest.raises(InvalidRequestError, match="cannot be constrained"):
            bound.invoke([HumanMessage("go")])
    assert len(engine.requests) == 1
