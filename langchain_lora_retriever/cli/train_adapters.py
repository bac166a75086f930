"""`lora-retriever train-adapters`: make adapters for a pool of one's own."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_lora_retriever.cli.terminal import hint, status
from langchain_lora_retriever.support.parents import end_with

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from langchain_lora_retriever.adapter_training.tasks import Task
    from langchain_lora_retriever.adapter_training.train import AdapterReport, AdapterTrainer, AdapterTrainingConfig

__all__ = ["train_adapters"]


def train_adapters(
    output: Annotated[Path, typer.Argument(help="Folder of the pool that the adapters go into.", file_okay=False)],
    *,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FOLDER",
            help="A <name>.jsonl of rows for each adapter; the demo's tasks by default.",
            show_default=False,
            exists=True,
            file_okay=False,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="NAME", help="Train this one only; may be repeated.", show_default=False),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="MODEL",
            help="Hub name, folder or .gguf file; the demo's by default.",
            show_default=False,
        ),
    ] = None,
    base_model_name: Annotated[
        str | None,
        typer.Option(
            "--base-model-name",
            metavar="NAME",
            help="What adapters name as their base; --base-model by default.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="Rank, where a task names none.", min=1)] = 8,
    target_module: Annotated[
        list[str] | None,
        typer.Option(
            "--target-module",
            metavar="NAME",
            show_default=False,
            help="Module to adapt, where a task names none; may be repeated. By default the four of attention.",
        ),
    ] = None,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", help="Maximum number of rows to train on per task.", min=1)
    ] = 1500,
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", help="Passes over the rows.", min=1)] = 3,
    max_steps: Annotated[
        int | None,
        typer.Option("--max-steps", metavar="N", help="Stop each training here.", min=1, show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Rows of a step.", min=1)] = 32,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", metavar="X", help="Small ranks want a high one.")
    ] = 1e-3,
    num_samples: Annotated[
        int, typer.Option("--num-samples", metavar="N", help="Rows that each adapter is found by.", min=1)
    ] = 20,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", help="Adapters trained at a time, each in a process.", min=1)
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of weights and of the rows' order.")] = 0,
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="A GPU if there is one.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", metavar="", help="Go on after an interruption; leave finished adapters alone.")
    ] = False,
    evaluate: Annotated[
        bool,
        typer.Option("--evaluate", metavar="", help="Hold rows out, and answer them with and without the adapter."),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", help="Of an answer of --evaluate.", min=1)
    ] = 96,
) -> None:
    """Train LoRA adapters, one per task, and put them into a pool with the samples they are found by.

    Each is saved before it is tried. A line of JSON per adapter says how it went. On a CPU begin with one narrow task
    and few rows: --task NAME --batch-size 8 --max-steps 100.
    """  # fmt: skip
    from langchain_lora_retriever.adapter_training.tasks import demo_tasks, read_tasks  # noqa: PLC0415 - few need them
    from langchain_lora_retriever.adapter_training.train import (  # noqa: PLC0415 - seconds to import
        AdapterTrainingConfig,
        num_steps_of,
    )

    modules = target_module or ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = {"r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    names = tuple(task or ())
    tasks = (
        demo_tasks(names=names, max_rows=rows, seed=seed)
        if data is None
        else read_tasks(data, lora=lora, names=names, max_rows=rows, holds_out=evaluate, seed=seed)
    )
    config = AdapterTrainingConfig(
        num_epochs=epochs, max_steps=max_steps, batch_size=batch_size, learning_rate=learning_rate,
        num_samples=num_samples, max_new_tokens=max_new_tokens, seed=seed,
    )  # fmt: skip
    model, name = _base_model(base_model, base_model_name)
    steps = [num_steps_of(each, config) for each in tasks]
    hint(f"{len(tasks)} adapters, {sum(steps):,} steps of {batch_size} rows in all")
    reports = []
    for report in _reports(
        tasks, (model, output, config, name, device), workers, sum(steps), resume=resume, evaluate=evaluate
    ):
        reports.append(report)
        typer.echo(json.dumps({key: value for key, value in asdict(report).items() if value is not None}))
    for label in ("base", "adapter"):
        scores = [score for report in reports if (score := getattr(report, label)) is not None]
        if scores:
            hint(f"{label}: exact match {100 * sum(scores) / len(scores):.1f} % over {len(scores)} tasks")
    hint(f"Look at them: lora-retriever pool list {output}")


def _base_model(base_model: str | None, base_model_name: str | None) -> tuple[str, str]:
    """What to load, and what to call it."""
    if base_model is not None:
        return base_model, base_model_name or base_model
    from langchain_lora_retriever.demo.model import BASE_MODEL, base_model_arguments  # noqa: PLC0415 - few need them

    given = base_model_arguments()
    file = given.get("model_kwargs", {}).get("gguf_file")
    return str(given["base_model"] / file if file else given["base_model"]), base_model_name or BASE_MODEL


def _reports(
    tasks: Sequence[Task], where: tuple[Any, ...], workers: int, num_steps: int, *, resume: bool, evaluate: bool
) -> Iterator[AdapterReport]:
    """Train the adapters, with a bar over all of them; in processes of their own if several at a time."""
    from tqdm import tqdm  # noqa: PLC0415 - not needed for --help

    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=end_with, initargs=(os.getpid(),)) as executor:
            futures = [executor.submit(_train, each, where, resume, evaluate) for each in tasks]
            for future in tqdm(as_completed(futures), total=len(tasks), desc="adapters", disable=None):
                yield future.result()
        return
    with status("Loading the base model"):
        trainer = _trainer(*where)
    with tqdm(total=num_steps, unit="step", disable=None) as bar:
        for each in tasks:
            bar.set_description(each.name)

            def on_step(_: int, __: int, loss: float) -> None:
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")

            yield trainer.train(each, resume=resume, evaluate=evaluate, on_step=on_step)


@cache
def _trainer(model: str, output: Path, config: AdapterTrainingConfig, name: str, device: str | None) -> AdapterTrainer:
    from langchain_lora_retriever.adapter_training.train import AdapterTrainer  # noqa: PLC0415 - seconds to import

    return AdapterTrainer(model, output, config, base_model_name=name, device=device)


def _train(task: Task, where: tuple[Any, ...], resume: bool, evaluate: bool) -> AdapterReport:
    """In a process of its own, which loads the base model once."""
    return _trainer(*where).train(task, resume=resume, evaluate=evaluate)
