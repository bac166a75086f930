"""What a pool knows of an adapter: the adapter, what prompts find it by, and where both come from; read and written."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from langchain_lora_retriever.errors import InvalidAdapterError, InvalidSamplesError
from langchain_lora_retriever.pool.card import CARD_FILE, MAX_CARD_BYTES, read_card
from langchain_lora_retriever.pool.checkpoint import adapter_of
from langchain_lora_retriever.pool.checkpoint_files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_FILE,
)
from langchain_lora_retriever.pool.origin import (
    ORIGIN_FILE,
    Description,
    HubOrigin,
    Origin,
    SamplesFrom,
    format_origin,
    read_origin,
)
from langchain_lora_retriever.pool.regular_files import (
    AdapterFolder,
    RegularFile,
    parse_json,
    read_one_version,
    said,
)
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
    from typing import Any

    from numpy.typing import ArrayLike, NDArray

    from langchain_lora_retriever.pool.folder import FingerprintCache
    from langchain_lora_retriever.types import Adapter

__all__ = [
    "EMBEDDING_FILE",
    "EMBEDDING_INFO",
    "MAX_EMBEDDING_BYTES",
    "MAX_INFO_BYTES",
    "PoolEntry",
    "check_encoder",
    "make_embedding",
    "read_entry",
    "write_entry",
]

EMBEDDING_FILE = "embedding.npy"
EMBEDDING_INFO = "embedding.json"
MAX_INFO_BYTES = 1 << 16
_MAX_NPY_HEADER = 1000
_MAX_NUMBERS = 1 << 18
"""Of an embedding, given or in a file."""
MAX_EMBEDDING_BYTES = 8 * _MAX_NUMBERS + 2 * _MAX_NPY_HEADER  # as many in doubles, and what says that they are
_MAX_ENCODER_LENGTH = 1000
_MAX_CONTAINERS = 100
_COPY_BYTES = 16 << 20


@dataclass(frozen=True, eq=False)
class PoolEntry:
    """An adapter and what it is found by.

    Attributes:
        adapter: The adapter.
        samples: Samples of its training data; may be empty.
        embedding: Given embedding `[d]`, float32, of length 1; None to embed the samples.
        encoder: Name of the encoder that made `embedding`, if known.
        samples_from: Where the samples come from.
        card_text: What the model card says it is for, where there are neither samples nor an embedding.
        note: More about where what it is found by comes from, for people.
        hub: Where on the hub the adapter is from; None if it is not.
    """

    adapter: Adapter
    samples: tuple[Sample, ...] = ()
    embedding: NDArray[np.float32] | None = None
    encoder: str | None = None
    samples_from: SamplesFrom = "samples"
    card_text: tuple[str, ...] = ()
    note: str = ""
    hub: HubOrigin | None = None

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.adapter.name

    @property
    def described_by(self) -> Description | None:
        """What prompts find it by; None if there is nothing, and it runs only where it is pinned."""
        if self.embedding is not None:
            return "embedding"
        if self.samples:
            return self.samples_from
        return "card text" if self.card_text else None

    @property
    def is_described(self) -> bool:
        """Whether there is anything to find it by; without, it runs only where it is pinned."""
        return self.described_by is not None

    def is_described_like(self, other: PoolEntry) -> bool:
        """Whether all but the adapter is the same: what it is found by, outputs included, and where it comes from."""
        mine, theirs = ((e.samples, e.encoder, e.samples_from, e.card_text, e.note, e.hub) for e in (self, other))
        return self.routing_hash == other.routing_hash and mine == theirs

    @property
    def routing_texts(self) -> tuple[str, ...]:
        """The texts whose embeddings' mean is its own: its samples' inputs, or else what its card says."""
        return tuple(sample.input for sample in self.samples) or self.card_text

    @cached_property
    def routing_hash(self) -> str:
        """Sha256 of what the adapter is found by: its embedding, or else its texts."""
        if self.embedding is not None:
            return hashlib.sha256(self.embedding.tobytes()).hexdigest()
        return hash_inputs(self.routing_texts if self.samples else ("card", *self.card_text))


def make_embedding(values: ArrayLike, *, where: str) -> NDArray[np.float32]:
    """Check a given embedding and scale it to length 1.

    Raises:
        InvalidSamplesError: If it is no vector of finite numbers, or all zeros.
    """
    try:
        vector = np.asarray(values, dtype=np.float32)
    except Exception as error:  # whatever numpy makes of it: it is no vector
        raise InvalidSamplesError(f"{where}: the embedding holds no numbers: {said(error)}") from error
    if vector.ndim != 1 or not 0 < vector.size <= _MAX_NUMBERS:
        raise InvalidSamplesError(
            f"{where}: the embedding has shape {shown(vector.shape)}; allowed is one vector [d] of up to "
            f"{_MAX_NUMBERS:,} numbers."
        )
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(norm) or norm == 0:
        raise InvalidSamplesError(f"{where}: the embedding has length {norm}; allowed is finite and above 0.")
    unit = (vector / norm).astype(np.float32)
    unit.setflags(write=False)
    return unit


def read_entry(
    path: Path,
    name: str,
    *,
    base_model: str | None = None,
    cache: FingerprintCache | None = None,
    guard: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> PoolEntry:
    """Read an adapter and whatever lies beside it; samples and embedding may both be missing.

    Args:
        path: Its folder.
        name: Its name.
        base_model: Refuse adapters whose configuration names another base model.
        cache: Where to look for its fingerprint, and to keep it.
        guard: Keeps out writers who replace the folder; entered once one of them came in between.

    Raises:
        AdapterError: If any of the files cannot be used.
    """

    def read(folder: AdapterFolder) -> PoolEntry:
        known = cache.get(folder) if cache is not None else None
        adapter = adapter_of(folder, name, base_model=base_model, fingerprint=known)
        where = f"adapter {name!r}"
        samples = _read_samples(folder, where)
        embedding, encoder = _read_embedding(folder, where)
        return _with_origin(PoolEntry(adapter, samples, embedding, encoder), folder)

    def read_and_keep(folder: AdapterFolder) -> PoolEntry:
        entry = read(folder)
        if cache is not None and folder.is_unchanged():
            cache.put(folder, entry.adapter.fingerprint)
        return entry

    return read_one_version(path, f"adapter {name!r} ({path})", read_and_keep, guard=guard)


def _with_origin(entry: PoolEntry, folder: AdapterFolder) -> PoolEntry:
    """The entry, told where it is from; one that has neither samples nor an embedding with what its card says."""
    origin = read_origin(folder)
    entry = replace(entry, hub=origin.hub)
    if entry.samples and origin.samples_hash == hash_inputs(entry.routing_texts):
        return replace(entry, samples_from=origin.samples_from, note=origin.note)
    if entry.is_described:
        return entry
    card = read_card(folder)
    return replace(
        entry,
        samples=card.examples,
        samples_from="card examples" if card.examples else "samples",
        card_text=() if card.examples else card.text,
        note=f"of its card {CARD_FILE}, {card.problem}" if card.problem else "",
    )


def _read_samples(folder: AdapterFolder, where: str) -> tuple[Sample, ...]:
    file = str(folder.path / SAMPLES_FILE)
    try:
        data = folder.read(SAMPLES_FILE, MAX_SAMPLES_BYTES)
    except OSError as error:
        raise InvalidSamplesError(f"{where}: cannot read {file}: {said(error)}") from error
    return () if data is None else parse_samples(data, file=file, where=where)


def _read_embedding(folder: AdapterFolder, where: str) -> tuple[NDArray[np.float32] | None, str | None]:
    """The embedding `[d]` of length 1 and the name of its encoder, as far as there are files of them."""
    try:
        data = folder.read(EMBEDDING_FILE, MAX_EMBEDDING_BYTES)
        if data is None:
            return None, None
        values = _parse_npy(data)
        info = folder.read(EMBEDDING_INFO, MAX_INFO_BYTES)
        encoder = None if info is None else parse_json(info, _MAX_CONTAINERS)["encoder"]
    except Exception as error:  # whatever parsers make of a stranger's bytes
        raise InvalidSamplesError(f"{where}: cannot read {folder.path / EMBEDDING_FILE}: {said(error)}") from error
    return make_embedding(values, where=where), check_encoder(encoder, where=where)


def check_encoder(encoder: object, *, where: str) -> str | None:
    """The name of the encoder that made an embedding, if there is one.

    Raises:
        InvalidSamplesError: If it is no short name.
    """
    if encoder is None or (isinstance(encoder, str) and encoder.isprintable() and len(encoder) <= _MAX_ENCODER_LENGTH):
        return encoder
    raise InvalidSamplesError(f"{where}: the embedding has encoder={shown(encoder)}; allowed is a short name, or none.")


def _parse_npy(data: bytes) -> NDArray[Any]:
    """The vector in an .npy file, without reserving what its header promises."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream, max_header_size=_MAX_NPY_HEADER)
    rest = data[stream.tell() :]
    if dtype.kind not in "fiu" or len(shape) != 1 or shape[0] * dtype.itemsize != len(rest):
        raise ValueError(f"it declares {shown(shape)} of {dtype} in {len(rest)} bytes; allowed is one vector [d]")
    return np.frombuffer(rest, dtype)


