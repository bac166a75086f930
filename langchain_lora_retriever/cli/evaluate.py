"""`lora-retriever evaluate`: retrieval and composition on a test file."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from langchain_lora_retriever.cli.options import (
    BaseModelOption,
    EncoderOption,
    JsonOption,
    PoolOption,
    make_chat_model,
    print_json,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from langchain_lora_retriever.evaluation import CompositionReport, RetrievalReport

__all__ = ["evaluate"]


def evaluate(
    test: Annotated[Path, typer.Argument(help="JSON list of rows: inputs, targets, task, and perhaps domain, metric.")],
    *,
    base_model: BaseModelOption = None,
    pool: PoolOption = None,
    encoder: EncoderOption = None,
    rows: Annotated[int | None, typer.Option("--rows", help="Most rows per task.", min=1, show_default=False)] = None,
    retrieval_only: Annotated[bool, typer.Option("--retrieval-only", help="Generate nothing.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1)] = 48,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="File of answers already generated.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score retrieval, and the base model, selection, fusion, mixture and the oracle, on test rows."""
    from langchain_lora_retriever.evaluation import (  # noqa: PLC0415 - seconds to import
        benchmark_from_pool,
        evaluate_composition,
        evaluate_retrieval,
    )

    llm = make_chat_model(base_model, pool, encoder)
    adapters: Any = llm.pool
    benchmark = benchmark_from_pool(adapters, test)
    if rows is not None:
        benchmark = benchmark.subset(rows)
    retriever = llm._router.retriever  # noqa: SLF001 - ours
    composed = None
    with Progress(console=Console(stderr=True)) as progress:
        retrieved = evaluate_retrieval(
            benchmark, retriever.encoder, instruction=retriever.instruction, progress=_bar(progress, "Retrieving")
        )
        if not retrieval_only:
            composed = evaluate_composition(
                benchmark,
                adapters,
                llm._engine(),  # noqa: SLF001 - ours
                retriever,
                max_tokens=max_tokens,
                cache=cache,
                progress=_bar(progress, "Answering"),
            )
    if as_json:
        print_json({"retrieval": retrieved.to_dict(), "composition": composed and composed.to_dict()})
        return
    _print(Console(), retrieved, composed)


def _bar(progress: Progress, label: str) -> Callable[[int, int], None]:
    task = progress.add_task(label, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def _print(console: Console, retrieved: RetrievalReport, composed: CompositionReport | None) -> None:
    table = Table("retrieval", *(f"top {k}" for k in retrieved.accuracy), title=f"{retrieved.num_rows} rows")
    table.add_row(retrieved.encoder, *(f"{share:.1%}" for share in retrieved.accuracy.values()))
    console.print(table)
    if composed is not None:
        table = Table("composition", "all adapters", "right adapter masked")
        scores: dict[str, dict[bool, str]] = {}
        for score in composed.scores:
            scores.setdefault(score.setting.label, {})[score.is_masked] = f"{score.overall.value:.1%}"
        for label, by_mask in scores.items():
            table.add_row(label, by_mask.get(False, "-"), by_mask.get(True, "-"))
        console.print(table)
