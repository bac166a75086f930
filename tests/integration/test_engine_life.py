"""The engine's life: what ends it, who hears of it, and what is left of the model afterwards."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
import torch

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker, load_base_model
from langchain_lora_retriever.engine import worker as engine_worker
from langchain_lora_retriever.engine.api import Grammar
from langchain_lora_retriever.engine.core import Engine, StepFailedError
from langchain_lora_retriever.engine.grammar import GrammarCompiler
from langchain_lora_retriever.errors import EngineDeadError, EngineError, EngineOverloadedError
from langchain_lora_retriever.support import openmp
from langchain_lora_retriever.types import SamplingParams
from makers import make_adapter, make_tiny_model, make_tokenizer, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = EngineConfig(max_num_seqs=2, kv_cache_bytes=1 << 20, lora_cache_bytes=4 << 20)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(max_tokens=2, ignore_eos=True)


@pytest.fixture
def worker() -> Iterator[EngineWorker]:
    """An engine of a tiny model."""
    with EngineWorker(BaseModel(make_tiny_model(), make_tokenizer(), "tiny"), CONFIG) as engine:
        yield engine


def hold(worker: EngineWorker) -> threading.Event:
    """Keep a worker's thread from its next step until the event is set."""
    held, go = threading.Event(), threading.Event()

    def wait() -> None:
        held.set()
        assert go.wait(30)

    worker._post(wait)
    assert held.wait(30)
    return go


def fail_launches(worker: EngineWorker, error: BaseException, num: int = 10**6) -> None:
    """Let the next launches of a worker's engine raise."""
    runner, left = worker.core.runner, [num]
    launch = runner.launch

    def broken(*args: Any) -> Any:
        if left[0] == 0:
            return launch(*args)
        left[0] -= 1
        raise error

    runner.launch = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("error", [SystemExit("by a model"), KeyboardInterrupt(), GeneratorExit()])
def test_whatever_ends_the_thread_is_told_to_everybody(worker: EngineWorker, error: BaseException) -> None:
    """Those who run, who wait and who come later get `EngineDeadError` with the cause; nobody hangs."""
    fail_launches(worker, error)
    go = hold(worker)
    running = [worker.submit([5, 6, 7 + i], LONG) for i in range(4)]
    go.set()
    for generation in running:
        with pytest.raises(EngineDeadError, match="The engine died") as met:
            generation.result(30)
        assert met.value.__cause__ is error
    assert not worker.is_alive
    for call in (lambda: worker.submit([5], SHORT), worker.check_integrity):
        with pytest.raises(EngineDeadError, match="has stopped after an error"):
            call()


def test_what_was_posted_before_a_failing_action_is_not_lost(worker: EngineWorker) -> None:
    """An action that raises ends the engine; requests posted behind it hear of it."""

    def leave() -> None:
        raise SystemExit

    go = hold(worker)
    worker._post(leave)
    behind = worker.submit([5, 6], SHORT)
    go.set()
    with pytest.raises(EngineDeadError):
        behind.result(30)


def test_failing_steps_end_their_requests_until_there_are_too_many(worker: EngineWorker) -> None:
    """A few failures are their requests' own; eight in a row are the engine's."""
    fail_launches(worker, RuntimeError("now and then"), num=7)
    for _ in range(7):
        with pytest.raises(EngineError, match="now and then") as met:
            worker.submit([5, 6], SHORT).result(30)
        assert not isinstance(met.value, EngineDeadError)
    assert worker.submit([5, 6], SHORT).result(30).finish_reason == "length"
    fail_launches(worker, RuntimeError("always"))
    errors = []
    for _ in range(8):
        with pytest.raises(EngineError, match="always") as met:
            worker.submit([5, 6], SHORT).result(30)
        errors.append(isinstance(met.value, EngineDeadError))
    assert errors == [False] * 7 + [True]


