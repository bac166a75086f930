"""What adapters of other kinds cost beside plain ones, and what an activated LoRA saves; ratios are of one run."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from engine_gpu.bench import DTYPE, RANK, Bench, Pairs
from langchain_lora_retriever.types import Adapter, LoraWeights

if TYPE_CHECKING:
    from langchain_lora_retriever.engine import EngineWorker

KINDS: dict[str, Any] = {"adapter_kinds": ("vocabulary", "dora")}


def kinds(bench: Bench) -> None:
    """Tokens per second of one adapter for each request and of mixtures of three, by kind, in turns.

    Plain adapters are timed in an engine that is ready for nothing else, and again in one that is ready for all kinds:
    the two must not differ. DoRA and adapters of the embedding and the output layer are rated by the second.
    """
    plain = bench.adapters[: 3 if bench.is_tiny else 8]
    before = _rates(bench, bench.engine(), {"plain": plain})
    dora = [_as_dora(bench, adapter) for adapter in plain]
    by_kind = {"plain": plain, "DoRA": dora, "vocabulary": [_with_vocabulary(bench, adapter) for adapter in plain]}
    worker = bench.engine(**KINDS)
    start = time.perf_counter()
    worker.core.runner.lora_layers.prepare(dora[0])
    bench.put("seconds for the gains of one DoRA adapter, at its first load", round(time.perf_counter() - start, 3))
    after = _rates(bench, worker, by_kind)
    for name, rate in before.items():
        bench.put(f"tok/s {name}, engine ready for plain adapters alone", f"{rate:.0f}")
    for name, rate in after.items():
        ratio = rate / after[name.replace("DoRA", "plain").replace("vocabulary", "plain")]
        also = f"; {rate / before[name]:.3f} of the engine without kinds" if name in before else ""
        bench.put(f"tok/s {name}, engine ready for all kinds", f"{rate:.0f} ({ratio:.3f} of plain{also})")
    bench.close_engine()


def activated(bench: Bench) -> None:
    """Time to first token of ten adapters, one after the other, over one document that the base model has read.

    Activated LoRAs find its pages in the cache; plain adapters prefill it each for itself. The two take turns.
    """
    num, length = (3, 40) if bench.is_tiny else (10, 2000)
    worker = bench.engine(enable_prefix_caching=True, captured_num_adapters=(1,), captured_ranks=(RANK,))
    document, invocation = bench.prompt(0, length), bench.prompt(1, 4)
    plain = bench.make_adapters(num)
    awake = [replace(a, fingerprint=f"{a.fingerprint} a", invocation_tokens=tuple(invocation)) for a in plain]
    for round_ in range(2):  # the first loads the adapters
        times: dict[str, list[float]] = {"plain": [], "activated": []}
        text = [3 + round_, *document]  # pages of its own
        worker.submit(text, bench.greedy(1)).result(300)
        for index in range(num):
            for name, adapters in (("plain", plain), ("activated", awake)):
                prompt = [*text, *invocation, *bench.prompt(100 + index, 8)]
                times[name].append(_first_token(bench, worker, prompt, [(adapters[index], 1.0)]))
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    told = ", ".join(
        f"{medians[name]:.2f} {name} ({1e3 * min(values):.2f} to {1e3 * max(values):.2f})"
        for name, values in times.items()
    )
    bench.put(
        f"time to first token ms, {length}-token document, {num} adapters",
        f"{told}: {medians['activated'] / medians['plain']:.3f} of plain",
    )
    bench.close_engine()


def _rates(bench: Bench, worker: EngineWorker, by_kind: dict[str, list[Adapter]]) -> dict[str, float]:
    """Medians of rounds that take turns, after one that does not count."""
    runs: dict[str, list[Pairs]] = {}
    for name, adapters in by_kind.items():
        num = len(adapters)
        runs[f"{name}, selection"] = [[(adapters[i % num], 1.0)] for i in range(bench.batch)]
        runs[f"{name}, mixture k=3"] = [
            [(adapters[(i + j) % num], 1 / 3) for j in range(3)] for i in range(bench.batch)
        ]
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + bench.rounds):
        for name, pairs in runs.items():
            rates[name].append(bench.run_all(worker, pairs))
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def _first_token(bench: Bench, worker: EngineWorker, prompt: list[int], pairs: Pairs) -> float:
    start = time.perf_counter()
    generation = worker.submit(prompt, bench.greedy(1), pairs)
    next(iter(generation))
    return time.perf_counter() - start


def _as_dora(bench: Bench, adapter: Adapter) -> Adapter:
    """The adapter with magnitudes near the base weights' norms."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for path, w in adapter.weights.items():
        norms = bench.model.get_submodule(path).weight.float().norm(dim=1).cpu()
        magnitude = norms * (1 + 0.1 * torch.randn(norms.shape, generator=generator))
        weights[path] = LoraWeights(w.lora_A, w.lora_B, w.scaling, magnitude)
    return Adapter(f"{adapter.name} dora", f"{adapter.fingerprint} dora", weights)


def _with_vocabulary(bench: Bench, adapter: Adapter) -> Adapter:
    """The adapter with the embedding and the output layer adapted too."""
    generator = torch.Generator().manual_seed(1)
    vocabulary, hidden = bench.model.get_input_embeddings().weight.shape
    weights = dict(adapter.weights)
    for path, num_in, num_out in (("model.embed_tokens", vocabulary, hidden), ("lm_head", hidden, vocabulary)):
        a = torch.randn(RANK, num_in, generator=generator) * hidden**-0.5
        b = torch.randn(num_out, RANK, generator=generator) * 0.02
        weights[path] = LoraWeights(a.to(DTYPE), b.to(DTYPE), 2.0)
    return Adapter(f"{adapter.name} vocabulary", f"{adapter.fingerprint} vocabulary", weights)
