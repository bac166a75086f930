"""Grammar-constrained decoding: a thin face over llguidance.

A grammar is compiled once per tokenizer; every request gets a copy of the compiled matcher that it advances alone.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from llguidance import LLMatcher, hf
from transformers import PreTrainedTokenizerFast

from langchain_lora_retriever.errors import EngineError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

__all__ = ["GrammarCompiler", "GrammarConstraint", "can_constrain", "compiler_of"]

_LONGEST_CLOSE = 512  # tokens; an answer that needs more to end is not made to fit
_STACK_BYTES = 256 << 20  # llguidance recurses over definitions that refer to others; taken only as far as it is used
_MAX_GRAMMARS = 256  # that stay compiled
_MAX_GRAMMARS_CHARACTERS = 8 << 20  # of those together


def can_constrain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether answers of a tokenizer can be constrained at all: llguidance reads `tokenizers` vocabularies only."""
    return isinstance(tokenizer, PreTrainedTokenizerFast)


_compilers: WeakKeyDictionary[PreTrainedTokenizerBase, GrammarCompiler] = WeakKeyDictionary()
_finding = threading.Lock()  # held for a look into the dictionary


def compiler_of(tokenizer: PreTrainedTokenizerBase) -> GrammarCompiler:
    """Return the compiler of a tokenizer; it lives as long as the tokenizer does."""
    with _finding:
        compiler = _compilers.get(tokenizer)
        if compiler is None:
            # A look into the vocabulary takes a second: whoever comes meanwhile waits in the compiler, not here.
            compiler = _compilers[tokenizer] = GrammarCompiler(_vocabulary_reader(tokenizer))
        return compiler


class _Compiled(NamedTuple):
    matcher: LLMatcher
    shortest: int | None  # tokens of the shortest answer that closes everything at once; None if it does not end so


class GrammarCompiler:
    """Compiles grammars for one vocabulary, each once, whoever asks; different ones do not wait for each other.

    Args:
        read_vocabulary: Reads the tokenizer, once, when it is first needed.
    """

    def __init__(self, read_vocabulary: Callable[[], Vocabulary]) -> None:
        self._read_vocabulary = read_vocabulary
        self._vocabulary: Vocabulary | None = None
        self._reading = threading.Lock()
        self._lock = threading.Lock()  # held for a look into the dictionary
        self._compiled: OrderedDict[str, Future[_Compiled]] = OrderedDict()  # least recently used first
        self._num_characters = 0

    @property
    def vocabulary(self) -> Vocabulary:
        """What is known of the tokenizer; read at first use.

        Raises:
            InvalidRequestError: If the tokenizer cannot be read.
        """
        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            return self._vocabulary

    def compile(self, grammar: str) -> None:
        """Compile a grammar, or wait for whoever does. Takes up to seconds; hold no lock and no event loop.

        Raises:
            InvalidRequestError: If the grammar, or the schema in it, asks for what is not supported.
        """
        self._get(grammar)

    def is_valid(self, grammar: str) -> bool:
        """Say whether a grammar can be followed; it is compiled then."""
        try:
            self._get(grammar)
        except InvalidRequestError:
            return False
        return True

    def constraint(self, grammar: str, *, fit: int | None = None) -> GrammarConstraint:
        """Make what keeps one request inside a grammar.

        Args:
            grammar: What the answer must follow.
            fit: Token limit that JSON is to be closed within: near it strings, lists, objects and numbers end as soon
                as the grammar lets them. None leaves the answer to be cut off there.

        Raises:
            InvalidRequestError: If the grammar, or the schema in it, asks for what is not supported.
        """
        compiled = self._get(grammar)
        limit = None if compiled.shortest is None else fit
        return GrammarConstraint(
            compiled.matcher.deep_copy(), self.vocabulary.closing, limit=limit, shortest=compiled.shortest or 0
        )

    def _get(self, grammar: str) -> _Compiled:
        with self._lock:
            future = self._compiled.get(grammar)
            is_first = future is None
            if future is None:
                future = self._compiled[grammar] = Future()
                self._num_characters += len(grammar)
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > _MAX_GRAMMARS or self._num_characters > _MAX_GRAMMARS_CHARACTERS:
                self._num_characters -= len(self._compiled.popitem(last=False)[0])
        if is_first:
            _run_with_large_stack(lambda: _settle(future, lambda: self._compile(grammar)))
        error = future.exception()
        if error is not None:
            raise InvalidRequestError(str(error)) from error
        return future.result()

    def _compile(self, grammar: str) -> _Compiled:
        vocabulary = self.vocabulary
        matcher = LLMatcher(vocabulary.tokens, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidRequestError(
                f"The answer cannot be constrained as asked: {matcher.get_error().splitlines()[0]} "
                "Simplify the schema, pattern or grammar."
            )
        return _Compiled(matcher, vocabulary.closing.num_to_end(matcher.deep_copy()))


class GrammarConstraint:
    """Keeps one request inside a grammar. Only the engine's thread may use it after submission.

    Args:
        matcher: A matcher of its own, at its start.
        closing: The tokens that end things.
        limit: Tokens within which to end, by allowing only closing tokens wherever there are any; None for no limit.
        shortest: Tokens of the shortest answer.

    Attributes:
        is_shortened: Whether the answer was made to end early.
    """

    def __init__(
        self, matcher: LLMatcher, closing: ClosingTokens, *, limit: int | None = None, shortest: int = 0
    ) -> None:
        self._matcher = matcher
        self._closing = closing
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
        num_words = len(self._closing.closers)
        known = row[:num_words]  # a model may have rows for more tokens than its tokenizer knows
        _fill(self._matcher, known)
        row[num_words:] = 0
        self._check()
        self._is_closing = self._is_closing or self._must_close()
        if self._is_closing and self._closing.keep(known):
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
        num_left = self._closing.num_to_end(self._matcher.deep_copy())
        return num_left is None or self._num_tokens + num_left + reserve >= self._limit

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError(f"The grammar failed while it was followed: {self._matcher.get_error()}")


class ClosingTokens(NamedTuple):
    """Tokens that end things, as bits of int32 `[ceil(vocab_size / 32)]`.

    Attributes:
        closers: Made of nothing but closing quotes and brackets, or the end of the answer.
        commas: A comma, blanks around it or not.
        digits: One digit from 1 to 9: a number that may not end yet (above 0, say) can soon after one of these.
        numerals: Made of nothing but what numbers are written with.
    """

    closers: torch.Tensor
    commas: torch.Tensor
    digits: torch.Tensor
    numerals: torch.Tensor

    def keep(self, row: torch.Tensor) -> bool:
        """Forbid all tokens but those that bring the end nearer, if any does; say whether that forbids anything."""
        kept = row & self.closers
        if not kept.any() and not (row & ~self.numerals & ~self.commas).any():  # in a number
            kept = row & self.commas
            if not kept.any():
                kept = row & self.digits
        if not kept.any() or torch.equal(kept, row):
            return False
        row.copy_(kept)
        return True

    def num_to_end(self, matcher: LLMatcher) -> int | None:
        """Count the tokens after which an answer that closes all it can ends; None if never. Uses `matcher` up."""
        row = torch.zeros_like(self.closers)
        for num_tokens in range(_LONGEST_CLOSE):
            if matcher.is_stopped():
                return num_tokens
            _fill(matcher, row)
            self.keep(row)
            words = row.nonzero()
            if matcher.is_error() or not len(words):
                return None
            word = int(words[0])
            bits = int(row[word]) & 0xFFFFFFFF
            matcher.consume_token(32 * word + (bits & -bits).bit_length() - 1)
        return None


class Vocabulary(NamedTuple):
    """What is known of a tokenizer.

    Attributes:
        tokens: For llguidance, its `LLTokenizer`.
        special: Tokens that llguidance does not take for text, and their ids: the added ones, `<tool_call>` perhaps.
        closing: The tokens that end things.
    """

    tokens: Any
    special: dict[str, int]
    closing: ClosingTokens


def _vocabulary_reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[], Vocabulary]:
    """Return what reads a tokenizer, once, without keeping it alive."""
    reference = weakref.ref(tokenizer)

    def read() -> Vocabulary:
        alive = reference()
        assert alive is not None, "whoever asks for a grammar has the tokenizer"
        return _read_vocabulary(alive)

    return read