def write_entry(folder: Path, entry: PoolEntry, *, source: Path) -> None:
    """Write an adapter's files into an existing folder.

    Args:
        folder: Where to.
        entry: Samples and embedding to write.
        source: Folder whose checkpoint is copied.

    Raises:
        InvalidAdapterError: If the checkpoint cannot be copied.
    """
    for name, max_bytes in ((CONFIG_FILE, MAX_CONFIG_BYTES), (WEIGHTS_FILE, MAX_WEIGHTS_BYTES)):
        try:
            _copy(source / name, folder / name, max_bytes)
        except OSError as error:
            raise InvalidAdapterError(
                f"adapter {entry.adapter.name!r}: cannot copy {source / name}: {said(error)}"
            ) from error
    if entry.samples:
        write_samples(folder / SAMPLES_FILE, entry.samples)
    if not entry.samples and entry.card_text:
        with contextlib.suppress(FileNotFoundError):
            _copy(source / CARD_FILE, folder / CARD_FILE, MAX_CARD_BYTES)
    if entry.hub is not None or entry.samples_from != "samples":
        origin = Origin(entry.hub, entry.samples_from, hash_inputs(entry.routing_texts), entry.note)
        (folder / ORIGIN_FILE).write_text(format_origin(origin), encoding="utf-8")
    if entry.embedding is not None:
        np.save(folder / EMBEDDING_FILE, entry.embedding, allow_pickle=False)
        if entry.encoder is not None:
            info = json.dumps({"encoder": entry.encoder})
            (folder / EMBEDDING_INFO).write_text(info, encoding="utf-8")


def _copy(source: Path, target: Path, max_bytes: int) -> None:
    """Copy a regular file of at most `max_bytes`."""
    with contextlib.closing(RegularFile(source, max_bytes)) as file, target.open("wb") as stream:
        for offset in range(0, file.identity.num_bytes, _COPY_BYTES):
            stream.write(file.read(_COPY_BYTES, offset))
