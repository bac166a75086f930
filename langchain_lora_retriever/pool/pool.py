"""The adapters there are: a folder of PEFT checkpoints, or adapters gathered in memory.

Readers see an immutable state that writers replace as a whole, so a reader needs no lock and never meets half
a change. On disk a change is written aside and renamed into place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from langchain_lora_retriever.errors import (
    AdapterError,
    DuplicateAdapterError,
    HubError,
    InvalidRequestError,
    PoolError,
    UnknownAdapterError,
    without_frames,
)
from langchain_lora_retriever.pool.arguments import (
    as_path,
    check_encoder_given,
    check_name,
    check_printable,
    check_same,
    check_samples_from,
    named_repositories,
    tell_undescribed,
    warn_rejected,
    with_dataset,
    with_routing,
    without,
    writing,
)
from langchain_lora_retriever.pool.calibration import Calibration, Progress, Score, calibrate
from langchain_lora_retriever.pool.checkpoint import renamed
from langchain_lora_retriever.pool.checkpoint_files import CONFIG_FILE
from langchain_lora_retriever.pool.conversion import convert_pickle
from langchain_lora_retriever.pool.entry import (
    PoolEntry,
    read_entry,
    write_entry,
)
from langchain_lora_retriever.pool.file_weights import FileWeights
from langchain_lora_retriever.pool.folder import (
    FingerprintCache,
    folder_lock,
    install,
    list_folders,
    look,
    reader_lock,
    recover,
    uninstall,
)
from langchain_lora_retriever.pool.hub import Hub, is_repo_id
from langchain_lora_retriever.pool.samples import Sample, make_samples
from langchain_lora_retriever.pool.state import PoolState
from langchain_lora_retriever.pool.task import TASK_FILE, TaskEntry, make_members, read_task, write_task
from langchain_lora_retriever.support.forking import begin_in_every_process
from langchain_lora_retriever.support.nesting import check_unicode
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from langchain_lora_retriever.types import Adapter

__all__ = ["AdapterPool", "PoolEntry", "PoolState", "Sample"]

_logger = logging.getLogger(__name__)
_POOL_IS = "A pool is a folder with one PEFT checkpoint per subfolder."
_NUM_FETCHED_AT_ONCE = 8
_BY_CARD = (None, "card examples", "card text")
"""What describes an adapter less well than what it was given."""


class AdapterPool:
    """A set of adapters that may change while it is used. Any thread may call anything.

    Whoever holds an `Adapter` may use it on after this pool has removed or updated it. If its file was changed or
    removed otherwise, reading its weights is an `InvalidAdapterError`.

    Args:
        path: A folder with one PEFT checkpoint per subfolder, named by it, each with a `samples.jsonl` or an
            `embedding.npy` beside its weights, or a model card `README.md` that says what it is for; without, an
            adapter runs only where it is pinned. Changes are written there; any process may. None keeps the pool in
            memory.
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
        begin_in_every_process(self._begin)
        self._known: PoolState | None = PoolState(0, {}, {})
        self._seen: object = None  # how the folder looked when it was read
        self._not_had: Mapping[str, AdapterError] = MappingProxyType({})  # of the hub: what no folder tells of
        if self._path is not None:
            if create:
                with writing(self._path):
                    self._path.mkdir(parents=True, exist_ok=True)
            self._load(self._path, allow_empty=create)

    def _begin(self) -> None:
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        where = "in memory" if self._path is None else repr(str(self._path))
        return f"AdapterPool({where}, {f'{len(self)} adapters' if self.is_read else 'not read yet'})"

    @classmethod
    def unread(cls, path: str | Path) -> Self:
        """A pool on disk whose folder is read when somebody first asks what it holds: nothing waits for it now.

        Raises:
            PoolError: If there is no such folder.
        """
        if not isinstance(path, str | os.PathLike):
            raise PoolError(f"path={shown(path)} is not allowed: pass a folder.")
        try:
            is_folder = Path(path).is_dir()
        except (OSError, ValueError):  # too long a name; half a surrogate pair, or a null byte
            is_folder = False
        if not is_folder:
            return cls(path)  # which says what is wrong
        pool = cls()
        pool._path, pool._known = Path(path), None
        return pool

    @classmethod
    def from_hub(
        cls,
        repositories: Sequence[str] | Mapping[str, str],
        *,
        path: str | Path | None = None,
        base_model: str | None = None,
        samples_from: str | None = None,
        hub: Hub | None = None,
        convert: bool = False,
    ) -> Self:
        """A pool of adapters from the hub. Those that cannot be had or used are in `rejected`, and warned of.

        Args:
            repositories: `user/repo`, or `user/repo@revision`, each named by its last part, or by both where two would
                have one name; or repositories by the names that their adapters are to have.
            path: Folder to keep them in; those that it has already are not fetched again. None keeps the pool in
                memory, and the files in the hub's cache.
            base_model: Refuse adapters whose configuration names another base model.
            samples_from: "dataset" draws samples from the data sets that cards name; see `add`.
            hub: How the hub is reached.
            convert: Convert those whose weights are a pickle alone; see `add`.

        Raises:
            PoolError: If none of them can be used.
        """
        named = named_repositories(repositories)
        pool = cls(path, base_model=base_model, create=path is not None)
        missing = {name: repository for name, repository in named.items() if name not in pool}
        refused: dict[str, AdapterError] = {}

        def add(item: tuple[str, str]) -> None:
            name, (repo_id, _, revision) = item[0], item[1].partition("@")
            try:
                pool.add(
                    name, repo_id, revision=revision or None, samples_from=samples_from, hub=hub or Hub(),
                    convert=convert,
                )  # fmt: skip
            except AdapterError as error:
                refused[name] = without_frames(error)

        with ThreadPoolExecutor(_NUM_FETCHED_AT_ONCE, thread_name_prefix="lora-retriever-hub") as threads:
            list(threads.map(add, missing.items()))
        rejected = dict(sorted(refused.items()))  # and not as they came
        for error in rejected.values():
            warn_rejected(error)
        if not len(pool):
            reasons = "\n".join(f"  {error}" for error in list(rejected.values())[:5])
            raise PoolError(f"no adapter of {len(named)} repositories can be used:\n{reasons}")
        pool._known = pool.state.changed(*rejected, rejected={**pool.rejected, **rejected})
        pool._not_had = MappingProxyType(rejected)
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
        """The adapters that nothing describes, by name, with what to do about it.

        They are loaded and run where they are pinned (`adapters=["name"]`); no prompt finds them.
        """
        return self.state.undescribed

    @property
    def tasks(self) -> Mapping[str, TaskEntry]:
        """The entries that stand for adapters of the pool, by name."""
        return self.state.tasks

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
        samples_from: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        hub: Hub | None = None,
        convert: bool = False,
    ) -> Adapter:
        """Add an adapter. A pool on disk copies the checkpoint; a pool in memory reads it where it lies.

        What prompts find it by is, in this order, what is given here; `samples.jsonl` or `embedding.npy` beside the
        weights; samples drawn from a data set, if `samples_from` asks for that; the examples in the model card; the
        card's prose and tags. Without any it is found by no prompt, and runs where it is pinned.

        Args:
            name: Its name from now on.
            path: Folder of the PEFT checkpoint; or, as a string, a repository of the hub, `user/repo`, where there is
                no such folder.
            samples: Inputs of its training data, a dozen to 20, as strings or `{"input", "output"}`.
            embedding: Its embedding `[d]`, in place of samples.
            encoder: Name of the encoder that made `embedding`; refused without one.
            samples_from: "dataset" draws 20 samples from the data set that the card names, where neither samples nor an
                embedding are there.
            revision: Branch, tag or commit of the repository. What it is now is kept, and recorded as a commit.
            subfolder: Where in the repository the adapter lies, if there are several.
            hub: How the hub is reached; by default as `huggingface_hub` is set up (`HF_TOKEN`, `HF_HUB_OFFLINE`, ...).
            convert: Where the weights are a pickle alone (`adapter_model.bin`), read it in a process of its own and
                write `adapter_model.safetensors` beside it, as `lora-retriever pool convert` does. Without, a pickle
                is refused unopened.

        Raises:
            DuplicateAdapterError: If the pool has that name, or another process has put it into the pool's folder.
            AdapterError: If the adapter or its samples cannot be had or used. The pool is unchanged.
        """
        self.check_free(name)
        check_encoder_given(name, embedding, encoder)
        found, source = self._find(name, path, samples_from, revision, subfolder, hub, convert=convert)
        with self._lock, self._writers():
            self.check_free(name)
            return self._put(with_routing(found, samples, embedding, encoder), source=source)

    def update(
        self,
        name: str,
        path: str | Path | None = None,
        *,
        samples: Sequence[str | Mapping[str, Any]] | None = None,
        embedding: ArrayLike | None = None,
        encoder: str | None = None,
        samples_from: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        hub: Hub | None = None,
        convert: bool = False,
    ) -> Adapter:
        """Replace an adapter's weights, samples or embedding; what is not given stays. Arguments are as for `add`.

        New samples without an embedding drop the old embedding. Without any argument the adapter is read again
        from its folder; with a revision alone its repository is fetched at that one.

        Raises:
            UnknownAdapterError: If no adapter has that name.
            AdapterError: If the new adapter or samples cannot be used. The pool is unchanged.
        """
        origin = self.state[name].hub
        check_samples_from(samples_from)
        check_encoder_given(name, embedding, encoder)
        if path is None and (revision is not None or subfolder is not None):
            if origin is None:
                raise HubError(
                    f"adapter {name!r} is not from the hub, so it has no revision. Pass a repository, user/repo."
                )
            path, subfolder = origin.repo_id, origin.subfolder or None if subfolder is None else subfolder
        new = None
        if path is not None:
            new = self._find(name, path, samples_from, revision, subfolder, hub, convert=convert)
        with self._lock, self._writers():
            old = self._current(name)
            source = old.adapter.path if new is None else new[1]
            assert source is not None, "every adapter of a pool was read from a folder"
            found = old if new is None else new[0]
            if new is None and samples is None and embedding is None:
                found = read_entry(source, name, base_model=self._base_model)
                if samples_from is not None:
                    found = with_dataset(found, source, hub or Hub())
            if found.described_by in _BY_CARD and old.described_by not in _BY_CARD:
                found = replace(old, adapter=found.adapter, hub=found.hub)
            return self._put(with_routing(found, samples, embedding, encoder), source=source)

    def calibrate(
        self,
        samples: Sequence[Mapping[str, Any] | Sample],
        score: Score,
        *,
        keep: int = 3,
        temperature: float = 0.05,
        exclude: Collection[str] = (),
        progress: Progress | None = None,
    ) -> Calibration:
        """Find the adapters that answer a user's own examples best; see `calibration.calibrate`.

        `add_task(name, calibration.members, calibration.samples)` makes a task entry of the outcome.

        Args:
            samples: Some dozens with an input and an output.
            score: Scores answers: an `evaluation.AnswerLikelihood`.
            keep: How many of the best a task entry is to stand for.
            temperature: Of their shares; the smaller, the more the best counts.
            exclude: Names to leave out, such as those that the engine cannot run.
            progress: Told after every answer how many there are, and of how many.
        """
        made = make_samples(samples, where="the calibration")
        left = {name: entry.adapter for name, entry in self.state.entries.items() if name not in exclude}
        return calibrate(left, made, score, keep=keep, temperature=temperature, progress=progress)

    def add_task(
        self, name: str, members: Mapping[str, float], samples: Sequence[str | Mapping[str, Any] | Sample]
    ) -> TaskEntry:
        """Add an entry without an adapter of its own: prompts like its samples run the adapters that it stands for.

        Args:
            name: Its name from now on.
            members: Shares by names of adapters of the pool; they are scaled to sum to 1. One that is removed later,
                or that a call excludes, is left out then.
            samples: Inputs of the task, a dozen to 20.

        Raises:
            DuplicateAdapterError: If the pool has that name.
            UnknownAdapterError: If a member is no adapter of the pool.
            AdapterError: If the samples cannot be used.
        """
        self.check_free(name)
        where = f"task {name!r}"
        task = TaskEntry(name, make_samples(samples, where=where), make_members(members, where=where))
        with self._lock, self._writers():
            self.check_free(name)
            for member, _ in task.members:
                self.state[member]
            if self._path is not None:
                with writing(self._path):
                    install(self._path, name, lambda folder: write_task(folder, task))
            state = self.state
            self._known = state.changed(name, tasks={**state.tasks, name: task}, rejected=without(state.rejected, name))
        return task

    def check_free(self, name: str) -> None:
        """Refuse a name that `add` and `add_task` would refuse, before anything is done for it.

        Raises:
            DuplicateAdapterError: If the pool has that name, or another process has put it into the pool's folder.
            InvalidAdapterError: If it cannot be the name of a folder.
        """
        check_name(name)
        if name in self or name in self.tasks:
            raise DuplicateAdapterError(
                f"the pool already has an adapter {name!r}. Choose another name, or call update({name!r}, ...)."
                if name in self
                else f"the pool already has a task {name!r}. Choose another name, or remove it first."
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

    def remove(self, name: str) -> None:
        """Remove an adapter, a task, or one that was refused; in a pool on disk its folder is deleted.

        Raises:
            UnknownAdapterError: If no adapter has that name.
        """
        with self._lock, self._writers():
            state = self.state
            if not isinstance(name, str) or not (name in state.rejected or name in state.tasks):
                state[name]
            if self._path is not None:
                self._hold(name)
                with writing(self._path):
                    uninstall(self._path, name)
            self._known = state.changed(
                name,
                entries=without(state.entries, name),
                rejected=without(state.rejected, name),
                tasks=without(state.tasks, name),
            )

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
            seen = look(self._path)
            if seen is not None and seen == self._seen:
                return False
            entries, rejected, tasks = self._found(self._path, allow_empty=True)
            known = self._known
            for name, error in self._not_had.items():  # unless it was added since, or removed
                if known.rejected.get(name) is error and name not in entries and name not in tasks:
                    rejected.setdefault(name, error)
            entries = {name: _unless_same(known.entries.get(name), entry) for name, entry in entries.items()}
            tasks = {name: _unless_same_task(known.tasks.get(name), task) for name, task in tasks.items()}
            self._seen = seen
            changed = (
                _differing(known.entries, entries)
                | _differing(known.tasks, tasks)
                | _differing(_said(known.rejected), _said(rejected))
            )
            if changed:
                self._known = known.changed(*sorted(changed), entries=entries, rejected=rejected, tasks=tasks)
            return bool(changed)

    def save(self, path: str | Path) -> None:
        """Write the pool into a folder that `AdapterPool(path)` reads.

        Raises:
            PoolError: If the folder exists and is not empty, or cannot be written.
            InvalidAdapterError: If an adapter's files were changed since they were read.
        """
        if not isinstance(path, str | os.PathLike):
            raise PoolError(f"path={shown(path)} is not allowed: pass a folder.")
        target = Path(path)
        if not target.name:
            raise PoolError(f"path={shown(str(path))} is not allowed: pass a new folder, by its name.")
        with writing(target):
            if self._path is not None and target.exists() and target.samefile(self._path):
                return
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise PoolError(f"{target} exists and is not an empty folder. Save the pool to a new one.")
            aside = target.with_name(f".incoming-{target.name}")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            try:
                for name, entry in self.state.entries.items():
                    assert entry.adapter.path is not None
                    (aside / name).mkdir()
                    write_entry(aside / name, entry, source=entry.adapter.path)
                    check_same(entry, read_entry(aside / name, name))
                for name, task in self.tasks.items():
                    (aside / name).mkdir()
                    write_task(aside / name, task)
                aside.replace(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)

    @contextlib.contextmanager
    def _writers(self) -> Iterator[None]:
        """Keep other processes from changing the folder, if there is one."""
        with contextlib.ExitStack() as stack:
            if self._path is not None:
                with writing(self._path):
                    stack.enter_context(folder_lock(self._path))
                    recover(self._path)
            yield

    def _find(
        self,
        name: str,
        path: str | Path,
        samples_from: str | None,
        revision: str | None,
        subfolder: str | None,
        hub: Hub | None,
        *,
        convert: bool = False,
    ) -> tuple[PoolEntry, Path]:
        """What an adapter's folder or repository holds, and where that lies."""
        check_samples_from(samples_from)
        source, origin = as_path(path, name), None
        is_meant = revision is not None or subfolder is not None
        if is_meant and not is_repo_id(path, is_meant=True):
            raise HubError(
                f"adapter {name!r}: a revision and a subfolder are of a repository of the hub, user/repo, and "
                f"{shown(str(path))} is none. Leave them out; of a folder here pass the one that holds {CONFIG_FILE}."
            )
        if is_repo_id(path, is_meant=is_meant):
            try:
                source, origin = (hub or Hub()).fetch(
                    str(path), revision=revision, subfolder=subfolder, with_pickle=convert
                )
            except AdapterError as error:
                error.args = (f"adapter {name!r}: {error}",)
                raise
        if convert:
            convert_pickle(source, name)
        found = read_entry(source, name, base_model=self._base_model)
        found = found if origin is None else replace(found, hub=origin)
        return (found if samples_from is None else with_dataset(found, source, hub or Hub())), source

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
                check_same(entry, written)
                return written

            self._hold(name)
            with writing(root):
                entry = install(root, name, write)
            entry = replace(entry, adapter=renamed(entry.adapter, root / name))
        state = self.state
        self._known = state.changed(
            name, entries={**state.entries, name: entry}, rejected=without(state.rejected, name)
        )
        return entry.adapter

    def _replace_state(
        self,
        entries: Mapping[str, PoolEntry],
        rejected: Mapping[str, AdapterError],
        tasks: Mapping[str, TaskEntry] = MappingProxyType({}),
    ) -> None:
        self._known = PoolState((self._known.version if self._known else 0) + 1, entries, rejected, tasks)

    def _read(self) -> None:
        with self._lock:
            if self._known is None and self._path is not None:
                self._load(self._path, allow_empty=False)

    def _load(self, root: Path, *, allow_empty: bool) -> None:
        self._seen = look(root)
        start = time.perf_counter()
        entries, rejected, tasks = self._found(root, allow_empty=allow_empty)
        self._replace_state(entries, rejected, tasks)
        undescribed, seconds = self.state.undescribed, time.perf_counter() - start
        _logger.info(
            "pool %s: %d adapters read in %.1f s, %d of them undescribed; %d refused",
            root, len(entries), seconds, len(undescribed), len(rejected),
        )  # fmt: skip
        tell_undescribed(root, undescribed)

    def _found(
        self, root: Path, *, allow_empty: bool
    ) -> tuple[dict[str, PoolEntry], dict[str, AdapterError], dict[str, TaskEntry]]:
        """What a folder holds: adapters, why others were refused, and tasks."""
        folders = self._list(root)
        if not folders and not allow_empty:
            raise PoolError(
                f"the pool {root} is empty. Put PEFT checkpoints into it, each in a subfolder, or add them: "
                "AdapterPool(path, create=True).add(name, checkpoint, samples=[...])."
            )
        entries: dict[str, PoolEntry] = {}
        rejected: dict[str, AdapterError] = {}
        tasks: dict[str, TaskEntry] = {}
        cache = FingerprintCache(root)
        guard = partial(reader_lock, root)
        for folder in folders:
            name = folder.name
            try:
                check_printable(folder)
                if (folder / TASK_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
                    tasks[name] = read_task(folder, name, guard=guard)
                else:
                    entries[name] = read_entry(folder, name, base_model=self._base_model, cache=cache, guard=guard)
            except AdapterError as error:
                if os.path.lexists(folder):  # and was not removed meanwhile
                    rejected[name] = without_frames(error)
                    warn_rejected(error)
        cache.save()
        if not entries and not allow_empty:
            reasons = "\n".join(f"  {error}" for error in list(rejected.values())[:5])
            raise PoolError(f"no adapter of the pool {root} can be used; {len(rejected)} were refused:\n{reasons}")
        return entries, rejected, tasks

    def _list(self, root: Path) -> list[Path]:
        """The folders that hold an adapter, a task, or a part of one."""
        try:
            if not root.exists():
                raise PoolError(
                    f"there is no folder {root}. {_POOL_IS} Start one with AdapterPool({str(root)!r}, create=True), or "
                    f"with `lora-retriever pool add {root} NAME CHECKPOINT`."
                )
            if (root / CONFIG_FILE).is_file():
                raise PoolError(f"{root} is one adapter, not a pool. Pass the folder that holds it: {root.parent}.")
            return list_folders(root)
        except (OSError, ValueError) as error:
            if isinstance(error, PoolError):
                raise
            raise PoolError(f"cannot read the pool {root}: {error}. {_POOL_IS}") from error


def _unless_same(known: PoolEntry | None, found: PoolEntry) -> PoolEntry:
    """What was known, if it is the same still: those who hold its weights need not read them again."""
    if known is None or known.adapter.fingerprint != found.adapter.fingerprint:
        return found
    return known if known.is_described_like(found) else replace(found, adapter=known.adapter)


def _unless_same_task(known: TaskEntry | None, found: TaskEntry) -> TaskEntry:
    is_same = known is not None and (known.members, known.samples) == (found.members, found.samples)
    return known if known is not None and is_same else found


def _differing(known: Mapping[str, object], found: Mapping[str, object]) -> set[str]:
    return {name for name in known.keys() | found.keys() if known.get(name) != found.get(name)}


def _said(rejected: Mapping[str, AdapterError]) -> dict[str, str]:
    return {name: str(error) for name, error in rejected.items()}
