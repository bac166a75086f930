"""Token ids to text as they come, and stop strings matched in that text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Detokenizer"]


class Detokenizer:
    """Turns one request's tokens into text, never half a character, never a part of a stop string.

    Text that might be the beginning of a stop string is held back until it is decided.

    Args:
        tokenizer: The model's tokenizer.
        stop: Strings that end the text and are cut from it.
        skip_special_tokens: Leave special tokens out of the text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._stream = _decode_stream(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stop = stop
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; the text that is now certain, perhaps empty."""
        if self.is_stopped:
            return ""
        self._held += self._stream.step(token_id)
        if not self._stop:
            return self._release(len(self._held))
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.is_stopped = True
            text = self._release(min(found))
            self._held = ""
            return text
        return self._release(len(self._held) - self._num_undecided())

    def flush(self) -> str:
        """The text held back; call once, when the request ends for another reason than a stop string."""
        return self._release(len(self._held))

    def _release(self, num_characters: int) -> str:
        text, self._held = self._held[:num_characters], self._held[num_characters:]
        return text

    def _num_undecided(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(len(stop) for stop in self._stop) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0


class _FastStream:
    """Incremental decoding by the `tokenizers` library."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def step(self, token_id: int) -> str:
        return self._stream.step(self._tokenizer, token_id) or ""


class _WindowStream:
    """The same for tokenizers without a `tokenizers` backend: decode a short window twice and take the difference."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._num_known = 0

    def step(self, token_id: int) -> str:
        known = self._decode(self._ids[: self._num_known])
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") or len(text) <= len(known):
            return ""
        # Keep the last decoded tokens as left context: some tokenizers drop a leading space.
        self._ids = self._ids[self._num_known :]
        self._num_known = len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens))


def _decode_stream(tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool) -> _FastStream | _WindowStream:
    kind = _FastStream if getattr(tokenizer, "backend_tokenizer", None) else _WindowStream
    return kind(tokenizer, skip_special_tokens=skip_special_tokens)
