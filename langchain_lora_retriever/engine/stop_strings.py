"""Find the first of many stop strings in text that comes in pieces.

Why not a library: pyahocorasick and ahocorasick_rs find strings in a text that is whole. Neither tells how much of the
text's end may still become a match, which is what must be held back from a stream.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["StopAutomaton", "StopMatcher"]


class StopAutomaton:
    """The Aho-Corasick automaton of some strings: a character costs the same, however many and long they are.

    A state is the longest end of what was read that begins one of the strings; 0 is none. It is built where a request
    is made, not in the engine's thread, and never changes afterwards.

    Args:
        strings: Not empty, none of them empty. Building takes time and memory by their total length, which
            `SamplingParams` bounds.

    Attributes:
        depths: Length of each state's text.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._children: list[dict[str, int]] = [{}]
        self.depths = [0]
        is_string = [False]
        for string in strings:
            state = 0
            for character in string:
                child = self._children[state].setdefault(character, len(self._children))
                if child == len(self._children):
                    self._children.append({})
                    self.depths.append(self.depths[state] + 1)
                    is_string.append(False)
                state = child
            is_string[state] = True
        self._shorter = [0] * len(self._children)  # the next longest end that begins a string
        waiting = deque([0])
        self._longest_match = [0] * len(self._children)  # the state of the longest string that the state's text ends in
        while waiting:
            state = waiting.popleft()
            self._longest_match[state] = state if is_string[state] else self._longest_match[self._shorter[state]]
            for character, child in self._children[state].items():
                self._shorter[child] = self.step(self._shorter[state], character) if state else 0
                waiting.append(child)

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self._children[state]:
            state = self._shorter[state]
        return self._children[state].get(character, 0)

    def matches(self, state: int) -> Iterator[int]:
        """Lengths of the strings that end in this state, longest first."""
        match = self._longest_match[state]
        while match:
            yield self.depths[match]
            match = self._longest_match[self._shorter[match]]


@lru_cache(maxsize=8)  # the answers of one call, and the calls of one agent, stop at the same strings
def _automaton(strings: tuple[str, ...]) -> StopAutomaton:
    return StopAutomaton(strings)


class StopMatcher:
    """Passes text on until a stop string comes, and holds back what might begin one.

    A special token counts as a whole: a stop string may contain it, but neither begins nor ends inside of it. It may be
    hidden, and is then compared but never passed on.

    Args:
        strings: The stop strings; at least one.

    Attributes:
        is_stopped: Whether a stop string was found. Nothing is passed on any more.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._automaton = _automaton(strings)
        self._state = 0
        self._num_read = 0
        self._num_passed = 0
        self._held: deque[tuple[str, bool]] = deque()  # text, and whether it is shown
        self._special: deque[tuple[int, int]] = deque()  # where special tokens lie that held text may reach into
        self.is_stopped = False

    def push(self, text: str, *, is_special: bool = False, is_hidden: bool = False) -> str:
        """Read a piece of text; what is now certain.

        Of several stop strings that end in this piece the one that begins first cuts.

        Args:
            text: The piece.
            is_special: It is a special token.
            is_hidden: It is not to be passed on.
        """
        if text:
            self._held.append((text, not is_hidden))
        if is_special:
            self._special.append((self._num_read, self._num_read + len(text)))
        self._state, start = self._find(text)
        self._num_read += len(text)
        if start is not None:
            self.is_stopped = True
            passed = self._pass_on(start)
            self._pass_on(self._num_read)
            return passed
        return self._pass_on(self._num_read - self._automaton.depths[self._state])

    def would_stop(self, text: str) -> bool:
        """Whether a stop string is complete once this text is read, which is not read yet."""
        return self._find(text)[1] is not None

    def flush(self) -> str:
        """The text held back; for an end that is no stop string's."""
        return self._pass_on(self._num_read)

    def _find(self, text: str) -> tuple[int, int | None]:
        """The state after a text, and the place where the earliest stop string that ends in it begins."""
        automaton, state, earliest = self._automaton, self._state, None
        for place, character in enumerate(text, self._num_read + 1):
            state = automaton.step(state, character)
            for length in automaton.matches(state):
                start = place - length
                if not any(begin < start < end or begin < place < end for begin, end in self._special):
                    earliest = start if earliest is None else min(earliest, start)
                    break
        return state, earliest

    def _pass_on(self, end: int) -> str:
        """Let go of everything before `end`; what of it is shown."""
        shown = []
        while self._num_passed < end:
            text, is_shown = self._held.popleft()
            taken = text[: end - self._num_passed]
            if len(taken) < len(text):
                self._held.appendleft((text[len(taken) :], is_shown))
            self._num_passed += len(taken)
            if is_shown:
                shown.append(taken)
        while self._special and self._special[0][1] <= end:
            self._special.popleft()
        return "".join(shown)
