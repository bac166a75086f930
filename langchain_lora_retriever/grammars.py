"""Grammars as text: of JSON, regular expressions, choices, and tool calls. Nothing is compiled here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.nesting import check_unicode
from langchain_lora_retriever.schemas import check_schema
from langchain_lora_retriever.shown import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_lora_retriever.dialects import CallForm

__all__ = [
    "MAX_GRAMMAR_CHARACTERS",
    "MAX_TOOLS",
    "calls_grammar",
    "choice_grammar",
    "json_grammar",
    "lark_grammar",
    "regex_grammar",
]

MAX_GRAMMAR_CHARACTERS = 256 << 10
"""Characters of a regular expression, of all choices together, or of a grammar, tools' schemas included."""
MAX_TOOLS = 512
"""Tools of one call that an answer is constrained by."""

# No free white space: a weak model would emit blanks until the token limit. The separators are json.dumps's, so the
# forced text is what models were trained on.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_grammar(schema: Mapping[str, Any]) -> str:
    """Write the grammar of JSON texts that satisfy a schema.

    Raises:
        InvalidRequestError: If the schema is beyond the bounds of `check_schema`.
    """
    return f"%llguidance {{}}\nstart: {_json_rule(schema)}\n"


def lark_grammar(grammar: str) -> str:
    """Check a caller's own grammar, in Lark's form.

    Raises:
        InvalidRequestError: If it is no text, or too long.
    """
    if not isinstance(grammar, str) or not grammar.strip():
        raise InvalidRequestError(f"guided grammar={shown(grammar)} is not allowed: pass a Lark grammar as text.")
    return _bounded(grammar, "The grammar")


def regex_grammar(pattern: str) -> str:
    """Write the grammar of texts that match a regular expression (Rust's dialect) as a whole.

    Raises:
        InvalidRequestError: If it is no text, or too long.
    """
    if not isinstance(pattern, str):
        raise InvalidRequestError(f"guided regex={shown(pattern)} is not allowed: pass a regular expression as text.")
    return LLMatcher.grammar_from_regex(_bounded(pattern, "The regular expression"))


def choice_grammar(choices: Sequence[str]) -> str:
    """Write the grammar of a choice between texts.

    Raises:
        InvalidRequestError: If they are no list of texts, or too long together.
    """
    if isinstance(choices, str) or not isinstance(choices, Iterable):
        raise InvalidRequestError(f"guided choice={shown(choices)} is not allowed: pass a list of texts.")
    texts = list(choices)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise InvalidRequestError(f"guided choice={shown(texts)} is not allowed: pass one or more non-empty texts.")
    # One terminal: as so many rules, more than 2,000 choices would be beyond the parser.
    rule = _bounded(" | ".join(json.dumps(text) for text in texts), "The choices together")
    return f"%llguidance {{}}\nstart: CHOICE\nCHOICE: {rule}\n"


def calls_grammar(
    tools: Mapping[str, Mapping[str, Any]],
    *,
    form: CallForm,
    special: Mapping[str, int],
    eos_token_id: int | None,
    is_forced: bool,
    is_repeatable: bool,
    otherwise: Mapping[str, Any] | None = None,
) -> str:
    """Write the grammar of tool calls.

    Args:
        tools: Names and the schemas of their arguments.
        form: What stands around a call's name and arguments.
        special: Tokens that are no text, and their ids: tags that are tokens of their own are written as such.
        eos_token_id: The one of them that ends an answer.
        is_forced: There is a call and nothing else; else free text may come first, or alone.
        is_repeatable: More calls may follow the first, if the form allows several.
        otherwise: A schema that the text may satisfy in place of a forced call.

    Raises:
        InvalidRequestError: If there are too many tools, or their schemas are too large together.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(
            f"{len(tools)} tools are bound, at most {MAX_TOOLS} are allowed: bind those that this call may need."
        )
    opening = _spelled(special, form.opening)
    rules = [
        f"tool_{index}: {_spelled(special, form.before_name + name + form.before_arguments)} {_json_rule(schema)}"
        for index, (name, schema) in enumerate(tools.items())
    ]
    body = f"({' | '.join(f'tool_{index}' for index in range(len(tools)))}) {_spelled(special, form.closing)}"
    more = ""
    if is_repeatable and form.separator is not None:
        more = f" ({_spelled(special, form.separator + form.opening)} body)*"
    rules.append(f"body: {body}")
    if is_forced:
        rules.insert(0, f"start: {opening} body{more}" + (f" | {_json_rule(otherwise)}" if otherwise else ""))
    else:
        # A lazy rule ends at the first match, so text that reaches the opening is in a call from there on. Tokens of
        # their own in the opening may stand there and nowhere else; all others may stand anywhere.
        taken = {id_ for text, id_ in special.items() if text in form.opening}
        others = sorted({*special.values()} - taken - {eos_token_id})
        rules.insert(0, f"start: free TEXT | free opening body{more}")
        rules.append("opening: trigger" + (f" | TEXT {opening}" if taken else ""))
        rules.append(f"trigger[lazy]: TEXT {json.dumps(form.opening)}")
        rules.append(f"free: (TEXT <[{','.join(map(str, others))}]>)*" if others else 'free: ""')
        rules.append("TEXT: /(.|\\n)*/")
    return _bounded("%llguidance {}\n" + "\n".join(rules) + "\n", "The tools' schemas together")


def _bounded(text: str, what: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise InvalidRequestError(
            f"{what}: {len(text):,} characters, at most {MAX_GRAMMAR_CHARACTERS:,} are allowed. Pass less."
        )
    check_unicode(text, what)
    return text


def _spelled(special: Mapping[str, int], text: str) -> str:
    """Write fixed text in a grammar, which must name special tokens by their numbers."""
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    parts = re.split(f"({pattern})", text) if pattern else [text]
    return " ".join(f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part)


def _json_rule(schema: Mapping[str, Any]) -> str:
    check_schema(schema)
    return "%json " + json.dumps({**_closed(schema), "x-guidance": _JSON_OPTIONS})


def _closed(schema: Any) -> Any:
    """Close objects that list their properties and do not say whether there may be others."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: {name: _closed(item) for name, item in value.items()}
        if key in {"properties", "$defs", "definitions"} and isinstance(value, dict)
        else value
        if key in {"const", "enum", "default", "examples"}
        else _closed(value)
        for key, value in schema.items()
    }
    if closed.get("type") == "object" and "properties" in closed:
        closed.setdefault("additionalProperties", False)
    return closed
