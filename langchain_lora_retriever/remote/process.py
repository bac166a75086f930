"""An engine in a process of its own on this machine: no interpreter lock is shared with its callers."""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from langchain_lora_retriever.errors import EngineDeadError, EngineError, InvalidRequestError
from langchain_lora_retriever.remote.client import RemoteClient, RemoteRequest
from langchain_lora_retriever.remote.recipe import EngineRecipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from langchain_lora_retriever.remote.peer import Peer
    from langchain_lora_retriever.remote.recipe import HostedEngine
    from langchain_lora_retriever.remote.wire import EngineDescription

__all__ = ["ProcessEngine"]

_CODE = "import sys; sys.path[:] = {path}; from langchain_lora_retriever.remote import child; child.serve_parent()"
_END_SECONDS = 30.0


class ProcessEngine(RemoteClient):
    """Starts a process, makes an engine there, and is an `EngineClient` of it. Any thread may call.

    Streams that are read in Python hold the interpreter, and the engine's thread needs it between two steps: with the
    engine elsewhere neither waits for the other. The process ends with `close`, and with this one in any case.

    Args:
        source: A hub name, a folder, or whatever makes the engine there: an `EngineRecipe`, a function of a module.
        model_kwargs: For `from_pretrained`, of a name or a folder.
        config: The engine's limits, likewise.
        max_in_flight: See `RemoteClient`.

    Raises:
        InvalidRequestError: If what makes the engine cannot be sent to another process.
        EngineError: If the engine cannot be made.
    """

    def __init__(
        self,
        source: str | Path | Callable[[], HostedEngine],
        *,
        model_kwargs: dict[str, Any] | None = None,
        config: Any = None,
        max_in_flight: int | None = None,
    ) -> None:
        if not callable(source):
            given = {"model_kwargs": model_kwargs, "config": config}
            given = {name: value for name, value in given.items() if value is not None}
            source = EngineRecipe(base_model=str(source), **given)
        elif model_kwargs or config:
            raise InvalidRequestError("What makes an engine has its own model_kwargs and config: pass one of the two.")
        try:
            recipe = pickle.dumps(source)
        except Exception as error:
            raise InvalidRequestError(
                f"source={source!r} cannot be sent to another process ({error}): pass a name, a folder, an "
                "EngineRecipe, or a function that a module has."
            ) from error
        if b"__main__" in recipe:
            raise InvalidRequestError(
                f"source={source!r} is of this program's main file, which another process does not have: put it into a "
                "module, or pass a name, a folder or an EngineRecipe."
            )
        mine, other = Pipe()
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter
            [sys.executable, "-c", _CODE.format(path=sys.path), str(other.fileno())],
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
        )
        other.close()
        try:
            super().__init__(self._start(mine, recipe), max_in_flight=max_in_flight)
        except BaseException:
            mine.close()
            self._reap(0.0)
            raise
        self._peer = self._connect(mine)
        _running.add(self)

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def close(self) -> None:
        """End the process: running requests end with `EngineDeadError`. Idempotent."""
        super().close()
        self._reap(_END_SECONDS)

    def _start(self, connection: Connection, recipe: bytes) -> EngineDescription:
        """Say what to make, and wait until it is made."""
        try:
            connection.send(os.getpid())
            connection.send_bytes(recipe)
            outcome = connection.recv()
        except (EOFError, OSError) as error:
            raise EngineError(
                f"The engine's process ended while the engine was made {self._how()}; its output says more."
            ) from error
        if isinstance(outcome, Exception):
            raise outcome
        made: EngineDescription = outcome
        return made

    def _begin(self, request: RemoteRequest) -> None:
        request.peer = self._peer
        self._peer.send(("submit", request.job(self._name)))

    def _cancel(self, request: RemoteRequest) -> None:
        self._peer.send(("abort", request.key))

    def _on_lost(self, peer: Peer, requests: list[RemoteRequest]) -> None:
        del peer, requests
        if self.is_alive:
            death = EngineDeadError(f"The engine's process has ended {self._how()}. Create a new ProcessEngine.")
            self._end(death, death)

    def _how(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(5.0)
            return f"(signal {-status})" if status < 0 else f"(status {status})"
        return "(it is still there, and does not answer)"

    def _reap(self, seconds: float) -> None:
        """Wait for the process, and kill it if it does not end."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_running: WeakSet[ProcessEngine] = WeakSet()


@atexit.register
def _end_all() -> None:
    for engine in list(_running):
        if engine._process.poll() is None and engine.is_alive:  # noqa: SLF001 - its other half
            engine.close()
