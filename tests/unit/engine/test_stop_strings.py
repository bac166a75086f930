"""Many stop strings found in text that comes in pieces."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from langchain_lora_retriever.engine.stop_strings import StopAutomaton, StopMatcher

strings = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=6).map(tuple)
pieces = st.lists(st.text("abc", max_size=4), max_size=12)


def push_by_comparing(read: list[str], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    """What passes piece by piece, by comparing every stop string with everything that is held."""
    held, passed = "", []
    for piece in read:
        held += piece
        found = [at for at in (held.find(string) for string in stop) if at >= 0]
        if found:
            return [*passed, held[: min(found)]], True
        undecided = max(i for i in range(len(held) + 1) if i == 0 or any(s.startswith(held[-i:]) for s in stop))
        passed.append(held[: len(held) - undecided])
        held = held[len(held) - undecided :]
    return [*passed, held], False


@settings(max_examples=500, deadline=None)
@given(pieces, strings)
def test_it_passes_what_comparing_all_strings_passes(read: list[str], stop: tuple[str, ...]) -> None:
    """Piece by piece the same text passes, and the same stop string ends it, as with the plain way."""
    matcher = StopMatcher(stop)
    passed: list[str] = []
    for piece in read:
        passed.append(matcher.push(piece))
        if matcher.is_stopped:
            break
    if not matcher.is_stopped:
        passed.append(matcher.flush())
    assert (passed, matcher.is_stopped) == push_by_comparing(read, stop)


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=30), strings)
def test_a_state_knows_all_strings_that_end_in_it(text: str, stop: tuple[str, ...]) -> None:
    """After every character the matches are all the strings that the text ends in, longest first."""
    automaton, state = StopAutomaton(stop), 0
    for end, character in enumerate(text, 1):
        state = automaton.step(state, character)
        assert list(automaton.matches(state)) == sorted({len(s) for s in stop if text[:end].endswith(s)}, reverse=True)


def test_what_would_stop_is_not_read() -> None:
    """Looking ahead changes nothing."""
    matcher = StopMatcher(("ab",))
    assert matcher.push("xa") == "x"
    assert matcher.would_stop("b")
    assert not matcher.would_stop("a")
    assert matcher.push("c") == "ac"


def test_a_special_token_counts_as_a_whole() -> None:
    """A stop string matches over a hidden token, but neither begins nor ends inside of one."""
    for stop, passed in (
        ("<end>", "one"),
        ("e<end>", "on"),
        ("<end>t", "one"),
        ("end", None),
        (">t", None),
        ("e<", None),
    ):
        matcher = StopMatcher((stop,))
        text = matcher.push("one") + matcher.push("<end>", is_special=True, is_hidden=True)
        if not matcher.is_stopped:
            text += matcher.push("two")
        assert (text if matcher.is_stopped else None) == passed, stop
        if not matcher.is_stopped:
            assert text + matcher.flush() == "onetwo"


def test_the_cost_of_a_character_does_not_grow_with_the_strings() -> None:
    """Text that nearly matches the longest strings allowed is read in about the time that it takes with short ones."""

    def seconds(stop: tuple[str, ...], text: str) -> float:
        matcher, times = StopMatcher(stop), []
        for _ in range(3):
            start = time.thread_time()
            for character in text:
                matcher.push(character)
            times.append(time.thread_time() - start)
        return min(times)

    text = "ab" * 20_000
    long = tuple("ab" * 30 + f"Z{i}" for i in range(256))
    assert seconds(long, text) < 10 * seconds(("abZ",), text)
