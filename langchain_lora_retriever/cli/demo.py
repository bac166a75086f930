"""`lora-retriever demo`: real prompts find real adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from langchain_lora_retriever.cli.options import JsonOption, print_json

if TYPE_CHECKING:
    from langchain_lora_retriever.demo.report import DemoAnswer, DemoReport

__all__ = ["demo"]


def demo(
    *,
    rows: Annotated[int, typer.Option("--rows", help="Held-out prompts per task.", min=1)] = 3,
    seed: Annotated[int, typer.Option("--seed", help="Another seed gives other prompts.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Send held-out prompts of all tasks at once, and compare the answers with the base model's."""
    from langchain_lora_retriever.demo import demo_chat_model, demo_test_set  # noqa: PLC0415 - seconds to import
    from langchain_lora_retriever.demo.report import run_demo  # noqa: PLC0415

    errors = Console(stderr=True)
    with Progress(console=errors) as progress:
        task = progress.add_task("Loading the base model ...", total=None)
        report = run_demo(
            demo_chat_model(),
            demo_test_set(rows, seed=seed),
            lambda done, total: progress.update(
                task, completed=done, total=total, description=f"{total} answers, all in one batch"
            ),
        )
    if as_json:
        print_json(report.to_dict())
        return
    console = Console()
    for answer in report.answers:
        _print_answer(console, answer)
    _print_tables(console, report)


def _print_answer(console: Console, answer: DemoAnswer) -> None:
    adapters = ", ".join(f"{a['name']} {a['score']:.2f} ({a['weight']:.0%})" for a in answer.adapters)
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("prompt", _plain(answer.input))
    table.add_row("adapters", _plain(adapters))
    for label, condition in (("routed", "mixture"), ("base", "base")):
        colour = "green" if answer.is_right(condition) else "red"
        table.add_row(label, f"[{colour}]{_plain(answer.answers[condition].strip())}[/]")
    table.add_row("truth", _plain(answer.truth))
    console.print(table)
    console.print()


def _print_tables(console: Console, report: DemoReport) -> None:
    from langchain_lora_retriever.demo.report import METHODS  # noqa: PLC0415 - loaded by now

    table = Table("exact match", *METHODS, title=f"{len(report.answers)} prompts of {len(report.per_task)} tasks")
    matches = report.exact_match
    table.add_row("all adapters", *(f"{matches[method]:.1%}" for method in METHODS))
    masked = (f"masked {method}" for method in METHODS)
    table.add_row("right adapter masked", *(f"{matches[name]:.1%}" if name in matches else "-" for name in masked))
    console.print(table)
    console.print(
        f"Retrieval: the right adapter comes first for {report.top_1:.1%} of the prompts and is among the first three "
        f"for {report.top_3:.1%}.\n{report.num_generated} answers, {report.output_tokens} tokens in "
        f"{report.seconds:.1f} s: {report.tokens_per_second:.0f} tokens/s.",
        highlight=False,
    )


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
