"""How a pool lies on disk: one folder per adapter, changed only by renaming.

::

    pool/
      sql/adapter_config.json          as PEFT wrote it
          adapter_model.safetensors
          samples.jsonl                and/or embedding.npy (+ embedding.json: which encoder made it)
      .incoming-sql/                   being written; a leftover of a crash is deleted
      .replaced-sql/                   on its way out; put back if a crash left no `sql`
      .fingerprints.json               big pools only: spares hashing unchanged files at the next start
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from langchain_lora_retriever.adapters import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from langchain_lora_retriever.errors import InvalidAdapterError, InvalidSamplesError
from langchain_lora_retriever.samples import SAMPLES_FILE, Sample, read_samples, write_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    from langchain_lora_retriever.types import Adapter

try:
    import fcntl
except ImportError:  # Windows: writers of one pool in several processes are not kept apart
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "EMBEDDING_FILE",
    "FingerprintCache",
    "PoolEntry",
    "folder_lock",
    "install",
    "list_folders",
    "make_embedding",
    "read_entry",
    "recover",
    "uninstall",
    "write_entry",
]

EMBEDDING_FILE = "embedding.npy"
_EMBEDDING_INFO = "embedding.json"
_FINGERPRINTS = ".fingerprints.json"
_INCOMING = ".incoming-"
_REPLACED = ".replaced-"
_CACHE_ABOVE_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class PoolEntry:
    """An adapter and what it is found by.

    Attributes:
        adapter: The adapter.
        samples: Samples of its training data; may be empty if there is an embedding.
        embedding: Given embedding `[d]`, float32, of length 1; None to embed the samples.
        encoder: Name of the encoder that made `embedding`, if known.
    """

    adapter: Adapter
    samples: tuple[Sample, ...] = ()
    embedding: NDArray[np.float32] | None = None
    encoder: str | None = None

    @cached_property
    def routing_hash(self) -> str:
        """Sha256 of what the adapter is found by: its embedding, or else its samples' inputs."""
        if self.embedding is not None:
            return hashlib.sha256(self.embedding.tobytes()).hexdigest()
        return hashlib.sha256(json.dumps([sample.input for sample in self.samples]).encode()).hexdigest()


def make_embedding(values: ArrayLike, *, where: str) -> NDArray[np.float32]:
    """Check a given embedding and scale it to length 1.

    Raises:
        InvalidSamplesError: If it is no vector of finite numbers, or all zeros.
    """
    try:
        vector = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidSamplesError(f"{where}: the embedding holds no numbers: {error}") from error
    if vector.ndim != 1 or vector.size == 0:
        raise InvalidSamplesError(f"{where}: the embedding has shape {vector.shape}; allowed is one vector [d].")
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(norm) or norm == 0:
        raise InvalidSamplesError(f"{where}: the embedding has length {norm}; allowed is finite and above 0.")
    unit = (vector / norm).astype(np.float32)
    unit.setflags(write=False)
    return unit


def read_entry(folder: Path, name: str, *, base_model: str | None = None, fingerprint: str | None = None) -> PoolEntry:
    """Read an adapter and whatever lies beside it; samples and embedding may both be missing.

    Raises:
        AdapterError: If any of the files cannot be honoured.
    """
    where = f"adapter {name!r}"
    adapter = read_adapter(folder, name=name, base_model=base_model, fingerprint=fingerprint)
    samples: tuple[Sample, ...] = ()
    if (folder / SAMPLES_FILE).is_file():
        samples = read_samples(folder / SAMPLES_FILE, where=where)
    file = folder / EMBEDDING_FILE
    if not file.is_file():
        return PoolEntry(adapter, samples)
    try:
        values = np.load(file, allow_pickle=False)
        info = folder / _EMBEDDING_INFO
        encoder = json.loads(info.read_text(encoding="utf-8"))["encoder"] if info.is_file() else None
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise InvalidSamplesError(f"{where}: cannot read {file}: {error}") from error
    return PoolEntry(adapter, samples, make_embedding(values, where=where), encoder)


