"""The command line: `lora-retriever demo | chat | route | pool | train | evaluate | bench | serve`."""

from __future__ import annotations

import sys
from typing import Any

import typer
from rich.console import Console

from langchain_lora_retriever.cli import ask, bench, demo, evaluate, pool, serve, train
from langchain_lora_retriever.demo.model import INSTALL_DEMO
from langchain_lora_retriever.errors import LoraRetrieverError

__all__ = ["app", "commands"]

commands = typer.Typer(
    help="Retrieve, compose and run LoRA adapters per prompt.", no_args_is_help=True, add_completion=False
)
commands.command("demo")(demo.demo)
commands.command("chat")(ask.chat)
commands.command("route")(ask.route)
commands.add_typer(pool.commands, name="pool")
commands.command("train")(train.train)
commands.add_typer(evaluate.commands, name="evaluate")
commands.command("bench")(bench.bench)
commands.command("serve")(serve.serve)


def app(*arguments: Any, **options: Any) -> None:
    """Run the command line; what the user can mend is printed without a traceback, and the exit status is 1.

    That is an error of this package, or of the system: a file, or a model on the hub, that cannot be had.
    """
    try:
        commands(*arguments, **options)
    except (LoraRetrieverError, OSError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {type(error).__name__}", highlight=False)
        told = f"{error}\n{INSTALL_DEMO}" if "huggingface.co" in str(error) else str(error)
        Console(stderr=True, soft_wrap=True).print(told, markup=False, highlight=False)
        sys.exit(1)
