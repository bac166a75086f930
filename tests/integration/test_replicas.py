"""Engines in other processes that are killed, left and changed under load: nothing is lost, nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx
import openai
import psutil
import pytest
import yaml
from langchain_openai import ChatOpenAI

from langchain_lora_retriever import AdapterPool, ChatLoraRetriever
from langchain_lora_retriever.errors import EngineDeadError, EngineError, InvalidRequestError
from langchain_lora_retriever.remote import ProcessEngine, RemoteEngine
from langchain_lora_retriever.serving.config import ServeConfig
from langchain_lora_retriever.testing import FakeEngine
from langchain_lora_retriever.types import SamplingParams
from makers import make_adapter, make_checkpoint, make_tiny_engine, make_tiny_model, make_tokenizer, until, wait_until
from servers import running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from langchain_lora_retriever.engine import Completion, Generation

pytestmark = pytest.mark.slow

PROMPT = [5, 6, 7]
LONG = SamplingParams(max_tokens=100, ignore_eos=True)


@pytest.fixture
def engine(ray_cluster: Any) -> Iterator[RemoteEngine]:
    """The two replicas as one engine, which have lost nothing in the end."""
    engine = RemoteEngine(ray_cluster)
    yield engine
    wait_until(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
    engine.check_integrity()
    engine.close()


LEFT: dict[int, str] = {}
"""Processes that are to end, and what they are."""


@pytest.fixture(scope="module", autouse=True)
def _nothing_left() -> Iterator[None]:
    """All of them have ended when the tests have."""
    yield
    wait_until(lambda: not any(map(_is_running, LEFT)), 90)


TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool on disk with three adapters."""
    root = tmp_path_factory.mktemp("pools")
    pool = AdapterPool(root / "pool", create=True)
    for i, name in enumerate(("a", "b", "c")):
        checkpoint = make_checkpoint(root / name, seed=i)
        pool.add(name, checkpoint, samples=[f"sample of {name}"])
    return root / "pool"


def body(index: int) -> dict[str, Any]:
    """A request that pins its adapters: one of two, both, or none."""
    names = (["a"], ["b"], ["a", "b"], [])[index % 4]
    return {
        "messages": [{"role": "user", "content": f"prompt {index % 20}"}],
        "max_tokens": 24,
        "seed": index % 20,
        "temperature": float(index % 2),
        "lora_retriever": {"adapters": names, "composition": "mixture"},
    }


# The whole, as it is started


@pytest.mark.timeout(280)
def test_the_server_of_replicas_and_its_end(tmp_path: Path, pool_folder: Path) -> None:
    """`lora-retriever serve --replicas 2` answers; killed, it leaves no process behind."""
    model = make_tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {
        "base_model": str(tmp_path / "model"), "pool": str(pool_folder), "replicas": 2,
        "chat": {"engine_config": {"max_num_seqs": 4, "kv_cache_bytes": 1 << 20, "lora_cache_bytes": 4 << 20,
                                   "max_model_len": 128}},
    }  # fmt: skip
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-c", "from langchain_lora_retriever.cli import app; app()", "serve", "--port", "0",
               "--config", str(tmp_path / "serve.yaml")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    try:
        said = ""
        while not (ready := re.search(r"served at (http://\S+)/v1", said)):
            line = process.stderr.readline()
            assert line, said[-3000:]
            said += line
        address = ready[1]
        answer = httpx.post(f"{address}/v1/chat/completions", json=body(1), timeout=60).json()
        with make_tiny_engine() as alone:
            prompt = alone.tokenizer.encode("prompt 1", add_special_tokens=False)
            adapter = AdapterPool(pool_folder)["b"]
            sampling = SamplingParams(max_tokens=24, seed=1, temperature=1.0)
            expected = alone.submit(prompt, sampling, [(adapter, 1.0)]).result(60)
        assert answer["choices"][0]["message"]["content"] == expected.text
        assert answer["lora_retriever"]["adapters"][0]["name"] == "b"
        assert httpx.get(f"{address}/health").status_code == 200
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) > 5
        LEFT.update({child.pid: " ".join(child.cmdline()) for child in children})
    finally:
        process.kill()
        process.wait(30)
    # Ray's agents of the node try for a minute to tell that it has ended; they are looked for when all tests are done.
    others = [pid for pid, name in LEFT.items() if not name.strip().endswith("Agent")]
    wait_until(lambda: not any(map(_is_running, others)), 60)


