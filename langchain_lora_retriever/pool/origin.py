"""Where an adapter and what it is found by come from: a small file beside its weights, which this package writes."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from langchain_lora_retriever.pool.regular_files import parse_json

if TYPE_CHECKING:
    from langchain_lora_retriever.pool.regular_files import AdapterFolder

__all__ = ["ORIGIN_FILE", "Description", "HubOrigin", "Origin", "SamplesFrom", "format_origin", "read_origin"]

ORIGIN_FILE = "origin.json"
_MAX_BYTES = 1 << 16
_MAX_CONTAINERS = 100
_TEXT = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{0,1000}")

SamplesFrom: TypeAlias = Literal["samples", "dataset", "card examples"]
"""Where samples come from: given or in a samples.jsonl, drawn from a data set, shown in a model card."""
Description: TypeAlias = Literal["embedding", "samples", "dataset", "card examples", "card text"]
"""What prompts find an adapter by."""


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """A place on the hub.

    Attributes:
        repo_id: `user/name`.
        commit: The commit whose files were taken, 40 hex digits.
        revision: What was asked for: a branch, a tag or a commit.
        subfolder: Where in the repository; "" for the top.
    """

    repo_id: str
    commit: str
    revision: str = "main"
    subfolder: str = ""

    def __str__(self) -> str:
        place = f"/{self.subfolder}" if self.subfolder else ""
        return f"{self.repo_id}{place}@{self.commit[:12]}"


@dataclass(frozen=True, slots=True)
class Origin:
    """What the file holds.

    Attributes:
        hub: Where the adapter was fetched from; None for one that was not.
        samples_from: Where its samples come from.
        samples_hash: Of which samples that was said; others beside it were written by somebody else.
        note: More about where they come from, for people.
    """

    hub: HubOrigin | None = None
    samples_from: SamplesFrom = "samples"
    samples_hash: str = ""
    note: str = ""


def format_origin(origin: Origin) -> str:
    """The file's content."""
    return json.dumps(dataclasses.asdict(origin), indent=1, ensure_ascii=False)


def read_origin(folder: AdapterFolder) -> Origin:
    """Read the file in an adapter's folder. One that this package did not write says nothing, as a missing one does."""
    try:
        data = folder.read(ORIGIN_FILE, _MAX_BYTES)
        return Origin() if data is None else _parse(parse_json(data, _MAX_CONTAINERS))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return Origin()


def _parse(value: Any) -> Origin:
    hub = value["hub"]
    if hub is not None:
        hub = HubOrigin(**{name: _text(hub[name]) for name in ("repo_id", "commit", "revision", "subfolder")})
    if value["samples_from"] not in get_args(SamplesFrom):
        raise ValueError("samples_from")
    return Origin(hub, value["samples_from"], _text(value["samples_hash"]), _text(value["note"]))


def _text(value: object) -> str:
    if not isinstance(value, str) or _TEXT.fullmatch(value) is None:
        raise ValueError("text")
    return value
