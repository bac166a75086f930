"""Tokens per second on a CPU: the engine beside `generate()` and PEFT's mixed batch, same weights, same run.

    python tests/benchmarks/bench_engine_cpu.py [--rounds 5] [--busy 0 1 2 4] [--json results.jsonl]

SmolLM2-135M-Instruct in float32, batch 8, 64 tokens in, 24 out, greedy; 8 adapters of rank 8 on all seven projections.
Seeded and warmed up; the contenders take turns, so that a machine that slows down slows all of them. Nothing is timed
before the engine's tokens equal PEFT's. `--busy`: beside so many processes that do nothing but compute.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model

from langchain_lora_retriever.demo.model import base_model_arguments
from langchain_lora_retriever.engine import EngineConfig, EngineWorker, load_base_model
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.support.openmp import run_aside
from langchain_lora_retriever.types import Adapter, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BATCH, NUM_IN, NUM_OUT, NUM_ADAPTERS, RANK = 8, 64, 24, 8, 8
GATE = 0.9  # share of tokens that must agree with PEFT: greedy near ties may fall either way in float32
GENERATE, PEFT = "generate(), base only", "PEFT mixed batch, 8 adapters"


def make_peft_model(model: Any, folder: Path) -> tuple[Any, list[Adapter]]:
    """Wrap `model` with random adapters, and read the same adapters back for the engine."""
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config, adapter_name="a0")
    for index in range(1, NUM_ADAPTERS):
        wrapped.add_adapter(f"a{index}", config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped.eval(), [read_adapter(folder / f"a{index}") for index in range(NUM_ADAPTERS)]


@contextmanager
def busy_processes(num: int) -> Iterator[None]:
    """Others that use the cores."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def take_turns(contenders: dict[str, Callable[[], object]], num_rounds: int) -> dict[str, list[float]]:
    """Tokens per second of every round."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(num_rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            rates[name].append(BATCH * NUM_OUT / (time.perf_counter() - start))
    return rates


def report(num_busy: int, rates: dict[str, list[float]], where: dict[str, object], file: Path | None) -> None:
    """Print a table, and append its rows."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(
        f"\n{f'beside {num_busy} busy processes':36}{'tok/s':>8}{'min':>8}{'max':>8}{'/ generate':>12}{'/ PEFT 8':>10}"
    )
    for name, median in medians.items():
        row = {
            "name": name, "busy": num_busy, "tokens_per_second": median, "min": min(rates[name]),
            "max": max(rates[name]), "over_generate": median / medians[GENERATE], "over_peft": median / medians[PEFT],
            **where,
        }  # fmt: skip
        print(
            f"{name:36}{median:8.1f}{row['min']:8.1f}{row['max']:8.1f}{row['over_generate']:12.2f}{row['over_peft']:10.2f}"
        )
        if file:
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")


def main() -> None:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    source = base_model_arguments()
    base = run_aside(load_base_model, source["base_model"], **source.get("model_kwargs", {}))
    plain, to_wrap = (run_aside(copy.deepcopy, base.model) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 40_000, (BATCH, NUM_IN), generator=generator)
    names = [f"a{index % NUM_ADAPTERS}" for index in range(BATCH)]
    options = {
        "attention_mask": torch.ones_like(prompts), "max_new_tokens": NUM_OUT, "min_new_tokens": NUM_OUT,
        "do_sample": False, "pad_token_id": 2,
    }  # fmt: skip
    sampling = SamplingParams(max_tokens=NUM_OUT, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        mixed, adapters = run_aside(make_peft_model, to_wrap, Path(folder))
        engine = run_aside(EngineWorker, base, EngineConfig(max_num_seqs=BATCH, enable_prefix_caching=False))

        def run_engine(k: int) -> list[list[int]]:
            running = [
                engine.submit(prompt, sampling, [(adapters[(row + j) % NUM_ADAPTERS], 1 / k) for j in range(k)])
                for row, prompt in enumerate(prompts.tolist())
            ]
            return [list(generation.result().token_ids) for generation in running]

        def run_generate(model: Any, **more: Any) -> list[list[int]]:
            # In a thread of its own, as the engine has one: see `run_aside`. It changes nothing for generate() itself.
            ids: list[list[int]] = run_aside(model.generate, input_ids=prompts, **options, **more)[:, NUM_IN:].tolist()
            return ids

        contenders: dict[str, Callable[[], list[list[int]]]] = {
            GENERATE: lambda: run_generate(plain),
            "PEFT mixed batch, 1 adapter": lambda: run_generate(mixed, adapter_names=["a0"] * BATCH),
            PEFT: lambda: run_generate(mixed, adapter_names=names),
            "engine, base only": lambda: run_engine(0),
            "engine, 8 adapters, selection": lambda: run_engine(1),
            "engine, 8 adapters, mixture k=3": lambda: run_engine(3),
        }
        warm = {name: run() for name, run in contenders.items()}
        for ours, theirs in (
            ("engine, base only", GENERATE),
            ("engine, 8 adapters, selection", PEFT),
        ):
            pairs = [(a, b) for x, y in zip(warm[ours], warm[theirs], strict=True) for a, b in zip(x, y, strict=True)]
            agreement = sum(a == b for a, b in pairs) / len(pairs)
            print(f"{ours} = {theirs}: {agreement:.1%} of the greedy tokens")
            if agreement < GATE:
                raise SystemExit("The engine's tokens are not PEFT's: nothing is timed.")
        where = {
            "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": transformers.__version__, "peft": peft.__version__,
        }  # fmt: skip
        print(where)
        for num_busy in arguments.busy:
            with busy_processes(num_busy):
                report(num_busy, take_turns(contenders, arguments.rounds), where, arguments.json)
        engine.close()


if __name__ == "__main__":
    main()
