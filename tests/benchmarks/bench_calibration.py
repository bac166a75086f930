"""What a task entry is worth to prompts whose own adapter is not in the pool, against the default.

For each task of a benchmark its adapter is kept away. `pool.calibrate` scores some of the task's samples under all
others, once; the task's rows are then answered by the default as it is, and with the entry that calibration makes, with
MiniLM alone and with words. Greedy, seeded; the differences are row by row, with 95 % bootstrap intervals.

A task takes minutes on a CPU, and each is written down when it is done: the same command goes on where it was cut off.

Usage: python tests/benchmarks/bench_calibration.py POOL TEST OUT [--rows 15] [--samples 10] [--tasks NAME ...]
    [--leave-out NAME ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from langchain_lora_retriever import AdapterPool, HybridEncoder, LoraRetriever
from langchain_lora_retriever.demo.model import base_model_arguments
from langchain_lora_retriever.engine import EngineConfig, EngineWorker, load_base_model
from langchain_lora_retriever.evaluation import AnswerLikelihood, Setting, benchmark_from_pool, evaluate_composition
from langchain_lora_retriever.evaluation.metrics import bootstrap_difference, bootstrap_macro
from langchain_lora_retriever.retrieval.encoder import DEFAULT_ENCODER, SentenceTransformerEncoder

if TYPE_CHECKING:
    from langchain_lora_retriever.evaluation import Benchmark

ENTRY = "a task of one's own"
ENCODERS = ("MiniLM", "MiniLM + words")
ARMS = ("the default", "with a task entry")


class Bench:
    """A pool in memory, the engine that runs it, and a retriever for each encoder.

    Args:
        folder: The pool's; nothing is written to it.
        out: Where answers are kept.
    """

    def __init__(self, folder: Path, out: Path) -> None:
        self.pool = AdapterPool()
        for name in AdapterPool(folder).names:
            self.pool.add(name, folder / name)
        meaning = SentenceTransformerEncoder(DEFAULT_ENCODER)
        encoders = (meaning, HybridEncoder(meaning))
        self.retrievers = {n: LoraRetriever(self.pool, e) for n, e in zip(ENCODERS, encoders, strict=True)}
        source = base_model_arguments()
        base = load_base_model(source["base_model"], **source.get("model_kwargs", {}))
        self.engine = EngineWorker(base, EngineConfig(max_num_seqs=16))
        self._cache = out / "answers.jsonl"

    def score(self, benchmark: Benchmark, task: str, num_samples: int) -> dict[str, object]:
        """Everything that is measured for a task."""
        start = time.perf_counter()
        samples = self.pool.samples(task)[:num_samples]
        found = self.pool.calibrate(samples, AnswerLikelihood(self.engine), exclude=[task])
        seconds = time.perf_counter() - start
        rows = replace(benchmark, rows=tuple(row for row in benchmark.rows if row.task == task))
        scores: dict[str, dict[str, list[float]]] = {name: {} for name in ENCODERS}
        for arm in ARMS:
            if arm == ARMS[1]:
                self.pool.add_task(ENTRY, found.members, samples)
            for name, retriever in self.retrievers.items():
                report = evaluate_composition(
                    rows, self.pool, self.engine, retriever,
                    settings=[Setting.default()], masked=[True], cache=self._cache,
                )  # fmt: skip
                scores[name][arm] = list(report.scores[0].row_scores[task])
        self.pool.remove(ENTRY)
        return {
            "task": task, "members": dict(found.members), "scores": scores, "calibration_seconds": round(seconds, 1),
            "best": [[a.name, round(a.log_likelihood, 4)] for a in found.adapters[:5]], "num_samples": len(samples),
            "base": round(found.base.log_likelihood, 4), "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip


def main() -> None:
    """Score the tasks that are not scored yet, then sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path, help="folder of adapters with samples that have outputs")
    parser.add_argument("test", type=Path, help="test rows, as docs/evaluate.md describes them")
    parser.add_argument("out", type=Path, help="folder for what has been measured")
    parser.add_argument("--rows", type=int, default=15, help="rows of a task")
    parser.add_argument("--samples", type=int, default=10, help="samples of a task that calibration sees")
    parser.add_argument("--tasks", nargs="*", help="these tasks alone")
    parser.add_argument("--leave-out", nargs="*", default=[], help="tasks to leave out")
    arguments = parser.parse_args()
    file = arguments.out / f"tasks-{arguments.rows}-{arguments.samples}.jsonl"
    arguments.out.mkdir(parents=True, exist_ok=True)
    done = {row["task"]: row for row in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}
    benchmark = benchmark_from_pool(AdapterPool(arguments.pool), arguments.test).subset(arguments.rows)
    wanted = [t for t in arguments.tasks or sorted(benchmark.domains) if t not in arguments.leave_out]
    missing = [task for task in wanted if task not in done]
    if missing:
        bench = Bench(arguments.pool, arguments.out)
        try:
            for task in missing:
                done[task] = bench.score(benchmark, task, arguments.samples)
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(done[task]) + "\n")
                print(json.dumps({k: v for k, v in done[task].items() if k != "scores"}), flush=True)
        finally:
            bench.engine.close()
    sum_up([done[task] for task in wanted])


def sum_up(rows: list[dict[str, object]]) -> None:
    """Print macro averages, and the differences of the two arms."""
    for name in ENCODERS:
        by_arm = {arm: {row["task"]: row["scores"][name][arm] for row in rows} for arm in ARMS}
        means = {arm: [round(100 * x, 1) for x in bootstrap_macro(scores)] for arm, scores in by_arm.items()}
        difference = bootstrap_difference(by_arm[ARMS[1]], by_arm[ARMS[0]])
        print(json.dumps({
            "bench": "calibration", "encoder": name, "tasks": len(rows),
            "rows": sum(map(len, by_arm[ARMS[0]].values())), **means,
            "difference": [round(100 * x, 1) for x in difference], "threads": os.environ.get("OMP_NUM_THREADS"),
            "machine": platform.machine(), "torch": version("torch"), "transformers": version("transformers"),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
