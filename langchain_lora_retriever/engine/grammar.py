"""Grammar-constrained decoding: a thin face over llguidance.

A grammar is compiled once per tokenizer; every request gets a copy of the compiled matcher that it advances alone.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import weakref
from collections import OrderedDict, deque
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, hf
from llguidance.torch import fill_next_token_bitmask
from transformers import PreTrainedTokenizerFast

from langchain_lora_retriever.engine.json_closing import ClosingTokens, JsonPosition, closing_path
from langchain_lora_retriever.errors import EngineError, InvalidRequestError, fresh
from langchain_lora_retriever.support.forking import after_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.engine.api import Grammar

__all__ = ["CompiledGrammar", "GrammarCompiler", "GrammarConstraint", "Vocabulary", "can_constrain", "compiler_of"]

_MAX_CLOSING_MASKS = 4_000  # that one request may take to find out how to end, in all
_MAX_STEP_MASKS = 400
_NEARLY_ENDED = 8  # tokens to the end, up to which a part may have ended with the next one, and another begun
_MOST_COUNTED = 2  # tokens of the way to the end that one of the model's stands for, about
_GUESSED_CLOSE = 64  # tokens, where no end is found from the very start
T = TypeVar("T")
_logger = logging.getLogger(__name__)

_STACK_BYTES = 256 << 20  # llguidance recurses over definitions that refer to others; taken only as far as it is used
_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'  # the last word: options that stand before do not count
_MAX_COMPILING = 32
"""Grammars that are compiled at once; others wait for them."""
_MAX_GRAMMARS = 256  # that stay compiled
_MAX_GRAMMARS_CHARACTERS = 2 << 20  # of those together; what is compiled of them is up to 200 times larger


def _limits(*, max_items_in_row: int) -> LLParserLimits:
    """Bound what one mask may cost the engine's thread, and one grammar the memory; what exceeds it ends in words."""
    return LLParserLimits(
        max_items_in_row=max_items_in_row,
        step_max_items=5_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        max_lexer_states=50_000,
        max_grammar_size=500_000,
        precompute_large_lexemes=True,
        verbose_errors=False,
    )


