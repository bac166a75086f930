"""Adapters arrive whole on the device, whoever asks for them and in whatever order."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker
from langchain_lora_retriever.engine.adapter_transfer import StagedStore
from langchain_lora_retriever.engine.model import runner as model_runner_module
from langchain_lora_retriever.engine.model.packed_adapter import AdapterPacking
from langchain_lora_retriever.errors import InvalidAdapterError
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.types import Adapter, LoraWeights, SamplingParams
from lora_retriever_kernels.lora import LoraRows, LoraSlice, LoraStack
from makers import make_adapter, make_tiny_model, make_tokenizer, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NAMES = (("q", "k"), ("o",))
SHAPES = {"q": (6, 8), "k": (6, 4), "o": (8, 6)}


class Stacks:
    """Two stacks, and the sink that loads adapters into them without packing."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.rows = LoraRows(8, 16, "cpu")
        self.stacks = [
            (names, LoraStack(self.rows, 32, SHAPES[names[0]][0], [SHAPES[n][1] for n in names], dtype))
            for names in NAMES
        ]
        self.num_loads = 0

    def slices(self, adapter: Adapter) -> dict[str, LoraSlice]:
        """Its weights as they are."""
        return {name: LoraSlice(w.lora_A, w.lora_B, w.scaling) for name, w in dict(adapter.weights).items()}

    def slice_shapes(self, adapter: Adapter) -> dict[str, LoraSlice]:
        """Without reading a file."""
        return {name: LoraSlice(w.lora_A, w.lora_B, w.scaling) for name, w in adapter.shapes.items()}

    def load(self, slot: int, start: int, adapter: Adapter) -> None:
        """Load as `LoraLayers` does."""
        self.num_loads += 1
        self.rows.assign(slot, start, adapter.rank)
        slices = self.slices(adapter)
        for names, stack in self.stacks:
            stack.load(slot, start, [slices.get(name) for name in names])

    def same_as(self, other: Stacks, slot: int, start: int, adapter: Adapter) -> bool:
        """Whether an adapter's rows are equal, as far as its ranks reach."""
        for (names, mine), (_, theirs) in zip(self.stacks, other.stacks, strict=True):
            assert torch.equal(mine.ranks[slot], theirs.ranks[slot])
            offset = 0
            for i, name in enumerate(names):
                rows = slice(start, start + (adapter.weights[name].r if name in adapter.weights else 0))
                width = slice(offset, offset + SHAPES[name][1])
                if not torch.equal(mine.a[i, rows], theirs.a[i, rows]):
                    return False
                if not torch.equal(mine.b[rows, width], theirs.b[rows, width]):
                    return False
                offset += SHAPES[name][1]
        return bool(self.rows.starts[slot] == start and self.rows.counts[slot] == adapter.rank)


def make(name: str, **ranks: int) -> Adapter:
    """A random adapter with a rank for each of its modules."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    weights = {
        module: LoraWeights(
            torch.randn(r, SHAPES[module][0], generator=generator),
            torch.randn(SHAPES[module][1], r, generator=generator),
            0.7,
        )
        for module, r in ranks.items()
    }
    return Adapter(name=name, fingerprint=name, weights=weights)


def make_store(num_rows: int = 12, pinned_bytes: int = 4096) -> tuple[StagedStore, Stacks]:
    """A store over fresh stacks. One rank takes 38 numbers."""
    stacks = Stacks()
    return StagedStore(
        stacks, AdapterPacking(stacks.stacks, stacks), num_rows=num_rows, pinned_bytes=pinned_bytes
    ), stacks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "ranks", [{"q": 4, "k": 4, "o": 4}, {"q": 2, "o": 5}, {"k": 3}], ids=["even", "mixed", "one-module"]
)
def test_a_packed_adapter_is_what_the_stacks_load(dtype: torch.dtype, ranks: dict[str, int]) -> None:
    """Bit for bit, with modules of other ranks and without some of them, over what lay there before."""
    adapter, old = make("new", **ranks), make("old", q=6, k=6, o=6)
    packed, direct = Stacks(dtype), Stacks(dtype)
    packing = AdapterPacking(packed.stacks, packed)
    for stacks in (packed, direct):
        stacks.load(1, 3, old)
    direct.load(1, 3, adapter)
    flat = torch.full((packing.size(adapter),), torch.nan, dtype=dtype)
    packing.pack(adapter, flat)
    packing.load(1, 3, adapter, flat)
    assert packed.same_as(direct, 1, 3, adapter)


def test_stacks_of_two_dtypes_are_not_packed() -> None:
    """One copy could not serve both."""
    stacks = Stacks().stacks[:1] + Stacks(torch.bfloat16).stacks[1:]
    assert AdapterPacking.of(stacks, Stacks()) is None


def write(adapter: Adapter, folder: Path) -> Adapter:
    """The adapter as a checkpoint, read again: its numbers stay in the file."""
    folder.mkdir()
    tensors = {
        f"base_model.model.{module}.{side}.weight": getattr(w, side).contiguous()
        for module, w in adapter.weights.items()
        for side in ("lora_A", "lora_B")
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    ranks = {module: w.r for module, w in adapter.weights.items()}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": list(ranks), "rank_pattern": ranks}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return read_adapter(folder)


def test_an_adapter_in_a_file_is_read_to_be_packed_and_no_more(tmp_path: Path) -> None:
    """What puts a packed adapter in place needs its shapes alone, so the file may be gone by then."""
    adapter = write(make("a", q=2, o=5), tmp_path / "a")
    packed, direct = Stacks(), Stacks()
    direct.load(1, 3, adapter)
    packing = AdapterPacking(packed.stacks, packed)
    flat = torch.full((packing.size(adapter),), torch.nan)
    packing.pack(adapter, flat)
    kept = dataclasses.replace(adapter, weights=dict(adapter.weights))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"")
    packing.load(1, 3, adapter, flat)
    assert packed.same_as(direct, 1, 3, kept)


def test_an_adapter_that_cannot_be_loaded_is_not_staged_any_more(tmp_path: Path) -> None:
    """Its error is its request's, and others find the room that it had."""
    store, _ = make_store(num_rows=4)
    adapter = write(make("a", q=4), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"")
    for _ in range(3):
        wait_until(lambda: store.are_ready([adapter]))
        with pytest.raises(InvalidAdapterError, match="'a'"):
            store.load(0, 0, adapter)
    store.load(0, 0, make("b", q=4))
    store.close()


