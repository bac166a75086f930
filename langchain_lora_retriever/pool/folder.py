"""How a pool lies on disk: one folder per adapter, changed only by renaming.

::

    pool/
      sql/adapter_config.json          as PEFT wrote it
          adapter_model.safetensors
          samples.jsonl                and/or embedding.npy (+ embedding.json: which encoder made it)
      .lock                            held by whoever writes, in any process; once written to only
      .incoming-sql/                   being written; a leftover of a crash is deleted
      .replaced-sql/                   on its way out; put back if a crash left no `sql`
      .fingerprints.json               big pools only: spares hashing unchanged files at the next start
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock, Timeout

from langchain_lora_retriever.errors import InvalidAdapterError, InvalidSamplesError, PoolError
from langchain_lora_retriever.pool.checkpoint import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    PICKLE_FILE,
    WEIGHTS_FILE,
    adapter_of,
)
from langchain_lora_retriever.pool.file_weights import MAX_WEIGHTS_BYTES
from langchain_lora_retriever.pool.regular_files import (
    AdapterFolder,
    FileIdentity,
    RegularFile,
    parse_json,
    read_one_version,
    said,
)
from langchain_lora_retriever.pool.samples import MAX_SAMPLES_BYTES, SAMPLES_FILE, Sample, parse_samples, write_samples
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import Any

    from numpy.typing import ArrayLike, NDArray

    from langchain_lora_retriever.types import Adapter

__all__ = [
    "EMBEDDING_FILE",
    "FingerprintCache",
    "PoolEntry",
    "check_encoder",
    "folder_lock",
    "install",
    "list_folders",
    "make_embedding",
    "read_entry",
    "reader_lock",
    "recover",
    "uninstall",
    "write_entry",
]

EMBEDDING_FILE = "embedding.npy"
_EMBEDDING_INFO = "embedding.json"
_FINGERPRINTS = ".fingerprints.json"
_INCOMING = ".incoming-"
_REPLACED = ".replaced-"
_LOCK_FILE = ".lock"
_LOCK_SECONDS = 60.0
_CACHE_ABOVE_BYTES = 256 << 20
_MAX_CACHE_BYTES = 64 << 20
_MAX_EMBEDDING_BYTES = 1 << 20
_MAX_NPY_HEADER = 1000
_MAX_INFO_BYTES = 1 << 16
_MAX_ENCODER_LENGTH = 1000
_MAX_CONTAINERS = 100
_COPY_BYTES = 16 << 20
_LIST_TRIES = 50
_LIST_SECONDS = 0.02


@dataclass(frozen=True, eq=False)
class PoolEntry:
    """An adapter and what it is found by.

    Attributes:
        adapter: The adapter.
        samples: Samples of its training data; may be empty.
        embedding: Given embedding `[d]`, float32, of length 1; None to embed the samples.
        encoder: Name of the encoder that made `embedding`, if known.
    """

    adapter: Adapter
    samples: tuple[Sample, ...] = ()
    embedding: NDArray[np.float32] | None = None
    encoder: str | None = None

    @property
    def is_described(self) -> bool:
        """Whether there is anything to find it by; without, it runs only where it is pinned."""
        return bool(self.samples) or self.embedding is not None

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
    except Exception as error:  # whatever numpy makes of it: it is no vector
        raise InvalidSamplesError(f"{where}: the embedding holds no numbers: {said(error)}") from error
    if vector.ndim != 1 or not 0 < vector.size <= _MAX_EMBEDDING_BYTES // 4:
        raise InvalidSamplesError(
            f"{where}: the embedding has shape {shown(vector.shape)}; allowed is one vector [d] of up to "
            f"{_MAX_EMBEDDING_BYTES // 4:,} numbers."
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
        AdapterError: If any of the files cannot be honoured.
    """

    def read(folder: AdapterFolder) -> PoolEntry:
        known = cache.get(folder) if cache is not None else None
        adapter = adapter_of(folder, name, base_model=base_model, fingerprint=known)
        where = f"adapter {name!r}"
        samples = _read_samples(folder, where)
        embedding, encoder = _read_embedding(folder, where)
        return PoolEntry(adapter, samples, embedding, encoder)

    def read_and_keep(folder: AdapterFolder) -> PoolEntry:
        entry = read(folder)
        if cache is not None and folder.is_unchanged():
            cache.put(folder, entry.adapter.fingerprint)
        return entry

    return read_one_version(path, f"adapter {name!r} ({path})", read_and_keep, guard=guard)


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
        data = folder.read(EMBEDDING_FILE, _MAX_EMBEDDING_BYTES)
        if data is None:
            return None, None
        values = _parse_npy(data)
        info = folder.read(_EMBEDDING_INFO, _MAX_INFO_BYTES)
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
    if entry.embedding is not None:
        np.save(folder / EMBEDDING_FILE, entry.embedding, allow_pickle=False)
        if entry.encoder is not None:
            info = json.dumps({"encoder": entry.encoder})
            (folder / _EMBEDDING_INFO).write_text(info, encoding="utf-8")


def _copy(source: Path, target: Path, max_bytes: int) -> None:
    """Copy a regular file of at most `max_bytes`."""
    with contextlib.closing(RegularFile(source, max_bytes)) as file, target.open("wb") as stream:
        for offset in range(0, file.identity.num_bytes, _COPY_BYTES):
            stream.write(file.read(_COPY_BYTES, offset))


