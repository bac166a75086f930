"""`lora-retriever pool`: look at a folder of adapters, and change it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from langchain_lora_retriever.cli.options import JsonOption, print_json
from langchain_lora_retriever.samples import read_samples

if TYPE_CHECKING:
    from langchain_lora_retriever.pool import AdapterPool

__all__ = ["commands"]

commands = typer.Typer(help="List, add, remove and inspect the adapters of a pool.", no_args_is_help=True)

FolderArgument = Annotated[Path, typer.Argument(help="Folder of the pool.")]
NameArgument = Annotated[str, typer.Argument(help="Name of the adapter.")]


@commands.command("list")
def list_adapters(folder: FolderArgument, *, as_json: JsonOption = False) -> None:
    """List a pool's adapters, and those that were refused."""
    pool = _open(folder)
    rows = [_describe(pool, name) for name in pool.names]
    rejected = {name: str(error) for name, error in pool.rejected.items()}
    if as_json:
        print_json({"adapters": rows, "rejected": rejected})
        return
    table = Table("adapter", "rank", "modules", "parameters", "samples")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["rank"]),
            str(len(row["modules"])),
            f"{row['num_parameters']:,}",
            str(row["num_samples"]),
        )
    console = Console()
    console.print(table)
    for name, reason in rejected.items():
        console.print(f"refused {name}: {reason}", style="red", markup=False, highlight=False)


@commands.command()
def add(
    folder: FolderArgument,
    name: NameArgument,
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the PEFT checkpoint.")],
    *,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="JSON lines with an input each.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Add an adapter; the checkpoint is copied into the pool."""
    pool = _open(folder, create=True)
    given = (
        None
        if samples is None
        else [{"input": s.input, "output": s.output} for s in read_samples(samples, where=str(samples))]
    )
    pool.add(name, checkpoint, samples=given)
    _confirm(f"Added {name!r}: {len(pool)} adapters.", {"added": name, "num_adapters": len(pool)}, as_json=as_json)


@commands.command()
def remove(folder: FolderArgument, name: NameArgument, *, as_json: JsonOption = False) -> None:
    """Remove an adapter and its folder."""
    pool = _open(folder)
    pool.remove(name)
    _confirm(f"Removed {name!r}: {len(pool)} left.", {"removed": name, "num_adapters": len(pool)}, as_json=as_json)


@commands.command()
def inspect(folder: FolderArgument, name: NameArgument, *, as_json: JsonOption = False) -> None:
    """Show what an adapter is made of and what it is found by."""
    pool = _open(folder)
    described = _describe(pool, name)
    described["samples"] = [sample.input for sample in pool.samples(name)]
    if as_json:
        print_json(described)
        return
    table = Table.grid(padding=(0, 2))
    for key, value in described.items():
        table.add_row(key, "\n".join(map(str, value)) if isinstance(value, list) else str(value))
    Console().print(table)


def _open(folder: Path, *, create: bool = False) -> AdapterPool:
    from langchain_lora_retriever.pool import AdapterPool  # noqa: PLC0415 - loads torch

    return AdapterPool(folder, create=create)


def _describe(pool: AdapterPool, name: str) -> dict[str, Any]:
    adapter = pool[name]
    return {
        "name": name,
        "fingerprint": adapter.fingerprint,
        "base_model": adapter.base_model,
        "path": str(adapter.path),
        "rank": adapter.rank,
        "num_parameters": adapter.num_parameters,
        "modules": sorted(adapter.weights),
        "num_samples": len(pool.samples(name)),
        "has_embedding": pool.embedding(name) is not None,
    }


def _confirm(text: str, value: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        typer.echo(text)
