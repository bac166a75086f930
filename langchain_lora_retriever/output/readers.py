"""Reading an answer while it is generated: text comes in as it becomes certain, pieces of a message go out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from langchain_core.messages.tool import ToolCallChunk

__all__ = ["Piece", "Reader", "Reasoning", "num_undecided", "read"]


class Reasoning(NamedTuple):
    """What a model thinks before it answers."""

    text: str


Piece: TypeAlias = "str | Reasoning | ToolCallChunk"
"""Text of the answer, reasoning, or a part of a tool call."""


class Reader(Protocol):
    """Tells apart what an answer's text is made of. One object per answer; it remembers what came before."""

    def push(self, text: str) -> Iterable[Piece]:
        """Read more text; return the pieces that are certain. Text that means nothing to this reader stays text."""

    def finish(self, *, is_cut_off: bool) -> Iterable[Piece]:
        """Return what was held back.

        Args:
            is_cut_off: The answer ended at a limit and not by itself.
        """


def read(readers: Sequence[Reader], text: str, *, is_last: bool, is_cut_off: bool) -> Iterator[Piece]:
    """Send text through readers, each of which reads the text that the one before it leaves."""
    pieces: Iterable[Piece] = [text] if text else []
    for reader in readers:
        pieces = _through(reader, pieces, is_last=is_last, is_cut_off=is_cut_off)
    yield from pieces


def num_undecided(text: str, tag: str, blanks: str | None = None) -> int:
    """Length of the end of `text` that `tag` may begin with, `blanks` (all white space) before it included."""
    lengths = range(min(len(tag) - 1, len(text)), 0, -1)
    length = next((length for length in lengths if tag.startswith(text[-length:])), 0)
    return len(text) - len(text[: len(text) - length].rstrip(blanks))


def _through(reader: Reader, pieces: Iterable[Piece], *, is_last: bool, is_cut_off: bool) -> Iterator[Piece]:
    for piece in pieces:
        if isinstance(piece, str):
            yield from reader.push(piece)
        else:
            yield piece
    if is_last:
        yield from reader.finish(is_cut_off=is_cut_off)
