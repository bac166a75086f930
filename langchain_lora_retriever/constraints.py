"""Grammar-constrained decoding: a thin face over llguidance.

A grammar is compiled once per tokenizer; every request gets a copy of the compiled matcher that it advances alone.
"""

from __future__ import annotations

import json
import re
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from llguidance import LLMatcher, hf
from transformers import PreTrainedTokenizerFast

from langchain_lora_retriever.errors import EngineError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.dialects import CallForm

__all__ = [
    "GrammarConstraint",
    "calls_grammar",
    "can_constrain",
    "choice_grammar",
    "is_honoured",
    "json_grammar",
    "make_constraint",
    "regex_grammar",
]

# No free white space: a weak model would emit blanks until the token limit. The separators are json.dumps's, so the
# forced text is what models were trained on.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_LONGEST_CLOSE = 512  # tokens; an answer that needs more to end is not made to fit

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
    tokenizer: PreTrainedTokenizerBase,
    tools: Mapping[str, Mapping[str, Any]],
    *,
    form: CallForm,
    is_forced: bool,
    is_repeatable: bool,
    otherwise: Mapping[str, Any] | None = None,
) -> str:
    """Write the grammar of tool calls.

    Args:
        tokenizer: The base model's: tags that are tokens of their own are written as such.
        tools: Names and the schemas of their arguments.
        form: What stands around a call's name and arguments.
        is_forced: There is a call and nothing else; else free text may come first, or alone.
        is_repeatable: More calls may follow the first, if the form allows several.
        otherwise: A schema that the text may satisfy in place of a forced call.
    """
    special = _special_tokens(tokenizer)
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
        others = sorted({*special.values()} - taken - {tokenizer.eos_token_id})
        rules.insert(0, f"start: free TEXT | free opening body{more}")
        rules.append("opening: trigger" + (f" | TEXT {opening}" if taken else ""))
        rules.append(f"trigger[lazy]: TEXT {json.dumps(form.opening)}")
        rules.append(f"free: (TEXT <[{','.join(map(str, others))}]>)*" if others else 'free: ""')
        rules.append("TEXT: /(.|\\n)*/")
    return "%llguidance {}\n" + "\n".join(rules) + "\n"


def can_constrain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether answers of a tokenizer can be constrained at all: llguidance reads `tokenizers` vocabularies only."""
    return isinstance(tokenizer, PreTrainedTokenizerFast)


def is_honoured(schema: Mapping[str, Any]) -> bool:
    """Say whether an answer can be constrained to a JSON schema."""
    return _is_valid(json_grammar(schema))


@lru_cache(maxsize=256)
def _is_valid(grammar: str) -> bool:
    return not LLMatcher.validate_grammar(grammar)


def _spelled(special: Mapping[str, int], text: str) -> str:
    """Write fixed text in a grammar, which must name special tokens by their numbers."""
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
    parts = re.split(f"({pattern})", text) if pattern else [text]
    return " ".join(f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part)


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


def make_constraint(tokenizer: PreTrainedTokenizerBase, grammar: str, *, fit: int | None = None) -> GrammarConstraint:
    """Compile a grammar for a request.

    Args:
        tokenizer: The base model's.
        grammar: What the answer must follow.
        fit: Token limit that JSON is to be closed within: near it strings, lists and objects end as soon as the
            grammar lets them. None leaves the answer to be cut off there.

    Raises:
        InvalidRequestError: If the grammar, or the schema in it, asks for what cannot be honoured.
    """
    with _compiling:
        matcher = _compile(tokenizer, grammar).deep_copy()
        closers = _closers(tokenizer)
        shortest = None if fit is None else _shortest(tokenizer, grammar)
    return GrammarConstraint(matcher, closers, limit=None if shortest is None else fit, shortest=shortest or 0)


class GrammarConstraint:
    """Keeps one request inside a grammar. Only the engine's thread may use it after submission.

    Args:
        matcher: A matcher of its own, at its start.
        closers: Bits of the tokens that close JSON, int32 `[ceil(vocab_size / 32)]`.
        limit: Tokens within which to end, by allowing only closing tokens wherever there are any; None for no limit.
        shortest: Tokens of the shortest answer.

    Attributes:
        is_shortened: Whether the answer was made to end early.
    """

    def __init__(
        self, matcher: LLMatcher, closers: torch.Tensor, *, limit: int | None = None, shortest: int = 0
    ) -> None:
        self._matcher = matcher
        self._closers = closers
        self._limit = limit
        self._shortest = shortest
        self._num_tokens = 0
        self._is_closing = False
        self.is_shortened = False

    @property
    def is_finished(self) -> bool:
        """Whether the grammar allows nothing more."""
        return bool(self._matcher.is_stopped())

    def fill_bitmask(self, row: torch.Tensor) -> None:
        """Write the allowed tokens into `row`, int32 `[ceil(vocab_size / 32)]` on the CPU, bit = 1: allowed."""
        known = row[: len(self._closers)]  # a model may have rows for more tokens than its tokenizer knows
        _fill(self._matcher, known)
        row[len(self._closers) :] = 0
        self._check()
        self._is_closing = self._is_closing or self._must_close()
        if self._is_closing and _keep_closing(known, self._closers):
            self.is_shortened = True

    def accept(self, token_id: int) -> None:
        """Advance by a token."""
        self._matcher.consume_token(token_id)
        self._num_tokens += 1
        self._check()

    def forced_tokens(self) -> list[int]:
        """Return the tokens that must come next."""
        return [] if self._matcher.is_stopped() else list(self._matcher.compute_ff_tokens())

    def _must_close(self) -> bool:
        """Say whether one more free token might leave too few to end the answer in."""
        # A token may begin something that has to be ended too: a string, an object and its keys.
        reserve = 8 + self._shortest // 2
        if self._limit is None or self._num_tokens + 2 * self._shortest + reserve < self._limit:
            return False
        num_left = _num_to_close(self._matcher.deep_copy(), self._closers)
        return num_left is None or self._num_tokens + num_left + reserve >= self._limit

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError(f"The grammar failed while it was followed: {self._matcher.get_error()}")


@lru_cache(maxsize=8)
def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> LLTokenizer:
    if not can_constrain(tokenizer):
        raise InvalidRequestError(
            f"The answer cannot be constrained: {type(tokenizer).__name__} has no fast (tokenizers) backend. "
            "Load the tokenizer with use_fast=True, or ask for free text."
        )
    return hf.from_tokenizer(cast("Any", tokenizer))


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Find the tokens that llguidance does not take for text: the added ones, of which `<tool_call>` may be one."""
    known = _tokenizer(tokenizer)
    return {text: id_ for text, id_ in tokenizer.get_added_vocab().items() if known.is_special_token(id_)}


