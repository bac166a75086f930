"""`lora-retriever train`: fine-tune an encoder on a pool's samples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from langchain_lora_retriever.cli.options import FolderArgument, JsonOption
from langchain_lora_retriever.cli.terminal import print_json

__all__ = ["train"]


def train(
    pool: FolderArgument,
    output: Annotated[Path, typer.Argument(help="Folder for the trained encoder.", file_okay=False)],
    *,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", metavar="MODEL", help="What to start from; the default encoder if not given."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Maximum number of optimizer steps.", min=1)] = 100,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Another seed draws other batches.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", metavar="", help="Go on from the last checkpoint in the folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the encoder so that samples of one adapter lie together, with a contrastive loss."""
    from langchain_lora_retriever.pool.pool import AdapterPool  # noqa: PLC0415 - seconds to import
    from langchain_lora_retriever.retrieval.retriever import DEFAULT_ENCODER  # noqa: PLC0415
    from langchain_lora_retriever.retrieval.training import TrainingConfig, train_encoder  # noqa: PLC0415

    adapters = AdapterPool(pool)
    report = train_encoder(
        {name: [sample.input for sample in adapters.samples(name)] for name in adapters.names},
        encoder or DEFAULT_ENCODER,
        output_dir=output,
        config=TrainingConfig(num_steps=steps, seed=seed),
        resume=resume,
        show_progress=not as_json and sys.stderr.isatty(),
    )
    if as_json:
        print_json(report.to_dict())
        return
    typer.echo(f"{report.num_steps} steps in {report.seconds:.0f} s; the encoder is in {report.output_dir}.")
    for k, before in report.accuracy_before.items():
        typer.echo(f"held-out top {k}: {before:.1%} before, {report.accuracy_after[k]:.1%} after")
