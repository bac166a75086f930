"""A stranger's folder, opened once: regular files of bounded size, all of one version of it."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Never, Self, TypeVar

from langchain_lora_retriever.errors import AdapterError, InvalidAdapterError
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import TracebackType

__all__ = ["AdapterFolder", "FileIdentity", "RegularFile", "parse_json", "read_one_version", "said"]

T = TypeVar("T")

_CAN_OPEN_IN_FOLDER = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_SETTLED_NS = 2_000_000_000
_MAX_TRIES = 20
_MAX_TRIES_WITHOUT_FOLDER = 3
_PAUSE_SECONDS = 0.02
_NO_FOLDER = "Pass a folder that is there, or a repository of the hub, user/repo."


class FileIdentity(NamedTuple):
    """What changes whenever a file's content does, as far as the clock of its file system can tell."""

    device: int
    inode: int
    num_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileIdentity:
        """The identity in what `os.stat` returned."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def is_settled(self) -> bool:
        """Whether the last change is so long ago that another one would have another time."""
        return max(self.mtime_ns, self.ctime_ns) + _SETTLED_NS < time.time_ns()


class RegularFile:
    """An open regular file, read at any place; closed when nobody holds it any more.

    Args:
        path: The file; a link is followed.
        max_bytes: Maximum number of bytes it may have.
        folder: Descriptor of the folder that `path` is in, if that is open.

    Attributes:
        identity: What it was when it was opened.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it is no regular file, too large, or cannot be opened. What is no file is not even opened.
    """

    def __init__(self, path: str | Path, max_bytes: int, *, folder: int | None = None) -> None:
        _check_regular(os.stat(path, dir_fd=folder), path)
        self._descriptor = os.open(path, _FLAGS, dir_fd=folder)
        self._finalizer = weakref.finalize(self, os.close, self._descriptor)
        found = os.fstat(self._descriptor)
        _check_regular(found, path)  # it may be another one by now
        self._name = Path(path).name
        self.identity = FileIdentity.of(found)
        if found.st_size > max_bytes:
            raise OSError(f"{self._name} has {found.st_size:,} bytes; allowed are {max_bytes:,}")

    def close(self) -> None:
        """Close the file."""
        self._finalizer()

    def __reduce__(self) -> Never:
        """Refuse to be copied: two objects would close one descriptor."""
        raise TypeError("an open file cannot be copied or pickled")

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with what begins at `offset`.

        Raises:
            OSError: If the file ends before.
        """
        while buffer:
            if hasattr(os, "preadv"):
                num_bytes = os.preadv(self._descriptor, [buffer], offset)
            else:  # Windows
                os.lseek(self._descriptor, offset, os.SEEK_SET)
                piece = os.read(self._descriptor, len(buffer))
                num_bytes = len(piece)
                buffer[:num_bytes] = piece
            if not num_bytes:
                raise OSError(f"{self._name} became shorter while it was read")
            buffer, offset = buffer[num_bytes:], offset + num_bytes

    def read(self, num_bytes: int | None = None, offset: int = 0) -> bytes:
        """Bytes from `offset` on, by default all of them; never more than the file had when it was opened."""
        num_bytes = min(self.identity.num_bytes - offset, num_bytes if num_bytes is not None else 1 << 62)
        data = bytearray(max(0, num_bytes))
        self.read_into(memoryview(data), offset)
        return bytes(data)

    @contextlib.contextmanager
    def as_stdin(self) -> Iterator[int]:
        """A descriptor for another process to read it by, from its beginning."""
        descriptor = os.dup(self._descriptor)
        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
            yield descriptor
        finally:
            os.close(descriptor)

    def current_identity(self) -> FileIdentity:
        """What it is now."""
        return FileIdentity.of(os.fstat(self._descriptor))


