"""Adapters beside an engine in another process: where they come from, once."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch

from langchain_lora_retriever.errors import EngineError, InvalidAdapterError, PromptTooLongError, RequestAbortedError
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.remote.adapters import AdapterContents, AdapterStore
from langchain_lora_retriever.remote.wire import portable, ref_of
from langchain_lora_retriever.retrieval.fusion import fuse
from langchain_lora_retriever.types import Adapter, LoraWeights
from makers import make_adapter, make_checkpoint, make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from langchain_lora_retriever.remote.wire import AdapterRef


class Sender:
    """What a caller sends, counted."""

    def __init__(self, *adapters: Adapter) -> None:
        self._adapters = {adapter.fingerprint: adapter for adapter in adapters}
        self.asked: list[str] = []

    def __call__(self, ref: AdapterRef) -> AdapterContents:
        """Send one."""
        self.asked.append(ref.fingerprint)
        sent: AdapterContents = pickle.loads(pickle.dumps(AdapterContents.of(self._adapters[ref.fingerprint])))
        return sent


def equal(one: Adapter, other: Adapter) -> bool:
    """Whether two adapters have the same name, content and numbers."""
    weights, others = dict(one.weights), dict(other.weights)
    if (one.name, one.fingerprint, weights.keys()) != (other.name, other.fingerprint, others.keys()):
        return False
    pairs = [(w, others[path]) for path, w in weights.items()]
    return all(w.lora_A.equal(o.lora_A) and w.lora_B.equal(o.lora_B) and w.scaling == o.scaling for w, o in pairs)


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], [torch.float16, torch.float64, torch.bfloat16]])
def test_an_adapter_arrives_as_it_was(dtypes: list[Any]) -> None:
    """Bit for bit, in any dtype, also where modules differ in theirs."""
    made = make_adapter(make_tiny_model(), "a", r=3)
    weights = {
        path: LoraWeights(w.lora_A.to(dtypes[i % len(dtypes)]), w.lora_B.to(dtypes[i % len(dtypes)]), w.scaling)
        for i, (path, w) in enumerate(made.weights.items())
    }
    adapter = Adapter(name="a", fingerprint="f", weights=weights)
    assert equal(AdapterStore(1 << 20).get(ref_of(adapter), Sender(adapter)), adapter)


def test_a_folder_that_both_see_is_read(tmp_path: Path) -> None:
    """Once; if it holds another adapter by now, or has gone, the one that is meant is sent."""
    make_checkpoint(tmp_path / "a", seed=1)
    adapter = read_adapter(tmp_path / "a")
    dict(adapter.weights)
    store, sender = AdapterStore(1 << 20), Sender(adapter)
    assert equal(store.get(ref_of(adapter), sender), adapter)
    assert (store.num_read, store.num_received, sender.asked) == (1, 0, [])
    store.get(ref_of(adapter), sender)
    assert store.num_read == 1
    held = read_adapter(tmp_path / "a")
    held.weights.hold()
    shutil.rmtree(tmp_path / "a")
    late, sender = AdapterStore(1 << 20), Sender(held)
    assert equal(late.get(ref_of(held), sender), held)
    make_checkpoint(tmp_path / "a", seed=2)
    later, sender = AdapterStore(1 << 20), Sender(held)
    assert equal(later.get(ref_of(held), sender), held)
    assert (later.num_read, later.num_received) == (0, 1)


def test_a_fusion_is_averaged_there(tmp_path: Path) -> None:
    """Its members travel, each once."""
    members = [make_adapter(make_tiny_model(), name) for name in "ab"]
    fused = fuse([(member, 0.5) for member in members])
    store, sender = AdapterStore(1 << 20), Sender(*members)
    assert not store.holds([ref_of(fused)])
    assert equal(store.get(ref_of(fused), sender), fused)
    assert store.holds([ref_of(fused), ref_of(members[0])])
    store.get(ref_of(fused), sender)
    assert sorted(sender.asked) == sorted(member.fingerprint for member in members)


def test_many_ask_at_once() -> None:
    """It is sent once; if the one who was asked cannot, another is."""
    adapter = make_adapter(make_tiny_model(), "a")
    store, is_asked, may_fail = AdapterStore(1 << 20), threading.Event(), threading.Event()

    def fail(_: AdapterRef) -> AdapterContents:
        is_asked.set()
        may_fail.wait(10)
        raise EngineError("gone")

    errors: list[Exception] = []

    def first() -> None:
        try:
            store.get(ref_of(adapter), fail)
        except EngineError as error:
            errors.append(error)

    sender = Sender(adapter)
    got: list[Adapter] = []
    threads = [threading.Thread(target=first)]
    threads[0].start()
    is_asked.wait(10)
    threads += [threading.Thread(target=lambda: got.append(store.get(ref_of(adapter), sender))) for _ in range(6)]
    for thread in threads[1:]:
        thread.start()
    may_fail.set()
    for thread in threads:
        thread.join(10)
    assert [str(error) for error in errors] == ["gone"]
    assert len(got) == 6
    assert len(sender.asked) == 1


def test_the_last_used_stay() -> None:
    """So far as there is room for those that were sent."""
    adapters = [make_adapter(make_tiny_model(), f"a{i}") for i in range(4)]
    size = AdapterContents.of(adapters[0]).data.nbytes
    store, sender = AdapterStore(2 * size), Sender(*adapters)
    for adapter in (*adapters[:2], adapters[0], adapters[2]):
        store.get(ref_of(adapter), sender)
    assert store.fingerprints == [adapters[0].fingerprint, adapters[2].fingerprint]


def test_errors_arrive_as_they_are_or_in_words() -> None:
    """Ours with their type and text; others as an `EngineError` that tells of them."""
    for error in (PromptTooLongError("too long"), InvalidAdapterError("bad"), RequestAbortedError("left")):
        assert portable(error) is error
    told = portable(ValueError("what"))
    assert isinstance(told, EngineError)
    assert str(told) == "ValueError: what"

    class OwnError(EngineError):
        def __init__(self, one: str, two: str) -> None:
            super().__init__(one + two)

    assert type(portable(OwnError("a", "b"))) is EngineError


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_dora": True},
        {"alora_invocation_tokens": [7, 8]},
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True, "saves_base": "auto"},
    ],
    ids=["plain", "dora", "activated", "embedding"],
)
def test_an_adapter_that_is_sent_is_the_same(tmp_path: Path, lora: dict[str, Any]) -> None:
    """Whatever tensors it has, and whatever its configuration says of when it is active."""
    adapter = read_adapter(make_checkpoint(tmp_path / "a", **lora))
    got = pickle.loads(pickle.dumps(AdapterContents.of(adapter))).to_adapter()
    assert got == adapter
    assert (got.is_dora, got.invocation_tokens, got.num_rows) == (
        adapter.is_dora,
        adapter.invocation_tokens,
        adapter.num_rows,
    )
    assert got.weights.keys() == adapter.weights.keys()
    for path, theirs in adapter.weights.items():
        mine = got.weights[path]
        assert mine.scaling == theirs.scaling
        for name in ("lora_A", "lora_B", "magnitude"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
    assert got.base_weights.keys() == adapter.base_weights.keys()
    assert all(torch.equal(got.base_weights[path], weight) for path, weight in adapter.base_weights.items())


def test_whoever_only_passes_requests_on_imports_little() -> None:
    """Neither torch nor PEFT, which are 0.4 GB a process."""
    code = """
import sys
import langchain_lora_retriever.remote.client, langchain_lora_retriever.remote.process
assert not {"torch", "peft", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_few_adapters_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests ask for one each."""
    from langchain_lora_retriever.remote import adapters

    refs = [ref_of(read_adapter(make_checkpoint(tmp_path / f"a{i}", seed=i))) for i in range(12)]
    lock, running, most = threading.Lock(), 0, 0
    read = adapters._read

    def watched(ref: AdapterRef) -> Adapter | None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        try:
            return read(ref)
        finally:
            with lock:
                running -= 1

    monkeypatch.setattr(adapters, "_read", watched)
    store = AdapterStore(1 << 20)
    with ThreadPoolExecutor(12) as threads:
        found = list(threads.map(lambda ref: store.get(ref, Sender()), refs))
    assert [adapter.fingerprint for adapter in found] == [ref.fingerprint for ref in refs]
    assert 1 < most <= adapters._MAX_READS