def _read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    if not can_constrain(tokenizer):
        raise InvalidRequestError(
            f"The answer cannot be constrained: {type(tokenizer).__name__} has no fast (tokenizers) backend. "
            "Load the tokenizer with use_fast=True, or ask for free text."
        )
    tokens = hf.from_tokenizer(cast("Any", tokenizer))
    special = {text: id_ for text, id_ in tokenizer.get_added_vocab().items() if tokens.is_special_token(id_)}
    num_tokens = min(tokens.vocab_size, len(tokenizer))
    texts = tokenizer.batch_decode([[token_id] for token_id in range(num_tokens)])
    ends = {id_ for id_ in (tokenizer.eos_token_id, tokens.eos_token) if id_ is not None}

    def bits(is_in: Callable[[int, str], bool]) -> torch.Tensor:
        members = torch.zeros(-(-tokens.vocab_size // 32) * 32, dtype=torch.int64)
        members[[token_id for token_id, text in enumerate(texts) if is_in(token_id, text)]] = 1
        words = (members.view(-1, 32) << torch.arange(32)).sum(1)
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

    closing = ClosingTokens(
        closers=bits(lambda id_, text: id_ in ends or bool(text and not text.strip('"}]'))),
        commas=bits(lambda _, text: text.strip() == ","),
        digits=bits(lambda _, text: len(text) == 1 and text in "123456789"),
        numerals=bits(lambda _, text: bool(text and not text.strip("+-.0123456789eE"))),
    )
    return Vocabulary(tokens, special, closing)


def _settle(future: Future[_Compiled], work: Callable[[], _Compiled]) -> None:
    """Give a future the outcome of `work`, whatever it is: a panic of native code is no `Exception`."""
    try:
        future.set_result(work())
    except InvalidRequestError as error:
        future.set_exception(error)
    except BaseException as error:  # noqa: BLE001 - whoever waits must hear of it
        future.set_exception(InvalidRequestError(f"The answer cannot be constrained as asked: {error!r:.300}"))


def _run_with_large_stack(work: Callable[[], None]) -> None:
    """Run `work` in a thread of its own, whose stack is large, and wait for it."""
    thread = threading.Thread(target=work, name="grammar-compiler", daemon=True)
    with _starting:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()


_starting = threading.Lock()  # the size of a new thread's stack is a setting of the whole process


def _begin_in_child() -> None:
    """Begin anew in a forked process: whoever compiles in another thread, or holds a lock, is not there."""
    global _finding, _starting
    _finding, _starting = threading.Lock(), threading.Lock()
    _compilers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)


def _fill(matcher: LLMatcher, row: torch.Tensor) -> None:
    matcher.unsafe_compute_mask_ptr(row.data_ptr(), row.numel() * row.element_size())
