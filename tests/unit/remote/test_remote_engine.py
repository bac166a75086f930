"""A `RemoteEngine` whose replicas are lost, over real connections; Ray's part is played by a handle of this file."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from langchain_lora_retriever.errors import (
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    InvalidRequestError,
    RequestAbortedError,
)
from langchain_lora_retriever.remote.engine import RemoteEngine
from langchain_lora_retriever.remote.host import EngineHost
from langchain_lora_retriever.remote.wire import Door
from langchain_lora_retriever.testing import FakeEngine
from langchain_lora_retriever.types import SamplingParams
from makers import make_adapter, make_tiny_model, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from langchain_lora_retriever.engine.api import Delta
    from langchain_lora_retriever.remote.wire import Job

TEXT = "The answer, which is as long as it has to be for something to happen to it. " * 4
LONG = SamplingParams(max_tokens=1000, logprobs=1)


class Replica:
    """A host in this process, as `EngineReplica` is one in another."""

    _names = itertools.count()

    def __init__(self, **options: Any) -> None:
        self.engine = FakeEngine(lambda *_: TEXT, **{"delay": 0.002, "max_model_len": 4096, **options})
        self.host = EngineHost(self.engine)
        address, key = self.host.listen("127.0.0.1")
        self.door = Door(f"replica-{next(self._names)}", address, key, 0)
        self.is_dead = False
        self.jobs: list[Job] = []

    def kill(self) -> None:
        """End as a process does: its connections end, and nothing is said."""
        self.is_dead = True
        self.host.close()

    async def generate(self, job: Job) -> AsyncIterator[Door]:
        """What `EngineReplica.generate` does."""
        self.jobs.append(job)
        yield self.door
        loop = asyncio.get_running_loop()
        has_come, has_ended = asyncio.Event(), asyncio.Event()
        self.host.when_there(job.caller, lambda: loop.call_soon_threadsafe(has_come.set))
        await has_come.wait()
        self.host.start(job, lambda: loop.call_soon_threadsafe(has_ended.set))
        await has_ended.wait()
        if self.is_dead:
            raise ActorDiedError


class Response:
    """A Serve response that can be iterated and cancelled."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._items = items
        self.is_cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._items

    def cancel(self) -> None:
        """Note it."""
        self.is_cancelled = True


