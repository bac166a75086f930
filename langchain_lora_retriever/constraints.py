"""Grammar-constrained decoding: a thin face over llguidance.

A grammar is compiled once per tokenizer; every request gets a copy of the compiled matcher that it advances alone.
"""

from __future__ import annotations

import json
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from llguidance import LLMatcher, hf

from langchain_lora_retriever.errors import EngineError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["GrammarConstraint", "calls_grammar", "choice_grammar", "json_grammar", "make_constraint", "regex_grammar"]

# No free white space: a weak model would emit blanks until the token limit. The separators are json.dumps's, so the
# forced text is what models were trained on.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_compiling = threading.Lock()


def json_grammar(schema: Mapping[str, Any]) -> str:
    """Write the grammar of JSON texts that satisfy a schema."""
    return f"%llguidance {{}}\nstart: {_json_rule(schema)}\n"


def regex_grammar(pattern: str) -> str:
    """Write the grammar of texts that match a regular expression (Rust's dialect) as a whole."""
    return LLMatcher.grammar_from_regex(pattern)


def choice_grammar(choices: Sequence[str]) -> str:
    """Write the grammar of a choice between texts."""
    return "%llguidance {}\nstart: " + " | ".join(json.dumps(choice) for choice in choices) + "\n"


def calls_grammar(
    tools: Mapping[str, Mapping[str, Any]],
    *,
    tags: tuple[str, str],
    is_forced: bool,
    is_repeatable: bool,
    otherwise: Mapping[str, Any] | None = None,
) -> str:
    """Write the grammar of tool calls: the opening tag, the call as JSON and the closing tag, on a line each.

    Args:
        tools: Names and the schemas of their arguments.
        tags: What stands before and after a call.
        is_forced: There is a call and nothing else; else free text may come first, or alone.
        is_repeatable: More calls may follow the first.
        otherwise: A schema that the text may satisfy in place of a forced call.
    """
    start, end = (json.dumps(tag) for tag in tags)
    rules = [
        f'tool_{index}: {json.dumps(f"""{{"name": {json.dumps(name)}, "arguments": """)} {_json_rule(schema)} "}}"'
        for index, (name, schema) in enumerate(tools.items())
    ]
    body = ' "\\n" (' + " | ".join(f"tool_{index}" for index in range(len(tools))) + f') "\\n" {end}'
    more = f' ("\\n" {start} body)*' if is_repeatable else ""
    rules.append(f"body:{body}")
    if is_forced:
        rules.insert(0, f"start: {start} body{more}" + (f" | {_json_rule(otherwise)}" if otherwise else ""))
    else:
        rules.insert(0, f"start: TEXT | free_call{more}")
        # A lazy rule ends at the first match, so text that reaches the tag is in a call from there on.
        rules += [f"trigger[lazy]: TEXT {start}", "free_call: trigger body", "TEXT: /(.|\\n)*/"]
    return "%llguidance {}\n" + "\n".join(rules) + "\n"


def _json_rule(schema: Mapping[str, Any]) -> str:
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


def make_constraint(tokenizer: PreTrainedTokenizerBase, grammar: str) -> GrammarConstraint:
    """Compile a grammar for a request.

    Raises:
        InvalidRequestError: If the grammar, or the schema in it, asks for what cannot be honoured.
    """
    with _compiling:
        matcher = _compile(tokenizer, grammar).deep_copy()
        return GrammarConstraint(matcher, _tokenizer(tokenizer).vocab_size)


class GrammarConstraint:
    """Keeps one request inside a grammar. Only the engine's thread may use it after submission.

    Args:
        matcher: A matcher of its own, at its start.
        vocab_size: Tokens the tokenizer knows; a model may have rows for more.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)

    @property
    def is_active(self) -> bool:
        """Whether the next token is restricted: always, though free text restricts little."""
        return True

    @property
    def is_finished(self) -> bool:
        """Whether the grammar allows nothing more."""
        return bool(self._matcher.is_stopped())

    def fill_bitmask(self, row: torch.Tensor) -> None:
        """Write the allowed tokens into `row`, int32 `[ceil(vocab_size / 32)]` on the CPU, bit = 1: allowed."""
        known = row[: self._num_words]
        self._matcher.unsafe_compute_mask_ptr(known.data_ptr(), known.numel() * known.element_size())
        row[self._num_words :] = 0
        self._check()

    def accept(self, token_id: int) -> None:
        """Advance by a token."""
        self._matcher.consume_token(token_id)
        self._check()

    def forced_tokens(self) -> list[int]:
        """Return the tokens that must come next."""
        return [] if self._matcher.is_stopped() else list(self._matcher.compute_ff_tokens())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError(f"The grammar failed while it was followed: {self._matcher.get_error()}")


@lru_cache(maxsize=8)
def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> LLTokenizer:
    try:
        return hf.from_tokenizer(cast("Any", tokenizer))
    except ValueError as error:
        raise InvalidRequestError(
            f"The answer cannot be constrained: {type(tokenizer).__name__} has no fast (tokenizers) backend."
        ) from error


@lru_cache(maxsize=256)
def _compile(tokenizer: PreTrainedTokenizerBase, grammar: str) -> LLMatcher:
    matcher = LLMatcher(_tokenizer(tokenizer), grammar, log_level=0)
    if matcher.is_error():
        raise InvalidRequestError(
            f"The answer cannot be constrained as asked: {matcher.get_error().splitlines()[0]} "
            "Simplify the schema, pattern or grammar."
        )
    return matcher
