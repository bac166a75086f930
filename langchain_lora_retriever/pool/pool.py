"""The adapters there are: a folder of PEFT checkpoints, or adapters gathered in memory.

Readers see an immutable state that writers replace as a whole, so a reader needs no lock and never meets half
a change. On disk a change is written aside and renamed into place.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
import time
import warnings
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from langchain_lora_retriever.errors import (
    AdapterError,
    DuplicateAdapterError,
    InvalidAdapterError,
    InvalidRequestError,
    LoraRetrieverError,
    PoolError,
    UnknownAdapterError,
)
from langchain_lora_retriever.pool.checkpoint import CONFIG_FILE, renamed
from langchain_lora_retriever.pool.conversion import convert_pickle
from langchain_lora_retriever.pool.file_weights import FileWeights
from langchain_lora_retriever.pool.folder import (
    FingerprintCache,
    PoolEntry,
    check_encoder,
    folder_lock,
    install,
    list_folders,
    make_embedding,
    read_entry,
    reader_lock,
    recover,
    uninstall,
    write_entry,
)
from langchain_lora_retriever.pool.samples import Sample, make_samples
from langchain_lora_retriever.support.near_names import near_names
from langchain_lora_retriever.support.nesting import check_unicode
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from langchain_lora_retriever.types import Adapter

__all__ = ["AdapterPool", "PoolEntry", "PoolState", "Sample"]

_logger = logging.getLogger(__name__)
_MAX_NAME_BYTES = 200
_NUM_NAMED = 10
_POOL_IS = "A pool is a folder with one PEFT checkpoint per subfolder."


class PoolState:
    """What a pool holds at one moment. Immutable.

    Attributes:
        version: Grows with every change of the pool.
        entries: The adapters, by name, described or not.
        rejected: Why adapters were refused, by name.
    """

    def __init__(self, version: int, entries: Mapping[str, PoolEntry], rejected: Mapping[str, AdapterError]) -> None:
        self.version = version
        self.entries = MappingProxyType(dict(entries))
        self.rejected = MappingProxyType(dict(rejected))

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
        """Sha256 of every name, adapter, sample input and given embedding."""
        digest = hashlib.sha256()
        for name in self.names:
            entry = self.entries[name]
            digest.update(f"{name}\0{entry.adapter.fingerprint}\0{entry.routing_hash}\0".encode())
        return digest.hexdigest()

    def __getitem__(self, name: str) -> PoolEntry:
        if isinstance(name, str) and name in self.entries:
            return self.entries[name]
        if isinstance(name, str) and name in self.rejected:
            raise UnknownAdapterError(f"adapter {name!r} was refused when the pool was loaded: {self.rejected[name]}")
        near = near_names(str(name), self.names)
        if near:
            told = f"Near names: {', '.join(map(repr, near))}."
        elif self.names:
            told = f"It has {_some(list(map(repr, self.names)))}."
        else:
            told = "It is empty."
        raise UnknownAdapterError(f"no adapter {shown(name)} in the pool of {len(self.names)}. {told}")


class AdapterPool:
    """A set of adapters that may change while it is used. Any thread may call anything.

    Whoever holds an `Adapter` may use it on after this pool has removed or updated it. If its file was changed or
    removed otherwise, reading its weights is an `InvalidAdapterError`.

    Args:
        path: A folder with one PEFT checkpoint per subfolder, named by it, each with a `samples.jsonl` or an
            `embedding.npy` beside its weights; without, an adapter runs only where it is pinned. Changes are written
            there; any process may. None keeps the pool in memory.
        base_model: Refuse adapters whose configuration names another base model.
        create: Let `path` be missing or hold no adapter yet.

    Raises:
        PoolError: If `path` is no folder that can be read, or holds no adapter that can be used.
    """

    def __init__(self, path: str | Path | None = None, *, base_model: str | None = None, create: bool = False) -> None:
        if not (path is None or isinstance(path, str | os.PathLike)):
            raise PoolError(f"path={shown(path)} is not allowed: pass a folder, or None for a pool in memory.")
        try:
            check_unicode(str(path), "path")
        except InvalidRequestError as error:
            raise PoolError(str(error)) from None
        if not (base_model is None or isinstance(base_model, str)):
            raise PoolError(f"base_model={shown(base_model)} is not allowed: pass a name or a path, or None.")
        self._path = None if path is None else Path(path)
        self._base_model = base_model
        self._lock = threading.RLock()
        self._known: PoolState | None = PoolState(0, {}, {})
        self._seen: object = None  # how the folder looked when it was read
        if self._path is not None:
            if create:
                with _writing(self._path):
                    self._path.mkdir(parents=True, exist_ok=True)
            self._load(self._path, allow_empty=create)

    def __repr__(self) -> str:
        where = "in memory" if self._path is None else repr(str(self._path))
        return f"AdapterPool({where}, {f'{len(self)} adapters' if self.is_read else 'not read yet'})"

    @classmethod
    def unread(cls, path: str | Path) -> Self:
        """A pool on disk whose folder is read when somebody first asks what it holds: nothing waits for it now.

        Raises:
            PoolError: If there is no such folder.
        """
        try:
            is_folder = Path(path).is_dir()
        except ValueError:  # half a surrogate pair, or a null byte
            is_folder = False
        if not is_folder:
            return cls(path)  # which says what is wrong
        pool = cls()
        pool._path, pool._known = Path(path), None
        return pool

    @property
    def path(self) -> Path | None:
        """The pool's folder; None if it is in memory."""
        return self._path

    @property
    def state(self) -> PoolState:
        """Everything as it is now, unaffected by later changes.

        Raises:
            PoolError: If the pool was not read yet, and its folder cannot be.
        """
        if self._known is None:
            self._read()
        assert self._known is not None
        return self._known

    @property
    def is_read(self) -> bool:
        """Whether what it holds is known; if not, the first to ask waits for its folder to be read."""
        return self._known is not None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, sorted."""
        return self.state.names

    @property
    def rejected(self) -> Mapping[str, AdapterError]:
        """Why adapters were refused, by name."""
        return self.state.rejected

    @property
    def undescribed(self) -> Mapping[str, str]:
        """The adapters that have neither samples nor an embedding, by name, with what to do about it.

        They are loaded and run where they are pinned (`adapters=["name"]`); no prompt finds them.
        """
        return self.state.undescribed

    @property
    def version(self) -> int:
        """Grows with every change."""
        return self.state.version

    @property
    def fingerprint(self) -> str:
        """Hex hash of all contents; equal for pools that hold the same."""
        return self.state.fingerprint

    def __len__(self) -> int:
        return len(self.state.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.state.names)

    def __contains__(self, name: object) -> bool:
        return name in self.state.entries

    def __getitem__(self, name: str) -> Adapter:
        return self.state[name].adapter

    def samples(self, name: str) -> tuple[Sample, ...]:
        """Samples of an adapter's training data; empty if it came with an embedding alone.

        Raises:
            UnknownAdapterError: If no adapter has that name.
        """
        return self.state[name].samples

    def embedding(self, name: str) -> NDArray[np.float32] | None:
        """The embedding `[d]` an adapter came with, of length 1; None if its samples are to be embedded.

        Raises:
            UnknownAdapterError: If no adapter has that name.
        """
        return self.state[name].embedding

    def add(
        self,
        name: str,
        path: str | Path,
        *,
        samples: Sequence[str | Mapping[str, Any]] | None = None,
        embedding: ArrayLike | None = None,
        encoder: str | None = None,
        convert: bool = False,
    ) -> Adapter:
        """Add an adapter. A pool on disk copies the checkpoint; a pool in memory reads it where it lies.

        Args:
            name: Its name from now on.
            path: Folder of the PEFT checkpoint.
            samples: Inputs of its training data, a dozen to 20, as strings or `{"input", "output"}`.
                By default those in `samples.jsonl` beside the weights; without any it is found by no prompt, and
                runs where it is pinned.
            embedding: Its embedding `[d]`, in place of samples.
            encoder: Name of the encoder that made `embedding`.
            convert: Where the weights are a pickle alone (`adapter_model.bin`), read it in a process of its own and
                write `adapter_model.safetensors` beside it, as `lora-retriever pool convert` does. Without, a pickle
                is refused unopened.

        Raises:
            DuplicateAdapterError: If the pool has that name, or another process has put it into the pool's folder.
            AdapterError: If the adapter or its samples cannot be used. The pool is unchanged.
        """
        _check_name(name)
        source = _as_path(path, name)
        with self._lock, self._writers():
            self._check_free(name)
            if convert:
                convert_pickle(source, name)
            found = read_entry(source, name, base_model=self._base_model)
            return self._put(_with_routing(found, samples, embedding, encoder), source=source)

    def update(
        self,
        name: str,
        path: str | Path | None = None,
        *,
        samples: Sequence[str | Mapping[str, Any]] | None = None,
        embedding: ArrayLike | None = None,
        encoder: str | None = None,
    ) -> Adapter:
        """Replace an adapter's weights, samples or embedding; what is not given stays.

        New samples without an embedding drop the old embedding. Without any argument the adapter is read again
        from its folder.

        Raises:
            UnknownAdapterError: If no adapter has that name.
            AdapterError: If the new adapter or samples cannot be used. The pool is unchanged.
        """
        with self._lock, self._writers():
            old = self._current(name)
            source = _as_path(path, name) if path is not None else old.adapter.path
            assert source is not None, "every adapter of a pool was read from a folder"
            found = old
            if path is not None or (samples is None and embedding is None):
                found = read_entry(source, name, base_model=self._base_model)
            if not found.is_described:
                found = replace(old, adapter=found.adapter)
            return self._put(_with_routing(found, samples, embedding, encoder), source=source)

    def remove(self, name: str) -> None:
        """Remove an adapter, or one that was refused; in a pool on disk its folder is deleted.

        Raises:
            UnknownAdapterError: If no adapter has that name.
        """
        with self._lock, self._writers():
            state = self.state
            if not isinstance(name, str) or name not in state.rejected:
                state[name]
            if self._path is not None:
                self._hold(name)
                with _writing(self._path):
                    uninstall(self._path, name)
            self._replace_state(_without(state.entries, name), _without(state.rejected, name))

    def refresh(self) -> bool:
        """Look whether other processes have changed the pool's folder, and read what they have.

        What has stayed stays as it is; an adapter that has gone may be used on by those who hold it. Cheap where
        nothing has changed: nothing is read then.

        Returns:
            Whether the pool is another now.

        Raises:
            PoolError: If the folder cannot be read any more. The pool is unchanged.
        """
        with self._lock:
            if self._path is None or self._known is None:
                return False
            seen = _look(self._path)
            if seen == self._seen:
                return False
            entries, rejected = self._found(self._path, allow_empty=True)
            known = self._known
            entries = {name: _unless_same(known.entries.get(name), entry) for name, entry in entries.items()}
            self._seen = seen
            is_same = all(entries.get(name) is entry for name, entry in known.entries.items())
            if is_same and len(entries) == len(known.entries) and _said(rejected) == _said(known.rejected):
                return False
            self._replace_state(entries, rejected)
            return True

    def save(self, path: str | Path) -> None:
        """Write the pool into a folder that `AdapterPool(path)` reads.

        Raises:
            PoolError: If the folder exists and is not empty, or cannot be written.
            InvalidAdapterError: If an adapter's files were changed since they were read.
        """
        if not isinstance(path, str | os.PathLike):
            raise PoolError(f"path={shown(path)} is not allowed: pass a folder.")
        target = Path(path)
        if self._path is not None and target.exists() and target.samefile(self._path):
            return
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise PoolError(f"{target} exists and is not an empty folder. Save the pool to a new one.")
        aside = target.with_name(f".incoming-{target.name}")
        with _writing(target):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            try:
                for name, entry in self.state.entries.items():
                    assert entry.adapter.path is not None
                    (aside / name).mkdir()
                    write_entry(aside / name, entry, source=entry.adapter.path)
                    _check_same(entry, read_entry(aside / name, name))
                aside.replace(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    @contextlib.contextmanager
    def _writers(self) -> Iterator[None]:
        """Keep other processes from changing the folder, if there is one."""
        with contextlib.ExitStack() as stack:
            if self._path is not None:
                with _writing(self._path):
                    stack.enter_context(folder_lock(self._path))
                    recover(self._path)
            yield

    def _check_free(self, name: str) -> None:
        if name in self:
            raise DuplicateAdapterError(
                f"the pool already has an adapter {name!r}. Choose another name, or call update({name!r}, ...)."
            )
        if self._path is None or not os.path.lexists(self._path / name):
            return
        if name in self.rejected:
            try:
                read_entry(self._path / name, name, base_model=self._base_model)
            except AdapterError:
                return  # it is still one that was refused
        raise DuplicateAdapterError(
            f"the pool's folder already has {self._path / name}, which another process may have added since this pool "
            f"was loaded. Choose another name, or load the pool again and call update({name!r}, ...)."
        )

    def _current(self, name: str) -> PoolEntry:
        """What there is of a name now; other processes may have changed it on disk."""
        known = self.state[name]
        if self._path is None:
            return known
        if not (self._path / name).is_dir():
            raise UnknownAdapterError(
                f"adapter {name!r} is no longer in the pool's folder {self._path}: another process has removed it. Add "
                "it anew, or load the pool again."
            )
        try:
            return read_entry(self._path / name, name, base_model=self._base_model)
        except AdapterError:
            return known  # what is to replace it is read and checked by itself

    def _hold(self, name: str) -> None:
        """Let those who run an adapter keep its file, which is about to go."""
        entry = self.state.entries.get(name)
        if entry is not None and isinstance(entry.adapter.weights, FileWeights):
            entry.adapter.weights.hold()

    def _put(self, entry: PoolEntry, *, source: Path) -> Adapter:
        name = entry.adapter.name
        if self._path is not None:
            root = self._path

            def write(folder: Path) -> PoolEntry:
                write_entry(folder, entry, source=source)
                written = read_entry(folder, name, base_model=self._base_model)
                _check_same(entry, written)
                return written

            self._hold(name)
            with _writing(root):
                entry = install(root, name, write)
            entry = replace(entry, adapter=renamed(entry.adapter, root / name))
        state = self.state
        self._replace_state({**state.entries, name: entry}, _without(state.rejected, name))
        return entry.adapter

    def _replace_state(self, entries: Mapping[str, PoolEntry], rejected: Mapping[str, AdapterError]) -> None:
        self._known = PoolState((self._known.version if self._known else 0) + 1, entries, rejected)

    def _read(self) -> None:
        with self._lock:
            if self._known is None and self._path is not None:
                self._load(self._path, allow_empty=False)

    def _load(self, root: Path, *, allow_empty: bool) -> None:
        self._seen = _look(root)
        start = time.perf_counter()
        entries, rejected = self._found(root, allow_empty=allow_empty)
        self._replace_state(entries, rejected)
        undescribed, seconds = self.state.undescribed, time.perf_counter() - start
        _logger.info(
            "pool %s: %d adapters read in %.1f s, %d of them undescribed; %d refused",
            root, len(entries), seconds, len(undescribed), len(rejected),
        )  # fmt: skip
        _tell_undescribed(root, undescribed)

    def _found(self, root: Path, *, allow_empty: bool) -> tuple[dict[str, PoolEntry], dict[str, AdapterError]]:
        """What a folder holds: adapters, and why others were refused."""
        try:
            if not root.exists():
                raise PoolError(
                    f"there is no folder {root}. {_POOL_IS} Start one with AdapterPool({str(root)!r}, create=True), or "
                    f"with `lora-retriever pool add {root} NAME CHECKPOINT`."
                )
            if (root / CONFIG_FILE).is_file():
                raise PoolError(f"{root} is one adapter, not a pool. Pass the folder that holds it: {root.parent}.")
            folders = list_folders(root)
        except (OSError, ValueError) as error:
            if isinstance(error, PoolError):
                raise
            raise PoolError(f"cannot read the pool {root}: {error}. {_POOL_IS}") from error
        if not folders and not allow_empty:
            raise PoolError(
                f"the pool {root} is empty. Put PEFT checkpoints into it, each in a subfolder, or add them: "
                "AdapterPool(path, create=True).add(name, checkpoint, samples=[...])."
            )
        entries: dict[str, PoolEntry] = {}
        rejected: dict[str, AdapterError] = {}
        cache = FingerprintCache(root)
        for folder in folders:
            name = folder.name
            try:
                _check_printable(folder)
                entries[name] = read_entry(
                    folder, name, base_model=self._base_model, cache=cache, guard=partial(reader_lock, root)
                )
            except AdapterError as error:
                if os.path.lexists(folder):  # and was not removed meanwhile
                    rejected[name] = error
                    _warn_rejected(error)
        cache.save()
        if not entries and not allow_empty:
            reasons = "\n".join(f"  {error}" for error in list(rejected.values())[:5])
            raise PoolError(f"no adapter of the pool {root} can be used; {len(rejected)} were refused:\n{reasons}")
        return entries, rejected


def _look(root: Path) -> object:
    """Tell a folder apart from itself after a change, by what the system says of the files two levels deep."""
    try:
        return [
            (folder.name, sorted((file.name, *_changes(file.stat())) for file in os.scandir(folder)))
            for folder in sorted(root.iterdir())
            if not folder.name.startswith(".") and folder.is_dir()
        ]
    except (OSError, ValueError):
        return None  # somebody is writing, or reading it will say what is wrong


def _changes(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _unless_same(known: PoolEntry | None, found: PoolEntry) -> PoolEntry:
    """What was known, if it is the same still: those who hold its weights need not read them again."""
    if known is None or known.adapter.fingerprint != found.adapter.fingerprint:
        return found
    return known if known.routing_hash == found.routing_hash else replace(found, adapter=known.adapter)


def _said(rejected: Mapping[str, AdapterError]) -> dict[str, str]:
    return {name: str(error) for name, error in rejected.items()}


def _with_routing(
    entry: PoolEntry,
    samples: Sequence[str | Mapping[str, Any]] | None,
    embedding: ArrayLike | None,
    encoder: str | None,
) -> PoolEntry:
    """The entry with what the caller gave."""
    where = f"adapter {entry.adapter.name!r}"
    if samples is not None:
        entry = replace(entry, samples=make_samples(samples, where=where), embedding=None, encoder=None)
    if embedding is not None:
        entry = replace(
            entry, embedding=make_embedding(embedding, where=where), encoder=check_encoder(encoder, where=where)
        )
    return entry


def _check_same(read: PoolEntry, written: PoolEntry) -> None:
    """Refuse a copy of files that were changed between reading and copying."""
    if written.adapter.fingerprint != read.adapter.fingerprint:
        raise InvalidAdapterError(
            f"adapter {read.adapter.name!r}: its files in {read.adapter.path} were changed after they were read. Do it "
            "again once they are whole."
        )


def _as_path(path: object, name: str) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise InvalidAdapterError(f"adapter {name!r}: path={shown(path)} is not allowed: pass the checkpoint's folder.")
    return Path(path)


def _check_printable(folder: Path) -> None:
    if not folder.name.isprintable():
        raise InvalidAdapterError(
            f"adapter {folder.name!a} has a folder whose name cannot be printed. Rename the folder."
        )


def _check_name(name: object) -> None:
    if (
        not isinstance(name, str)
        or not name.strip()
        or name.startswith(".")
        or not name.isprintable()
        or len(name.encode()) > _MAX_NAME_BYTES
        or any(character in '/\\:*?"<>|' for character in name)
    ):
        raise InvalidAdapterError(
            f"adapter name {shown(name)} cannot be the name of a folder. Allowed are up to 200 bytes of printable "
            'characters without / \\ : * ? " < > |, not starting with a dot.'
        )


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `PoolError` that names the folder."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, LoraRetrieverError):
            raise
        raise PoolError(f"cannot write to the pool {root}: {error}") from error


def _without(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != name}


def _how_to_describe(name: str) -> str:
    return (
        f"adapter {name!r} has neither samples nor an embedding: no prompt finds it, and it runs only where it is "
        "pinned. Write a samples.jsonl beside its weights, or call "
        f"pool.update({name!r}, samples=[...])."
    )


def _tell_undescribed(root: Path, undescribed: Mapping[str, str]) -> None:
    if len(undescribed) == 1:
        _logger.warning("pool %s: %s", root, *undescribed.values())
    elif undescribed:
        _logger.warning(
            "pool %s: %d adapters have neither samples nor an embedding: no prompt finds them, and they run only where "
            "they are pinned: %s. Write a samples.jsonl beside their weights, or call "
            "pool.update(name, samples=[...]).",
            root, len(undescribed), _some(list(undescribed)),
        )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    """The first of some names, and how many there are beside them."""
    rest = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _warn_rejected(error: AdapterError) -> None:
    _logger.warning("refused: %s", error)
    warnings.warn(f"refused: {error}", UserWarning, stacklevel=4)