# The rules of a caller's may be ambiguous: a step's time then grows with the square of a row, and more.
_LIMITS = {False: _limits(max_items_in_row=2_000), True: _limits(max_items_in_row=500)}


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
        self._compiled: OrderedDict[Grammar, Future[CompiledGrammar]] = OrderedDict()  # least recently used first
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

    def prepare(self) -> None:
        """Read the tokenizer now, if it can be read; if not, whoever asks for a grammar is told."""
        try:
            _ = self.vocabulary
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a panic of native code is no `Exception`
            _logger.info("Answers of this model cannot be constrained: %s", error)

    def start(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """Begin to compile a grammar in a thread of its own, unless somebody has; waits for nothing.

        The future's error is an `InvalidRequestError` if the grammar, or the schema in it, asks for what is not
        supported; it belongs to all who have the future: see `fresh`.

        Raises:
            EngineError: If no thread can be started.
        """
        with self._lock:
            future = self._compiled.get(grammar)
            if future is None:
                future = self._compiled[grammar] = _large_stacks.submit(partial(self._compile, grammar))
                self._num_characters += len(grammar.text)
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > _MAX_GRAMMARS or self._num_characters > _MAX_GRAMMARS_CHARACTERS:
                self._num_characters -= len(self._compiled.popitem(last=False)[0].text)
            return future

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compile a grammar, or wait for whoever does. Takes up to seconds; hold no lock and no event loop.

        Raises:
            InvalidRequestError: If the grammar, or the schema in it, asks for what is not supported.
        """
        future = self.start(grammar)
        error = future.exception()
        if error is not None:
            raise fresh(error)
        return future.result()

    def is_valid(self, grammar: Grammar) -> bool:
        """Say whether a grammar can be followed; it is compiled then."""
        try:
            self.compile(grammar)
        except InvalidRequestError:
            return False
        return True

    def constraint(self, grammar: Grammar, *, fit: int | None = None) -> GrammarConstraint:
        """Compile a grammar, and make what keeps one request inside it; see `CompiledGrammar.constraint`.

        Raises:
            InvalidRequestError: If the grammar, or the schema in it, asks for what is not supported.
        """
        return self.compile(grammar).constraint(fit=fit)

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        try:
            return self._compiled_now(grammar)
        except InvalidRequestError:
            raise
        except BaseException as error:
            # A panic of native code is no `Exception`.
            raise InvalidRequestError(f"The answer cannot be constrained as asked: {error!r:.300}") from error

    def _compiled_now(self, grammar: Grammar) -> CompiledGrammar:
        vocabulary = self.vocabulary
        matcher = _matcher(vocabulary, grammar.text, is_foreign=grammar.is_foreign)
        # What nothing can begin, or what is too wide to be looked over, shows at the first masks only.
        first, shortest = matcher.deep_copy(), None
        if not first.is_error():
            first.compute_bitmask()
        if grammar.is_json and not first.is_error():
            path, _ = closing_path(first, vocabulary.closing, JsonPosition(), max_masks=_MAX_STEP_MASKS)
            shortest = _GUESSED_CLOSE if path is None else len(path)
        if first.is_error():
            raise InvalidRequestError(
                f"The answer cannot be constrained as asked: {_first_line(first.get_error())} "
                "Simplify the schema, pattern or grammar."
            )
        dearest = 0
        for part in grammar.parts:
            begun = _matcher(vocabulary, part, is_foreign=False)
            if not begun.is_error():
                path, _ = closing_path(begun, vocabulary.closing, JsonPosition(), max_masks=_MAX_STEP_MASKS)
                dearest = max(dearest, _GUESSED_CLOSE if path is None else len(path))
        return CompiledGrammar(matcher, vocabulary.closing, shortest, dearest)


def _matcher(vocabulary: Vocabulary, text: str, *, is_foreign: bool) -> LLMatcher:
    # llguidance takes forced text that reads like such a token for the token, which its own parser refuses then.
    if vocabulary.special_text.search(_unescaped(text)):
        text += _NO_FORCING
    return LLMatcher(vocabulary.tokens, text, log_level=0, limits=_LIMITS[is_foreign])


class CompiledGrammar:
    """A grammar as the tokens of one vocabulary follow it. Any thread may ask it for constraints.

    Args:
        matcher: At its start; only copies of it advance.
        closing: The tokens that end JSON.
        shortest: Tokens of about the shortest answer, where answers are JSON; None where they are not.
        dearest: Tokens of about the shortest of the longest part that may be begun.
    """

    def __init__(self, matcher: LLMatcher, closing: ClosingTokens, shortest: int | None, dearest: int) -> None:
        self._matcher = matcher
        self._closing = closing
        self._shortest = shortest
        self._dearest = dearest

    def constraint(self, *, fit: int | None = None) -> GrammarConstraint:
        """Make what keeps one request inside the grammar.

        Args:
            fit: Token limit that JSON is to be closed within: near it strings, lists, objects and numbers end as soon
                as the grammar lets them. None leaves the answer to be cut off there.
        """
        limit = None if self._shortest is None else fit
        return GrammarConstraint(
            self._matcher.deep_copy(), self._closing, limit=limit, shortest=self._shortest or 0, dearest=self._dearest
        )

    def allows(self, text: str) -> bool:
        """Say whether a text, as a whole, follows the grammar."""
        matcher, token_ids = self._matcher.deep_copy(), self._closing.tokens.greedy_tokenize(text)
        return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


class GrammarConstraint:
    """Keeps one request inside a grammar. Only the engine's thread may use it after submission.

    Args:
        matcher: A matcher of its own, at its start.
        closing: The tokens that end JSON.
        limit: Tokens within which to end, by allowing nothing but a way to the end once few are left; None for no
            limit.
        shortest: Tokens of about the shortest answer.
        dearest: Tokens that a part which may be begun takes at least, of about the longest.

    Attributes:
        is_shortened: Whether the answer was made to end early.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        closing: ClosingTokens,
        *,
        limit: int | None = None,
        shortest: int = 0,
        dearest: int = 0,
    ) -> None:
        self._matcher = matcher
        self._closing = closing
        self._limit = limit
        self._shortest = shortest
        self._dearest = dearest
        self._num_tokens = 0
        self._position = JsonPosition()
        # Tokens to the end when they were last counted, the brackets open then, and the tokens written.
        self._known_need = (shortest, 0, 0)
        self._masks_left = _MAX_CLOSING_MASKS
        self._ending: deque[int] | None = None
        self.is_shortened = False

    @property
    def is_finished(self) -> bool:
        """Whether the grammar allows nothing more."""
        return bool(self._matcher.is_stopped())

    def fill_bitmask(self, row: torch.Tensor) -> None:
        """Write the allowed tokens into `row`, int32 `[ceil(vocab_size / 32)]` on the CPU, bit = 1: allowed.

        Raises:
            EngineError: If the grammar cannot be followed any further.
        """
        num_words = -(-self._closing.vocab_size // 32)
        known = row[:num_words]  # a model may have rows for more tokens than its tokenizer knows
        fill_next_token_bitmask(self._matcher, known[None])
        row[num_words:] = 0
        self._check()
        if self._limit is not None and self._must_end(self._limit):
            self._keep_ending(known)

    def accept(self, token_id: int) -> None:
        """Advance by a token.

        Raises:
            EngineError: If the grammar does not allow it.
        """
        self._matcher.consume_token(token_id)
        self._num_tokens += 1
        self._check()
        if self._limit is not None:
            self._position = self._position.after(self._closing.tokens.decode_bytes([token_id]))
            if self._position.lowest < self._known_need[1]:  # what was counted has ended
                self._known_need = 0, self._position.lowest, self._num_tokens
        if self._ending:
            self._ending = self._ending if self._ending.popleft() == token_id else None

    def follow(self, token_ids: Sequence[int]) -> None:
        """Advance by tokens that were chosen under this grammar elsewhere, to the state that it had there.

        Raises:
            EngineError: If the grammar does not allow them.
        """
        row = torch.zeros(-(-self._closing.vocab_size // 32), dtype=torch.int32)
        rest = deque(token_ids)
        while rest:
            if self._limit is not None:
                self.fill_bitmask(row)  # which decides when the answer must come to its end
            self.accept(rest.popleft())
            for forced in self.forced_tokens():
                if not rest or rest[0] != forced:
                    break
                self.accept(rest.popleft())

    def forced_tokens(self) -> list[int]:
        """Return the tokens that must come next."""
        return [] if self._matcher.is_stopped() else list(self._matcher.compute_ff_tokens())

    def _must_end(self, limit: int) -> bool:
        """Say whether one more free token might leave too few to end the answer in; find the way to its end then."""
        if self._ending is not None:
            return True
        need, depth, num_tokens = self._known_need
        need += max(0, self._position.depth - depth) * (1 + max(self._shortest, self._dearest))
        least = need - _MOST_COUNTED * (self._num_tokens - num_tokens)
        if self._num_tokens + need + self._reserve(least) < limit or self._masks_left <= 0:
            return False
        path, num_masks = closing_path(
            self._matcher.deep_copy(), self._closing, self._position, max_masks=min(self._masks_left, _MAX_STEP_MASKS)
        )
        self._masks_left -= num_masks
        if path is not None:
            self._known_need = len(path), self._position.depth, self._num_tokens
            reserve = self._reserve(len(path))
            if self._num_tokens + len(path) + reserve >= limit or self._masks_left < _MAX_STEP_MASKS:
                self._ending = deque(path)
        return self._ending is not None

    def _reserve(self, need: int) -> int:
        """Tokens that have to be left beside those to the end: the next may begin what has to be ended too.

        That is a string, or an object and its keys; and where little is left to be written, the next part.
        """
        begun = self._dearest if need <= _NEARLY_ENDED + self._position.depth else 0
        return 8 + max(self._shortest // 2, begun)

    def _keep_ending(self, row: torch.Tensor) -> None:
        """Forbid all tokens but the next on the way to the end; the end of the answer, where it may end here."""
        assert self._ending is not None
        token_id = self._ending[0] if self._ending else self._closing.eos_token_id
        kept = torch.zeros_like(row)
        kept[token_id // 32] = row[token_id // 32] & _BITS[token_id % 32]
        if kept.any() and not torch.equal(kept, row):
            row.copy_(kept)
            self.is_shortened = True

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError(f"The grammar failed while it was followed: {_first_line(self._matcher.get_error())}")


_BITS = torch.ones(32, dtype=torch.int32) << torch.arange(32, dtype=torch.int32)


def _first_line(message: str) -> str:
    return f"{message.strip().partition(chr(10))[0]:.500}"


class Vocabulary(NamedTuple):
    """What is known of a tokenizer.

    Attributes:
        tokens: llguidance's own tokenizer.
        special: Tokens that llguidance does not take for text, and their ids: the added ones, `<tool_call>` perhaps.
        special_text: Matches their texts, as `_unescaped` leaves them.
        closing: The tokens that end JSON.
    """

    tokens: LLTokenizer
    special: dict[str, int]
    special_text: re.Pattern[str]
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
    # In parts, each of which holds the interpreter to its end: other threads run between them.
    backend = cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer
    if backend.padding is None and backend.truncation is None:
        tokens = LLTokenizer(backend.to_str(), eos_token=cast("Any", tokenizer).eos_token_id, slices=[])
    else:
        tokens = hf.from_tokenizer(cast("Any", tokenizer), slices=[])  # takes both off a copy, which is one part more
    tokens = tokens.with_slices(LLTokenizer.general_slices())
    special = {text: id_ for text, id_ in tokenizer.get_added_vocab().items() if tokens.is_special_token(id_)}
    texts = {_unescaped(written) for text in special for written in (text, json.dumps(text)[1:-1])}
    special_text = re.compile("|".join(map(re.escape, sorted(texts - {""}))) or "(?!)")
    return Vocabulary(tokens, special, special_text, ClosingTokens.of(tokens))


def _unescaped(text: str) -> str:
    """Leave out what escapes characters, in JSON and in regular expressions alike."""
    return text.replace("\\", "")


class _LargeStacks:
    """Threads with large stacks, a few at most, started when there is work and ended when there is none.

    No executor of the library's: the interpreter would wait at its end for what they compile.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._num_threads = 0

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Do work soon; whatever it raises is told to those who wait for it.

        Raises:
            EngineError: If there is no thread and none can be started.
        """
        outcome: Future[T] = Future()
        with self._lock:
            self._work.append((work, outcome))
            if self._num_threads >= _MAX_COMPILING:
                return outcome
            before = threading.stack_size(_STACK_BYTES)  # a setting of the whole process
            try:
                threading.Thread(target=self._run, name="grammar-compiler", daemon=True).start()
                self._num_threads += 1
            except RuntimeError as error:
                if not self._num_threads:
                    self._work.pop()
                    raise EngineError(f"No thread can be started to compile a grammar in: {error}") from error
            finally:
                threading.stack_size(before)
        return outcome

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._num_threads -= 1
                    return
                work, outcome = self._work.popleft()
            try:
                outcome.set_result(work())
            except BaseException as error:  # noqa: BLE001 - a panic of native code is no `Exception`
                outcome.set_exception(error)
            del work, outcome


_large_stacks = _LargeStacks()


def _begin_in_child() -> None:
    """Begin anew in a forked process: whoever compiles in another thread, or holds a lock, is not there."""
    global _finding, _large_stacks
    _finding, _large_stacks = threading.Lock(), _LargeStacks()
    _compilers.clear()


after_fork(_begin_in_child)
