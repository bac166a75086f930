"""`lora-retriever pool`: look at a folder of adapters, and change it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from langchain_lora_retriever.cli.options import (
    BaseModelOption,
    EncoderOption,
    FolderArgument,
    JsonOption,
    WordsOption,
    complete_adapter,
    make_chat_model,
    make_encoder,
    new_commands,
)
from langchain_lora_retriever.cli.pool_listing import ListedAdapter, list_plain_pool
from langchain_lora_retriever.cli.terminal import (
    bar,
    hint,
    new_progress,
    print_facts,
    print_json,
    print_table,
    status,
    warn,
    without_warnings,
)
from langchain_lora_retriever.pool.samples import read_samples

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_lora_retriever.errors import AdapterError
    from langchain_lora_retriever.pool.calibration import Calibration
    from langchain_lora_retriever.pool.pool import AdapterPool
    from langchain_lora_retriever.pool.task import TaskEntry
    from langchain_lora_retriever.retrieval.retriever import LoraRetriever

__all__ = ["commands"]

commands = new_commands("List, add, describe, update, remove, inspect and calibrate the adapters of a pool.")

NewFolderArgument = Annotated[
    Path, typer.Argument(help="Folder of the pool; made if it is not there.", file_okay=False)
]
NameArgument = Annotated[str, typer.Argument(help="Name of the adapter.", autocompletion=complete_adapter)]
SamplesOption = Annotated[
    Path | None,
    typer.Option(
        "--samples", metavar="FILE", help="JSON lines with an input each.", show_default=False,
        exists=True, dir_okay=False,
    ),
]  # fmt: skip
SamplesFromOption = Annotated[
    str | None,
    typer.Option(
        "--samples-from", metavar="dataset", show_default=False,
        help="Without samples, draw some from the data set that the model card names.",
    ),
]  # fmt: skip
RevisionOption = Annotated[
    str | None,
    typer.Option("--revision", metavar="NAME", help="Branch, tag or commit of the repository.", show_default=False),
]
SubfolderOption = Annotated[
    str | None,
    typer.Option("--subfolder", metavar="PATH", help="Where in the repository the adapter lies.", show_default=False),
]
ConvertOption = Annotated[
    bool,
    typer.Option(
        "--convert", metavar="", help="Where the weights are a pickle, convert it first, as `pool convert` does."
    ),
]


@commands.command("list", short_help="List the adapters; say who is not found or not used.")
def list_adapters(folder: FolderArgument, *, as_json: JsonOption = False) -> None:
    """List a pool's adapters, those that no prompt finds, and those that were refused.

    A pool of plain checkpoints is listed without reading their weights; `pool inspect` reads all of it.
    """
    adapters, rejected = list_plain_pool(folder), dict[str, str]()
    tasks: Mapping[str, TaskEntry] = {}
    if adapters is None:
        with status("Reading the pool"), without_warnings():
            pool = _open(folder)
        adapters = [_listed(pool, name) for name in pool.names]
        rejected = {name: str(error) for name, error in pool.rejected.items()}
        tasks = pool.tasks
    undescribed = [adapter.name for adapter in adapters if not adapter.is_described]
    if as_json:
        rows = [{**adapter._asdict(), "is_described": adapter.is_described} for adapter in adapters]
        members = {name: dict(task.members) for name, task in tasks.items()}
        print_json({"adapters": rows, "tasks": members, "undescribed": undescribed, "rejected": rejected})
        return
    print_table(
        ("adapter", "state", "rank", "modules", "parameters", "samples", "found by", "from"),
        [
            *(
                (
                    adapter.name,
                    "described" if adapter.is_described else "undescribed",
                    str(adapter.rank),
                    str(adapter.num_modules),
                    f"{adapter.num_parameters:,}",
                    str(adapter.num_samples),
                    adapter.described_by or "",
                    adapter.hub or "",
                )
                for adapter in adapters
            ),
            *(
                (name, "task", "", "", "", str(len(task.samples)), "samples", _members(task))
                for name, task in tasks.items()
            ),
            *((name, "rejected", "", "", "", "", "", "") for name in rejected),
        ],
    )
    if undescribed:
        hint(
            f"No prompt finds the undescribed ({len(undescribed)}): they run only where they are pinned. Describe one: "
            f"lora-retriever pool describe {folder} {undescribed[0]} --samples samples.jsonl"
        )
    for reason in rejected.values():
        warn(f"rejected: {reason}")


@commands.command(short_help="Add an adapter, from a folder or the hub.")
def add(
    folder: NewFolderArgument,
    name: Annotated[str, typer.Argument(help="Name of the adapter from now on.")],
    checkpoint: Annotated[str, typer.Argument(help="Folder of the PEFT checkpoint, or a repository: user/repo.")],
    *,
    samples: SamplesOption = None,
    samples_from: SamplesFromOption = None,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    convert: ConvertOption = False,
    as_json: JsonOption = False,
) -> None:
    """Add an adapter, from a folder or from the Hugging Face hub; the checkpoint is copied into the pool."""
    is_new = not folder.exists()
    pool = _open(folder, create=True)
    try:
        pool.add(
            name, checkpoint, samples=_read(samples), samples_from=samples_from, revision=revision, subfolder=subfolder,
            convert=convert,
        )  # fmt: skip
    except BaseException:
        if is_new and not len(pool):
            with suppress(OSError):  # whatever else has come into it meanwhile stays
                folder.rmdir()
        raise
    _confirm(f"Added {name!r}: {len(pool)} adapters.", {"added": name, "num_adapters": len(pool)}, as_json=as_json)


@commands.command(short_help="Turn a pickle of weights into safetensors.")
def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Folder of a PEFT checkpoint with an adapter_model.bin.", exists=True, file_okay=False),
    ],
    *,
    as_json: JsonOption = False,
) -> None:
    """Write a pickle's tensors beside it as safetensors; it is read in a process that can do nothing else."""
    from langchain_lora_retriever.pool.conversion import convert_pickle  # noqa: PLC0415 - loads torch

    written = convert_pickle(checkpoint, checkpoint.resolve().name)
    text = f"{checkpoint} has its weights as safetensors already." if written is None else f"Wrote {written}."
    _confirm(text, {"written": None if written is None else str(written)}, as_json=as_json)


