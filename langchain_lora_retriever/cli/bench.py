"""`lora-retriever bench`: what batching over adapters brings on this machine."""

from __future__ import annotations

import asyncio
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_lora_retriever.cli.options import (
    BaseModelOption,
    EncoderOption,
    JsonOption,
    PoolOption,
    make_chat_model,
    warm_up,
)
from langchain_lora_retriever.cli.terminal import print_json, print_table, status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.chat.model import ChatLoraRetriever

__all__ = ["bench"]


def bench(
    *,
    base_model: BaseModelOption = None,
    pool: PoolOption = None,
    encoder: EncoderOption = None,
    prompts: Annotated[
        int, typer.Option("--prompts", metavar="N", help="Prompts, drawn from the adapters' samples.", min=1)
    ] = 32,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", help="Maximum number of tokens of an answer.", min=1)
    ] = 24,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Picture to draw (needs matplotlib).", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure tokens per second one by one and together, on prompts that need many different adapters."""
    with status("Reading the pool"):
        llm = make_chat_model(base_model, pool, encoder, max_tokens=max_tokens)
    texts = _texts(llm, prompts)
    warm_up(llm)
    llm.invoke(texts[0])  # the first step is slower than those after it
    runs = {"one by one": 1, "8 at once": 8, "all at once": prompts}
    results = []
    for label, limit in runs.items():
        with status(f"{prompts} prompts, {label}"):
            results.append({"run": label, **_measure(llm, texts, limit)})
    if plot is not None:
        from langchain_lora_retriever.evaluation.plots import plot_throughput  # noqa: PLC0415 - seconds to import

        speeds = dict(zip(runs.values(), (row["tokens_per_second"] for row in results), strict=True))
        plot_throughput(plot, {llm.model_name: speeds})
    device = llm.runtime.engine.info.device or platform.processor() or platform.machine()
    if as_json:
        print_json({"device": device, "base_model": llm.model_name, "prompts": len(texts), "results": results})
        return
    rows = [
        (
            row["run"],
            f"{row['seconds']:.1f}",
            str(row["tokens"]),
            f"{row['tokens_per_second']:.0f}",
            str(row["adapters"]),
        )
        for row in results
    ]
    columns = ("run", "seconds", "tokens", "tokens/s", "adapters")
    print_table(columns, rows, title=f"{llm.model_name} on {device}")


def _texts(llm: ChatLoraRetriever, num: int) -> list[str]:
    columns = [[sample.input for sample in llm.pool.samples(name)] for name in llm.pool.names]
    texts = [column[i] for i in range(max(map(len, columns), default=0)) for column in columns if i < len(column)]
    texts = texts or ["Tell me something about rivers.", "What is two plus two?"]
    return (texts * (num // len(texts) + 1))[:num]


def _measure(llm: ChatLoraRetriever, texts: Sequence[str], limit: int) -> dict[str, Any]:
    start = time.perf_counter()
    answers = asyncio.run(llm.abatch(list(texts), config={"max_concurrency": limit}))
    seconds = time.perf_counter() - start
    tokens = sum(answer.usage_metadata["output_tokens"] for answer in answers if answer.usage_metadata)
    names = {adapter["name"] for answer in answers for adapter in answer.response_metadata["adapters"]}
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds, "adapters": len(names)}