# A process of its own


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    """Whoever waits hears how it ended; there is no other, and nothing is left."""
    with ProcessEngineOf(make_tiny_engine) as engine:
        engine.check_integrity()
        running = [engine.submit(PROMPT, LONG) for _ in range(4)]
        next(iter(running[0].deltas()))
        os.kill(engine.pid, signal.SIGKILL)
        for generation in running[1:]:
            with pytest.raises(EngineDeadError, match="signal 9"):
                generation.result(30)
        assert not engine.is_alive
        with pytest.raises(EngineDeadError, match="signal 9"):
            engine.submit(PROMPT, LONG)
    assert not psutil.pid_exists(engine.pid)


def test_a_process_ends_with_its_parent() -> None:
    """However the parent ends, and whatever runs."""
    code = """
        import os, signal
        from langchain_lora_retriever.remote import ProcessEngine
        from langchain_lora_retriever.testing import FakeEngine
        from langchain_lora_retriever.types import SamplingParams
        engine = ProcessEngine(FakeEngine)
        engine.submit([5], SamplingParams())
        print(engine.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: not _is_running(int(done.stdout)))


def test_what_cannot_be_made_elsewhere_is_told() -> None:
    """What cannot be sent, what is not found there, what ends the process."""
    with pytest.raises(InvalidRequestError, match="cannot be sent"):
        ProcessEngine(lambda: FakeEngine(["a"]))
    with pytest.raises(EngineError, match="could not convert string to float"):
        ProcessEngine(partial(float, "no number"))
    with pytest.raises(EngineError, match="status 7"):
        ProcessEngine(partial(os._exit, 7))
    with pytest.raises(InvalidRequestError, match="one of the two"):
        ProcessEngine(make_tiny_engine, model_kwargs={"dtype": "auto"})


@contextmanager
def ProcessEngineOf(make: Any) -> Iterator[ProcessEngine]:  # noqa: N802 - reads as the class it closes
    """A `ProcessEngine` that is closed in the end."""
    engine = ProcessEngine(make)
    try:
        yield engine
    finally:
        engine.close()


# Replicas


def requests_of(adapters: list[Any], num: int) -> list[tuple[list[int], SamplingParams, list[Any]]]:
    """Requests of all kinds: greedy and sampled, with log-probabilities, alone and mixed."""
    made = []
    for i in range(num):
        sampling = SamplingParams(
            max_tokens=80 + i, ignore_eos=True, logprobs=1 if i % 3 else None,
            temperature=1.0 if i % 2 else 0.0, seed=i if i % 2 else None,
        )  # fmt: skip
        members = [(adapters[i % len(adapters)], 0.7), (adapters[(i + 1) % len(adapters)], 0.3)][: i % 3]
        made.append(([5 + i, 6, 7], sampling, members))
    return made


def solo(requests: list[Any]) -> list[Completion]:
    """What each gives alone, in an engine of this process."""
    with make_tiny_engine() as engine:
        return [engine.submit(*request).result(60) for request in requests]


def test_kill_a_replica_under_twenty_streams(engine: RemoteEngine, record_property: Any) -> None:
    """Every stream goes on elsewhere, gives what it gives alone, and no token twice."""
    adapters = [make_adapter(make_tiny_model(), f"a{i}") for i in range(4)]
    requests = requests_of(adapters, 20)
    alone = solo(requests)
    for generation in [engine.submit([9, i], LONG) for i in range(12)]:  # both have a connection, and adapters
        generation.result(60)
    wait_until(lambda: len(engine.doors) == 2)
    pauses = [0.0] * len(requests)

    async def read(index: int, generation: Generation) -> Completion:
        last = None
        async for _ in generation:
            now = time.monotonic()
            pauses[index] = max(pauses[index], now - last if last else 0.0)
            last = now
        return generation.result(0)

    async def run() -> list[Completion]:
        before = engine.stats().num_output_tokens
        tasks = [asyncio.ensure_future(read(i, engine.submit(*request))) for i, request in enumerate(requests)]
        await until(lambda: engine.stats().num_output_tokens > before + 200)
        os.kill(engine.doors[0].pid, signal.SIGKILL)
        return await asyncio.gather(*tasks)

    done = asyncio.run(run())
    assert engine.num_moved > 0
    for got, expected in zip(done, alone, strict=True):
        assert got.text == expected.text
        assert got.token_ids == expected.token_ids
        assert got.finish_reason == expected.finish_reason
        assert got.usage.num_output_tokens == expected.usage.num_output_tokens
        if expected.logprobs is None:
            assert got.logprobs is None
        else:
            assert [item.token_id for item in got.logprobs] == list(expected.token_ids)
            for one, other in zip(got.logprobs, expected.logprobs, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
    record_property("longest pause of a stream, s", round(max(pauses), 3))


def test_kill_the_controller(engine: RemoteEngine) -> None:
    """Serve's controller is nobody's way: streams go on, and later requests are taken."""
    import ray

    requests = requests_of([make_adapter(make_tiny_model(), "a")], 6)
    alone = solo(requests)
    running = [engine.submit(*request) for request in requests]
    ray.kill(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve"), no_restart=False)
    for generation, expected in zip(running, alone, strict=True):
        assert generation.result(60).text == expected.text
    assert engine.submit(*requests[0]).result(60).text == alone[0].text


# The server over replicas


def alone_over_http(pool_folder: Path) -> list[str]:
    """What the twenty kinds of requests are answered by a server over the engine in this process, one at a time."""
    with make_tiny_engine() as alone:
        alone.tokenizer.chat_template = TEMPLATE
        with running(ChatLoraRetriever(engine=alone, pool=AdapterPool(pool_folder)), end_seconds=60) as address:
            answers = [httpx.post(f"{address}/v1/chat/completions", json=body(i), timeout=60).json() for i in range(20)]
    return [answer["choices"][0]["message"]["content"] for answer in answers]


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Adapters come and go, by what another process would do: it has a pool of its own on the folder."""
    stop = threading.Event()

    def change() -> None:
        other, source = AdapterPool(folder), folder.parent / "c"
        while not stop.is_set():
            for gone, come in (("c", "late"), ("late", "c")):
                other.remove(gone)
                other.add(come, source, samples=[f"sample of {come}"])
                stop.wait(0.3)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        yield
    finally:
        stop.set()
        changer.join()