@commands.command(short_help="Replace weights, samples, or both.")
def update(
    folder: FolderArgument,
    name: NameArgument,
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="Folder of the new PEFT checkpoint, or a repository; without it the weights stay."),
    ] = None,
    *,
    samples: SamplesOption = None,
    samples_from: SamplesFromOption = None,
    revision: RevisionOption = None,
    subfolder: SubfolderOption = None,
    convert: ConvertOption = False,
    as_json: JsonOption = False,
) -> None:
    """Replace an adapter's weights, its samples, or both; what is not given stays."""
    pool = _open(folder)
    adapter = pool.update(
        name, checkpoint, samples=_read(samples), samples_from=samples_from, revision=revision, subfolder=subfolder,
        convert=convert,
    )  # fmt: skip
    _confirm(f"Updated {name!r}.", {"updated": name, "fingerprint": adapter.fingerprint}, as_json=as_json)


@commands.command(short_help="Have prompts find an adapter by samples.")
def describe(
    folder: FolderArgument,
    name: NameArgument,
    *,
    samples: Annotated[
        Path,
        typer.Option("--samples", metavar="FILE", help="JSON lines with an input each.", exists=True, dir_okay=False),
    ],
    as_json: JsonOption = False,
) -> None:
    """Have prompts find an adapter by these samples, whatever it was found by until now."""
    pool = _open(folder)
    pool.update(name, samples=_read(samples))
    num_samples = len(pool.samples(name))
    value = {"described": name, "num_samples": num_samples}
    _confirm(f"Described {name!r} by {num_samples} samples.", value, as_json=as_json)


