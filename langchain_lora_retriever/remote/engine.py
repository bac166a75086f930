"""Many engines behind Ray Serve, as one `EngineClient`."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from contextlib import suppress
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError

from langchain_lora_retriever.errors import EngineError, EngineOverloadedError
from langchain_lora_retriever.remote.client import RemoteClient, RemoteRequest

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from ray.serve.handle import DeploymentHandle

    from langchain_lora_retriever.remote.peer import Peer
    from langchain_lora_retriever.remote.wire import Door, EngineDescription

__all__ = ["RemoteEngine"]

_MOVE_SECONDS = 120.0
_LAST_FRAME_SECONDS = 10.0
_CLOSE_SECONDS = 10.0


class _LostError(Exception):
    """The replica that a request ran on is not there any more."""


class RemoteEngine(RemoteClient):
    """Engine replicas behind a Ray Serve handle, as one engine. Any thread or event loop may call every method.

    A request whose replica is lost goes on at another, after what has come of it already: its caller sees one answer,
    greedy or sampled, and no token twice.

    Args:
        handle: Of the deployment that `engine_app` makes, or the name of its Serve application.
        max_moves: How often a request may lose its replica before it ends with an error.
        max_in_flight: See `RemoteClient`.

    Raises:
        EngineError: If no replica answers.
    """

    def __init__(
        self, handle: DeploymentHandle[Any] | str, *, max_moves: int = 3, max_in_flight: int | None = None
    ) -> None:
        if isinstance(handle, str):
            handle = serve.get_app_handle(handle)
        self._generate = handle.options(method_name="generate", stream=True)
        self._max_moves = max_moves
        self._links: dict[str, asyncio.Task[Peer]] = {}
        self._tasks: dict[RemoteRequest, asyncio.Task[None]] = {}
        self._lost: dict[RemoteRequest, asyncio.Event] = {}
        self._doors: dict[Peer, Door] = {}
        self.num_moved = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lora-remote-engine", daemon=True)
        self._thread.start()
        super().__init__(self._wait(_describe(handle)), max_in_flight=max_in_flight)

    @property
    def doors(self) -> list[Door]:
        """The replicas that there are connections to."""
        return list(self._doors.values())

    def close(self) -> None:
        """Ask nothing any more: running requests end with `EngineDeadError`. The replicas stay. Idempotent."""
        super().close()
        if self._thread.is_alive():
            with suppress(TimeoutError):
                self._wait(self._finish(), _CLOSE_SECONDS)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Any], seconds: float | None = None) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    async def _finish(self) -> None:
        """End what still waits for Serve."""
        tasks = [*self._tasks.values(), *self._links.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, request: RemoteRequest) -> None:
        # In a context of its own: a caller that is itself a Serve replica has its request in it.
        with suppress(RuntimeError):  # the loop is closed: the request has ended with the client
            self._loop.call_soon_threadsafe(self._spawn, request, context=contextvars.Context())

    def _spawn(self, request: RemoteRequest) -> None:
        if not request.generation.is_done:
            self._tasks[request] = task = self._loop.create_task(self._run(request))
            task.add_done_callback(lambda _: self._tasks.pop(request, None))

    def _cancel(self, request: RemoteRequest) -> None:
        peer = request.peer
        if peer is not None:
            peer.send(("abort", request.key))  # at once; through Serve it takes some ten milliseconds
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._leave_task, request)

    def _leave_task(self, request: RemoteRequest) -> None:
        task = self._tasks.get(request)
        if task is not None and request.peer is None:
            task.cancel()

    def _on_lost(self, peer: Peer, requests: list[RemoteRequest]) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._tell_lost, peer, requests)

    def _tell_lost(self, peer: Peer, requests: list[RemoteRequest]) -> None:
        door = self._doors.pop(peer, None)
        if door is not None:
            self._links.pop(door.replica_id, None)
        for request in requests:
            event = self._lost.get(request)
            if event is not None and request.peer is peer:
                event.set()

    async def _run(self, request: RemoteRequest) -> None:
        """Run a request, at another replica whenever it loses one."""
        losses: list[tuple[str, str]] = []
        try:
            while not request.generation.is_done and len(losses) <= self._max_moves:
                if losses:
                    self.num_moved += 1
                    self._next_key(request)
                replica = ["a replica that it had not reached yet"]
                try:
                    await self._attempt(request, replica, frozenset(name for name, _ in losses))
                except _LostError as error:
                    losses.append((replica[0], str(error)))
        except BackPressureError as error:
            self._on_error(request, EngineOverloadedError(f"Too many requests wait for a replica: {error}"))
        except EngineError as error:
            self._on_error(request, error)
        except Exception as error:  # noqa: BLE001 - the caller's to hear
            self._on_error(request, EngineError(f"The request failed: {error!r}"))
        else:
            self._on_error(request, EngineError(_told(losses, len(request.output_token_ids))))  # if it has not ended

    async def _attempt(self, request: RemoteRequest, replica: list[str], avoid: frozenset[str]) -> None:
        """Run a request on one replica, to its end.

        Args:
            request: The request.
            replica: Its only item becomes the replica's name.
            avoid: Replicas that were lost.

        Raises:
            _LostError: If the replica is not there any more.
        """
        self._lost[request] = is_lost = asyncio.Event()
        response = self._generate.remote(request.job(self._name, avoid))
        follow = self._loop.create_task(self._follow(response, request, replica))
        lost = self._loop.create_task(is_lost.wait())
        try:
            limit = _MOVE_SECONDS if avoid else None
            while not (follow.done() or lost.done()):
                done, _ = await asyncio.wait({follow, lost}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
                if not done and request.peer is None:
                    raise EngineError(f"No replica took the request within {limit:.0f} s after it had lost its own.")
            if follow.done():
                follow.result()
            if lost.done() and not request.generation.is_done:
                raise _LostError("its connection ended")
        except (RayError, OSError, EOFError, AuthenticationError) as error:
            if isinstance(error, RayTaskError):
                raise EngineError(f"The replica {replica[0]} failed: {error.cause!r}") from error
            raise _LostError(f"{type(error).__name__}: {_first_line(error)}") from error
        finally:
            self._lost.pop(request, None)
            lost.cancel()
            if not follow.done():
                response.cancel()  # type: ignore[no-untyped-call]
                follow.cancel()
            await asyncio.gather(follow, lost, return_exceptions=True)

    async def _follow(self, response: Any, request: RemoteRequest, replica: list[str]) -> None:
        """Wait for a request's end at its replica, and here."""
        key = request.key
        async for door in response:
            replica[0] = door.replica_id
            peer = await self._link(door)
            if request.key == key and request.peer is None:
                request.peer = peer
            if not self._is_connected(peer):
                raise EOFError("the connection ended")
            if request.generation.is_done:  # aborted on the way
                peer.send(("abort", key))
        has_ended = asyncio.Event()
        request.on_end(partial(self._loop.call_soon_threadsafe, has_ended.set))
        try:
            async with asyncio.timeout(_LAST_FRAME_SECONDS):
                await has_ended.wait()
        except TimeoutError:
            raise _LostError("it ended the request and did not say how") from None

    async def _link(self, door: Door) -> Peer:
        """The connection to a replica, made once."""
        task = self._links.get(door.replica_id)
        if task is None:
            task = self._links[door.replica_id] = self._loop.create_task(self._knock(door))
            task.add_done_callback(lambda done: self._links.pop(door.replica_id, None) if _failed(done) else None)
        return await asyncio.shield(task)

    async def _knock(self, door: Door) -> Peer:
        connection = await asyncio.to_thread(Client, door.address, authkey=door.key)
        peer = self._connect(connection)
        self._doors[peer] = door
        return peer


async def _describe(handle: DeploymentHandle[Any]) -> EngineDescription:
    try:
        found: EngineDescription = await handle.describe.remote()
    except RayError as error:
        raise EngineError(f"No engine replica answers: {_first_line(error)}") from error
    return found


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is not None


def _told(losses: list[tuple[str, str]], num_tokens: int) -> str:
    ways = "; ".join(f"{name}: {how}" for name, how in losses)
    return (
        f"The request lost its replica {len(losses)} times, after {num_tokens} tokens, and is not tried again "
        f"(max_moves): {ways}. If it is always this request, it may be what ends them; their logs say more."
    )


def _first_line(error: BaseException) -> str:
    return f"{str(error).strip().partition(chr(10))[0]:.300}"
