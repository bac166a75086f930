"""How a pool lies on disk: one folder per adapter or task, changed only by renaming.

::

    pool/
      sql/adapter_config.json          as PEFT wrote it
          adapter_model.safetensors
          samples.jsonl                and/or embedding.npy (+ embedding.json: which encoder made it)
          README.md                    the model card, which describes an adapter that has neither
          origin.json                  where the adapter and its samples come from, unless they were just given
      poems/task.json                  a task: the adapters that it stands for, and their shares
            samples.jsonl              what finds it
      .lock                            held by whoever writes, in any process; once written to only
      .incoming-sql/                   being written; a leftover of a crash is deleted
      .replaced-sql/                   on its way out; put back if a crash left no `sql`
      .fingerprints.json               big pools only: spares hashing unchanged files at the next start
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from langchain_lora_retriever.errors import PoolError
from langchain_lora_retriever.pool.checkpoint_files import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from langchain_lora_retriever.pool.regular_files import FileIdentity, RegularFile
from langchain_lora_retriever.pool.samples import SAMPLES_FILE
from langchain_lora_retriever.pool.task import TASK_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Any, TypeVar

    from langchain_lora_retriever.pool.regular_files import AdapterFolder

    T = TypeVar("T")

__all__ = [
    "FingerprintCache",
    "folder_lock",
    "install",
    "list_folders",
    "look",
    "reader_lock",
    "recover",
    "uninstall",
]

_PARTS = (CONFIG_FILE, WEIGHTS_FILE, SAMPLES_FILE, PICKLE_FILE, TASK_FILE)
_FINGERPRINTS = ".fingerprints.json"
_INCOMING = ".incoming-"
_REPLACED = ".replaced-"
_LOCK_FILE = ".lock"
_LOCK_SECONDS = 60.0
_CACHE_ABOVE_BYTES = 256 << 20
_MAX_CACHE_BYTES = 64 << 20
_LIST_TRIES = 50
_LIST_SECONDS = 0.02


def list_folders(root: Path) -> list[Path]:
    """The folders that hold an adapter, a task or a part of one, sorted by name. Hidden and other folders are left out.

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
    """Whether there is a part of an adapter or a task in a folder; also if nobody may look."""
    try:
        return any((folder / part).exists() for part in _PARTS)
    except PermissionError:
        return True
    except OSError:
        return False


def look(root: Path) -> object:
    """Tell a folder apart from itself after a change, by what the system says of the files two levels deep.

    None if it cannot be told: two of these are not the same.
    """
    try:
        return [
            (folder.name, sorted((file.name, *_changes(file)) for file in os.scandir(folder)))
            for folder in sorted(root.iterdir())
            if not folder.name.startswith(".") and folder.is_dir()
        ]
    except (OSError, ValueError):
        return None  # somebody is writing, or reading it will say what is wrong


def _changes(file: os.DirEntry[str]) -> tuple[int, int, int]:
    try:
        stat = file.stat()
    except OSError:  # a link that leads nowhere: what an editor leaves beside an open file, for one
        stat = file.stat(follow_symlinks=False)
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


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


def install(root: Path, name: str, write: Callable[[Path], T]) -> T:
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
        written = write(aside)
        if target.exists():
            target.rename(old)
        aside.rename(target)
    except BaseException:
        _delete(aside)
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    _delete(old)
    return written


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
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                    json.dump(self._seen, stream)
                aside.replace(self._file)
            finally:
                aside.unlink(missing_ok=True)


def _identities(folder: AdapterFolder) -> list[list[int]]:
    found = (folder.identity_of(name) for name in (CONFIG_FILE, WEIGHTS_FILE))
    return [list(identity) for identity in found if identity is not None]


def _is_ours(found: os.stat_result) -> bool:
    """Whether nobody but us may have written a file."""
    return not hasattr(os, "geteuid") or (found.st_uid == os.geteuid() and not found.st_mode & 0o022)