@commands.command(short_help="Find the adapters that answer your samples best.")
def calibrate(
    folder: FolderArgument,
    *,
    samples: Annotated[
        Path,
        typer.Option(
            "--samples",
            metavar="FILE",
            help="JSON lines with an input and an output each.",
            exists=True,
            dir_okay=False,
        ),
    ],
    base_model: BaseModelOption = None,
    keep: Annotated[
        int, typer.Option("--keep", metavar="N", help="Number of adapters that a task stands for.", min=1, max=8)
    ] = 3,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME", help="Add the outcome as a task of this name.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the adapters that answer your own samples best, and make a task that stands for them."""
    from langchain_lora_retriever.evaluation import AnswerLikelihood  # noqa: PLC0415 - seconds to import
    from langchain_lora_retriever.pool.calibration import check_answered  # noqa: PLC0415 - loads torch

    given = read_samples(samples, where=str(samples))
    check_answered(given)
    llm = make_chat_model(base_model, folder, None)
    if task is not None:
        llm.pool.check_free(task)  # now, and not after minutes of scoring
    with status(f"Loading {llm.model_name}"):
        engine = llm.runtime.ready()
    with new_progress() as progress:
        found = llm.pool.calibrate(
            given,
            AnswerLikelihood(engine),
            keep=keep,
            exclude=llm.runtime.rejected,
            progress=bar(progress, "Scoring"),
        )
    llm.runtime.close()
    added = None
    try:
        if task is not None:
            llm.pool.add_task(task, found.members, given)
            added = task
    finally:  # minutes of scoring are not lost if the task cannot be added
        if as_json:
            print_json({**found.to_dict(), "task": added})
        else:
            _print_calibration(found)
    if added is not None and not as_json:
        hint(f"Added the task {added!r}.")


def _print_calibration(found: Calibration) -> None:
    rows = [
        (
            row.name or "the base model",
            f"{row.log_likelihood:.4f}",
            str(row.num_samples),
            f"{found.members[row.name]:.3f}" if row.name and row.name in found.members else "",
        )
        for row in (*found.adapters, found.base)
    ]
    print_table(("adapter", "mean log-likelihood", "samples", "share"), rows)


@commands.command(short_help="Remove an adapter and its folder.")
def remove(folder: FolderArgument, name: NameArgument, *, as_json: JsonOption = False) -> None:
    """Remove an adapter and its folder."""
    pool = _open(folder)
    pool.remove(name)
    _confirm(f"Removed {name!r}: {len(pool)} left.", {"removed": name, "num_adapters": len(pool)}, as_json=as_json)


@commands.command(short_help="Show an adapter, or what samples say of the pool.")
def inspect(
    folder: FolderArgument,
    name: Annotated[
        str | None,
        typer.Argument(help="Name of one adapter or task; without it the whole pool.", autocompletion=complete_adapter),
    ] = None,
    *,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="MODEL",
            help="Hub name or folder: load it and say which adapters do not fit it.",
            show_default=False,
        ),
    ] = None,
    encoder: EncoderOption = None,
    words: WordsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what an adapter is made of and found by; or what the pool's samples say about it, and who cannot be used."""
    pool = _open(folder)
    if name is not None:
        described = _describe(pool, name)
        if as_json:
            print_json(described)
        else:
            modules = described.get("modules", ())
            if len(modules) > 5:
                described["modules"] = [*modules[:4], f"... {len(modules) - 4} more"]
            print_facts(described)
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
        "strangers (without an adapter)": f"{inspection.strangers:.1%} of the samples would reach it without their own",
        "twins (cannot be told apart)": [
            f"{pair.first} and {pair.second} ({pair.similarity:.3f})" for pair in inspection.twins
        ]
        or "none",
        "reaches (samples that find others)": [
            f"{reach.share:.0%} of {reach.samples_of} find {reach.find}" for reach in inspection.reaches
        ]
        or "none",
        "undescribed (pinned only)": ", ".join(pool.undescribed) or "none",
        "cannot be used": [f"{name}: {reason}" for name, reason in rejected.items()] or "none",
    }
    print_facts(facts)


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


def _read(samples: Path | None) -> list[dict[str, Any]] | None:
    if samples is None:
        return None
    return [{"input": sample.input, "output": sample.output} for sample in read_samples(samples, where=str(samples))]


def _open(folder: Path, *, create: bool = False) -> AdapterPool:
    from langchain_lora_retriever.pool.pool import AdapterPool  # noqa: PLC0415 - loads torch

    return AdapterPool(folder, create=create)


def _members(task: TaskEntry) -> str:
    return ", ".join(f"{name} {share:.2f}" for name, share in task.members)


def _listed(pool: AdapterPool, name: str) -> ListedAdapter:
    entry, adapter = pool.state[name], pool[name]
    return ListedAdapter(
        name=name,
        base_model=adapter.base_model,
        rank=adapter.rank,
        num_modules=len(adapter.shapes),
        num_parameters=adapter.num_parameters,
        num_samples=len(pool.samples(name)),
        has_embedding=pool.embedding(name) is not None,
        described_by=entry.described_by,
        hub=None if entry.hub is None else str(entry.hub),
    )


def _describe(pool: AdapterPool, name: str) -> dict[str, Any]:
    if name in pool.tasks:
        task = pool.tasks[name]
        return {"name": name, "members": dict(task.members), "samples": [sample.input for sample in task.samples]}
    adapter, listed = pool[name], _listed(pool, name)
    return {
        **listed._asdict(),
        "is_described": pool.state[name].is_described,
        "fingerprint": adapter.fingerprint,
        "path": str(adapter.path),
        "is_dora": adapter.is_dora,
        "invocation_tokens": list(adapter.invocation_tokens),
        "modules": sorted(adapter.weights),
        "samples": [sample.input for sample in pool.samples(name)],
        "card_text": list(pool.state[name].card_text),
        "note": pool.state[name].note,
    }


def _confirm(text: str, value: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        typer.echo(text)