async def clients(address: str, num: int) -> list[tuple[int, str | None]]:
    """Stream to so many at once; a third hang up in mid-stream, and have None in place of a text."""
    rng = random.Random(0)

    async def client(http: httpx.AsyncClient, index: int) -> tuple[int, str | None]:
        hangs_up = rng.random() < 1 / 3
        parts: list[str] = []
        async with http.stream("POST", "/v1/chat/completions", json={**body(index), "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    parts += [choice["delta"].get("content") or "" for choice in event["choices"]]
                    if hangs_up and len(parts) > 3:
                        return index, None
        return index, "".join(parts)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=120) as http:
        return await asyncio.gather(*(client(http, index) for index in range(num)))


def test_two_hundred_clients_and_a_pool_that_changes(engine: RemoteEngine, pool_folder: Path) -> None:
    """A third hang up in mid-stream, adapters come and go; the others get what they get alone, and nothing stays."""
    expected = alone_over_http(pool_folder)
    engine.tokenizer.chat_template = TEMPLATE
    llm = ChatLoraRetriever(engine=engine, pool=AdapterPool(pool_folder))
    with running(llm, ServeConfig(pool_seconds=0.1), end_seconds=60) as address:
        before = llm.pool.version
        with changing(pool_folder):
            answers = asyncio.run(clients(address, 200))
        wait_until(lambda: llm.pool.names == ("a", "b", "c"))
        assert llm.pool.version > before
        survivors = [(index, text) for index, text in answers if text is not None]
        assert 100 < len(survivors) < 170
        for index, text in survivors:
            assert text == expected[index % 20], index
        wait_until(lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="b", messages=body(1)["messages"], max_tokens=24, seed=1, temperature=1.0
        )
        assert answer.choices[0].message.content == expected[1]
        chat = ChatOpenAI(base_url=f"{address}/v1", api_key="none", model="a", max_tokens=24, temperature=0.0)
        assert "".join(str(chunk.content) for chunk in chat.stream("prompt 0")) == expected[0]
        engine.check_integrity()


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
