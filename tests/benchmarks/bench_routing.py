"""What routing costs: encode and search for a batch of prompts, beside the time to the first token of one of them.

    python tests/benchmarks/bench_routing.py [--device cuda] [--batch 64] [--words 30] [--hybrid] [--first-token]

Prompts are random words of three to four tokens each, so no cache answers for the encoder; every round makes new ones.
Seeded and warmed up. Nothing is timed before retrieval finds each adapter by its own samples. One JSON line with the
medians, the device and the versions.
`--first-token` also loads the demo's base model and generates one token for one prompt, and for the whole batch.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from typing import TYPE_CHECKING

import faiss
import sentence_transformers
import torch
import transformers

from langchain_lora_retriever.demo.model import base_model_arguments
from langchain_lora_retriever.evaluation import CardPool
from langchain_lora_retriever.pool.samples import Sample
from langchain_lora_retriever.retrieval.encoder import DEFAULT_ENCODER, SentenceTransformerEncoder
from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder
from langchain_lora_retriever.retrieval.retriever import LoraRetriever

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_ADAPTERS, NUM_SAMPLES, ROUNDS = 48, 20, 7
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "ing")]


def words(generator: random.Random, count: int) -> str:
    """Return `count` words of two or three syllables."""
    return " ".join("".join(generator.choices(SYLLABLES, k=generator.randint(2, 3))) for _ in range(count))


def make_pool(generator: random.Random) -> CardPool:
    """Return adapters whose samples share a template of eight words each."""
    cards = {}
    for number in range(NUM_ADAPTERS):
        template = words(generator, 8)
        cards[f"a{number}"] = [Sample(f"{template} {words(generator, 12)}") for _ in range(NUM_SAMPLES)]
    return CardPool(cards)


def check(retriever: LoraRetriever) -> None:
    """Raise unless nearly every adapter is found by its own samples."""
    names = [name for name in retriever.pool for _ in retriever.pool.samples(name)]
    texts = [sample.input for name in retriever.pool for sample in retriever.pool.samples(name)]
    found = retriever.retrieve_batch(texts, top_k=1)
    right = statistics.mean(row[0].name == name for row, name in zip(found, names, strict=True))
    if right < 0.95:
        raise SystemExit(f"retrieval finds only {right:.1%} of the samples' own adapters; nothing was timed.")


def median_ms(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median wall-clock time of `run` in milliseconds, after two runs to warm up."""
    times = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def first_token_ms(prompts: list[str], rounds: int) -> dict[str, float]:
    """Return the time to the first token of one prompt, and to the last first token of all of them together."""
    from langchain_lora_retriever.chat.messages import encode_chat
    from langchain_lora_retriever.engine import EngineConfig, EngineWorker, load_base_model
    from langchain_lora_retriever.types import SamplingParams

    source = base_model_arguments()
    base = load_base_model(source["base_model"], **source.get("model_kwargs", {}))
    sampling = SamplingParams(max_tokens=1, ignore_eos=True)
    config = EngineConfig(max_num_seqs=len(prompts), enable_prefix_caching=False)
    with EngineWorker(base, config) as engine:
        ids = [encode_chat(engine.tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]

        def generate(batch: list[list[int]]) -> None:
            for generation in [engine.submit(prompt, sampling) for prompt in batch]:
                generation.result()

        return {
            "first_token_one_ms": median_ms(lambda: generate(ids[:1]), rounds),
            "first_token_batch_ms": median_ms(lambda: generate(ids), rounds),
        }


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--words", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--hybrid", action="store_true")
    parser.add_argument("--first-token", action="store_true")
    arguments = parser.parse_args()

    generator = random.Random(0)
    encoder = SentenceTransformerEncoder(DEFAULT_ENCODER, device=arguments.device, batch_size=arguments.batch)
    retriever = LoraRetriever(
        make_pool(generator), HybridEncoder(encoder) if arguments.hybrid else encoder, cache_size=0
    )
    check(retriever)

    def prompts() -> list[str]:
        return [words(generator, arguments.words) for _ in range(arguments.batch)]

    encode_ms = median_ms(lambda: retriever.embed(prompts()), arguments.rounds)
    route_ms = median_ms(lambda: retriever.retrieve_batch(prompts(), top_k=3), arguments.rounds)
    one_ms = median_ms(lambda: retriever.retrieve(prompts()[0], top_k=3), arguments.rounds)
    gpu = arguments.device.startswith("cuda")
    result = {
        "bench": "routing",
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "encoder": retriever.encoder.name.rsplit("/", 1)[-1],
        "adapters": NUM_ADAPTERS,
        "batch": arguments.batch,
        "words": arguments.words,
        "encode_batch_ms": round(encode_ms, 2),
        "encode_and_search_batch_ms": round(route_ms, 2),
        "encode_and_search_one_ms": round(one_ms, 2),
    }
    if arguments.first_token:
        times = first_token_ms(prompts(), arguments.rounds)
        result |= {name: round(value, 2) for name, value in times.items()}
    result["versions"] = {
        module.__name__: module.__version__ for module in (torch, transformers, sentence_transformers, faiss)
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
