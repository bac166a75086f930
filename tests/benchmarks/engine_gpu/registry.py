"""Thousands of adapters behind a device budget that holds a fraction of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from engine_gpu.bench import RANK, Bench, Pairs
from engine_gpu.correctness import GateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.engine import EngineWorker
    from langchain_lora_retriever.types import Adapter


def registry(bench: Bench) -> None:
    """2,000 adapters requested zipf-wise, three per request, with 16 GB on the device, against no copies at all.

    2,000 adapters of 84 MB are more than this host's memory, so 64 distinct sets of tensors lie in it under 2,000 names
    and fingerprints; the engine knows fingerprints only, so that every copy is made. The reference is the same
    stream of requests with the copies left out: the same slots, evictions and steps, as if all were resident.
    """
    num_names, num_distinct, num_requests = (40, 6, 16) if bench.is_tiny else (2000, 64, 512)
    distinct = bench.make_adapters(num_distinct)
    names = [replace(distinct[i % num_distinct], name=f"n{i}", fingerprint=f"n{i}") for i in range(num_names)]
    budget = 1 << 20 if bench.is_tiny else 16 * 10**9
    worker = bench.engine(lora_cache_bytes=budget, max_loras=256)
    draws = torch.multinomial(
        1 / torch.arange(1, num_names + 1).float().expand(num_requests, -1), 3,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    stream: list[Pairs] = [[(names[i], 1 / 3) for i in row] for row in draws.tolist()]
    quarter = num_requests // 4
    bench.run_all(worker, stream[:quarter])  # fills the device's memory
    before = worker.stats()
    rate = bench.run_all(worker, stream[quarter:])
    after = worker.stats()
    loads, hits = after.num_adapter_loads - before.num_adapter_loads, after.num_adapter_hits - before.num_adapter_hits
    resident = after.num_resident_adapters
    _check_answers(bench, worker, stream[-4:], distinct)
    _leave_out_copies(worker)
    bench.run_all(worker, stream[:quarter])
    reference = bench.run_all(worker, stream[quarter:])
    bench.put(
        f"tok/s {num_names} adapters zipf-wise, mixture k=3, {budget / 1e9:.2g} GB on the device",
        f"{rate:.0f} ({rate / reference:.3f} of the same without copies, {reference:.0f}); {resident} resident, "
        f"{loads} loads and {hits} hits for {num_requests - quarter} requests",
    )
    bench.close_engine()


def _check_answers(bench: Bench, worker: EngineWorker, stream: Sequence[Pairs], distinct: Sequence[Adapter]) -> None:
    """Whoever was evicted and copied again answers as the adapter whose tensors it has, token for token."""
    for index, pairs in enumerate(stream):
        # Fresh names for the same tensors; the order of a sum follows the fingerprints, so it stays the same.
        ordered = sorted(pairs, key=lambda pair: pair[0].fingerprint)
        fresh = [
            (replace(distinct[int(adapter.name[1:]) % len(distinct)], fingerprint=f"fresh-{index}-{place}"), share)
            for place, (adapter, share) in enumerate(ordered)
        ]
        got, expected = (
            worker.submit(bench.prompt(index), bench.greedy(), kind).result(300).token_ids for kind in (pairs, fresh)
        )
        if got != expected:
            raise GateError(f"request {index} of the registry gave {got}, its adapters by other names {expected}")
    bench.put("registry: answers of copied adapters", f"{len(stream)}/{len(stream)} are those of their tensors")


def _leave_out_copies(worker: EngineWorker) -> None:
    layers = worker._engine._runner.lora_layers
    for _, stack in layers.stacks:
        stack.ranks.fill_(RANK)
    worker._engine.slots._store = _NoCopies(layers)
    worker._engine._store.close()
    worker._engine._store = worker._engine.slots._store


class _NoCopies:
    """Gives an adapter its rows and leaves what lies in them."""

    def __init__(self, layers: Any) -> None:
        self._rows = [rows for rows, _ in layers._devices.values()]

    def are_ready(self, _: Sequence[Adapter]) -> bool:
        return True

    def prefetch(self, _: Sequence[Adapter], *, may_drop: bool = False) -> None:
        pass

    def load(self, slot: int, start: int, adapter: Adapter) -> None:
        for rows in self._rows:
            rows.assign(slot, start, adapter.rank)

    def close(self) -> None:
        pass
