"""The command line: `lora-retriever demo | chat | route | pool | train | train-adapters | evaluate | bench | serve`.

And `check-model`. Exit status: 0 if it was done, 1 if it could not be, 2 if the arguments are wrong, 70 for a fault of
this package, 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from langchain_lora_retriever.cli import (
    ask,
    bench,
    check_model,
    demo,
    evaluate,
    interrupts,
    pool,
    serve,
    terminal,
    train,
    train_adapters,
)
from langchain_lora_retriever.cli.failures import explain
from langchain_lora_retriever.cli.options import new_commands

__all__ = ["app", "commands"]

_VERBOSE = ("-v", "--verbose")

commands = new_commands("Retrieve, compose and run LoRA adapters per prompt.", completes=True)
commands.command("demo", short_help="Answer held-out prompts with the demo's pool.")(demo.demo)
commands.command("chat", short_help="Ask once, or have a conversation.")(ask.chat)
commands.command("route", short_help="Show which adapters prompts would run.")(ask.route)
commands.add_typer(pool.commands, name="pool", short_help="List, change and inspect a pool of adapters.")
commands.command("train-adapters", short_help="Make adapters for a pool.")(train_adapters.train_adapters)
commands.command("train", short_help="Fine-tune the encoder on a pool.")(train.train)
commands.add_typer(evaluate.commands, name="evaluate", short_help="Measure retrieval and composition.")
commands.command("bench", short_help="Measure tokens per second.")(bench.bench)
commands.command("serve", short_help="Serve the OpenAI API.")(serve.serve)
commands.command("check-model", short_help="Say what will happen with a base model.")(check_model.check_model)


def _print_version(*, is_wanted: bool) -> None:
    if is_wanted:
        from langchain_lora_retriever import __version__  # noqa: PLC0415 - few ask

        typer.echo(f"lora-retriever {__version__}")
        raise typer.Exit


@commands.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(*_VERBOSE, metavar="", help="Print logs, other libraries' warnings, and tracebacks of errors."),
    ] = False,
) -> None:
    """Retrieve, compose and run LoRA adapters per prompt."""


def app(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    What goes wrong is told in a paragraph; there is a traceback with `--verbose` alone, which may stand anywhere.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = given[: given.index("--")] if "--" in given else given
    is_verbose = any(option in _VERBOSE for option in options)
    given = [option for option in options if option not in _VERBOSE] + given[len(options) :]
    with terminal.logging_to_terminal(is_verbose=is_verbose), interrupts.ending_soon():
        try:
            commands(given, prog_name="lora-retriever")
        except Exception as error:
            if is_verbose:
                raise
            text, code = explain(error)
            terminal.print_error(text)
            sys.exit(code)