def test_every_adapter_arrives_whatever_is_prefetched() -> None:
    """Far more adapters than staging memory and page-locked memory hold, asked for in any order."""
    store, stacks = make_store(num_rows=8, pinned_bytes=38 * 4 * 10)
    adapters = [make(f"n{i}", q=1 + i % 4, k=2, o=1 + i % 3) for i in range(12)]
    rng = random.Random(0)
    for _ in range(200):
        store.prefetch(rng.sample(adapters, 3), may_drop=rng.random() < 0.5)
        adapter, slot, start = rng.choice(adapters), rng.randrange(8), rng.randrange(16)
        if rng.random() < 0.5:
            wait_until(lambda adapter=adapter: store.are_ready([adapter]))
        store.load(slot, start, adapter)
        direct = Stacks()
        direct.load(slot, start, adapter)
        assert stacks.same_as(direct, slot, start, adapter)
    store.close()
    assert stacks.num_loads == 0


def test_the_thread_that_copies_computes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside busy processes a team's members wait for each other at every tensor."""
    stacks = Stacks()
    packing = AdapterPacking.of(stacks.stacks, stacks)
    assert packing is not None
    seen = []
    pack = packing.pack
    monkeypatch.setattr(packing, "pack", lambda *args: (seen.append(torch.get_num_threads()), pack(*args)))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    store = StagedStore(stacks, packing, num_rows=16, pinned_bytes=1 << 20)
    try:
        store.load(0, 0, make("a", q=2))
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        store.close()
        torch.set_num_threads(before)


def test_an_adapter_too_large_for_staging_goes_straight_to_the_sink() -> None:
    """It is ready at once, for waiting would not help, and does not disturb what is staged."""
    store, stacks = make_store(num_rows=4)
    large = make("large", q=6)
    assert store.are_ready([large])
    store.load(0, 0, large)
    assert stacks.num_loads == 1
    store.close()


def test_a_request_whose_adapters_never_fit_together_is_ready_when_nothing_travels() -> None:
    """Two adapters with staging memory for one: no request waits for ever."""
    store, _ = make_store(num_rows=4)
    pair = [make("a", q=3), make("b", q=3)]
    wait_until(lambda: store.are_ready(pair))
    for slot, adapter in enumerate(pair):
        store.load(slot, 4 * slot, adapter)
    store.close()


