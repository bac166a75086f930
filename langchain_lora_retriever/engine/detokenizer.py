"""Token ids to text as they come, and stop strings matched in that text."""

from __future__ import annotations

import codecs
from functools import partial
from typing import TYPE_CHECKING

from langchain_lora_retriever.engine.stop_strings import StopMatcher

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedTokenizerBase

__all__ = ["Detokenizer", "Vocabulary"]

_REPLACEMENT = "\ufffd"  # what bytes decode to that are no character, or not yet

# Tokens decoded together. A character has at most four bytes: the last four tokens hold all of one that is not whole.
_MOST_DECODED = 8
_MOST_OPEN = 4

_MOST_BYTES_HELD = 16  # of a run of byte tokens; one that has been text for so long is text


class Vocabulary:
    """What a tokenizer's ids are in text; one for all requests of an engine.

    Args:
        tokenizer: With or without a `tokenizers` backend.

    Attributes:
        special_tokens: The tokens that `skip_special_tokens` leaves out.
        byte_tokens: The value of each token that is a byte, where the tokenizer falls back on bytes (`<0x0A>`).
        strips_blank: Whether a blank byte at the very beginning has no text.
        decode: The text of some tokens, special ones included: `tokenizer.decode` without its cleaning up of spaces.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.special_tokens: Mapping[int, str]
        self.byte_tokens: Mapping[int, int] = _byte_tokens(tokenizer)
        self.decode: Callable[[list[int]], str]
        if backend is not None:
            added = backend.get_added_tokens_decoder()
            self.special_tokens = {token_id: token.content for token_id, token in added.items() if token.special}
            self.decode = partial(backend.decode, skip_special_tokens=False)
        else:
            self.special_tokens = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
            self.decode = lambda token_ids: str(tokenizer.decode(token_ids, skip_special_tokens=False))
        by_value = {value: token_id for token_id, value in self.byte_tokens.items()}
        self.strips_blank = by_value.keys() >= {0x20, 0x41} and self.decode([by_value[0x20], by_value[0x41]]) == "A"


def _byte_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """Tokens `<0x00>` to `<0xFF>`, if decoding takes them for bytes."""
    known = tokenizer.get_vocab()
    found = {known[name]: value for value in range(256) if (name := f"<0x{value:02X}>") in known}
    letter = known.get("<0x41>")
    return found if letter is not None and tokenizer.decode([letter]) == "A" else {}


class Detokenizer:
    """Turns one request's tokens into text, never half a character, never a part of a stop string.

    Text that might be the beginning of a stop string is held back until it is decided. A stop string may be or contain
    a special token, which is found although it is left out of the text.

    Args:
        tokenizer: The model's tokenizer.
        stop: Strings that end the text and are cut from it.
        skip_special_tokens: Leave special tokens out of the text.
        vocabulary: The tokenizer's, where it has been made already.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: tuple[str, ...] = (),
        *,
        skip_special_tokens: bool = True,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        vocabulary = vocabulary or Vocabulary(tokenizer)
        self._special_tokens = vocabulary.special_tokens
        self._skips_special_tokens = skip_special_tokens
        self._stream = _TextStream(vocabulary)
        self._matcher = StopMatcher(stop) if stop else None

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come. Its text was cut, and no more comes out."""
        return self._matcher is not None and self._matcher.is_stopped

    def push(self, token_id: int) -> str:
        """Add a token; the text that is now certain, perhaps empty."""
        matcher = self._matcher
        special = self._special_tokens.get(token_id)
        is_hidden = special is not None and self._skips_special_tokens
        if matcher is None:
            return "" if is_hidden else self._stream.push(token_id)
        if matcher.is_stopped:
            return ""
        if special is None:
            passed = matcher.push(self._stream.push(token_id))
            if not matcher.is_stopped and matcher.would_stop(self._stream.ahead):
                passed += matcher.push(self._stream.settle())
            return passed
        passed = matcher.push(self._stream.settle())
        if is_hidden:
            return passed + matcher.push(special, is_special=True, is_hidden=True)
        text = self._stream.push(token_id)
        return passed + matcher.push(text, is_special=text == special)

    def flush(self) -> str:
        """The text held back; call once, when the request ends for another reason than a stop string.

        A character that the end has cut is left out, and nothing before it.
        """
        text = self._stream.settle()
        return text if self._matcher is None else self._matcher.push(text) + self._matcher.flush()


class _TextStream:
    """The text of tokens as soon as it is certain: what later tokens cannot change.

    Semantics:
        The pieces, joined, are `decode` of all tokens without the replacement characters at its end, which may become
        a character still. A few tokens are decoded at a time, whatever came before: no token costs more than another.

        Byte tokens are decoded by the run: an invalid byte makes replacement characters of its whole run. So a run
        is held back until it has ended, or has been text for `_MOST_BYTES_HELD` bytes.

    Args:
        vocabulary: The tokens.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._decode = vocabulary.decode
        self._byte_tokens = vocabulary.byte_tokens
        self._strips_blank = vocabulary.strips_blank
        self._ids: list[int] = []
        self._num_given = 0  # characters of `decode(_ids)` that have come out
        self._num_open = 0  # replacement characters at its end that have not
        self._num_replaced = 0  # and such of tokens before these
        self._run: list[int] = []
        self._run_bytes = bytearray()
        self._num_run_given = 0

    @property
    def ahead(self) -> str:
        """Text that will have been certain if no token follows."""
        if not self._run:
            return ""
        try:
            text, _ = codecs.utf_8_decode(self._run_bytes, "strict", False)
        except UnicodeDecodeError:
            return ""
        if self._strips_blank and not self._ids:
            text = text.removeprefix(" ")
        text = text[self._num_run_given :]
        return _REPLACEMENT * (self._num_replaced + self._num_open) + text if text else ""

    def push(self, token_id: int) -> str:
        """Add a token; the text that is certain now."""
        if token_id in self._byte_tokens:
            self._run.append(token_id)
            self._run_bytes.append(self._byte_tokens[token_id])
            return self.settle() if len(self._run) > _MOST_BYTES_HELD else ""
        if self._run:
            self._ids += self._run
            self._num_given += self._num_run_given
            self._run, self._num_run_given = [], 0
            self._run_bytes.clear()
        self._ids.append(token_id)
        text = self._decode(self._ids)
        num_given = len(text) if text[-1:] != _REPLACEMENT else len(text.rstrip(_REPLACEMENT))
        certain = text[self._num_given : num_given]
        if certain:
            self._num_given = num_given
            if self._num_replaced:
                certain = _REPLACEMENT * self._num_replaced + certain
                self._num_replaced = 0
        self._num_open = len(text) - self._num_given
        if len(self._ids) > _MOST_DECODED:
            self._forget(text)
        return certain

    def settle(self) -> str:
        """Whole characters of a run of byte tokens, not waiting for its end."""
        text = self.ahead
        if text:
            self._num_run_given += len(text) - self._num_replaced - self._num_open
            self._num_given += self._num_open
            self._num_replaced = self._num_open = 0
        return text

    def _forget(self, text: str) -> None:
        """Drop tokens from the front that no later token has to do with, cutting between two characters."""
        for start in range(len(self._ids) - _MOST_OPEN, 0, -1):
            rest = self._decode(self._ids[start:])
            if text.endswith(rest):
                num_given = len(rest) - (len(text) - self._num_given)
                self._ids = self._ids[start:]
                self._num_given = max(num_given, 0)
                self._num_open += min(num_given, 0)
                self._num_replaced -= min(num_given, 0)
                return
