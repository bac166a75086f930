"""Match a stranger's regular expression in a bounded number of steps.

`re` backtracks for as long as a pattern makes it, RE2 has no lookaheads, which real adapters use, and `regex`, which
can time out, expands counted repeats in memory. A module's name is short, so the set of places where a match can end is
one integer, a bit per place, and each part of a pattern maps such a set to the next: nothing is tried twice.
"""

from __future__ import annotations

import re
import unicodedata
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser as sre_parser  # type: ignore[attr-defined]
from typing import Any

__all__ = ["Pattern", "PatternError", "StepBudget"]

_MAX_LENGTH = 20_000


class PatternError(ValueError):
    """A pattern that is none, that asks for what is not matched here, or that takes too many steps."""


class StepBudget:
    """How many steps all matches that share it may take together; about a microsecond each.

    Args:
        num_steps: The number of steps.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_left = num_steps

    def allow(self, num_steps: int) -> None:
        """Add steps."""
        self._num_left += num_steps

    def spend(self, num_steps: int = 1) -> None:
        """Take steps.

        Raises:
            PatternError: If there are none left.
        """
        self._num_left -= num_steps
        if self._num_left < 0:
            raise PatternError("matching takes too long: write it with fewer repeats inside repeats")


class Pattern:
    """A regular expression, with the meaning that `re` gives it.

    Args:
        pattern: The expression. Backreferences, conditions, atomic groups and possessive repeats are refused.
        before: Our own part of the expression, put before it.
        after: The same, put after it.

    Raises:
        PatternError: If it is not one that is matched here.
    """

    def __init__(self, pattern: str, *, before: str = "", after: str = "") -> None:
        if len(pattern) > _MAX_LENGTH:
            raise PatternError(f"it has {len(pattern)} characters; allowed are {_MAX_LENGTH}")
        try:
            self._tree = sre_parser.parse(before + pattern + after)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"it is no regular expression: {error}") from error

    def fullmatch(self, text: str, budget: StepBudget) -> bool:
        """Whether the whole of `text` matches.

        Raises:
            PatternError: If that cannot be told within the budget.
        """
        return bool(self._ends(text, budget) >> len(text))

    def match(self, text: str, budget: StepBudget) -> bool:
        """Whether the beginning of `text` matches.

        Raises:
            PatternError: If that cannot be told within the budget.
        """
        return self._ends(text, budget) != 0

    def _ends(self, text: str, budget: StepBudget) -> int:
        budget.spend(1 + len(text) // 16)
        try:
            return _Matcher(text, budget).run(self._tree, 1, self._tree.state.flags)
        except RecursionError as error:
            raise PatternError("its groups are nested too deep") from error


class _Matcher:
    """One text. Sets of places are integers: bit i is the place before character i."""

    def __init__(self, text: str, budget: StepBudget) -> None:
        self._text = text
        self._budget = budget
        self._all = (1 << (len(text) + 1)) - 1
        self._places: dict[str, int] = {}  # of each character
        for place, character in enumerate(text):
            self._places[character] = self._places.get(character, 0) | 1 << place

    def run(self, parts: Any, starts: int, flags: int) -> int:
        """Where matches of `parts`, one after the other, end that begin at any of `starts`."""
        for op, argument in parts:
            if not starts:
                return 0
            self._budget.spend()
            starts = self._step(op, argument, starts, flags)
        return starts

    def _step(self, op: Any, argument: Any, starts: int, flags: int) -> int:
        if op in _ONE_CHARACTER:
            return (starts & self._characters(op, argument, flags)) << 1
        if op is sre.AT:
            return starts & self._at(argument, flags)
        if op is sre.BRANCH:
            ends = 0
            for branch in argument[1]:
                ends |= self.run(branch, starts, flags)
            return ends
        if op is sre.SUBPATTERN:
            _, added, removed, parts = argument
            return self.run(parts, starts, (flags | added) & ~removed)
        if op in {sre.MAX_REPEAT, sre.MIN_REPEAT}:
            return self._repeat(argument, starts, flags)
        if op in {sre.ASSERT, sre.ASSERT_NOT}:
            return self._look(argument, starts, flags, is_wanted=op is sre.ASSERT)
        if op is sre.FAILURE:
            return 0
        raise PatternError(f"it uses {str(op).lower()}, which is not matched here")

    def _repeat(self, argument: Any, starts: int, flags: int) -> int:
        least, most, parts = argument
        if least <= 1 and most is sre.MAXREPEAT and len(parts) == 1 and parts[0][0] in _ONE_CHARACTER:
            op, argument = parts[0]
            allowed = self._characters(op, argument, flags)
            # The carry of an addition runs through every row of allowed characters, from the first start in it.
            ends = (((starts & allowed) + allowed) ^ allowed) | starts
            return ends if least == 0 else (ends & allowed) << 1
        for _ in range(least):
            ends = self.run(parts, starts, flags)
            if ends == starts:  # so they stay: a repeat of nothing
                break
            starts = ends
        reached = news = starts
        for _ in range(most - least):
            news = self.run(parts, news, flags) & ~reached
            if not news:
                break
            reached |= news
        return reached

    def _look(self, argument: Any, starts: int, flags: int, *, is_wanted: bool) -> int:
        (direction, parts), width = argument, 0
        if direction < 0:
            width, widest = parts.getwidth()
            if width != widest:
                raise PatternError("it looks behind at a text of no fixed length")
        kept = 0
        for place in range(len(self._text) + 1):
            if starts >> place & 1:
                self._budget.spend()
                is_met = place >= width and self.run(parts, 1 << (place - width), flags) != 0
                kept |= (is_met == is_wanted) << place
        return kept

    def _at(self, where: Any, flags: int) -> int:
        last = 1 << len(self._text)
        lines = self._places.get("\n", 0)
        if where is sre.AT_BEGINNING_STRING:
            return 1
        if where is sre.AT_BEGINNING:
            return 1 | (lines << 1 if flags & re.MULTILINE else 0)
        if where is sre.AT_END_STRING:
            return last
        if where is sre.AT_END:
            return last | (lines if flags & re.MULTILINE else lines & last >> 1)
        words = self._characters(sre.CATEGORY, sre.CATEGORY_WORD, flags)
        boundaries = (words ^ words << 1) & self._all
        return boundaries if where is sre.AT_BOUNDARY else self._all & ~boundaries

    def _characters(self, op: Any, argument: Any, flags: int) -> int:
        """Where the characters are that one character of the pattern matches."""
        if op is sre.LITERAL and not flags & re.IGNORECASE:
            return self._places.get(chr(argument), 0)
        found = 0
        for character, places in self._places.items():
            self._budget.spend()
            if self._is_one_of(character, op, argument, flags):
                found |= places
        return found

    def _is_one_of(self, character: str, op: Any, argument: Any, flags: int) -> bool:
        if op is sre.IN:
            self._budget.spend(len(argument))
            is_negated = argument[0][0] is sre.NEGATE
            return is_negated != any(
                self._is_one_of(character, part, value, flags) for part, value in argument[is_negated:]
            )
        if op is sre.NOT_LITERAL:
            return not self._is_one_of(character, sre.LITERAL, argument, flags)
        if op is sre.ANY:
            return bool(flags & re.DOTALL) or character != "\n"
        if op is sre.CATEGORY:
            return _is_in_category(character, argument, is_ascii=bool(flags & re.ASCII))
        cases = {character, character.lower(), character.upper()} if flags & re.IGNORECASE else {character}
        low, high = (argument, argument) if op is sre.LITERAL else argument
        return any(len(case) == 1 and low <= ord(case) <= high for case in cases)


_ONE_CHARACTER = {sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN}


def _is_in_category(character: str, category: Any, *, is_ascii: bool) -> bool:
    name = str(category).rpartition("_")[2]
    if is_ascii and not character.isascii():
        is_in = False
    elif name == "DIGIT":
        is_in = unicodedata.category(character) == "Nd"
    elif name == "SPACE":
        is_in = character.isspace() and not (is_ascii and character in "\x1c\x1d\x1e\x1f")
    else:
        is_in = character.isalnum() or character == "_"
    return is_in != ("_NOT_" in str(category))