def test_a_copy_that_fails_costs_only_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stops the copying thread, the adapter is loaded from where it was."""
    store, stacks = make_store()
    adapter = make("a", q=2)
    begun = threading.Event()

    def broken(*_: Any) -> None:
        begun.set()
        raise RuntimeError("no memory")

    monkeypatch.setattr(AdapterPacking, "pack", broken)
    store.prefetch([adapter])
    assert begun.wait(10)
    wait_until(lambda: store.are_ready([adapter]))
    store.load(0, 0, adapter)
    assert stacks.num_loads == 1
    monkeypatch.undo()
    store.load(1, 4, adapter)
    assert stacks.num_loads == 1
    store.close()


class FakeStream:
    """Writes down what it is told to wait for, and refuses events that would hold nothing back."""

    def __init__(self) -> None:
        self.waited: list[FakeEvent] = []
        self.num_synchronized = 0

    def wait_event(self, event: FakeEvent) -> None:
        """As CUDA has it, an event that was never recorded delays nobody."""
        assert event.is_recorded, "waits for an event that nobody has recorded"
        self.waited.append(event)

    def synchronize(self) -> None:
        """Count."""
        self.num_synchronized += 1


class FakeEvent:
    """An event of a `FakeStream`."""

    before_record: Callable[[], None] | None = None

    def __init__(self) -> None:
        self.is_recorded = False

    def record(self, stream: FakeStream) -> None:
        """Let others run first, as threads may."""
        if FakeEvent.before_record is not None and threading.current_thread() is threading.main_thread():
            FakeEvent.before_record()
        self.is_recorded = True


@pytest.fixture
def fake_stream(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """The copying stream of a device that does everything at once."""
    stream = FakeStream()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: FakeStream())
    monkeypatch.setattr(FakeEvent, "before_record", None)
    return stream


def test_a_copy_waits_for_the_load_that_read_its_place(fake_stream: FakeStream) -> None:
    """Also one that is launched while the next load is marking its end: it never meets a mark that is not set yet."""
    store, _ = make_store()
    store._stream = fake_stream  # type: ignore[assignment]
    first, second, third = (make(name, q=2) for name in ("first", "second", "third"))
    store.load(0, 0, first)
    first_load = store._last_load

    def copy_another() -> None:
        store.prefetch([third])
        store._staged["third"].result(10)

    FakeEvent.before_record = copy_another
    store.load(1, 4, second)
    assert fake_stream.waited[-1] is first_load
    assert store._last_load is not first_load
    store.close()
    assert fake_stream.num_synchronized == 1


def test_a_thread_that_cannot_be_started_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the store that wants it, which has booked nothing yet: a container may have no room for one more."""
    started: list[str] = []

    def fail(thread: threading.Thread) -> None:
        started.append(thread.name)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        make_store()
    assert len(started) == 1
    monkeypatch.undo()
    store, stacks = make_store()
    monkeypatch.setattr(threading.Thread, "start", fail)
    store.prefetch([make("a", q=2)])
    store.load(0, 0, make("a", q=2))
    assert stacks.num_loads == 0
    assert len(started) == 1
    store.close()


def test_a_closed_store_stages_nothing() -> None:
    """A request that comes while the engine closes is told that the engine has stopped, not that a thread has."""
    store, stacks = make_store()
    store.close()
    adapter = make("a", q=2)
    store.prefetch([adapter])
    assert store.are_ready([adapter])
    store.load(0, 0, adapter)
    assert stacks.num_loads == 1


def test_without_packing_everything_is_ready() -> None:
    """A store over several devices or none that needs copies loads at once."""
    stacks = Stacks()
    store = StagedStore(stacks)
    store.prefetch([make("a", q=2)])
    assert store.are_ready([make("a", q=2)])
    store.load(0, 0, make("a", q=2))
    store.close()
    assert stacks.num_loads == 1


def test_requests_wait_for_their_adapters_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a slow copy is under way a running request gets tokens; then the waiting one runs, with its adapter."""
    plan_memory = model_runner_module.plan_memory

    def plan(*args: Any) -> Any:
        return plan_memory(*args)._replace(num_staging_rows=16, num_pinned_bytes=1 << 20)

    monkeypatch.setattr(model_runner_module, "plan_memory", plan)
    model = make_tiny_model("llama")
    adapter = make_adapter(model, "a", r=4)
    config = EngineConfig(max_num_seqs=4, kv_cache_bytes=2 << 20, lora_cache_bytes=4 << 20)
    go = threading.Event()
    pack = AdapterPacking.pack

    def slow(self: AdapterPacking, *args: Any) -> None:
        assert go.wait(30)
        pack(self, *args)

    with EngineWorker(BaseModel(model, make_tokenizer(), "tiny"), config) as worker:
        sampling = SamplingParams(max_tokens=300, ignore_eos=True)
        expected = worker.submit([5, 6, 7], dataclasses.replace(sampling, max_tokens=9), [(adapter, 1.0)]).result(60)
        other = dataclasses.replace(adapter, fingerprint="other", weights=dict(adapter.weights))
        monkeypatch.setattr(AdapterPacking, "pack", slow)
        stream = worker.submit([9, 10], sampling)
        tokens = iter(stream)
        next(tokens)
        waiting = worker.submit([5, 6, 7], dataclasses.replace(sampling, max_tokens=9), [(other, 1.0)])
        for _ in range(20):
            next(tokens)
        assert not waiting.is_done
        assert worker.stats().num_waiting == 1
        go.set()
        assert waiting.result(60).token_ids == expected.token_ids
        worker.check_integrity()
