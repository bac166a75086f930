"""A conversation on a terminal, or with a program that writes a turn a line."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import TYPE_CHECKING, Any

import typer

from langchain_lora_retriever.cli import interrupts
from langchain_lora_retriever.cli.options import warm_up
from langchain_lora_retriever.cli.terminal import hint, print_error, print_json
from langchain_lora_retriever.errors import LoraRetrieverError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from langchain_core.messages import AIMessage, AIMessageChunk

    from langchain_lora_retriever.chat.model import ChatLoraRetriever

__all__ = ["Conversation", "answer"]

_HELP = """\
/route            show which adapters found the last message, with scores
/route TEXT       show which adapters a text would find
/pin NAME ...     run these adapters from now on; /pin alone runs the base model
/unpin            let each message find its adapters again
/adapters         list the pool's adapters
/clear            forget the conversation
/help             this list
/quit             end; so does Ctrl-D, and Ctrl-C at the prompt. Ctrl-C during an answer stops the answer"""


class Conversation:
    """Reads turns from standard input, answers them, and remembers what was said.

    Args:
        llm: The model.
        as_json: Print each answer as JSON.
    """

    def __init__(self, llm: ChatLoraRetriever, *, as_json: bool = False) -> None:
        self._llm = llm
        self._as_json = as_json
        self._history: list[Any] = []
        self._pinned: list[str] | None = llm.adapters
        self._last = ""
        self._is_typed = sys.stdin.isatty() and sys.stdout.isatty()
        self._commands: dict[str, Callable[[list[str]], None]] = {
            "/route": self._route,
            "/pin": self._pin,
            "/unpin": self._unpin,
            "/adapters": lambda _: typer.echo("\n".join(self._llm.pool.names)),
            "/clear": lambda _: self._history.clear(),
            "/help": lambda _: typer.echo(_HELP),
        }

    def run(self) -> None:
        """Go on until the input ends, or somebody wants to leave."""
        if self._is_typed:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401, PLC0415 - lends `input` its history and its keys; Windows has none
            hint("Type a message, or /help. Ctrl-D ends.")
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a turn that is no UTF-8 is told, and the next is read
        while (text := self._read()) is not None:
            if text.startswith("/"):
                name, *arguments = text.split()
                if name in {"/quit", "/exit"}:
                    return
                self._do(self._commands.get(name, self._unknown), [name, *arguments])
            elif text:
                self._do(self._answer, [text])

    def _read(self) -> str | None:
        """A line without the blanks around it; None once there are no more."""
        try:
            with interrupts.raising():
                line = input("> ") if self._is_typed else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return None
        return None if not line and not self._is_typed else line.strip()

    def _do(self, command: Callable[[list[str]], None], arguments: list[str]) -> None:
        """What is wrong with one turn is told, and the next may be right."""
        try:
            with interrupts.raising():
                command(arguments)
        except LoraRetrieverError as error:
            print_error(str(error))
        except KeyboardInterrupt:
            hint("\n(stopped)")

    def _answer(self, arguments: list[str]) -> None:
        (self._last,) = arguments
        turns = [*self._history, ("user", self._last)]
        with interrupts.ending_soon():
            warm_up(self._llm)
        self._history = [*turns, answer(self._llm, turns, as_json=self._as_json, adapters=self._pinned)]

    def _route(self, arguments: list[str]) -> None:
        text = " ".join(arguments[1:]) or self._last
        if not text:
            hint("Nothing was said yet: /route TEXT")
            return
        members = self._llm.route(text, adapters=self._pinned).adapters
        for member in members:
            score = "pinned" if member.score is None else f"{member.score:.3f}"
            typer.echo(f"{member.name}\t{score}\t{member.weight:.0%}")
        if not members:
            typer.echo("(base model)")

    def _pin(self, arguments: list[str]) -> None:
        names = arguments[1:]
        self._llm.route("", adapters=names)  # raises if one cannot run
        self._pinned = names
        hint(f"pinned: {', '.join(names) or 'the base model alone'}")

    def _unpin(self, _: list[str]) -> None:
        self._pinned = None
        hint("each message finds its adapters")

    def _unknown(self, arguments: list[str]) -> None:
        print_error(f"There is no command {arguments[0]}. /help lists them.")


def answer(llm: ChatLoraRetriever, messages: Sequence[Any], *, as_json: bool = False, **settings: Any) -> AIMessage:
    """Print an answer while it comes, and on a terminal who gave it; or the whole as JSON. Returns it."""
    if as_json:
        message = llm.invoke(list(messages), **settings)
        print_json({"content": message.content, **message.response_metadata, "usage": message.usage_metadata})
        return message
    full: AIMessageChunk | None = None
    for chunk in llm.stream(list(messages), **settings):
        typer.echo(str(chunk.text), nl=False)
        full = chunk if full is None else full + chunk
    typer.echo()
    assert full is not None
    adapters = ", ".join(f"{a['name']} {a['weight']:.0%}" for a in full.response_metadata["adapters"])
    if sys.stderr.isatty():
        hint(f"({adapters or 'base model'})")
    return full
