"""How a model is shown tools and writes calls, found out by letting its chat template do both.

Most templates ignore tools without a word, and those that know them write calls in formats of their own. So a template
is asked to render a tool and a call, and what it makes of them is looked at; nothing is assumed of a model by its name.
"""

from __future__ import annotations

import json
import re
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jinja2

from langchain_lora_retriever.output.readers import read
from langchain_lora_retriever.output.response_template import CALLS, TemplateReader, response_template
from langchain_lora_retriever.output.tool_calls import CALL_CLOSE, CALL_OPEN, ToolCallParser, call_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.output.readers import Reader
    from langchain_lora_retriever.output.tools import Tool

__all__ = ["HERMES", "SECTION", "CallForm", "ChatTurn", "Dialect", "add_tools_section", "dialect_of"]

ChatTurn: TypeAlias = dict[str, Any]
"""One turn as chat templates take it: `{"role", "content"}`, and `"tool_calls"` where there are any."""

_SECTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

_ARGUMENTS: dict[str, dict[str, Any]] = {
    "probe_tool": {"probe_argument": 731, "probe_text": "seven"},
    "probe_other_tool": {"probe_argument": 82, "probe_text": "eight two"},
}
_PROBE_TOOLS: list[Tool] = [
    {"type": "function", "function": {"name": name, "description": "Probe.", "parameters": {
        "type": "object", "properties": {"probe_argument": {"type": "integer"}, "probe_text": {"type": "string"}}}}}
    for name in _ARGUMENTS
]  # fmt: skip


class CallForm(NamedTuple):
    """What a model writes around the name and the arguments of a call.

    Attributes:
        opening: From here on it is a call.
        before_name: Between the opening and the name.
        before_arguments: Between the name and the arguments, which are JSON with the separators of `json.dumps`.
        closing: After the arguments.
        separator: Between two calls; None if an answer can hold one only.
    """

    opening: str
    before_name: str
    before_arguments: str
    closing: str
    separator: str | None

    def write(self, calls: Mapping[str, Any]) -> str:
        """Write calls of the tools and arguments given."""
        texts = [
            f"{self.opening}{self.before_name}{name}{self.before_arguments}"
            f"{json.dumps(arguments, ensure_ascii=False)}{self.closing}"
            for name, arguments in calls.items()
        ]
        return (self.separator or "").join(texts)


HERMES = CallForm(CALL_OPEN, '\n{"name": "', '", "arguments": ', "}\n" + CALL_CLOSE, "\n")


class Dialect(NamedTuple):
    """How tools get into a prompt and calls out of an answer.

    Attributes:
        by_template: The chat template writes tools and past calls; else a section of the system message does.
        by_response_template: The tokenizer's `response_template` reads calls; else they stand between `<tool_call>`
            tags.
        form: What a call looks like; None if it is not JSON between fixed texts, and cannot be constrained.
        is_told_by_opening: Nothing but a call begins with the form's opening, so that a free answer can be
            constrained from there on.
    """

    by_template: bool
    by_response_template: bool
    form: CallForm | None
    is_told_by_opening: bool = True


SECTION = Dialect(by_template=False, by_response_template=False, form=HERMES)
"""What any model can be told."""