@lru_cache(maxsize=256)
def _compile(tokenizer: PreTrainedTokenizerBase, grammar: str) -> LLMatcher:
    matcher = LLMatcher(_tokenizer(tokenizer), grammar, log_level=0)
    if matcher.is_error():
        raise InvalidRequestError(
            f"The answer cannot be constrained as asked: {matcher.get_error().splitlines()[0]} "
            "Simplify the schema, pattern or grammar."
        )
    return matcher


@lru_cache(maxsize=8)
def _closers(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Find the tokens made of nothing but closing quotes and brackets."""
    vocab_size = _tokenizer(tokenizer).vocab_size
    bits = torch.zeros(-(-vocab_size // 32) * 32, dtype=torch.int64)
    texts = tokenizer.batch_decode([[token_id] for token_id in range(min(vocab_size, len(tokenizer)))])
    bits[[token_id for token_id, text in enumerate(texts) if text and not text.strip('"}]')]] = 1
    words = (bits.view(-1, 32) << torch.arange(32)).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@lru_cache(maxsize=256)
def _shortest(tokenizer: PreTrainedTokenizerBase, grammar: str) -> int | None:
    """Count the tokens of an answer that closes everything at once; None if it does not end so."""
    return _num_to_close(_compile(tokenizer, grammar).deep_copy(), _closers(tokenizer))


def _num_to_close(matcher: LLMatcher, closers: torch.Tensor) -> int | None:
    """Count the tokens after which an answer that closes all it can ends; None if it does not. Uses `matcher` up."""
    row = torch.zeros_like(closers)
    for num_tokens in range(_LONGEST_CLOSE):
        if matcher.is_stopped():
            return num_tokens
        _fill(matcher, row)
        _keep_closing(row, closers)
        word = int(row.nonzero()[0])
        bits = int(row[word]) & 0xFFFFFFFF
        matcher.consume_token(32 * word + (bits & -bits).bit_length() - 1)
    return None


def _fill(matcher: LLMatcher, row: torch.Tensor) -> None:
    matcher.unsafe_compute_mask_ptr(row.data_ptr(), row.numel() * row.element_size())


def _keep_closing(row: torch.Tensor, closers: torch.Tensor) -> bool:
    """Forbid all but the closing tokens if any is allowed; say whether that forbids anything."""
    closing = row & closers
    if not closing.any() or torch.equal(closing, row):
        return False
    row.copy_(closing)
    return True
