"""What crosses between a caller and an engine in another process."""

from __future__ import annotations

import pickle
from array import array
from typing import TYPE_CHECKING, NamedTuple

from langchain_lora_retriever.errors import EngineError, LoraRetrieverError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.engine.admission import Admission
    from langchain_lora_retriever.engine.api import EngineInfo, Grammar
    from langchain_lora_retriever.types import Adapter, SamplingParams

__all__ = [
    "AdapterRef",
    "Door",
    "EngineDescription",
    "Job",
    "leaves",
    "packed_tokens",
    "portable",
    "ref_of",
    "short",
    "unpacked_tokens",
]


class AdapterRef(NamedTuple):
    """An adapter by its content.

    Attributes:
        name: For error texts.
        fingerprint: What it is.
        path: The folder that the caller read it from, which the other side may see too.
        members: Of a fusion, what it averages, with weights.
    """

    name: str
    fingerprint: str
    path: str | None
    members: tuple[tuple[AdapterRef, float], ...] = ()


class Job(NamedTuple):
    """A request.

    Attributes:
        caller: Whose it is.
        key: Which of the caller's; a request that is moved has another key at the next engine.
        prompt_token_ids: `packed_tokens`.
        sampling: With a seed: an answer that is moved goes on as it began.
        adapters: What to run.
        grammar: What the answer is constrained to.
        output_token_ids: The answer's beginning, if another engine gave one; packed too.
        avoid: Replicas that it was lost on.
    """

    caller: str
    key: int
    prompt_token_ids: bytes
    sampling: SamplingParams
    adapters: tuple[tuple[AdapterRef, float], ...]
    grammar: Grammar | None
    output_token_ids: bytes
    avoid: frozenset[str] = frozenset()


class EngineDescription(NamedTuple):
    """What of an engine does not change: all that a caller needs to make requests and to refuse hopeless ones."""

    info: EngineInfo
    tokenizer: PreTrainedTokenizerBase
    admission: Admission


class Door(NamedTuple):
    """Where a caller is let in to an engine's process.

    Attributes:
        replica_id: Whose.
        address: Host and port.
        key: Who knows it may come in.
        pid: The process, on its machine.
    """

    replica_id: str
    address: tuple[str, int]
    key: bytes
    pid: int


def packed_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as bytes, four for each."""
    return array("i", token_ids).tobytes()


def unpacked_tokens(packed: bytes) -> list[int]:
    """The other way."""
    return array("i", packed).tolist()


def ref_of(adapter: Adapter) -> AdapterRef:
    """An adapter by its content."""
    members = tuple((ref_of(member), weight) for member, weight in adapter.members)
    return AdapterRef(adapter.name, adapter.fingerprint, None if adapter.path is None else str(adapter.path), members)


def portable(error: BaseException) -> Exception:
    """An error that arrives at the other side as what it is, or told in words by one that does."""
    if isinstance(error, Exception):
        try:
            arrived = pickle.loads(pickle.dumps(error))  # noqa: S301 - what was dumped just now
        except Exception:  # noqa: BLE001 - anybody's `__reduce__`
            arrived = None
        if isinstance(arrived, LoraRetrieverError) and type(arrived) is type(error) and arrived.args == error.args:
            return error
    return EngineError(f"{type(error).__name__}: {error}")


def leaves(ref: AdapterRef) -> list[AdapterRef]:
    """What has to be there for an adapter: itself, or what it averages."""
    return [leaf for member, _ in ref.members for leaf in leaves(member)] if ref.members else [ref]


def short(fingerprint: str) -> str:
    """A fingerprint for routing: a replica tells of hundreds every second, and a mistake costs a load."""
    return fingerprint[:16]
