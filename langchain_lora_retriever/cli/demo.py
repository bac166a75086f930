"""`lora-retriever demo`: real prompts find real adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from langchain_lora_retriever.cli.options import JsonOption, warm_up
from langchain_lora_retriever.cli.terminal import bar, new_progress, print_json, print_table, status

if TYPE_CHECKING:
    from langchain_lora_retriever.demo.report import DemoAnswer, DemoReport

__all__ = ["demo"]


def demo(
    *,
    rows: Annotated[int, typer.Option("--rows", metavar="N", help="Held-out prompts per task.", min=1)] = 3,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Another seed gives other prompts.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Send held-out prompts of all tasks at once, and compare the answers with the base model's."""
    from langchain_lora_retriever.demo import demo_chat_model, demo_test_set  # noqa: PLC0415 - seconds to import
    from langchain_lora_retriever.demo.report import run_demo  # noqa: PLC0415

    with status("Reading the demo's pool"):
        llm = demo_chat_model()
    warm_up(llm)
    with new_progress() as progress:
        report = run_demo(llm, demo_test_set(rows, seed=seed), bar(progress, "Answers, all in one batch"))
    if as_json:
        print_json(report.to_dict())
        return
    for answer in report.answers:
        _print_answer(answer)
    _print_tables(report)


def _print_answer(answer: DemoAnswer) -> None:
    adapters = ", ".join(f"{a['name']} {a['score']:.2f} ({a['weight']:.0%})" for a in answer.adapters)
    lines = {"prompt": answer.input, "adapters": adapters}
    for label, condition in (("routed", "mixture"), ("base", "base")):
        is_right = answer.is_right(condition)
        lines[label] = typer.style(answer.answers[condition].strip(), fg="green" if is_right else "red")
    lines["truth"] = answer.truth
    for label, text in lines.items():
        first, *others = text.split("\n")
        typer.echo(f"{label:8}  {first}")
        for line in others:
            typer.echo(f"{'':8}  {line}")
    typer.echo()


def _print_tables(report: DemoReport) -> None:
    from langchain_lora_retriever.demo.report import METHODS  # noqa: PLC0415 - loaded by now

    matches = report.exact_match
    masked = (f"masked {method}" for method in METHODS)
    print_table(
        ("exact match", *METHODS),
        [
            ("all adapters", *(f"{matches[method]:.1%}" for method in METHODS)),
            ("right adapter masked", *(f"{matches[name]:.1%}" if name in matches else "-" for name in masked)),
        ],
        title=f"{len(report.answers)} prompts of {len(report.per_task)} tasks",
    )
    typer.echo(
        f"Retrieval: the right adapter comes first for {report.top_1:.1%} of the prompts and is among the first three "
        f"for {report.top_3:.1%}.\n{report.num_generated} answers, {report.output_tokens} tokens in "
        f"{report.seconds:.1f} s: {report.tokens_per_second:.0f} tokens/s."
    )
