"""What a pool holds at one moment, and what changed since an earlier one."""

from __future__ import annotations

import hashlib
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.errors import UnknownAdapterError
from langchain_lora_retriever.support.near_names import near_names
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from langchain_lora_retriever.errors import AdapterError
    from langchain_lora_retriever.pool.entry import PoolEntry
    from langchain_lora_retriever.pool.task import TaskEntry

__all__ = ["PoolState", "some"]

_NUM_NAMED = 10
_NUM_CHANGES = 1024
"""Changes that a state remembers, for those who followed the pool up to an earlier one."""


class PoolState:
    """What a pool holds at one moment. Immutable.

    Attributes:
        version: Grows with every change of the pool.
        entries: The adapters, by name, described or not.
        rejected: Why adapters were refused, by name.
        tasks: Entries without an adapter of their own, by name.
    """

    def __init__(
        self,
        version: int,
        entries: Mapping[str, PoolEntry],
        rejected: Mapping[str, AdapterError],
        tasks: Mapping[str, TaskEntry] = MappingProxyType({}),
        changes: Sequence[tuple[int, str]] = (),
    ) -> None:
        self.version = version
        self.entries = MappingProxyType(dict(entries))
        self.rejected = MappingProxyType(dict(rejected))
        self.tasks = MappingProxyType(dict(tasks))
        self._changes = tuple(changes)

    def changed(self, *names: str, **parts: Any) -> PoolState:
        """The state after some names were changed: with other `entries`, `rejected` or `tasks`."""
        version = self.version + 1
        kept = {"entries": self.entries, "rejected": self.rejected, "tasks": self.tasks}
        changes = (*self._changes, *((version, name) for name in names))
        if len(changes) > _NUM_CHANGES:
            cut, _ = changes[-_NUM_CHANGES - 1]  # of the versions that are remembered, all of their names are
            changes = tuple(change for change in changes[-_NUM_CHANGES:] if change[0] > cut)
        return PoolState(version, **{**kept, **parts}, changes=changes)

    def changed_since(self, version: int) -> frozenset[str] | None:
        """The names that were added, changed or removed after an earlier version; None if that is too long ago."""
        if version == self.version:
            return frozenset()
        if not self._changes or self._changes[0][0] > version + 1:
            return None
        return frozenset(name for changed, name in self._changes if changed > version)

    def routed(self, name: str) -> PoolEntry | TaskEntry | None:
        """What prompts find under a name; None if nothing is."""
        entry = self.entries.get(name) or self.tasks.get(name)
        return entry if entry is not None and entry.is_described else None

    def members(self, excluded: Collection[str] = ()) -> dict[str, list[tuple[str, float]]]:
        """The members of each task that can run, with their shares: neither excluded nor removed meanwhile."""
        return {
            name: [pair for pair in task.members if pair[0] in self.entries and pair[0] not in excluded]
            for name, task in self.tasks.items()
        }

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, sorted."""
        return tuple(sorted(self.entries))

    @cached_property
    def undescribed(self) -> Mapping[str, str]:
        """The adapters that no prompt can find, by name, with what to do about it; they run where they are pinned."""
        undescribed = (name for name in self.names if not self.entries[name].is_described)
        return MappingProxyType({name: _how_to_describe(name) for name in undescribed})

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of every name, adapter, sample and given embedding, and of every task."""
        digest = hashlib.sha256()
        for name in self.names:
            entry = self.entries[name]
            digest.update(f"{name}\0{entry.adapter.fingerprint}\0{entry.routing_hash}\0".encode())
            digest.update(repr([sample.output for sample in entry.samples]).encode(errors="surrogatepass"))
        for name in sorted(self.tasks):
            task = self.tasks[name]
            digest.update(f"{name}\0{task.members!r}\0{task.routing_hash}\0".encode())
            digest.update(repr([sample.output for sample in task.samples]).encode(errors="surrogatepass"))
        return digest.hexdigest()

    def __getitem__(self, name: str) -> PoolEntry:
        if isinstance(name, str) and name in self.entries:
            return self.entries[name]
        if isinstance(name, str) and name in self.rejected:
            raise UnknownAdapterError(f"adapter {name!r} was refused when the pool was loaded: {self.rejected[name]}")
        if isinstance(name, str) and name in self.tasks:
            members = ", ".join(repr(member) for member, _ in self.tasks[name].members)
            raise UnknownAdapterError(f"{name!r} is a task, not an adapter. It stands for {members}.")
        near = near_names(str(name), self.names)
        if near:
            told = f"Near names: {', '.join(map(repr, near))}."
        elif self.names:
            told = f"It has {some(list(map(repr, self.names)))}."
        else:
            told = "It is empty."
        raise UnknownAdapterError(f"no adapter {shown(name)} in the pool of {len(self.names)}. {told}")


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many there are beside them."""
    rest = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _how_to_describe(name: str) -> str:
    return (
        f"adapter {name!r} has neither samples nor an embedding, nor a model card that says what it is for: no prompt "
        "finds it, and it runs only where it is pinned. Write a samples.jsonl beside its weights, or call "
        f"pool.update({name!r}, samples=[...])."
    )
