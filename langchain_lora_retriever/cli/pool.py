"""`lora-retriever pool`: look at a folder of adapters, and change it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from langchain_lora_retriever.cli.options import EncoderOption, JsonOption, WordsOption, make_encoder, print_json
from langchain_lora_retriever.pool.samples import read_samples

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_lora_retriever.errors import AdapterError
    from langchain_lora_retriever.pool.pool import AdapterPool
    from langchain_lora_retriever.retrieval.retriever import LoraRetriever

__all__ = ["commands"]

commands = typer.Typer(help="List, add, update, remove and inspect the adapters of a pool.", no_args_is_help=True)

FolderArgument = Annotated[Path, typer.Argument(help="Folder of the pool.")]
NameArgument = Annotated[str, typer.Argument(help="Name of the adapter.")]
SamplesOption = Annotated[
    Path | None, typer.Option("--samples", help="JSON lines with an input each.", show_default=False)
]


@commands.command("list")
def list_adapters(folder: FolderArgument, *, as_json: JsonOption = False) -> None:
    """List a pool's adapters, those that no prompt finds, and those that were refused."""
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
    for row in rows:
        if not row["is_routed"]:
            console.print(
                f"{row['name']} runs only where it is pinned: no prompt finds it without samples. Describe it: "
                f"lora-retriever pool update {folder} {row['name']} --samples samples.jsonl",
                style="yellow",
                markup=False,
                highlight=False,
            )
    for name, reason in rejected.items():
        console.print(f"refused {name!r}: {reason}", style="red", markup=False, highlight=False)


@commands.command()
def add(
    folder: FolderArgument,
    name: NameArgument,
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the PEFT checkpoint.")],
    *,
    samples: SamplesOption = None,
    convert: Annotated[
        bool,
        typer.Option("--convert", help="Where the weights are a pickle, convert it first, as `pool convert` does."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add an adapter; the checkpoint is copied into the pool."""
    pool = _open(folder, create=True)
    pool.add(name, checkpoint, samples=_read(samples), convert=convert)
    _confirm(f"Added {name!r}: {len(pool)} adapters.", {"added": name, "num_adapters": len(pool)}, as_json=as_json)


@commands.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a PEFT checkpoint with an adapter_model.bin.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Write a pickle's tensors beside it as safetensors; it is read in a process that can do nothing else."""
    from langchain_lora_retriever.pool.conversion import convert_pickle  # noqa: PLC0415 - loads torch

    written = convert_pickle(checkpoint, checkpoint.resolve().name)
    text = f"{checkpoint} has its weights as safetensors already." if written is None else f"Wrote {written}."
    _confirm(text, {"written": None if written is None else str(written)}, as_json=as_json)


@commands.command()
def update(
    folder: FolderArgument,
    name: NameArgument,
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Folder of the new PEFT checkpoint; without it the weights stay.")
    ] = None,
    *,
    samples: SamplesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replace an adapter's weights, its samples, or both; what is not given stays."""
    pool = _open(folder)
    adapter = pool.update(name, checkpoint, samples=_read(samples))
    _confirm(f"Updated {name!r}.", {"updated": name, "fingerprint": adapter.fingerprint}, as_json=as_json)


@commands.command()
def remove(folder: FolderArgument, name: NameArgument, *, as_json: JsonOption = False) -> None:
    """Remove an adapter and its folder."""
    pool = _open(folder)
    pool.remove(name)
    _confirm(f"Removed {name!r}: {len(pool)} left.", {"removed": name, "num_adapters": len(pool)}, as_json=as_json)


@commands.command()
def inspect(
    folder: FolderArgument,
    name: Annotated[str | None, typer.Argument(help="Name of one adapter; without it the whole pool.")] = None,
    *,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            help="Hub name or folder: load it and say which adapters do not fit it.",
            show_default=False,
        ),
    ] = None,
    encoder: EncoderOption = None,
    words: WordsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what an adapter is made of and found by; or what the pool's samples say about it, and who cannot be used."""
    pool = _open(folder)
    if name is not None:
        described = _describe(pool, name)
        described["samples"] = [sample.input for sample in pool.samples(name)]
        if as_json:
            print_json(described)
        else:
            _print_facts(described)
        return
    from langchain_lora_retriever.evaluation import inspect_pool  # noqa: PLC0415 - seconds to import
    from langchain_lora_retriever.retrieval.retriever import LoraRetriever  # noqa: PLC0415 - the same

    retriever = LoraRetriever(pool, make_encoder(encoder, words=words))
    inspection = inspect_pool(retriever)
    rejected = {name: str(error) for name, error in _rejected(retriever, base_model).items()}
    if as_json:
        print_json({**inspection.to_dict(), "rejected": rejected})
        return
    facts: dict[str, Any] = {
        "adapters": inspection.num_adapters,
        "samples": inspection.num_samples,
        "find their own adapter first": f"{inspection.accuracy:.1%}",
        "min_score": f"{inspection.min_score:.3f} ({inspection.kept:.0%} of the samples reach it)",
        "strangers": f"{inspection.strangers:.1%} of the samples would reach it without their own adapter",
        "twins": [f"{pair.first} and {pair.second} ({pair.similarity:.3f})" for pair in inspection.twins] or "none",
        "reaches": [f"{reach.share:.0%} of {reach.samples_of} find {reach.find}" for reach in inspection.reaches]
        or "none",
        "cannot be used": [f"{name}: {reason}" for name, reason in rejected.items()] or "none",
    }
    _print_facts(facts)


def _rejected(retriever: LoraRetriever, base_model: str | None) -> Mapping[str, AdapterError]:
    """Who cannot be used: with a base model, those that do not fit it too."""
    if base_model is None:
        return {**retriever.rejected, **retriever.pool.rejected}
    from langchain_lora_retriever.chat.model import ChatLoraRetriever  # noqa: PLC0415 - seconds to import

    runtime = ChatLoraRetriever(base_model=base_model, retriever=retriever).runtime
    try:
        runtime.ready()
        return dict(runtime.rejected)
    finally:
        runtime.close()


def _print_facts(facts: dict[str, Any]) -> None:
    table = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        table.add_row(key, Text("\n".join(map(str, value)) if isinstance(value, list) else str(value)))
    Console().print(table)


def _read(samples: Path | None) -> list[dict[str, Any]] | None:
    if samples is None:
        return None
    return [{"input": sample.input, "output": sample.output} for sample in read_samples(samples, where=str(samples))]


def _open(folder: Path, *, create: bool = False) -> AdapterPool:
    from langchain_lora_retriever.pool.pool import AdapterPool  # noqa: PLC0415 - loads torch

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
        "is_routed": pool.state[name].is_described,
    }


def _confirm(text: str, value: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        typer.echo(text)
