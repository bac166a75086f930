"""Grammars as text: of JSON, regular expressions, choices, and tool calls. Nothing is compiled here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher

from langchain_lora_retriever.engine.api import Grammar
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.output.schemas import checked_schema
from langchain_lora_retriever.support.nesting import check_unicode
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from langchain_lora_retriever.output.dialects import CallForm

__all__ = [
    "MAX_CHOICES",
    "MAX_GRAMMAR_CHARACTERS",
    "MAX_PATTERN_CHARACTERS",
    "calls_grammar",
    "choice_grammar",
    "json_grammar",
    "lark_grammar",
    "regex_grammar",
]

MAX_GRAMMAR_CHARACTERS = 256 << 10
"""Characters of all choices together, or of a grammar, tools' schemas included."""
MAX_PATTERN_CHARACTERS = 8 << 10
"""Characters of a regular expression."""
MAX_CHOICES = 10_000
"""Choices of one call."""
_MAX_OPERATORS = 2
"""Intersections and complements (`&`, `~`) of a Lark grammar: with four parts compilation can take minutes."""
_MAX_FORCED_CHARACTERS = 16 << 10
"""Characters of keys and constants up to which a grammar's forced tokens are looked for, all in a row: 1.5 us each."""

_MAX_PARTS, _MAX_PARTS_CHARACTERS = 16, 200_000
"""Parts of a schema that are compiled by themselves too, and the characters of all of them."""

# No free white space: a weak model would emit blanks until the token limit. The separators are json.dumps's, so the
# forced text is what models were trained on.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# What says nothing about how an answer is written.
_ANNOTATIONS = frozenset({"title", "description", "default", "examples", "$comment"})

# Comments, strings, regular expressions, special tokens, and the mark of a parametric rule outside of these.
_LARK_PARTS = re.compile(r'(?:#|//)[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\])+/|<[^<>\s]+>|::', re.DOTALL)


