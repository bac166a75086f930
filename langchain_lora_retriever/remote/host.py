"""Beside an engine: takes the requests of callers in other processes, and gives them their deltas, a frame a step."""

from __future__ import annotations

import logging
import secrets
import threading
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener, answer_challenge, deliver_challenge
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.errors import EngineError
from langchain_lora_retriever.remote.adapters import AdapterContents, AdapterStore
from langchain_lora_retriever.remote.peer import Peer
from langchain_lora_retriever.remote.wire import EngineDescription, portable, unpacked_tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from langchain_lora_retriever.engine.generation import Delta, Generation
    from langchain_lora_retriever.remote.recipe import HostedEngine
    from langchain_lora_retriever.remote.wire import AdapterRef, Job

__all__ = ["MAX_ADAPTER_BYTES", "EngineHost"]

MAX_ADAPTER_BYTES = 8 << 30
"""Bytes of adapters that callers have sent, kept beside an engine where nobody says how many."""

_logger = logging.getLogger(__name__)
_LINGER_SECONDS = 0.001
_STATS_SECONDS = 1.0


class _Running:
    """A caller's request, from when it is asked for until it ends."""

    def __init__(self) -> None:
        self.generation: Generation | None = None
        self.is_aborted = False


class _Caller:
    """A process whose requests run here.

    Attributes:
        peer: The connection to it, once it has come.
        on_come: What is done then.
        jobs: Its requests by key.
        wanted: Adapters that it was asked for.
    """

    def __init__(self) -> None:
        self.peer: Peer | None = None
        self.on_come: list[Callable[[], object]] = []
        self.jobs: dict[int, _Running] = {}
        self.wanted: dict[str, Future[AdapterContents]] = {}