class AdapterFolder:
    """A folder, opened once, so that all files are read from the same one even if another takes its name.

    Args:
        path: The folder; a link is followed.

    Raises:
        OSError: If it is no folder that can be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        found = path.stat()
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(f"{path} is no folder")
        if _CAN_OPEN_IN_FOLDER:
            self._descriptor = os.open(path, _FLAGS | os.O_DIRECTORY)
            found = os.fstat(self._descriptor)
        self._identity = _folder_identity(found)
        self._opened: dict[str, FileIdentity | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the folder; files that were opened stay open."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def open(self, name: str, max_bytes: int) -> RegularFile | None:
        """Open a file of the folder.

        Returns:
            The file; None if there is none of that name.

        Raises:
            OSError: If it is no regular file, too large, or cannot be opened.
        """
        self._opened[name] = self.identity_of(name)
        try:
            return RegularFile(self._within(name), max_bytes, folder=self._descriptor)
        except FileNotFoundError:
            with contextlib.suppress(FileNotFoundError):
                os.stat(self._within(name), dir_fd=self._descriptor, follow_symlinks=False)
                raise OSError(f"{name} is a link to what is not there") from None
            return None

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """The content of a file of the folder; None if there is none of that name.

        Raises:
            OSError: If it is no regular file, too large, or cannot be read.
        """
        file = self.open(name, max_bytes)
        if file is None:
            return None
        with contextlib.closing(file):
            return file.read()

    def has(self, name: str) -> bool:
        """Whether there is anything of that name."""
        try:
            os.stat(self._within(name), dir_fd=self._descriptor)
        except OSError:
            return False
        return True

    def is_unchanged(self) -> bool:
        """Whether path and names still lead to what was opened, and nothing that was opened has changed."""
        try:
            if _folder_identity(self.path.stat()) != self._identity:
                return False
            return all(self.identity_of(name) == identity for name, identity in self._opened.items())
        except OSError:
            return False

    def identity_of(self, name: str) -> FileIdentity | None:
        """What a file of the folder is now; None if there is no regular file of that name."""
        try:
            found = os.stat(self._within(name), dir_fd=self._descriptor)
        except FileNotFoundError:
            return None
        return FileIdentity.of(found) if stat.S_ISREG(found.st_mode) else None

    def _within(self, name: str) -> str | Path:
        return name if self._descriptor is not None else self.path / name


def read_one_version(
    path: Path, where: str, read: Callable[[AdapterFolder], T], *, guard: Callable[[], AbstractContextManager[None]]
) -> T:
    """Read a folder that others may replace meanwhile: all of one version, or an error.

    Args:
        path: The folder.
        where: What to call it in an error.
        read: Reads what is wanted of it.
        guard: Keeps those who replace it by renaming away; entered once one of them came in between.

    Raises:
        AdapterError: What `read` raises; whatever else parsers make of a stranger's bytes, as one.
    """
    failure: Exception = OSError("there is no such folder")
    advice = _NO_FOLDER
    for tried in range(_MAX_TRIES):
        if tried > 1:
            time.sleep(_PAUSE_SECONDS)
        with guard() if tried else contextlib.nullcontext():
            try:
                folder = AdapterFolder(path)
            except (OSError, ValueError) as error:  # a path with a zero byte in it
                failure, advice = error, _NO_FOLDER
                if tried > _MAX_TRIES_WITHOUT_FOLDER:
                    break
                continue
            with folder:
                advice = "Copy it again."
                try:
                    result = read(folder)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is said of this folder below
                    failure = error
                    if folder.is_unchanged():
                        break
                else:
                    if folder.is_unchanged():
                        return result
                    failure = OSError("its files change while they are read")
    if isinstance(failure, AdapterError):
        raise failure
    raise InvalidAdapterError(f"{where} cannot be read: {said(failure)}. {advice}") from failure


def parse_json(data: bytes, max_containers: int) -> Any:
    """Parse a stranger's JSON, in memory and time that its length bounds.

    Args:
        data: Utf-8.
        max_containers: Most lists and objects: an empty one takes two bytes of the file and sixty of memory.

    Raises:
        ValueError: If it is no JSON, or has more lists and objects.
        RecursionError: If they are nested too deep.
    """
    if data.count(b"[") + data.count(b"{") > max_containers:
        raise ValueError(f"it has more than {max_containers:,} lists and objects")
    return json.loads(data.decode("utf-8"))


def said(error: Exception) -> str:
    """What an error says, in a few hundred characters."""
    return str(error)[:500] if isinstance(error, OSError) else shown(error)


def _folder_identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _check_regular(found: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(f"{Path(path).name} is {kind}, not a regular file")
