"""The way through LangChain: messages, routing, and the answer's message, against the engine alone."""

from __future__ import annotations

import asyncio
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from engine_gpu.bench import DEVICE, Bench, Pairs
from engine_gpu.correctness import GateError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from langchain_core.messages import AIMessage

    from langchain_lora_retriever import AdapterPool
    from langchain_lora_retriever.engine import EngineWorker, Generation
    from langchain_lora_retriever.retrieval.encoder import SentenceTransformerEncoder


def chat(bench: Bench) -> None:
    """`ChatLoraRetriever.abatch` with 32 adapters in the pool, mixture k = 3, routing included.

    The encoder is of MiniLM's shape with random weights on the same device: its answers mean nothing, its time is real.
    The same prompts run once more with the compositions that were found, through the engine alone. Of both ways it is
    said when the engine had the first and the last prompt, when it gave the last token, and when the caller had it all;
    and how much of that the interpreter's full collections took, and the CPU time of the event loop's thread.
    """
    from langchain_lora_retriever import AdapterPool, ChatLoraRetriever, LoraRetriever
    from langchain_lora_retriever.pool.pool import PoolEntry
    from langchain_lora_retriever.registry import close_engines

    usual = bench.engine().config
    bench.close_engine()
    with tempfile.TemporaryDirectory() as folder:
        encoder = random_encoder(bench, Path(folder))
    vectors = encoder.encode([f"adapter {i}" for i in range(len(bench.adapters))])
    pool = AdapterPool()
    entries = {a.name: PoolEntry(a, embedding=v) for a, v in zip(bench.adapters, vectors, strict=True)}
    pool._replace_state(entries, {})
    llm = ChatLoraRetriever(
        base_model=(bench.model, bench.tokenizer), retriever=LoraRetriever(pool, encoder), engine_config=usual,
        composition="mixture", top_k=3, weights="uniform", max_tokens=bench.num_out,
    )  # fmt: skip
    engine = llm.runtime.ready()
    _check_answers(bench, llm, engine, pool)
    for size in (bench.batch, 4 * bench.batch):
        runs: dict[str, list[Timing]] = {"chat": [], "engine": []}
        for round_ in range(bench.rounds + 1):
            # Other prompts every round: neither the encoder's cache nor anything else knows them.
            ids = [bench.prompt(10_000 * size + 1000 * round_ + i) for i in range(size)]
            texts = [_text(row) for row in ids]
            messages, timing = asyncio.run(_timed_abatch(llm, engine, texts))
            runs["chat"].append(timing)
            pairs = [_adapters(message, pool) for message in messages]
            with _Watch(engine) as watch:
                running = [engine.submit(p, bench.greedy(), a) for p, a in zip(ids, pairs, strict=True)]
                answers = [generation.result(300) for generation in running]
            runs["engine"].append(watch.timing())
            num_equal = sum(m.content == a.text for m, a in zip(messages, answers, strict=True))
        medians = {
            name: Timing(*(statistics.median(values) for values in zip(*timings[1:], strict=True)))
            for name, timings in runs.items()
        }
        chat_rate, engine_rate = (size * bench.num_out / medians[name].end for name in ("chat", "engine"))
        bench.put(
            f"tok/s through abatch, {size} prompts",
            f"{chat_rate:.0f} ({chat_rate / engine_rate:.3f} of the engine alone, {engine_rate:.0f}); "
            f"{num_equal}/{size} answers of the last round are the same text",
        )
        for name, timing in medians.items():
            bench.put(
                f"{name}, {size} prompts, ms",
                ", ".join(f"{what} {1e3 * seconds:.0f}" for what, seconds in timing._asdict().items()),
            )
    close_engines()


class Timing(NamedTuple):
    """Seconds from a call's beginning.

    Attributes:
        first_submitted: Until the engine has the first prompt.
        last_submitted: Until it has the last.
        last_token: Until it has given the last token.
        end: Until the caller has all answers.
        caller_cpu: CPU time of the caller's thread, of all that.
        full_collections: Time that the garbage collector took to look at all objects, in any thread.
    """

    first_submitted: float
    last_submitted: float
    last_token: float
    end: float
    caller_cpu: float
    full_collections: float


class _Watch:
    """Notes when an engine is given prompts and when they end, from outside of it."""

    def __init__(self, engine: EngineWorker) -> None:
        self._engine = engine
        self._submitted: list[float] = []
        self._ended: list[float] = []
        self._collected = self._collecting = 0.0

    def __enter__(self) -> Self:
        gc.callbacks.append(self._on_collection)
        submit = self._engine.submit

        def noted(*arguments: Any, **options: Any) -> Generation:
            generation = submit(*arguments, **options)
            self._submitted.append(time.perf_counter())
            generation._future.add_done_callback(lambda _: self._ended.append(time.perf_counter()))
            return generation

        self._engine.submit = noted  # type: ignore[method-assign]
        self._start, self._start_cpu = time.perf_counter(), time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        self._end, self._end_cpu = time.perf_counter(), time.thread_time()
        del self._engine.submit
        gc.callbacks.remove(self._on_collection)

    def timing(self) -> Timing:
        """What was noted."""
        moments = (self._submitted[0], self._submitted[-1], max(self._ended), self._end)
        return Timing(*(at - self._start for at in moments), self._end_cpu - self._start_cpu, self._collected)

    def _on_collection(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] == 2:
            now = time.perf_counter()
            if phase == "start":
                self._collecting = now
            else:
                self._collected += now - self._collecting


async def _timed_abatch(llm: Any, engine: EngineWorker, texts: list[str]) -> tuple[list[AIMessage], Timing]:
    """Time `abatch` within an event loop, as a server calls it; starting a loop takes milliseconds of its own."""
    with _Watch(engine) as watch:
        messages = await llm.abatch(texts)
    return messages, watch.timing()


def _check_answers(bench: Bench, llm: Any, engine: EngineWorker, pool: AdapterPool) -> None:
    """One at a time, where nothing rounds differently, both ways give the same answers."""
    for seed in range(4):
        ids = bench.prompt(seed)
        message = llm.invoke(_text(ids))
        expected = engine.submit(ids, bench.greedy(), _adapters(message, pool)).result(300)
        if message.content != expected.text:
            raise GateError(f"prompt {seed}: the chat model gave {message.content!r}, the engine {expected.text!r}")
    bench.put("chat: answers one at a time", "4/4 are the engine's")


def _text(ids: Sequence[int]) -> str:
    return " ".join(f"t{token}" for token in ids)


def _adapters(message: AIMessage, pool: AdapterPool) -> Pairs:
    return [(pool[member["name"]], member["weight"]) for member in message.response_metadata["adapters"]]


def random_encoder(bench: Bench, folder: Path) -> SentenceTransformerEncoder:
    """A sentence-transformers model of the shape of all-MiniLM-L6-v2, with random weights and the bench's tokenizer."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel

    from langchain_lora_retriever.retrieval.encoder import SentenceTransformerEncoder

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(bench.tokenizer), hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    bench.tokenizer.save_pretrained(folder)
    transformer = models.Transformer(str(folder), max_seq_length=256)
    model = SentenceTransformer(modules=[transformer, models.Pooling(384)], device=DEVICE.type)
    return SentenceTransformerEncoder(model)