def test_an_error_that_stays_with_the_device_ends_the_engine(worker: EngineWorker) -> None:
    """At once: every later step would fail too. The error says that another process is needed."""
    fail_launches(worker, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(EngineDeadError, match="start another"):
        worker.submit([5, 6], SHORT).result(30)
    assert not worker.is_alive


def test_a_generation_that_ended_is_freed_without_the_garbage_collector(worker: EngineWorker) -> None:
    """Nothing that it holds holds it: no collection, which stops every thread, has to find it."""
    gc.disable()
    try:
        generation = worker.submit([5, 6, 7], SHORT)
        generation.result(60)
        seen = weakref.ref(generation)
        del generation
        worker.check_integrity()  # the engine's thread has let go of it
        assert seen() is None
    finally:
        gc.enable()


def test_who_fills_a_step_lets_the_idle_engine_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once what came while it was idle fills a step, and not before; nor while it has begun."""
    sleeps: list[float] = []
    config = replace(CONFIG, max_num_batched_tokens=16)
    with EngineWorker(BaseModel(make_tiny_model(), make_tokenizer(), "tiny"), config) as worker:
        worker.submit([5], SHORT).result(30)
        while worker._num_idle_tokens < 0:
            time.sleep(0.001)
        with monkeypatch.context() as patch, worker._news:  # it cannot begin
            patch.setattr(engine_worker.time, "sleep", sleeps.append)
            running = [worker.submit([5] * 7, LONG) for _ in range(2)]
            assert sleeps == []
            running.append(worker.submit([5] * 7, LONG))
            assert sleeps == [engine_worker._SECONDS_TO_BEGIN]
        go = hold(worker)
        with monkeypatch.context() as patch:
            patch.setattr(engine_worker.time, "sleep", sleeps.append)
            running += [worker.submit([5] * 7, SHORT) for _ in range(3)]
        assert len(sleeps) == 1
        go.set()
        assert all(generation.result(60).finish_reason == "length" for generation in running)


def test_what_waits_for_its_adapters_is_not_let_begin(worker: EngineWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing could begin: nobody sleeps for it."""
    sleeps: list[float] = []
    held: Future[None] = Future()
    monkeypatch.setattr(worker.core, "preparations", lambda _: [lambda: held.result(30)])
    monkeypatch.setattr(engine_worker.time, "sleep", sleeps.append)
    monkeypatch.setattr(worker, "_num_idle_tokens", 10**6)
    generation = worker.submit([5] * 7, SHORT)
    assert sleeps == []
    held.set_result(None)
    assert len(generation.result(30).token_ids) == 2


def test_a_failed_step_leaves_no_tokens_on_the_device() -> None:
    """Those of the step before it, which it may have written over, are read at once."""
    core = Engine(BaseModel(make_tiny_model(), make_tokenizer(), "tiny"), replace(CONFIG, enable_async_scheduling=True))
    runner: Any = core.runner
    try:
        core.add(core.make_request([5, 6, 7], LONG))
        assert core.step() == []
        assert core._pending is not None
        launch, runner.launch = runner.launch, Mock(side_effect=RuntimeError("a kernel"))
        with pytest.raises(StepFailedError) as failed:
            core.step()
        assert core._pending is None
        assert [type(output.error) for output in failed.value.outputs] == [EngineError]
        runner.launch = launch
        core.add(core.make_request([5, 6, 7], SHORT))
        while core.has_unfinished_requests:
            core.step()
    finally:
        core.close()


def test_no_more_wait_than_are_allowed() -> None:
    """One more is refused with numbers, and all that were accepted are answered."""
    config = EngineConfig(max_num_seqs=1, max_waiting=2, kv_cache_bytes=1 << 20, lora_cache_bytes=4 << 20)
    with EngineWorker(BaseModel(make_tiny_model(), make_tokenizer(), "tiny"), config) as engine:
        go = hold(engine)
        accepted = [engine.submit([5, 6], SHORT) for _ in range(3)]
        with pytest.raises(EngineOverloadedError, match=r"3 requests run or wait, 1 may run.*max_waiting=2"):
            engine.submit([5, 6], SHORT)
        go.set()
        assert [generation.result(30).finish_reason for generation in accepted] == ["length"] * 3
        assert engine.submit([5, 6], SHORT).result(30).finish_reason == "length"


@pytest.mark.parametrize("is_tied", [False, True])
def test_close_gives_the_model_back(tmp_path: Any, *, is_tied: bool) -> None:
    """Weights in memory of their own, the very parameters, modes, gradients and outputs; it saves and trains."""
    model = make_tiny_model(tie_word_embeddings=is_tied).train().requires_grad_()
    model.lm_head.weight.requires_grad_(requires_grad=False)
    tokens = torch.arange(5)[None]
    before = {name: (id(p), p.is_contiguous(), p.untyped_storage().nbytes(), p.requires_grad) for name, p in
              model.named_parameters()}  # fmt: skip
    logits, attention = model(tokens).logits, model.config._attn_implementation
    base = load_base_model((model, make_tokenizer()))
    with EngineWorker(base, CONFIG) as engine:
        engine.submit([5, 6], SHORT).result(30)
        assert not model.training
    after = {name: (id(p), p.is_contiguous(), p.untyped_storage().nbytes(), p.requires_grad) for name, p in
             model.named_parameters()}  # fmt: skip
    assert after == before
    assert model.training
    assert model.config._attn_implementation == attention
    assert torch.equal(model(tokens).logits, logits)
    model(tokens).logits.sum().backward()
    model.save_pretrained(tmp_path)
    EngineWorker(load_base_model((model, make_tokenizer())), CONFIG).close()


def test_a_model_that_cannot_be_served_is_given_back() -> None:
    """Also where the engine failed to start half-way."""
    model = make_tiny_model().train().requires_grad_()
    before = {name: (id(p), p.untyped_storage().nbytes()) for name, p in model.named_parameters()}
    with pytest.raises(EngineError):
        EngineWorker(
            BaseModel(model, make_tokenizer(), "tiny"), EngineConfig(kv_cache_bytes=1, lora_cache_bytes=4 << 20)
        )
    assert {name: (id(p), p.untyped_storage().nbytes()) for name, p in model.named_parameters()} == before
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(torch.arange(5)[None]).logits.sum().backward()


def test_an_engine_whose_thread_cannot_begin_gives_the_model_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be started, and where whoever waits for it is interrupted: the next engine may come."""
    base = BaseModel(make_tiny_model(), make_tokenizer(), "tiny")
    start, wait = threading.Thread.start, threading.Event.wait
    others = set(threading.enumerate())

    def engines() -> list[threading.Thread]:
        return [thread for thread in set(threading.enumerate()) - others if thread.name == "lora-engine"]

    def fail(thread: threading.Thread) -> None:
        if thread.name == "lora-engine":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            EngineWorker(base, CONFIG)
    base.model(torch.arange(5)[None])

    def interrupt(event: threading.Event, timeout: float | None = None) -> bool:
        if engines():
            monkeypatch.undo()
            raise KeyboardInterrupt
        return wait(event, timeout)

    monkeypatch.setattr(threading.Event, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        EngineWorker(base, CONFIG)
    assert not engines()
    base.model(torch.arange(5)[None])
    with EngineWorker(base, CONFIG) as engine:
        assert engine.submit([5, 6], SHORT).result(30).finish_reason == "length"


def test_an_engine_that_served_a_grammar_is_freed_with_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler keeps for others holds nobody who asked for it, though he came before it was done."""
    go = threading.Event()
    compile_ = GrammarCompiler._compile

    def compile_late(compiler: GrammarCompiler, grammar: Grammar) -> Any:
        assert go.wait(30)
        return compile_(compiler, grammar)

    monkeypatch.setattr(GrammarCompiler, "_compile", compile_late)
    base = BaseModel(make_tiny_model(), make_tokenizer(), "tiny")
    with EngineWorker(base, CONFIG) as engine:
        adapter = make_adapter(base.model, "a")
        tensor = next(iter(adapter.weights.values())).lora_A
        held = [weakref.ref(one) for one in (engine, base.model, base.tokenizer, tensor)]
        running = engine.submit([5, 6], SHORT, [(adapter, 1.0)], grammar=Grammar("start: /[ab]{2}/\n"))
        go.set()
        assert len(running.result(30).token_ids) == 2
    del engine, running, adapter, base, tensor
    wait_until(lambda: gc.collect() >= 0 and not any(ref() is not None for ref in held))


@pytest.mark.parametrize("is_ended", [True, False], ids=["idle", "closed while it runs"])
def test_an_engine_does_not_hold_the_adapters_of_past_requests(*, is_ended: bool) -> None:
    """Those of requests that ended are gone while it idles, and those of running ones once it is closed."""
    model = make_tiny_model()
    engine = EngineWorker(BaseModel(model, make_tokenizer(), "tiny"), CONFIG)
    adapter = make_adapter(model, "a")
    held = weakref.ref(next(iter(adapter.weights.values())).lora_A)
    running = engine.submit([5, 6], SHORT if is_ended else LONG, [(adapter, 1.0)])
    if is_ended:
        running.result(30)
    else:
        next(iter(running))
        engine.close()
    del adapter, running
    wait_until(lambda: gc.collect() >= 0 and held() is None)
    engine.close()
    assert engine.stats().num_running == 0


def test_a_model_has_one_engine_at_a_time() -> None:
    """Another is refused by name, before it touches anything; the first goes on, and after it another may come."""
    base = BaseModel(make_tiny_model(), make_tokenizer(), "tiny")
    with EngineWorker(base, CONFIG) as engine:
        expected = engine.submit([5, 6], SHORT).result(30).token_ids
        with pytest.raises(EngineError, match="is served by another engine"):
            EngineWorker(base, CONFIG)
        assert engine.submit([5, 6], SHORT).result(30).token_ids == expected
    with EngineWorker(base, CONFIG) as engine:
        assert engine.submit([5, 6], SHORT).result(30).token_ids == expected


START = """
from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker
from langchain_lora_retriever.types import SamplingParams
from makers import make_tiny_model, make_tokenizer
import os, sys, threading
config = EngineConfig(kv_cache_bytes=1 << 22, lora_cache_bytes=4 << 20)
engine = EngineWorker(BaseModel(make_tiny_model(), make_tokenizer(), "tiny"), config)
for i in range(8):
    engine.submit([5, 6, 7 + i], SamplingParams(max_tokens=400, ignore_eos=True))
running = engine.submit([5, 6], SamplingParams(max_tokens=400, ignore_eos=True))
stream = running.deltas()
next(stream)
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise RuntimeError", 1),
        ("import signal; signal.raise_signal(signal.SIGINT)", 1),
    ],
    ids=["end", "exit", "error", "interrupt"],
)
def test_a_process_that_ends_while_the_engine_computes_ends_well(end: str, code: int) -> None:
    """With its own exit status, however it ends, and not by a signal of the interpreter's going down."""
    done = subprocess.run([sys.executable, "-c", START + end], capture_output=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr.decode()[-500:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_process_is_told_and_never_hangs() -> None:
    """The engine is not there, in words: for a call, for whoever holds a running one, and for multiprocessing."""
    code = START + textwrap.dedent(
        """
        import warnings
        from langchain_lora_retriever.errors import EngineDeadError
        warnings.simplefilter("ignore")
        def met(call):
            try:
                call()
            except EngineDeadError as error:
                return "forked" in str(error)
            return False
        pid = os.fork()
        if not pid:
            import signal
            signal.alarm(60)
            calls = (lambda: engine.submit([5], SamplingParams()), running.result, engine.check_integrity)
            os._exit(0 if not engine.is_alive and all(map(met, calls)) else 9)
        assert os.waitpid(pid, 0)[1] == 0
        running.result(60)
        engine.close()
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr.decode()[-800:]


class Contended:
    """Stands for a kernel that says a thread waits for a core half of its time, a second at every look."""

    def __init__(self) -> None:
        self.num_looks = 0

    def read(self) -> openmp._Times:
        """Half of each."""
        self.num_looks += 1
        return openmp._Times(*[self.num_looks * 500_000_000] * 2)

    def close(self) -> None:
        """Nothing is open."""


def test_the_engines_threads_sleep_beside_busy_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks after every step; nothing is left once it is closed."""

    def idle_teams() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("idle-team")]

    contended = Contended()
    monkeypatch.setattr(openmp._Waits, "of_this_thread", lambda: contended)
    monkeypatch.setattr(openmp.joblib, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with EngineWorker(BaseModel(make_tiny_model(), make_tokenizer(), "tiny"), CONFIG) as engine:
            assert idle_teams() == []
            engine.submit([5, 6, 7], SHORT).result(30)
            assert idle_teams() == ["idle-team-0"]
            assert contended.num_looks >= SHORT.max_tokens
        assert idle_teams() == []
    finally:
        torch.set_num_threads(before)