def dialect_of(tokenizer: PreTrainedTokenizerBase) -> Dialect:
    """Find out how a model is shown tools and writes calls."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return SECTION
    asked = (repr(template), repr(response_template(tokenizer)))  # changed templates are probed again
    known = _dialects.get(tokenizer)
    if known is None or known[0] != asked:
        known = _dialects[tokenizer] = (asked, _probed(tokenizer))
    return known[1]


_dialects: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[str, str], Dialect]] = (
    weakref.WeakKeyDictionary()
)


def _probed(tokenizer: PreTrainedTokenizerBase) -> Dialect:
    shown = _rendered(tokenizer, 1)
    if shown is None or not all(name in shown for name in _ARGUMENTS):
        return SECTION
    if CALLS in (response_template(tokenizer) or {}).get("fields", {}):
        answer = _answer(tokenizer, 1)
        if answer is not None and _calls_in([TemplateReader(tokenizer, "", _PROBE_TOOLS)], answer) == _calls(1):
            form = _form_of(tokenizer, answer)
            return Dialect(
                by_template=True,
                by_response_template=True,
                form=form,
                is_told_by_opening=form is not None and _is_of_calls_only(tokenizer, form.opening),
            )
    if _calls(1).items() <= _calls_in([ToolCallParser()], shown).items():
        return Dialect(by_template=True, by_response_template=False, form=HERMES)
    return SECTION


def add_tools_section(chat: Sequence[ChatTurn], tools: Sequence[Tool]) -> list[ChatTurn]:
    """Write tools into the system message and past calls into the answers, for a template that does neither."""
    turns = [_without_calls(turn) for turn in chat]
    if not tools:
        return turns
    section = _SECTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{section}"}, *turns[1:]]
    return [{"role": "system", "content": section}, *turns]


def _without_calls(turn: ChatTurn) -> ChatTurn:
    calls = turn.get("tool_calls")
    if not calls:
        return turn
    texts = [call_text(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    content = "\n".join([turn["content"], *texts] if turn["content"] else texts)
    return {"role": turn["role"], "content": content}


def _calls(num: int) -> dict[str, Any]:
    return dict(list(_ARGUMENTS.items())[:num])


def _rendered(tokenizer: PreTrainedTokenizerBase, num_calls: int) -> str | None:
    """Render tools, a question, and an answer of `num_calls` calls; no answer where there are none."""
    turns: list[ChatTurn] = [{"role": "user", "content": "probe"}]
    if num_calls:
        calls = [
            {"id": f"call0000{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for index, (name, arguments) in enumerate(_calls(num_calls).items())
        ]
        turns.append({"role": "assistant", "content": "", "tool_calls": calls})
    try:
        return str(
            tokenizer.apply_chat_template(
                turns, tools=[*_PROBE_TOOLS], tokenize=False, add_generation_prompt=not num_calls
            )
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):
        return None


def _answer(tokenizer: PreTrainedTokenizerBase, num_calls: int) -> str | None:
    """Let the template write what a model would answer with `num_calls` calls."""
    prompt, whole = (_rendered(tokenizer, num) for num in (0, num_calls))
    if prompt is None or whole is None:
        return None
    # A template may open a block of reasoning in a prompt that it does not write into a past answer.
    same = next((at for at, pair in enumerate(zip(prompt, whole, strict=False)) if pair[0] != pair[1]), len(prompt))
    return whole[same:]


def _calls_in(readers: Sequence[Reader], text: str) -> dict[str, Any]:
    """Read the calls in a text: arguments by name, None where they are no JSON."""
    names: dict[int, str | None] = {}
    texts: dict[int, str] = {}
    for piece in read(readers, text, is_last=True, is_cut_off=False):
        if isinstance(piece, dict):
            index = piece["index"] or 0
            names[index] = names.get(index) or piece["name"]
            texts[index] = texts.get(index, "") + (piece["args"] or "")
    return {names[index] or "": _parsed(texts[index]) for index in names}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _form_of(tokenizer: PreTrainedTokenizerBase, answer: str) -> CallForm | None:
    """Take a rendered call apart; None if it is not JSON between fixed texts, or does not read back as it was."""
    template = response_template(tokenizer)
    assert template is not None, "the caller has read a call by it"
    field = template["fields"][CALLS]
    ((name, arguments),) = _calls(1).items()
    before, found, after = answer.partition(json.dumps(arguments))
    name_at = before.rfind(name)
    try:
        opens = re.search(_pattern(field, "open"), before, re.DOTALL)
        closes = re.search(_pattern(field, "close"), after, re.DOTALL)
    except re.error:  # the template's patterns are in the dialect of the `regex` package
        return None
    if not found or name_at < 0 or opens is None or closes is None:
        return None
    opening = before[opens.start() : min(opens.end(), name_at)]
    form = CallForm(
        opening=opening.lstrip(),
        before_name=before[opens.start() + len(opening) : name_at],
        before_arguments=before[name_at + len(name) :],
        closing=after[: closes.end()],
        separator=None,
    )
    if not form.opening or _calls_in([TemplateReader(tokenizer, "", _PROBE_TOOLS)], form.write(_calls(1))) != _calls(1):
        return None
    pair = _answer(tokenizer, 2) or ""
    _, _, rest = pair.partition(form.write(_calls(1)))
    separator, found, _ = rest.partition(form.opening)
    double = form._replace(separator=separator)
    reads_back = _calls_in([TemplateReader(tokenizer, "", _PROBE_TOOLS)], double.write(_calls(2))) == _calls(2)
    return double if found and reads_back else form


def _is_of_calls_only(tokenizer: PreTrainedTokenizerBase, opening: str) -> bool:
    """Say whether no other field of the response template uses a token that the opening has."""
    fields = (response_template(tokenizer) or {})["fields"]
    others = "\n".join(_pattern(fields[name], key) for name in fields if name != CALLS for key in ("open", "close"))
    tokens = [token for token in tokenizer.get_added_vocab() if token in opening]
    return not any(token in others or re.escape(token) in others for token in tokens)


def _pattern(field: Mapping[str, Any], key: str) -> str:
    """Return the regular expression of a field's delimiter; of none, that of the empty text."""
    literals = field.get(key)
    if literals is None:
        return str(field.get(f"{key}_pattern", ""))
    literals = [literals] if isinstance(literals, str) else literals
    return "|".join(re.escape(literal) for literal in sorted(literals, key=len, reverse=True))
