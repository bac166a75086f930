"""The caller's side: an `EngineClient` whose engine is elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import secrets
import threading
import time
import uuid
from abc import ABC, abstractmethod
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from langchain_lora_retriever.engine.generation import Delta, Generation, deliver
from langchain_lora_retriever.engine.stats import EngineStats, RequestCounts
from langchain_lora_retriever.errors import EngineDeadError, EngineError, EngineOverloadedError
from langchain_lora_retriever.remote.adapters import AdapterContents
from langchain_lora_retriever.remote.peer import Peer
from langchain_lora_retriever.remote.wire import Job, packed_tokens, portable, ref_of
from langchain_lora_retriever.support.forking import after_fork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from multiprocessing.connection import Connection

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.engine.api import EngineInfo, Grammar, Registration
    from langchain_lora_retriever.remote.wire import AdapterRef, EngineDescription
    from langchain_lora_retriever.types import Adapter, SamplingParams

__all__ = ["RemoteClient", "RemoteRequest"]

_logger = logging.getLogger(__name__)
_MAX_ADAPTERS = 8192  # that may still be asked for
_CALL_SECONDS = 60.0


class RemoteRequest:
    """A request on the caller's side.

    Attributes:
        generation: What its caller holds.
        key: Which it is at the engine that it runs on.
        output_token_ids: What has come.
        has_prompt_logprobs: Whether the prompt's log-probabilities have, which are given once.
        peer: The connection over which it comes, once something has.
        arrival: When it was made, by `time.monotonic`.
    """

    def __init__(
        self,
        key: int,
        prompt_token_ids: bytes,
        sampling: SamplingParams,
        adapters: tuple[tuple[AdapterRef, float], ...],
        grammar: Grammar | None,
    ) -> None:
        self.generation: Generation
        self.key = key
        self.output_token_ids: list[int] = []
        self.has_prompt_logprobs = False
        self.peer: Peer | None = None
        self.arrival = time.monotonic()
        self.last_news: float | None = None
        self._prompt_token_ids = prompt_token_ids
        self._sampling = sampling
        self._adapters = adapters
        self._grammar = grammar
        self._on_end: Callable[[], object] | None = None

    def on_end(self, action: Callable[[], object]) -> None:
        """Call `action` once the request has ended here: now, or from whatever thread ends it."""
        self._on_end = action
        if self.generation.is_done:
            action()

    def end(self) -> None:
        """Say that it has ended."""
        if self._on_end is not None:
            self._on_end()

    def job(self, caller: str, avoid: Iterable[str] = ()) -> Job:
        """What is to be done yet."""
        sampling, given = self._sampling, packed_tokens(self.output_token_ids)
        if self.has_prompt_logprobs:
            sampling = dataclasses.replace(sampling, prompt_logprobs_from=None)
        return Job(
            caller, self.key, self._prompt_token_ids, sampling, self._adapters, self._grammar, given,
            frozenset(avoid),
        )  # fmt: skip


class RemoteClient(ABC):
    """An engine in another process, as an `EngineClient`. Any thread or event loop may call every method.

    What can never be served is refused here, by what the engine has told of itself.

    Args:
        description: What it has told.
        max_in_flight: Maximum number of requests of this caller that may be under way; one more is refused with
            `EngineOverloadedError`. None sets no limit.
    """

    def __init__(self, description: EngineDescription, *, max_in_flight: int | None = None) -> None:
        self._description = description
        self._max_in_flight = max_in_flight
        self._name = uuid.uuid4().hex
        self._keys = itertools.count()
        self._lock = threading.Lock()
        self._requests: dict[int, RemoteRequest] = {}
        self._peers: dict[Peer, EngineStats | None] = {}
        self._adapters: dict[str, Adapter] = {}  # by content: what an engine may ask for
        self._answers: dict[int, tuple[Peer, Future[Any]]] = {}
        self._counts = RequestCounts()
        self._death: EngineDeadError | None = None
        _clients.add(self)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, a copy of it."""
        return self._description.tokenizer

    @property
    def info(self) -> EngineInfo:
        """What does not change while it runs."""
        return self._description.info

    @property
    def is_alive(self) -> bool:
        """Whether it still takes requests."""
        return self._death is None

    def register(self, adapters: Sequence[Adapter]) -> list[Registration]:
        """Say of each adapter whether it can run there; nothing is sent for that."""
        return self._description.admission.register(adapters)

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapters: Sequence[tuple[Adapter, float]] = (),
        *,
        grammar: Grammar | None = None,
        output_token_ids: Sequence[int] = (),
    ) -> Generation:
        """Queue a request; see `EngineClient.submit`."""
        if self._death is not None:
            raise EngineDeadError(str(self._death))
        token_ids = self._description.admission.check(prompt_token_ids, sampling, adapters, output_token_ids)
        if sampling.seed is None:  # so that an answer which is moved goes on as it began
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(62))
        refs = tuple((ref_of(adapter), float(weight)) for adapter, weight in adapters)
        request = RemoteRequest(next(self._keys), packed_tokens(token_ids), sampling, refs, grammar)
        request.output_token_ids += output_token_ids
        request.generation = Generation(on_abort=lambda: self._leave(request))
        with self._lock:
            if self._death is not None:
                raise EngineDeadError(str(self._death))
            if self._max_in_flight is not None and len(self._requests) >= self._max_in_flight:
                raise EngineOverloadedError(
                    f"{len(self._requests)} requests of this process are under way, and max_in_flight="
                    f"{self._max_in_flight} lets no more: try again later, or raise it."
                )
            for adapter, _ in adapters:
                self._remember(adapter)
            self._requests[request.key] = request
            self._counts.num_prompt_tokens += len(token_ids)
        self._begin(request)
        return request.generation

    def stats(self) -> EngineStats:
        """A snapshot: requests, tokens and latencies of this caller, the rest as the engines told it a second ago."""
        with self._lock:
            known = [stats for stats in self._peers.values() if stats is not None]
            num_running = sum(request.last_news is not None for request in self._requests.values())
            return EngineStats(
                num_running=num_running,
                num_waiting=len(self._requests) - num_running,
                num_free_blocks=sum(stats.num_free_blocks for stats in known),
                num_resident_adapters=sum(stats.num_resident_adapters for stats in known),
                num_steps=sum(stats.num_steps for stats in known),
                output_tokens_per_second=sum(stats.output_tokens_per_second for stats in known),
                num_preemptions=sum(stats.num_preemptions for stats in known),
                num_adapter_hits=sum(stats.num_adapter_hits for stats in known),
                num_adapter_loads=sum(stats.num_adapter_loads for stats in known),
                num_blocks=sum(stats.num_blocks for stats in known),
                **self._counts.told(),
            )

    def engine_stats(self) -> list[EngineStats]:
        """What each engine says of itself now, of those that this caller has a connection to."""
        return self._ask_all("stats")

    def check_integrity(self) -> None:
        """Assert of each engine that this caller has a connection to that it has lost no memory."""
        self._ask_all("check_integrity")

    def close(self) -> None:
        """Ask nothing any more: running requests end with `EngineDeadError`. Idempotent."""
        self._end(
            EngineDeadError("The engine was closed while this request was running."),
            EngineDeadError("The engine has stopped: it was closed. Create a new one."),
        )

    @abstractmethod
    def _begin(self, request: RemoteRequest) -> None:
        """Give a request to an engine. Called by `submit`; it must not wait."""

    @abstractmethod
    def _cancel(self, request: RemoteRequest) -> None:
        """Let go of a request that was aborted."""

    @abstractmethod
    def _on_lost(self, peer: Peer, requests: list[RemoteRequest]) -> None:
        """A connection has ended, over which requests were coming."""

    def _on_error(self, request: RemoteRequest, error: Exception) -> None:
        """An engine has ended a request with an error."""
        if self._forget(request):
            request.generation.fail(error)
            request.end()

    def _connect(self, connection: Connection) -> Peer:
        """Begin to talk over a connection."""
        peer = Peer(connection, self._on_messages, self._on_close)
        with self._lock:
            self._peers[peer] = None
        peer.send(("hello", self._name))
        peer.start()
        return peer

    def _is_connected(self, peer: Peer) -> bool:
        """Whether a connection is open; if it is, whoever has requests on it hears when it is not any more."""
        with self._lock:
            return peer in self._peers

    def _next_key(self, request: RemoteRequest) -> None:
        """Make a request another one to engines: what comes of the old one is nobody's."""
        with self._lock:
            if self._requests.pop(request.key, None) is None:
                return
            request.key, request.peer = next(self._keys), None
            self._requests[request.key] = request

    def _forget(self, request: RemoteRequest) -> bool:
        """Count a request as ended; False if it is already."""
        with self._lock:
            if self._requests.pop(request.key, None) is None:
                return False
            self._counts.num_finished += 1
            return True

    def _leave(self, request: RemoteRequest) -> None:
        if self._forget(request):
            self._cancel(request)
            request.end()

    def _end(self, death: EngineDeadError, told_later: EngineDeadError) -> None:
        """End the requests that run with `death`; later ones are refused with `told_later`."""
        with self._lock:
            if self._death is not None:
                return
            self._death = told_later
            requests, peers = list(self._requests.values()), list(self._peers)
            self._requests.clear()
            self._counts.num_finished += len(requests)
        for request in requests:
            request.generation.fail(EngineDeadError(str(death)))
            self._cancel(request)
            request.end()
        for peer in peers:
            peer.close()

    def _end_in_child(self) -> None:
        """Say in a forked process that the connections are its parent's."""
        self._lock = threading.Lock()
        self._death = EngineDeadError(
            "This process was forked from one that has connections to an engine, and these cannot be shared. Make the "
            "client after the fork (in each worker), or start processes by spawn."
        )
        for request in list(self._requests.values()):
            request.generation.orphan(self._death)

    def _remember(self, adapter: Adapter) -> None:
        """Keep an adapter for an engine that asks for it. Call under the lock."""
        for member, _ in adapter.members:
            self._remember(member)
        if not adapter.members:
            self._adapters.pop(adapter.fingerprint, None)  # the last ones used stay
            self._adapters[adapter.fingerprint] = adapter
            while len(self._adapters) > _MAX_ADAPTERS:
                del self._adapters[next(iter(self._adapters))]

    def _on_messages(self, peer: Peer, messages: list[Any]) -> None:
        news: list[tuple[RemoteRequest, Delta | Exception]] = []
        now = time.monotonic()
        with self._lock:
            for kind, *rest in messages:
                if isinstance(kind, int):
                    request = self._requests.get(kind)
                    if request is not None:
                        request.peer = peer
                        is_error = isinstance(rest[0], Exception)
                        news.append((request, rest[0] if is_error else self._note(request, Delta(*rest[0]), now)))
                else:
                    self._on_message(peer, kind, *rest)
        deliver((request.generation, item) for request, item in news if isinstance(item, Delta))
        for request, item in news:
            if isinstance(item, Exception):
                self._on_error(request, item)
            elif item.finish_reason is not None:
                request.end()

    def _on_message(self, peer: Peer, kind: str, *rest: Any) -> None:
        """Take in what is of no request. Called under the lock."""
        if kind == "stats":
            (self._peers[peer],) = rest
        elif kind == "answer":
            key, result = rest
            self._answers.pop(key)[1].set_result(result)
        elif kind == "want":
            threading.Thread(target=self._give, args=(peer, *rest), name="lora-adapter-sender", daemon=True).start()

    def _note(self, request: RemoteRequest, delta: Delta, now: float) -> Delta:
        """Count a delta. Call under the lock."""
        request.output_token_ids += delta.token_ids
        request.has_prompt_logprobs |= delta.prompt_logprobs is not None
        self._counts.num_output_tokens += len(delta.token_ids)
        if request.last_news is None:
            self._counts.first_token.append(now - request.arrival)
        elif delta.token_ids:
            self._counts.inter_token.append((now - request.last_news) / len(delta.token_ids))
        request.last_news = now
        if delta.finish_reason is not None:
            del self._requests[request.key]
            self._counts.num_finished += 1
            self._counts.num_cached_tokens += delta.usage.num_cached_tokens if delta.usage is not None else 0
        return delta

    def _on_close(self, peer: Peer, reason: BaseException | None) -> None:
        if reason is not None:
            _logger.error("The connection to an engine has ended", exc_info=reason)
        with self._lock:
            self._peers.pop(peer, None)
            unanswered = [key for key, (asked, _) in self._answers.items() if asked is peer]
            answers = [self._answers.pop(key)[1] for key in unanswered]
            lost = [request for request in self._requests.values() if request.peer is peer]
        for answer in answers:
            answer.set_result(EngineDeadError("The connection to the engine has ended."))
        self._on_lost(peer, lost)

    def _give(self, peer: Peer, fingerprint: str) -> None:
        """Send an adapter to an engine that lacks it."""
        try:
            contents: AdapterContents | Exception = AdapterContents.of(self._adapters[fingerprint])
        except KeyError:
            contents = EngineError(f"The adapter with the content {fingerprint} is not known here any more.")
        except Exception as error:  # noqa: BLE001 - the request's to hear
            contents = portable(error)
        peer.send(("contents", fingerprint, contents))

    def _ask_all(self, method: str) -> list[Any]:
        with self._lock:
            asked = []
            for peer in self._peers:
                key = next(self._keys)
                answer: Future[Any] = Future()
                self._answers[key] = peer, answer
                peer.send(("call", key, method))
                asked.append(answer)
        results = [answer.result(_CALL_SECONDS) for answer in asked]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results


_clients: WeakSet[RemoteClient] = WeakSet()


def _end_all_in_child() -> None:
    for client in list(_clients):
        client._end_in_child()  # noqa: SLF001 - its other half


after_fork(_end_all_in_child)
