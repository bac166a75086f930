"""How JSON that is being generated can be brought to its end in few tokens, whatever its grammar still wants."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["ClosingTokens", "JsonPosition", "closing_path"]

_LONGEST_PATH = 512  # tokens; an answer that needs more to end is not made to fit
_MOST_TRIES = 160  # of continuations, where no closing character is allowed

# Tried in this order where nothing closes: numbers and literals before what has to be closed in turn; in strings one
# character of each usual class before the others of its class.
_VALUES = '102345678ntf9-."[{eE+, :'
_VARIED = "a1Z-0 z.9@:/A_T+,bcdefghijklmnopqrstuvwxyBCDEFGHIJKLMNOPQRSUVWXY2345678"
_CHARACTERS = _VARIED + "".join(chr(code) for code in range(33, 127) if chr(code) not in _VARIED + '"\\')


class ClosingTokens(NamedTuple):
    """The tokens of a vocabulary that stand for one ASCII character each, and the one that ends an answer.

    Attributes:
        tokens: llguidance's tokenizer.
        ids: Token ids by character.
        vocab_size: Number of tokens.
        eos_token_id: What ends an answer that its grammar would let go on.
    """

    tokens: LLTokenizer
    ids: dict[str, int]
    vocab_size: int
    eos_token_id: int

    @classmethod
    def of(cls, tokens: LLTokenizer) -> ClosingTokens:
        """Look through a vocabulary."""
        ids: dict[str, int] = {}
        for token_id in range(tokens.vocab_size):
            text = tokens.decode_bytes([token_id])
            if len(text) == 1 and 32 <= text[0] < 127:
                ids.setdefault(chr(text[0]), token_id)
        return cls(tokens, ids, tokens.vocab_size, tokens.eos_token)


class JsonPosition(NamedTuple):
    """Where in JSON a text ends.

    Attributes:
        is_in_string: Within quotes.
        is_escaped: Behind a backslash.
        depth: Brackets that are open.
        lowest: The fewest that were, since the text that was read last began.
    """

    is_in_string: bool = False
    is_escaped: bool = False
    depth: int = 0
    lowest: int = 0

    def after(self, text: bytes) -> JsonPosition:
        """Read on."""
        is_in_string, is_escaped, depth, _ = self
        lowest = depth
        for byte in text:
            if is_escaped:
                is_escaped = False
            elif byte == 0x22:  # a quote
                is_in_string = not is_in_string
            elif is_in_string:
                is_escaped = byte == 0x5C
            elif byte in b"[{":
                depth += 1
            elif byte in b"]}":
                depth -= 1
                lowest = min(lowest, depth)
        return JsonPosition(is_in_string, is_escaped, depth, lowest)


def closing_path(
    matcher: LLMatcher, closing: ClosingTokens, position: JsonPosition, *, max_masks: int
) -> tuple[list[int] | None, int]:
    """Find tokens that end an answer.

    Args:
        matcher: Where the answer stands; it is used up.
        closing: The vocabulary's tokens.
        position: Where the answer stands.
        max_masks: Masks that may be computed.

    Returns:
        The tokens, or None if none were found; and the number of masks computed.
    """
    path: list[int] = []
    search = _Search(closing, max_masks)
    while len(path) < _LONGEST_PATH and search.masks_left > 0 and not matcher.is_error():
        if matcher.is_stopped():
            return path, max_masks - search.masks_left
        next_ids = list(matcher.compute_ff_tokens())[:_LONGEST_PATH] or search.next_ids(matcher, position)
        if not next_ids:
            return path, max_masks - search.masks_left
        if not matcher.consume_tokens(next_ids):
            break
        path += next_ids
        position = position.after(closing.tokens.decode_bytes(next_ids))
    return None, max_masks - search.masks_left


class _Search:
    """Looks for what to write next.

    Args:
        closing: The vocabulary's tokens.
        max_masks: Masks that may be computed.
    """

    def __init__(self, closing: ClosingTokens, max_masks: int) -> None:
        self._ids = closing.ids
        self._barren: set[bytes] = set()  # masks in strings from which nothing was found: characters are counted there
        self.masks_left = max_masks

    def next_ids(self, matcher: LLMatcher, position: JsonPosition) -> list[int]:
        """Choose the next tokens; none where the answer may end."""
        mask = self._mask(matcher)
        if matcher.is_accepting():
            return []
        in_string = position.is_in_string
        goals = '"' if in_string else '}]",'
        if not position.is_escaped:
            for char in goals:
                if self._is_allowed(mask, char):
                    return [self._ids[char]]
        found: list[int] = []
        if mask not in self._barren:
            chars = _CHARACTERS if in_string else _VALUES
            found = self._search(matcher, mask, goals, chars, is_in_string=in_string)
            if in_string and not found:
                self._barren.add(mask)
        return found or self._any(mask, "a1" if in_string else "01", _VALUES + _CHARACTERS)

    def _search(self, matcher: LLMatcher, mask: bytes, goals: str, chars: str, *, is_in_string: bool) -> list[int]:
        """Find the fewest tokens after which a goal is allowed, or the answer or what is forced goes on by itself."""
        seen, queue, num_tries = {mask}, deque([(matcher, mask, list[int]())]), 0
        while queue:
            here, allowed, path = queue.popleft()
            for char in chars:
                if not self._is_allowed(allowed, char):
                    continue
                num_tries += 1
                if num_tries > _MOST_TRIES or self.masks_left <= 0:
                    return []
                child, token_id = here.deep_copy(), self._ids[char]
                if not child.consume_token(token_id):
                    continue
                if child.is_stopped() or (not is_in_string and child.compute_ff_tokens()):
                    return [*path, token_id]
                after = self._mask(child)
                if child.is_error():
                    continue
                if child.is_accepting() or any(self._is_allowed(after, goal) for goal in goals):
                    return [*path, token_id]
                # In a string the characters tell states apart; in a number its value does.
                if not is_in_string or after not in seen:
                    seen.add(after)
                    queue.append((child, after, [*path, token_id]))
        return []

    def _any(self, mask: bytes, preferred: str, chars: str) -> list[int]:
        """Choose some allowed token."""
        for char in preferred + chars:
            if self._is_allowed(mask, char):
                return [self._ids[char]]
        word = next((index for index, byte in enumerate(mask) if byte), None)
        return [] if word is None else [8 * word + (mask[word] & -mask[word]).bit_length() - 1]

    def _mask(self, matcher: LLMatcher) -> bytes:
        self.masks_left -= 1
        return bytes(matcher.compute_bitmask())

    def _is_allowed(self, mask: bytes, char: str) -> bool:
        token_id = self._ids.get(char)
        return token_id is not None and bool(mask[token_id // 8] >> token_id % 8 & 1)
