"""Thousands of adapters behind a device budget that holds a fraction of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from engine_gpu.bench import RANK, Bench, Pairs
from engine_gpu.correctness import GateError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_lora_retriever.engine import EngineWorker
    from langchain_lora_retriever.engine.api import Completion
    from langchain_lora_retriever.types import Adapter

    Logprobs = list[dict[int, float]]  # of the likeliest tokens, position by position


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
    check_rows(bench, worker, {adapter.fingerprint: adapter for adapter in names})
    _check_answers(bench, worker, stream[-8:], distinct)
    _leave_out_copies(worker)
    bench.run_all(worker, stream[:quarter])
    reference = bench.run_all(worker, stream[quarter:])
    bench.put(
        f"tok/s {num_names} adapters zipf-wise, mixture k=3, {budget / 1e9:.2g} GB on the device",
        f"{rate:.0f} ({rate / reference:.3f} of the same without copies, {reference:.0f}); {resident} resident, "
        f"{loads} loads and {hits} hits for {num_requests - quarter} requests",
    )
    bench.close_engine()


def check_rows(bench: Bench, worker: EngineWorker, adapters: Mapping[str, Adapter]) -> None:
    """Every resident adapter lies on the device as its source says, bit for bit; the engine must be idle.

    Args:
        bench: Takes the result.
        worker: The engine.
        adapters: Sources by fingerprint, of all that may be resident.

    Raises:
        GateError: If one does not; names the first, and the module.
    """
    stacks = worker.core.runner.lora_layers.stacks
    residents = dict(worker.core.slots._residents)
    num_tensors = 0
    for fingerprint, resident in residents.items():
        adapter = adapters[fingerprint]
        start = worker.core.slots._rows.get(fingerprint)
        assert start is not None
        rows = slice(start, start + adapter.rank)
        for names, stack in stacks:
            place = int(stack.rows.starts[resident.slot]), int(stack.rows.counts[resident.slot])
            if place != (start, adapter.rank):
                raise GateError(f"slot {resident.slot} has (start, rows) {place}, {adapter.name} lies at {rows}")
            parts = stack.b[rows].split(stack.out_features, 1)
            for index, (name, b) in enumerate(zip(names, parts, strict=True)):
                w = adapter.weights.get(name)
                rank, met = 0 if w is None else w.r, int(stack.ranks[resident.slot, index])
                if met != rank:
                    raise GateError(f"{adapter.name}, {name}: rank {met} on the device, {rank} in its source")
                if w is None:
                    continue
                scaled = (w.lora_B.to(b.device).float() * w.scaling).to(b.dtype).t()
                pairs = {"lora_A": (stack.a[index, rows], w.lora_A.to(b.device, b.dtype)), "lora_B": (b, scaled)}
                for tensor, (got, expected) in pairs.items():
                    num_tensors += 1
                    if not torch.equal(got[:rank], expected):
                        wrong = (got[:rank] != expected).any(1).nonzero().flatten().tolist()
                        raise GateError(
                            f"{adapter.name}, slot {resident.slot}, {name}.{tensor}: rows {wrong} of {rank} on the "
                            f"device, from {start}, are not those of its source"
                        )
    bench.put("registry: rows on the device", f"{len(residents)} adapters, {num_tensors} tensors equal bit for bit")


def _check_answers(bench: Bench, worker: EngineWorker, stream: Sequence[Pairs], distinct: Sequence[Adapter]) -> None:
    """Adapters that were copied, some evicted and copied again, answer as their tensors do under fresh names.

    Where they lie among the others decides the order in which a prompt's sums are taken, so that the two may differ by
    rounding. How much that is shows in a third answer, by the same tensors once more, summed in the opposite order.
    Logprobs may differ from the second answer's by twice as much; a first differing token must be a near tie.
    """
    runs = []
    for index, pairs in enumerate(stream):
        ordered = sorted(pairs, key=lambda pair: pair[0].fingerprint)  # the order in which the engine sums them
        fresh, opposite = (
            [
                (replace(distinct[int(adapter.name[1:]) % len(distinct)], fingerprint=f"{name}-{index}-{place}"), share)
                for place, (adapter, share) in enumerate(members)
            ]
            for name, members in (("fresh", ordered), ("opposite", ordered[::-1]))
        )
        runs.append([_answer(bench, worker, index, kind) for kind in (ordered, fresh, opposite)])
    rounding = max(_furthest(expected, other) for _, expected, other in runs)
    num_same = 0
    for index, (got, expected, _) in enumerate(runs):
        message = compare_answers(got, expected, 2 * rounding + 1e-5)
        num_same += message.startswith("the same")
        print(f"  answer {index}: {message}", flush=True)
    bench.put(
        "registry: answers of copied adapters",
        f"{num_same}/{len(runs)} are those of their tensors, the others part at a near tie; logprobs differ by "
        f"{max(_furthest(got, expected) for got, expected, _ in runs):.5f} at most, where only the order of the sums "
        f"differs by {rounding:.5f}",
    )


def _answer(bench: Bench, worker: EngineWorker, seed: int, pairs: Pairs) -> Completion:
    return worker.submit(bench.prompt(seed), bench.greedy(logprobs=20), pairs).result(300)


def compare_answers(got: Completion, expected: Completion, allowed: float) -> str:
    """How two greedy answers to one prompt compare.

    Args:
        got: An answer with logprobs.
        expected: What it should be.
        allowed: By how much logprobs may differ.

    Raises:
        GateError: If logprobs before the first differing token, or its own, differ by more, or it is no near tie.
    """
    furthest = _furthest(got, expected)
    if furthest > allowed:
        raise GateError(f"logprobs after the same tokens differ by {furthest:.5f}; rounding alone makes {allowed:.5f}")
    at = _first_difference(got, expected)
    if at == len(expected.token_ids):
        return f"the same {at} tokens, logprobs within {furthest:.5f}"
    first, second = got.token_ids[at], expected.token_ids[at]
    margins = [
        abs(top.get(first, -torch.inf) - top.get(second, -torch.inf)) for top in (_top(got)[at], _top(expected)[at])
    ]
    text = (
        f"token {at} of {len(expected.token_ids)} is {first} instead of {second}, {margins[0]:.5f} ahead of it here "
        f"and {margins[1]:.5f} behind it there (near tie: up to {allowed:.5f}); logprobs until then within "
        f"{furthest:.5f}"
    )
    if not max(margins) <= allowed:
        raise GateError(text)
    return text


def _first_difference(one: Completion, other: Completion) -> int:
    """Place of the first token that differs; the length of the answers if none does."""
    pairs = enumerate(zip(one.token_ids, other.token_ids, strict=True))
    return next((at for at, (a, b) in pairs if a != b), len(one.token_ids))


def _furthest(one: Completion, other: Completion) -> float:
    """Largest difference of logprobs that both list, up to and with the first differing token."""
    num = min(_first_difference(one, other) + 1, len(one.token_ids))
    tops = zip(_top(one)[:num], _top(other)[:num], strict=True)
    return max(abs(a[token] - b[token]) for a, b in tops for token in a.keys() & b.keys())


def _top(completion: Completion) -> Logprobs:
    return [dict(position.top) for position in completion.logprobs or ()]


def _leave_out_copies(worker: EngineWorker) -> None:
    layers = worker.core.runner.lora_layers
    for _, stack in layers.stacks:
        stack.ranks.fill_(RANK)
    worker.core.slots._store = _NoCopies(layers)
    worker.core.store.close()
    worker.core.store = worker.core.slots._store


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
