"""Task entries: found by samples as adapters are, without one of their own, they stand for the best of others."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.errors import InvalidAdapterError, InvalidRequestError
from langchain_lora_retriever.pool.regular_files import AdapterFolder, parse_json, read_one_version, said
from langchain_lora_retriever.pool.samples import (
    MAX_SAMPLES_BYTES,
    SAMPLES_FILE,
    Sample,
    hash_inputs,
    parse_samples,
    write_samples,
)
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

__all__ = ["MAX_MEMBERS", "TASK_FILE", "TaskEntry", "make_members", "read_task", "write_task"]

TASK_FILE = "task.json"
_MAX_BYTES = 1 << 16
_MAX_CONTAINERS = 10
MAX_MEMBERS = 8  # as many adapters as a request may run
_MAX_NAME = 255


@dataclass(frozen=True, eq=False)
class TaskEntry:
    """A task, and the adapters that answer it best.

    Attributes:
        name: Its name among the pool's.
        samples: Of the task; prompts like them find it.
        members: Names of adapters and their shares, the largest first; they sum to 1.
    """

    name: str
    samples: tuple[Sample, ...]
    members: tuple[tuple[str, float], ...]

    is_described = True
    embedding = encoder = None

    @property
    def routing_texts(self) -> tuple[str, ...]:
        """The texts whose embeddings' mean is its own."""
        return tuple(sample.input for sample in self.samples)

    @cached_property
    def routing_hash(self) -> str:
        """Sha256 of what it is found by."""
        return hash_inputs(self.routing_texts)


def make_members(members: object, *, where: str) -> tuple[tuple[str, float], ...]:
    """Check the adapters that a task stands for, and scale their shares to sum to 1.

    Args:
        members: Shares by name, finite and above 0.
        where: What to call the task in an error.

    Raises:
        InvalidRequestError: If they are something else, or a share is nothing beside another.
    """
    if not isinstance(members, Mapping) or not 0 < len(members) <= MAX_MEMBERS:
        raise InvalidRequestError(
            f"{where} has members={shown(members)}; allowed are shares by adapters' names, 1 to {MAX_MEMBERS} of them."
        )
    for name, share in members.items():
        is_name = isinstance(name, str) and 0 < len(name) <= _MAX_NAME
        is_share = isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= sys.float_info.max
        if not (is_name and is_share):
            raise InvalidRequestError(
                f"{where} has the member {shown(name)} with the share {shown(share)}; allowed are a name and a number "
                "above 0 that a float can hold."
            )
    largest = max(members.values())
    total = math.fsum(share / largest for share in members.values())
    shares = {name: share / largest / total for name, share in members.items()}
    for name, share in shares.items():
        if share == 0:
            raise InvalidRequestError(
                f"{where} has the member {shown(name)} with the share {shown(members[name])}, which is nothing beside "
                f"the largest, {shown(largest)}. Leave it out, or give it a larger share."
            )
    return tuple(sorted(shares.items(), key=lambda pair: (-pair[1], pair[0])))


def write_task(folder: Path, task: TaskEntry) -> None:
    """Write a task's files into an existing folder."""
    text = json.dumps({"members": dict(task.members)}, indent=1, ensure_ascii=False)
    (folder / TASK_FILE).write_text(text, encoding="utf-8")
    write_samples(folder / SAMPLES_FILE, task.samples)


def read_task(
    path: Path, name: str, *, guard: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
) -> TaskEntry:
    """Read a task from its folder.

    Args:
        path: The folder.
        name: The task's name.
        guard: Keeps out writers who replace the folder; entered once one of them came in between.

    Raises:
        AdapterError: If any of its files cannot be used.
    """
    where = f"task {name!r}"

    def read(folder: AdapterFolder) -> TaskEntry:
        try:
            data, samples = folder.read(TASK_FILE, _MAX_BYTES), folder.read(SAMPLES_FILE, MAX_SAMPLES_BYTES)
            value: Any = None if data is None else parse_json(data, _MAX_CONTAINERS)
            members = make_members(value.get("members") if isinstance(value, Mapping) else value, where=where)
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidAdapterError(f"{where} ({path}) cannot be read: {said(error)}") from error
        file = str(folder.path / SAMPLES_FILE)
        return TaskEntry(name, parse_samples(samples or b"", file=file, where=where), members)

    return read_one_version(path, f"{where} ({path})", read, guard=guard)
