"""A composition as vLLM carries it: a `LoRARequest` whose path names the members, their contents and their weights.

vLLM's prefix cache is keyed by the name and the path of a request's adapter, its batches by the number. So the path
says all that a composition is, and the name and the number are its own: equal only where the path is.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, unquote

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Compositions", "Member", "composed_name", "folder_of", "members_of", "parse_name", "with_contents"]

NAME_PREFIX = "mix:"
_PATH_PREFIX = "lora-retriever-composition:"
_CONTENTS = "#sha256="
_FIRST_ID = 1 << 24  # vLLM numbers adapters from 1
_LAST_ID = (1 << 31) - 1  # its batches hold them as int32
_MAX_REMEMBERED = 1 << 16  # far more than are in flight at once
_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


class Member(NamedTuple):
    """One adapter of a composition.

    Attributes:
        lora_int_id: vLLM's number of the adapter.
        name: Its name; unique among the adapters that are in flight.
        path: The folder it is read from, and its contents; see `with_contents`.
        weight: What its output is multiplied with.
    """

    lora_int_id: int
    name: str
    path: str
    weight: float


def with_contents(folder: str) -> str:
    """A folder's path and the hash of the checkpoint in it, so that a cache keyed by the path is keyed by contents.

    A path that has one already, and one that is no folder (a hub name), stays as it is.
    """
    if _CONTENTS in folder or not Path(folder).is_dir():
        return folder
    digest = hashlib.sha256()
    for name in _FILES:
        file = Path(folder, name)
        if file.is_file():
            with file.open("rb") as opened:
                digest.update(name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return f"{folder}{_CONTENTS}{digest.hexdigest()}"


def folder_of(path: str) -> str:
    """The folder alone of what `with_contents` gave."""
    return path.rpartition(_CONTENTS)[0] or path


@lru_cache(maxsize=_MAX_REMEMBERED)
def _members(path: str) -> tuple[Member, ...]:
    return tuple(Member(*entry) for entry in json.loads(path.removeprefix(_PATH_PREFIX)))


def members_of(lora_request: Any) -> tuple[Member, ...]:
    """The members of a composition; empty for any other adapter of vLLM's."""
    path: str = lora_request.lora_path
    return _members(path) if path.startswith(_PATH_PREFIX) else ()


class Compositions:
    """Makes the `LoRARequest` of a composition, the same for the same members and weights.

    Two requests of one batch never share a name, nor a number, unless they are the same: vLLM holds a batch's adapters
    by both.
    """

    def __init__(self) -> None:
        self._by_path: OrderedDict[str, Any] = OrderedDict()
        self._by_name: dict[str, Any] = {}
        self._next_id = _FIRST_ID

    def request(self, name: str, members: Sequence[Member]) -> Any:
        """The `LoRARequest`.

        Args:
            name: What it is called, in answers too; a number follows where another composition was called the same.
            members: Its adapters. Their order does not matter: they are summed in one.
        """
        from vllm.lora.request import LoRARequest  # noqa: PLC0415 - read in processes without vLLM too

        path = _PATH_PREFIX + json.dumps(sorted(members, key=lambda member: (member.path, member.name)))
        known = self._by_path.get(path)
        if known is None:
            unique = f"{name}#{self._next_id}" if name in self._by_name else name
            known = self._by_path[path] = LoRARequest(unique, self._next_id, path)
            self._by_name[unique] = known
            self._next_id = _FIRST_ID if self._next_id == _LAST_ID else self._next_id + 1
            if len(self._by_path) > _MAX_REMEMBERED:
                _, oldest = self._by_path.popitem(last=False)
                del self._by_name[oldest.lora_name]
        self._by_path.move_to_end(path)
        return known

    def named(self, name: object) -> Any:
        """One that was made, by the name of its `LoRARequest`; None if there is none."""
        return self._by_name.get(name) if isinstance(name, str) else None


def composed_name(weights: Mapping[str, float]) -> str:
    """What a composition is called in a request: `mix:json=0.3,sql=0.7`, sorted; reserved characters encoded."""
    parts = (f"{quote(name, safe=' /@:.+-_')}={float(weight)!r}" for name, weight in sorted(weights.items()))
    return NAME_PREFIX + ",".join(parts)


def parse_name(name: str) -> dict[str, float]:
    """The weights that `mix:sql=0.7,json=0.3` names.

    Raises:
        InvalidRequestError: If it is not of this form, a weight is no finite number, or an adapter is named twice.
    """
    weights: dict[str, float] = {}
    for part in name.removeprefix(NAME_PREFIX).split(","):
        adapter, _, weight = part.rpartition("=")
        adapter = unquote(adapter.strip())
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not adapter or not math.isfinite(value) or adapter in weights:
            raise InvalidRequestError(
                f"model={shown(name)} is not allowed: {shown(part)} is not an adapter and a finite weight, or names an "
                "adapter again. Write mix:NAME=WEIGHT,NAME=WEIGHT, with ',', '=' and '%' in names as %2C, %3D and %25."
            )
        weights[adapter] = value
    return weights