class EngineHost:
    """Serves an engine to other processes. Any thread may call.

    A caller has one connection, over which everything comes to it. When that ends, its requests are aborted: the caller
    has gone, or asks elsewhere.

    Args:
        engine: The engine; the host neither makes nor closes it.
        max_adapter_bytes: Maximum number of bytes of adapters that callers have sent, kept for further requests.
    """

    def __init__(self, engine: HostedEngine, *, max_adapter_bytes: int = MAX_ADAPTER_BYTES) -> None:
        self.engine = engine
        self.adapters = AdapterStore(max_adapter_bytes)
        self._lock = threading.Lock()
        self._callers: dict[str, _Caller] = {}
        self._listener: Listener | None = None
        self._names: dict[Peer, str] = {}
        self._is_closed = threading.Event()
        threading.Thread(target=self._tell_stats, name="lora-host-stats", daemon=True).start()

    @property
    def description(self) -> EngineDescription:
        """What callers must know of the engine."""
        return EngineDescription(self.engine.info, self.engine.tokenizer, self.engine.admission)

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        with self._lock:
            return sum(len(caller.jobs) for caller in self._callers.values())

    @property
    def resident_fingerprints(self) -> list[str]:
        """The adapters that lie where the engine runs them; for one that does not say, those that are known here."""
        found: list[str] | None = getattr(self.engine, "resident_fingerprints", None)
        return self.adapters.fingerprints if found is None else found

    def listen(self, host: str) -> tuple[tuple[str, int], bytes]:
        """Let callers in over the network.

        Args:
            host: The address that they reach this process under.

        Returns:
            Host and port, and the key that a caller must have.
        """
        key = secrets.token_bytes(32)
        self._listener = listener = Listener((host, 0), backlog=128)
        threading.Thread(target=self._let_in, args=(listener, key), name="lora-host-door", daemon=True).start()
        address: Any = listener.address
        return (str(address[0]), int(address[1])), key

    def serve(self, connection: Connection, *, on_close: Callable[[], object] = lambda: None) -> None:
        """Serve the caller at the other end, which says first who it is.

        Args:
            connection: To a caller that may ask anything.
            on_close: Called when it has ended, on a thread of its own.
        """

        def leave(peer: Peer, reason: BaseException | None) -> None:
            self._on_close(peer, reason)
            on_close()

        Peer(connection, self._on_messages, leave, linger=_LINGER_SECONDS).start()

    def when_there(self, caller: str, action: Callable[[], object]) -> None:
        """Call `action` once a caller's connection is there: now, or on the connection's thread."""
        known = self._caller(caller)
        with self._lock:
            if known.peer is None:
                known.on_come.append(action)
                return
        action()

    def start(self, job: Job, on_end: Callable[[], object] = lambda: None) -> None:
        """Begin a request, without waiting. What becomes of it goes to its caller, what is wrong with it, too.

        Args:
            job: The request. Adapters that are not known here are read or asked for first, in a thread of its own.
            on_end: Called once when it has ended, from any thread; it must not wait.
        """
        caller = self._caller(job.caller)
        running = _Running()
        with self._lock:
            caller.jobs[job.key] = running
        if self.adapters.holds([ref for ref, _ in job.adapters]):
            self._run(caller, job, running, on_end)
        else:
            arguments = (caller, job, running, on_end)
            threading.Thread(target=self._run, args=arguments, name="lora-host-start", daemon=True).start()

    def abort(self, caller: str, key: int) -> None:
        """End a request; nothing happens if it has ended."""
        with self._lock:
            known = self._callers.get(caller)
            running = None if known is None else known.jobs.get(key)
            if running is None:
                return
            running.is_aborted = True
            generation = running.generation
        if generation is not None:
            generation.abort()

    def close(self) -> None:
        """Let nobody in any more, and end all connections."""
        self._is_closed.set()
        if self._listener is not None:
            self._listener.close()
        for peer in list(self._names):
            peer.close()

    def _run(self, caller: _Caller, job: Job, running: _Running, on_end: Callable[[], object]) -> None:
        def give(item: Delta | BaseException) -> None:
            if caller.peer is not None:
                caller.peer.send((job.key, portable(item) if isinstance(item, BaseException) else tuple(item)))
            if isinstance(item, BaseException) or item.finish_reason is not None:
                caller.jobs.pop(job.key, None)
                on_end()

        try:
            generation = self._submit(caller, job)
        except BaseException as error:  # noqa: BLE001 - it is the caller's to hear, panics of native code too
            give(error)
            return
        generation.hand_over(give)
        with self._lock:
            running.generation = generation
            is_aborted = running.is_aborted
        if is_aborted:
            generation.abort()

    def _submit(self, caller: _Caller, job: Job) -> Generation:
        adapters = [
            (self.adapters.get(ref, lambda part: self._fetch(caller, part)), weight) for ref, weight in job.adapters
        ]
        return self.engine.submit(
            unpacked_tokens(job.prompt_token_ids),
            job.sampling,
            adapters,
            grammar=job.grammar,
            output_token_ids=unpacked_tokens(job.output_token_ids),
        )

    def _caller(self, name: str) -> _Caller:
        with self._lock:
            return self._callers.setdefault(name, _Caller())

    def _let_in(self, listener: Listener, key: bytes) -> None:
        while not self._is_closed.is_set():
            try:
                connection = listener.accept()
            except (OSError, EOFError) as error:
                if not self._is_closed.wait(0.05):
                    _logger.warning("Somebody was not let in: %r", error)
                continue
            # Who says nothing holds up nobody else.
            threading.Thread(target=self._welcome, args=(connection, key), name="lora-host-door", daemon=True).start()

    def _welcome(self, connection: Connection, key: bytes) -> None:
        try:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
        except (OSError, EOFError, AuthenticationError) as error:
            _logger.warning("Somebody without the key was not let in: %r", error)
            connection.close()
            return
        self.serve(connection)

    def _on_messages(self, peer: Peer, messages: list[Any]) -> None:
        for kind, *rest in messages:
            if kind == "hello":
                self._greet(peer, *rest)
            elif kind == "submit":
                self.start(*rest)
            elif kind == "abort":
                self.abort(self._names[peer], *rest)
            elif kind == "contents":
                self._receive(peer, *rest)
            elif kind == "call":
                threading.Thread(target=self._answer, args=(peer, *rest), daemon=True).start()

    def _greet(self, peer: Peer, name: str) -> None:
        caller = self._caller(name)
        with self._lock:
            self._names[peer] = name
            caller.peer = peer
            actions, caller.on_come = caller.on_come, []
        peer.send(("stats", self.engine.stats()))
        for action in actions:
            action()

    def _on_close(self, peer: Peer, reason: BaseException | None) -> None:
        if reason is not None:
            _logger.error("A caller's connection has ended", exc_info=reason)
        with self._lock:
            name = self._names.pop(peer, None)
            caller = None if name is None else self._callers.get(name)
            if caller is None or caller.peer is not peer:
                return
            assert name is not None
            del self._callers[name]
            wanted = list(caller.wanted.values())
            jobs = list(caller.jobs.values())
            for running in jobs:
                running.is_aborted = True
        for future in wanted:
            future.set_exception(EngineError("The caller has gone."))
        for running in jobs:
            if running.generation is not None:
                running.generation.abort()

    def _fetch(self, caller: _Caller, ref: AdapterRef) -> AdapterContents:
        """Have an adapter sent by a caller."""
        with self._lock:
            peer = caller.peer
            future: Future[AdapterContents] = caller.wanted.setdefault(ref.fingerprint, Future())
        if peer is None:
            raise EngineError(f"The adapter {ref.name!r} cannot be had: its caller is not there.")
        peer.send(("want", ref.fingerprint))
        return future.result()

    def _receive(self, peer: Peer, fingerprint: str, contents: AdapterContents | Exception) -> None:
        with self._lock:
            caller = self._callers.get(self._names.get(peer, ""))
            future = None if caller is None else caller.wanted.pop(fingerprint, None)
        if future is None:
            return
        if isinstance(contents, Exception):
            future.set_exception(contents)
        else:
            future.set_result(contents)

    def _answer(self, peer: Peer, key: int, method: str) -> None:
        """Do what a caller asks of the engine as a whole."""
        asked = {"stats": self.engine.stats, "check_integrity": getattr(self.engine, "check_integrity", lambda: None)}
        try:
            result = asked[method]()
        except BaseException as error:  # noqa: BLE001 - the caller's to hear, assertions too
            result = portable(error)
        peer.send(("answer", key, result))

    def _tell_stats(self) -> None:
        """Tell callers, every second, how the engine is; leave them once it has been dead for one."""
        was_alive = True
        while not self._is_closed.wait(_STATS_SECONDS):
            peers = list(self._names)
            if not self.engine.is_alive:
                for peer in () if was_alive else peers:
                    peer.close()
                was_alive = False
            if peers:
                with suppress(Exception):  # of an engine that is being closed
                    stats = self.engine.stats()
                    for peer in peers:
                        peer.send(("stats", stats))