def json_grammar(schema: Mapping[str, Any]) -> Grammar:
    """Write the grammar of JSON texts that satisfy a schema.

    Raises:
        InvalidRequestError: If the schema is beyond the bounds of `checked_schema`.
    """
    checked = checked_schema(schema)
    text = _json_text(checked)
    num_parts = min(_MAX_PARTS, _MAX_PARTS_CHARACTERS // len(text))
    return Grammar(text, is_json=True, parts=tuple(map(_json_text, _demanding_parts(checked)[:num_parts])))


def _json_text(schema: Mapping[str, Any]) -> str:
    return f"{_header(schema)}start: {_json_rule(schema)}\n"


def _demanding_parts(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The schemas within one that ask for something once they are begun, the largest first, with the definitions."""
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    found: dict[str, dict[str, Any]] = {}
    stack: list[Any] = list(schema.values())
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack += value
        elif isinstance(value, dict):
            stack += value.values()
            if isinstance(value.get("required"), list) or value.get("minItems"):
                found[json.dumps(value)] = {**value, **definitions}
    return [found[text] for text in sorted(found, key=len, reverse=True)]


def lark_grammar(grammar: str) -> Grammar:
    """Check a caller's own grammar, in Lark's form.

    Raises:
        InvalidRequestError: If it is no text, too long, holds a schema beyond the bounds of `checked_schema` or
            parametric rules or many intersections, or is llguidance's own JSON in place of Lark.
    """
    if not isinstance(grammar, str) or grammar.strip()[:1] in {"", "{"}:
        raise InvalidRequestError(f"guided grammar={shown(grammar)} is not allowed: pass a Lark grammar as text.")
    rules, text = _with_checked_json(_bounded(grammar, "The grammar"))
    if any(part[0] == "::" for part in _LARK_PARTS.finditer(rules)):
        raise InvalidRequestError(
            "The grammar has parametric rules (name::value), which can take minutes to follow: write them out."
        )
    operators = re.findall(r"&|~(?!\s*\d)", _LARK_PARTS.sub(" ", rules))  # `~ 3` is a repeat
    if len(operators) > _MAX_OPERATORS:
        raise InvalidRequestError(
            f"The grammar has {len(operators)} intersections and complements (&, ~), at most {_MAX_OPERATORS} are "
            "allowed: what they ask for multiplies. Write A & ~(B | C) in place of A & ~B & ~C."
        )
    if len(text) > _MAX_FORCED_CHARACTERS:
        text += '\n%llguidance {"no_forcing": true}\n'  # the last word: earlier options of the caller's do not count
    return Grammar(text, is_foreign=True)


def _with_checked_json(text: str) -> tuple[str, str]:
    """Check the schemas in a Lark grammar; return its rules without any JSON, and the grammar with what was checked."""
    decoder, rules, written, at = json.JSONDecoder(), [], [], 0
    for found in re.finditer(r"%(json|regex|llguidance)\b\s*", text):
        if found.start() < at:
            continue
        try:
            value, end = decoder.raw_decode(text, found.end())
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"%{found[1]} in the grammar must be followed by JSON: {error}") from error
        checked = checked_schema(value) if found[1] == "json" else value
        rules.append(text[at : found.start()])
        written += [rules[-1], f"%{found[1]} {json.dumps(checked)}"]
        at = end
    return "".join([*rules, text[at:]]), "".join([*written, text[at:]])


def regex_grammar(pattern: str) -> Grammar:
    """Write the grammar of texts that match a regular expression (Rust's dialect) as a whole.

    Raises:
        InvalidRequestError: If it is no text, or too long.
    """
    if not isinstance(pattern, str):
        raise InvalidRequestError(f"guided regex={shown(pattern)} is not allowed: pass a regular expression as text.")
    written = LLMatcher.grammar_from_regex(_bounded(pattern, "The regular expression", MAX_PATTERN_CHARACTERS))
    return Grammar(json.loads(written)["grammars"][0]["lark_grammar"])  # whose options may follow, as in any other


def choice_grammar(choices: Sequence[str]) -> Grammar:
    """Write the grammar of a choice between texts.

    Raises:
        InvalidRequestError: If they are no list of texts, too many, or too long together.
    """
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise InvalidRequestError(f"guided choice={shown(choices)} is not allowed: pass a list of texts.")
    if len(choices) > MAX_CHOICES:
        raise InvalidRequestError(
            f"guided choice has {len(choices):,} texts, at most {MAX_CHOICES:,} are allowed. Pass fewer."
        )
    if not choices or not all(isinstance(text, str) and text for text in choices):
        raise InvalidRequestError(f"guided choice={shown(choices)} is not allowed: pass one or more non-empty texts.")
    num_characters = sum(map(len, choices))
    if num_characters > MAX_GRAMMAR_CHARACTERS:
        raise _too_long("The choices together", num_characters, MAX_GRAMMAR_CHARACTERS)
    # One terminal: as so many rules, more than 2,000 choices would be beyond the parser.
    rule = " | ".join(json.dumps(_bounded(text, "A choice")) for text in choices)
    header = _HEADERS[num_characters > _MAX_FORCED_CHARACTERS]
    return Grammar(f"{header}start: CHOICE\nCHOICE: {rule}\n")


def calls_grammar(
    tools: Mapping[str, Mapping[str, Any]],
    *,
    form: CallForm,
    special: Mapping[str, int],
    eos_token_id: int | None,
    is_forced: bool,
    is_repeatable: bool,
) -> Grammar:
    """Write the grammar of tool calls.

    Args:
        tools: Names and the schemas of their arguments.
        form: What stands around a call's name and arguments.
        special: Tokens that are no text, and their ids: tags that are tokens of their own are written as such.
        eos_token_id: The one of them that ends an answer.
        is_forced: There is a call and nothing else; else free text may come first, or alone.
        is_repeatable: More calls may follow the first, if the form allows several.

    Raises:
        InvalidRequestError: If the tools' schemas are beyond bounds, or too large together.
    """
    tools = {name: checked_schema(schema) for name, schema in tools.items()}
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
        rules.insert(0, f"start: {opening} body{more}")
    else:
        # A lazy rule ends at the first match, so text that reaches the opening is in a call from there on. Tokens of
        # their own in the opening may stand there and nowhere else; all others may stand anywhere.
        taken = {id_ for text, id_ in special.items() if text in form.opening}
        others = sorted({*special.values()} - taken - {eos_token_id})
        rules.insert(0, f"start: free TEXT | free opening body{more}")
        rules.append("opening: trigger" + (f" | TEXT {opening}" if taken else ""))
        # By characters: a text that reads like a special token costs a grammar its forced tokens, and here none are.
        rules.append(f"trigger[lazy]: TEXT {' '.join(map(json.dumps, form.opening))}")
        rules.append(f"free: (TEXT <[{','.join(map(str, others))}]>)*" if others else 'free: ""')
        rules.append("TEXT: /(.|\\n)*/")
    text = _header(*tools.values()) + "\n".join(rules) + "\n"
    return Grammar(_bounded(text, "The tools' schemas together"), is_json=is_forced)


_HEADERS = ("%llguidance {}\n", '%llguidance {"no_forcing": true}\n')


def _header(*schemas: Mapping[str, Any]) -> str:
    """Write a grammar's options: a step may not take in more forced text than the engine's thread has time for."""
    return _HEADERS[any(_num_fixed_characters(schema) > _MAX_FORCED_CHARACTERS for schema in schemas)]


def _num_fixed_characters(schema: Any) -> int:
    """Count the characters of keys and constants in a schema, and some more."""
    num, stack = 0, [schema]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            num += len(value)
        elif isinstance(value, list):
            stack += value
        elif isinstance(value, dict):
            num += sum(map(len, value))
            stack += [item for key, item in value.items() if key not in _ANNOTATIONS or not isinstance(item, str)]
    return num


def _bounded(text: str, what: str, limit: int = MAX_GRAMMAR_CHARACTERS) -> str:
    if len(text) > limit:
        raise _too_long(what, len(text), limit)
    check_unicode(text, what)
    return text


def _too_long(what: str, num_characters: int, limit: int) -> InvalidRequestError:
    return InvalidRequestError(f"{what}: {num_characters:,} characters, at most {limit:,} are allowed. Pass less.")


def _spelled(special: Mapping[str, int], text: str) -> str:
    """Write fixed text in a grammar, which must name special tokens by their numbers."""
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    parts = re.split(f"({pattern})", text) if pattern else [text]
    return " ".join(f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part)


def _json_rule(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**_closed(schema), "x-guidance": _JSON_OPTIONS})


# Parts of a schema that hold schemas: by name, in a row, or one.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_PARTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items", "additionalItems", "additionalProperties"})
_COMBINING = frozenset({"allOf", "anyOf", "oneOf", "$ref"})


def _closed(schema: Any, *, is_combined: bool = False) -> Any:
    """Close objects that list their properties and do not say whether there may be others.

    What is combined with others (in `allOf`, in or beside `anyOf`, beside `$ref`) stays open: closed, each would forbid
    what the others bring. What asks for nothing (`uniqueItems: false`) is left out.
    """
    if isinstance(schema, list):
        return [_closed(item, is_combined=is_combined) for item in schema]
    if not isinstance(schema, dict):
        return schema
    parts = schema.keys() & (_COMBINING | {"properties"})
    combines = is_combined or len(parts) > 1
    closed = {
        key: {name: _closed(item) for name, item in value.items()}
        if key in _NAMED and isinstance(value, dict)
        else _closed(value, is_combined=key == "allOf" or (combines and key in _COMBINING))
        if key in _PARTS
        else value
        for key, value in schema.items()
        if not (key == "uniqueItems" and value is False)
    }
    if closed.get("type") == "object" and "properties" in closed and not combines:
        closed.setdefault("additionalProperties", False)
    return closed