def write_entry(folder: Path, entry: PoolEntry, *, source: Path) -> None:
    """Write an adapter's files into an existing folder.

    Args:
        folder: Where to.
        entry: Samples and embedding to write.
        source: Folder whose checkpoint is copied.

    Raises:
        InvalidAdapterError: If the checkpoint cannot be copied.
    """
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            shutil.copyfile(source / file, folder / file)
        except OSError as error:
            raise InvalidAdapterError(
                f"adapter {entry.adapter.name!r}: cannot copy {source / file}: {error}"
            ) from error
    if entry.samples:
        write_samples(folder / SAMPLES_FILE, entry.samples)
    if entry.embedding is not None:
        np.save(folder / EMBEDDING_FILE, entry.embedding, allow_pickle=False)
        if entry.encoder is not None:
            info = json.dumps({"encoder": entry.encoder})
            (folder / _EMBEDDING_INFO).write_text(info, encoding="utf-8")


def list_folders(root: Path) -> list[Path]:
    """The folders that hold an adapter or a part of one, sorted by name. Hidden and other folders are left out."""
    parts = (CONFIG_FILE, WEIGHTS_FILE, SAMPLES_FILE, "adapter_model.bin")
    return [
        folder
        for folder in sorted(root.iterdir())
        if not folder.name.startswith(".") and any((folder / part).exists() for part in parts)
    ]


@contextlib.contextmanager
def folder_lock(root: Path) -> Iterator[None]:
    """Keep other processes' writers out of the pool while the block runs."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            descriptor = os.open(root, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def install(root: Path, name: str, write: Callable[[Path], PoolEntry]) -> PoolEntry:
    """Write an adapter aside and rename it into place. Call under `folder_lock`.

    Args:
        root: The pool.
        name: The adapter; one of that name is replaced.
        write: Fills the folder it is given, and returns what it read back from it.
    """
    aside, target, old = root / f"{_INCOMING}{name}", root / name, root / f"{_REPLACED}{name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        entry = write(aside)
        if target.exists():
            target.rename(old)
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return entry


def uninstall(root: Path, name: str) -> None:
    """Rename an adapter's folder out of the pool, then delete it. Call under `folder_lock`."""
    aside = root / f"{_INCOMING}{name}"  # not _REPLACED: a crash now must not bring it back
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        (root / name).rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def recover(root: Path) -> None:
    """Undo what a crash left half done. Does nothing in a folder that may not be written to."""
    leftovers = [path for path in root.iterdir() if path.name.startswith((_INCOMING, _REPLACED))]
    if not leftovers or not os.access(root, os.W_OK):
        return
    with folder_lock(root):
        for path in leftovers:
            target = root / path.name.removeprefix(_REPLACED)
            if path.name.startswith(_REPLACED) and path.exists() and not target.exists():
                path.rename(target)
            else:
                shutil.rmtree(path, ignore_errors=True)


class FingerprintCache:
    """Fingerprints of files that have not changed, kept beside a pool too big to hash at every start.

    A file counts as unchanged while its size, inode, modification and change times are.
    """

    def __init__(self, root: Path) -> None:
        self._file = root / _FINGERPRINTS
        self._known: dict[str, list[object]] = {}
        self._seen: dict[str, list[object]] = {}
        self._hashed_bytes = 0
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._file.read_text(encoding="utf-8"))
            self._known = known if isinstance(known, dict) else {}

    def get(self, folder: Path) -> str | None:
        """The fingerprint of an adapter's folder, if it is known and no file has changed."""
        known = self._known.get(folder.name)
        if not known or known[1:] != self._stat(folder):
            return None
        return str(known[0])

    def put(self, folder: Path, fingerprint: str) -> None:
        """Remember a fingerprint."""
        with contextlib.suppress(OSError):
            if self.get(folder) is None:
                self._hashed_bytes += (folder / WEIGHTS_FILE).stat().st_size
            self._seen[folder.name] = [fingerprint, *self._stat(folder)]

    def save(self) -> None:
        """Write the file, if that would have spared much; a pool that may not be written to is left alone."""
        if self._hashed_bytes < _CACHE_ABOVE_BYTES:
            return
        aside = self._file.with_name(f"{_FINGERPRINTS}.{os.getpid()}")
        with contextlib.suppress(OSError):
            aside.write_text(json.dumps(self._seen), encoding="utf-8")
            aside.replace(self._file)

    @staticmethod
    def _stat(folder: Path) -> list[object]:
        stats = []
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            with contextlib.suppress(OSError):
                stat = (folder / file).stat()
                stats += [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        return list(stats)
