"""What the command line prints: answers on standard output, everything else on standard error.

On a terminal there are tables and colours; a pipe gets plain lines, columns separated by tabs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console
    from rich.progress import Progress

__all__ = [
    "bar",
    "console",
    "hint",
    "logging_to_terminal",
    "new_progress",
    "print_error",
    "print_facts",
    "print_json",
    "print_table",
    "status",
    "warn",
    "without_warnings",
]

_LOUD_LIBRARIES = ("transformers", "sentence_transformers", "huggingface_hub", "gguf", "faiss", "peft", "accelerate")


def console(*, stderr: bool = False) -> Console:
    """A console on standard output or error, as they are now."""
    from rich.console import Console  # noqa: PLC0415 - not needed for most of what is said

    return Console(stderr=stderr)


def new_progress() -> Progress:
    """A bar on standard error, which leaves nothing behind."""
    from rich.progress import Progress  # noqa: PLC0415 - not needed for --help

    return Progress(console=console(stderr=True), transient=True)


def bar(progress: Progress, label: str) -> Callable[[int, int], None]:
    """A bar among those of `new_progress`, to be told how much is done and of how much."""
    task = progress.add_task(label, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table; in a pipe its columns' names and then its rows, separated by tabs."""
    if not sys.stdout.isatty():
        if title is not None:
            hint(title)
        for row in [columns, *rows]:
            typer.echo("\t".join(" ".join(cell.split()) for cell in row))
        return
    from rich.table import Table  # noqa: PLC0415 - not needed in a pipe
    from rich.text import Text  # noqa: PLC0415

    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table)


def print_facts(facts: dict[str, Any]) -> None:
    """Print names and values, a line each; a list has a line for each of its items."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        lines = [str(item) for item in value] if isinstance(value, list) else str(value).split("\n")
        for index, line in enumerate(lines or [""]):
            typer.echo(f"{name if index == 0 else '':{width}}  {line}")


def hint(text: str) -> None:
    """Say something beside the answer."""
    typer.echo(_styled(text, dim=True), err=True)


def warn(text: str) -> None:
    """Say something that the user should know, in a paragraph."""
    typer.echo(f"{_styled('Warning:', fg='yellow', bold=True)} {text}", err=True)


def print_error(text: str) -> None:
    """Say why the command failed, in a paragraph."""
    typer.echo(f"{_styled('Error:', fg='red', bold=True)} {text}", err=True)


def _styled(text: str, **style: Any) -> str:
    return typer.style(text, **style) if sys.stderr.isatty() else text


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """Say on a terminal what is being waited for, while it is."""
    if not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(text):
        yield


class _Paragraphs(logging.Handler):
    """Prints the log's lines as the command line prints its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            warn(record.getMessage())
        else:
            hint(record.getMessage())


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Keep this package's warnings out of the way of a command that says the same in its own answer."""
    package = logging.getLogger("langchain_lora_retriever")
    level = package.level
    package.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        package.setLevel(level)


@contextlib.contextmanager
def logging_to_terminal(*, is_verbose: bool) -> Iterator[None]:
    """Print this package's warnings, and no other library's; with `is_verbose` all that anybody says."""
    package, handler = logging.getLogger("langchain_lora_retriever"), _Paragraphs()
    level, propagates, environment = package.level, package.propagate, os.environ.copy()
    package.addHandler(handler)
    package.propagate = False
    package.setLevel(logging.DEBUG if is_verbose else logging.WARNING)
    try:
        if is_verbose:
            logging.basicConfig(level=logging.INFO)
            yield
            return
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it sets its own level when it is imported
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the hub's bars are for a terminal
        for name in _LOUD_LIBRARIES:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        package.removeHandler(handler)
        package.propagate = propagates
        package.setLevel(level)
        os.environ.update(environment)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