class Handle:
    """A Serve handle that takes the first replica which is alive and not to be avoided."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = list(replicas)
        self.responses: list[Response] = []
        self.describe = self
        self.error: Exception | None = None

    def options(self, **_: Any) -> Handle:
        """Itself."""
        return self

    def remote(self, job: Job | None = None) -> Any:
        """Describe, or generate."""
        if job is None:
            return self._describe()
        self.responses.append(Response(self._generate(job)))
        return self.responses[-1]

    async def _describe(self) -> Any:
        return self.replicas[0].host.description

    async def _generate(self, job: Job) -> AsyncIterator[Door]:
        if self.error is not None:
            raise self.error
        alive = [replica for replica in self.replicas if not replica.is_dead]
        if not alive:
            raise ActorDiedError
        ranked = sorted(alive, key=lambda replica: replica.door.replica_id in job.avoid)
        async for door in ranked[0].generate(job):
            yield door


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    """Three of them."""
    made = [Replica() for _ in range(3)]
    yield made
    for replica in made:
        replica.host.close()


@pytest.fixture
def engine(replicas: list[Replica]) -> Iterator[RemoteEngine]:
    """An engine over them."""
    engine = RemoteEngine(Handle(*replicas), max_moves=2)
    yield engine
    engine.close()


def test_an_answer_survives_its_replicas(engine: RemoteEngine, replicas: list[Replica]) -> None:
    """Two are lost in its middle; text, tokens and log-probabilities come once, from the third in the end."""
    generation = engine.submit([5, 6], replace(LONG, prompt_logprobs_from=0))
    deltas: list[Delta] = []
    for delta in generation:
        deltas.append(delta)
        if len(deltas) in {10, 40}:
            next(replica for replica in replicas if not replica.is_dead).kill()
    assert "".join(delta.text for delta in deltas) == TEXT == generation.result(1).text
    done = generation.result(1)
    assert done.usage.num_output_tokens == len(done.token_ids) == len(TEXT)
    assert [item.token_id for item in done.logprobs] == list(done.token_ids)
    assert [delta.prompt_logprobs is not None for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    assert engine.num_moved == 2
    assert [len(replica.jobs) for replica in replicas] == [1, 1, 1]
    seeds = {replica.jobs[0].sampling.seed for replica in replicas}
    assert len(seeds) == 1
    assert None not in seeds
    assert replicas[2].jobs[0].avoid == {replicas[0].door.replica_id, replicas[1].door.replica_id}


def test_retries_are_bounded_and_told(engine: RemoteEngine, replicas: list[Replica]) -> None:
    """A request that loses every replica it gets ends with an error that names them and says what came of it."""
    generation = engine.submit([5, 6], LONG)

    def read() -> None:
        for number, _ in enumerate(generation):
            if number % 10 == 5:
                next(replica for replica in replicas if not replica.is_dead).kill()

    with pytest.raises(EngineError, match="lost its replica 3 times") as error:
        read()
    assert all(replica.door.replica_id in str(error.value) for replica in replicas)


def test_a_whole_answer_is_moved_too(engine: RemoteEngine, replicas: list[Replica]) -> None:
    """Also of those that nobody reads yet, and many at once."""
    running = [engine.submit([5, 6, i], LONG) for i in range(20)]
    wait_until(lambda: engine.stats().num_running == 20)
    replicas[0].kill()
    assert {generation.result(60).text for generation in running} == {TEXT}
    assert engine.num_moved == 20
    assert engine.stats().num_finished == 20


def test_an_error_of_the_engine_is_no_loss(engine: RemoteEngine, replicas: list[Replica]) -> None:
    """It comes as what it is, and the request is not tried elsewhere; nor is one that nobody has room for."""

    def fail(*_: Any) -> str:
        raise InvalidRequestError("no such thing")

    replicas[0].engine.answers = fail
    with pytest.raises(InvalidRequestError, match="no such thing"):
        engine.submit([5], LONG).result(10)
    assert engine.num_moved == 0
    engine._generate.error = BackPressureError(num_queued_requests=3, max_queued_requests=3)
    with pytest.raises(EngineOverloadedError):
        engine.submit([5], LONG).result(10)


def test_an_abort_reaches_the_replica(engine: RemoteEngine, replicas: list[Replica]) -> None:
    """In mid-stream, and before the request has arrived anywhere; nothing is left there."""
    generation = engine.submit([5], LONG)
    next(iter(generation.deltas()))
    wait_until(lambda: replicas[0].engine.num_aborted == 1)
    early = engine.submit([5], LONG)
    early.abort()
    with pytest.raises(RequestAbortedError):
        early.result(1)
    wait_until(lambda: replicas[0].host.num_unfinished == 0)
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_who_goes_leaves_nothing_behind(engine: RemoteEngine, replicas: list[Replica]) -> None:
    """A caller whose connection ends has its requests ended at the replica."""
    running = [engine.submit([5, i], LONG) for i in range(3)]
    wait_until(lambda: engine.stats().num_running == 3)
    engine.close()
    wait_until(lambda: replicas[0].host.num_unfinished == 0)
    for generation in running:
        with pytest.raises(EngineDeadError):
            generation.result(1)


def test_a_host_whose_engine_has_died_leaves_its_callers(replicas: list[Replica], monkeypatch: Any) -> None:
    """Its process may go on: whoever looks after it hears that the engine is gone, once its last words are sent."""
    engine = RemoteEngine(Handle(replicas[0]), max_moves=0)
    try:
        assert engine.submit([1, 2, 3], LONG).result(30).text
        assert replicas[0].host._names
        monkeypatch.setattr(FakeEngine, "is_alive", property(lambda _: False))
        wait_until(lambda: not replicas[0].host._names)
    finally:
        engine.close()


def test_adapters_travel_once(engine: RemoteEngine, replicas: list[Replica]) -> None:
    """By content, whatever their names, for many requests at once; a replica that comes later gets its own."""
    adapter = make_adapter(make_tiny_model(), "a")
    running = [engine.submit([5, i], LONG, [(adapter, 0.5)]) for i in range(12)]
    assert {generation.result(60).text for generation in running} == {TEXT}
    assert replicas[0].host.adapters.num_received == 1
    (met, weight) = replicas[0].engine.requests[0].adapters[0]
    assert (met, weight) == (adapter, 0.5)
    for path, w in adapter.weights.items():
        assert met.weights[path].lora_A.equal(w.lora_A)
        assert met.weights[path].lora_B.equal(w.lora_B)
        assert met.weights[path].scaling == w.scaling
    replicas[0].kill()
    assert engine.submit([5], LONG, [(adapter, 0.5)]).result(60).text == TEXT
    assert replicas[1].host.adapters.num_received == 1


def test_a_limit_of_requests_under_way(replicas: list[Replica]) -> None:
    """One more is refused at once, by `submit` itself."""
    engine = RemoteEngine(Handle(*replicas), max_in_flight=2)
    running = [engine.submit([5], LONG) for _ in range(2)]
    with pytest.raises(EngineOverloadedError, match="max_in_flight=2"):
        engine.submit([5], LONG)
    for generation in running:
        generation.abort()
    engine.close()


def test_who_has_no_key_is_not_let_in(replicas: list[Replica]) -> None:
    """Nor held up by one who says nothing."""
    import socket
    from multiprocessing import AuthenticationError
    from multiprocessing.connection import Client

    door = replicas[0].door
    with socket.create_connection(door.address):
        with pytest.raises(AuthenticationError):
            Client(door.address, authkey=b"another")
        connection = Client(door.address, authkey=door.key)
        connection.close()