def list_folders(root: Path) -> list[Path]:
    """The folders that hold an adapter or a part of one, sorted by name. Hidden and other folders are left out.

    Undoes what a crash left half done, and waits for those who are writing. In a folder that may not be written to it
    can only look again.
    """
    found: dict[str, Path] = {}
    for _ in range(_LIST_TRIES):
        before = root.stat().st_mtime_ns
        paths = list(root.iterdir())
        found |= {path.name: path for path in paths if not path.name.startswith(".") and _is_adapter(path)}
        is_quiet = not any(path.name.startswith((_INCOMING, _REPLACED)) for path in paths)
        if is_quiet and root.stat().st_mtime_ns == before:
            break
        if os.access(root, os.W_OK):
            with folder_lock(root):
                recover(root)
                found = {path.name: path for path in root.iterdir() if path.name[0] != "." and _is_adapter(path)}
            break
        time.sleep(_LIST_SECONDS)
    return [found[name] for name in sorted(found)]


def _is_adapter(folder: Path) -> bool:
    """Whether there is a part of an adapter in a folder; also if nobody may look."""
    try:
        return any((folder / part).exists() for part in (CONFIG_FILE, WEIGHTS_FILE, SAMPLES_FILE, PICKLE_FILE))
    except PermissionError:
        return True
    except OSError:
        return False


@contextlib.contextmanager
def folder_lock(root: Path) -> Iterator[None]:
    """Keep other writers, of any process, out of the pool while the block runs. Not to be entered twice.

    Raises:
        PoolError: If another one is in it for a minute.
        OSError: If the folder may not be written to.
    """
    lock = FileLock(root / _LOCK_FILE)
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout as error:
        raise PoolError(
            f"the pool {root} is being written to for {_LOCK_SECONDS:.0f} seconds: {root / _LOCK_FILE} is locked by "
            "another process or thread. Wait for it, or end it."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def reader_lock(root: Path) -> Iterator[None]:
    """`folder_lock` for those who only read: nothing in a folder that may not be written to."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(folder_lock(root))
        yield


def install(root: Path, name: str, write: Callable[[Path], PoolEntry]) -> PoolEntry:
    """Write an adapter aside and rename it into place. Call under `folder_lock`.

    Args:
        root: The pool.
        name: The adapter; one of that name is replaced.
        write: Fills the folder it is given, and returns what it read back from it.
    """
    aside, target, old = root / f"{_INCOMING}{name}", root / name, root / f"{_REPLACED}{name}"
    _delete(aside)
    _delete(old)
    aside.mkdir()
    try:
        entry = write(aside)
        if target.exists():
            target.rename(old)
        aside.rename(target)
    except BaseException:
        _delete(aside)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    _delete(old)
    return entry


def uninstall(root: Path, name: str) -> None:
    """Rename an adapter's folder out of the pool, then delete it. Call under `folder_lock`."""
    aside = root / f"{_INCOMING}{name}"  # not _REPLACED: a crash now must not bring it back
    _delete(aside)
    with contextlib.suppress(FileNotFoundError):
        (root / name).rename(aside)
    _delete(aside)


def _delete(path: Path) -> None:
    """Delete a folder, or what else has its name, as far as possible; nothing that a link leads to."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


def recover(root: Path) -> None:
    """Undo what a crash left half done. Call under `folder_lock`."""
    for path in list(root.iterdir()):
        name = path.name.removeprefix(_REPLACED)
        if path.name.startswith(_REPLACED) and name and not (root / name).exists():
            path.rename(root / name)
        elif path.name.startswith((_INCOMING, _REPLACED)):
            _delete(path)


class FingerprintCache:
    """Fingerprints of files that have not changed, kept beside a pool too big to hash at every start.

    A file counts as unchanged while its size, inode, modification and change times are. A cache that somebody else may
    have written is not believed.
    """

    def __init__(self, root: Path) -> None:
        self._file = root / _FINGERPRINTS
        self._known: dict[str, Any] = {}
        self._seen: dict[str, list[object]] = {}
        self._hashed_bytes = 0
        try:
            if _is_ours(os.lstat(self._file)):
                with contextlib.closing(RegularFile(self._file, _MAX_CACHE_BYTES)) as file:
                    known = json.loads(file.read())
                self._known = known if isinstance(known, dict) else {}
        except Exception:  # noqa: BLE001 - whatever is wrong with it, what it would spare is done instead
            self._known = {}

    def get(self, folder: AdapterFolder) -> str | None:
        """The fingerprint of an adapter's folder, if it is known and no file has changed."""
        known = self._known.get(folder.path.name)
        if not isinstance(known, list) or not known or known[1:] != _identities(folder):
            return None
        return known[0] if isinstance(known[0], str) and len(known[0]) == 64 else None

    def put(self, folder: AdapterFolder, fingerprint: str) -> None:
        """Remember a fingerprint that was found, or that the unchanged files were hashed to."""
        identities = _identities(folder)
        if self.get(folder) is None:
            self._hashed_bytes += sum(identity[2] for identity in identities)
        if identities and all(FileIdentity(*identity).is_settled() for identity in identities):
            self._seen[folder.path.name] = [fingerprint, *identities]

    def save(self) -> None:
        """Write the file, if that would have spared much; a pool that may not be written to is left alone."""
        if self._hashed_bytes < _CACHE_ABOVE_BYTES:
            return
        aside = self._file.with_name(f"{_FINGERPRINTS}.{os.getpid()}")
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                json.dump(self._seen, stream)
            aside.replace(self._file)


def _identities(folder: AdapterFolder) -> list[list[int]]:
    found = (folder.identity_of(name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    return [list(identity) for identity in found if identity is not None]


def _is_ours(found: os.stat_result) -> bool:
    """Whether nobody but us may have written a file."""
    return not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)
