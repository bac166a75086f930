"""The engine on a GPU: right first, then tokens per second with an 8B-shaped Llama of random weights.

    PYTHONPATH=.:kernels:tests python tests/benchmarks/bench_engine_gpu.py [--out folder] [--tiny] [--only name ...]

bf16, 64 requests, 128 tokens in, 64 out, greedy; adapters of rank 16 on all seven projections. Nothing is timed before
the engine's greedy tokens equal those of `generate` with merged weights, in float32, for small models of four
architectures. Seeded and warmed up; medians. Sections fail one by one. `--tiny` shrinks the timed model, so that the
script itself can be tried anywhere.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch.nn.functional import linear

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker
from langchain_lora_retriever.types import Adapter, LoraWeights, SamplingParams
from makers import make_adapter, make_tiny_model, make_tokenizer, merge_adapters

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, NUM_IN, NUM_OUT, RANK, NUM_ADAPTERS = 64, 128, 64, 16, 32
ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "mistral")
Pairs = list[tuple[Adapter, float]]


class Bench:
    """Sections that run one after the other and share a model, an engine and a table.

    Args:
        out: Folder for results, or None.
        is_tiny: Whether to shrink everything.
    """

    def __init__(self, out: Path | None, *, is_tiny: bool) -> None:
        self.out = out
        self.is_tiny = is_tiny
        self.batch = 4 if is_tiny else BATCH
        self.num_in, self.num_out = (16, 6) if is_tiny else (NUM_IN, NUM_OUT)
        self.rounds = 1 if is_tiny else 3
        self.rows: dict[str, Any] = {}
        self.worker: EngineWorker | None = None
        self.adapters: list[Adapter] = []

    def put(self, name: str, value: Any) -> None:
        """Keep a result, and print it at once."""
        self.rows[name] = value
        print(f"{name}: {value}", flush=True)

    def correctness(self) -> None:
        """Float32 tokens equal `generate`'s: mixed adapters, batch of 64, graphs on and off, prefix miss and hit."""
        torch.backends.cuda.matmul.allow_tf32 = False
        tokenizer = make_tokenizer()
        num_kinds, num_out = (3, 4) if self.is_tiny else (16, 20)
        for architecture in ARCHITECTURES[: 1 if self.is_tiny else None]:
            model = make_tiny_model(architecture).to(DEVICE)
            pool = [make_adapter(model, f"a{i}", r=2 + 2 * i) for i in range(5)]
            cases = []
            for i in range(num_kinds):
                prompt = torch.randint(3, 259, (3 + 7 * i,), generator=torch.Generator().manual_seed(i)).tolist()
                weights = ([1.0], [0.5, 0.3, 0.2], [])[i % 3]
                cases.append((prompt, [(pool[(i + j) % 5], w) for j, w in enumerate(weights)]))
            expected = [self._generate(model, *case, num_out) for case in cases]
            for graphs in (True, False):
                config = EngineConfig(
                    max_num_seqs=self.batch, kv_cache_bytes=8 << 20, lora_cache_bytes=4 << 20,
                    max_num_batched_tokens=512, enable_cuda_graphs=graphs,
                )  # fmt: skip
                with EngineWorker(BaseModel(copy.deepcopy(model), tokenizer, "tiny"), config) as worker:
                    sampling = SamplingParams(max_tokens=num_out, ignore_eos=True)
                    total = equal = 0
                    for _ in range(2):  # the second round finds every prefix in the cache
                        running = [worker.submit(cases[i % num_kinds][0], sampling, cases[i % num_kinds][1])
                                   for i in range(self.batch)]  # fmt: skip
                        got = [list(g.result(300).token_ids) for g in running]
                        total += len(got)
                        equal += sum(tokens == expected[i % num_kinds] for i, tokens in enumerate(got))
                    alone = [list(worker.submit(p, sampling, a).result(300).token_ids) for p, a in cases[:4]]
                    equal += sum(a == b for a, b in zip(alone, expected, strict=False))
                    executor = worker._engine._runner._executor
                    fused = None if executor is None else executor.is_fused
                    worker.check_integrity()
                total += len(alone)
                self.put(f"correct {architecture} graphs={graphs}", f"{equal}/{total} fused={fused}")

    @staticmethod
    def _generate(model: Any, prompt: list[int], adapters: Pairs, num_tokens: int) -> list[int]:
        merged = copy.deepcopy(model)
        for adapter, weight in adapters:
            merge_adapters(merged, [(_moved(adapter, model.device), weight)])
        ids = torch.tensor([prompt], device=model.device)
        out = merged.generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        return list(out[0, len(prompt) :].tolist())

    def load(self) -> None:
        """The 8B-shaped model, the engine over it, and the adapters."""
        shape: dict[str, Any] = {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
        }  # fmt: skip
        if self.is_tiny:
            shape = {
                "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
            }  # fmt: skip
        config = transformers.LlamaConfig(**shape, rope_theta=500000.0, tie_word_embeddings=False)
        torch.manual_seed(0)
        dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
        with torch.device(DEVICE):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        model.requires_grad_(requires_grad=False)
        self.adapters = [self._adapter(model, index) for index in range(6 if self.is_tiny else NUM_ADAPTERS)]
        limits = {"kv_cache_bytes": 1 << 20, "lora_cache_bytes": 4 << 20} if self.is_tiny else {
            "kv_cache_bytes": 12 << 30, "lora_cache_bytes": 5 << 30}  # fmt: skip
        engine_config = EngineConfig(
            max_num_seqs=self.batch, max_num_batched_tokens=8192 if not self.is_tiny else 64,
            enable_prefix_caching=False, max_loras=64, **limits,
        )  # fmt: skip
        start = time.perf_counter()
        self.worker = EngineWorker(BaseModel(model, make_tokenizer(), "8b"), engine_config)
        executor = self.worker._engine._runner._executor
        self.put("engine start s", round(time.perf_counter() - start, 2))
        self.put("fused layers", executor is not None and executor.is_fused)

    @staticmethod
    def _adapter(model: Any, index: int) -> Adapter:
        generator = torch.Generator(DEVICE).manual_seed(index)
        weights = {}
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in path:
                a = torch.randn(RANK, module.in_features, generator=generator, device=DEVICE) * 0.02
                b = torch.randn(module.out_features, RANK, generator=generator, device=DEVICE) * 0.02
                weights[path] = LoraWeights(a.to(module.weight.dtype), b.to(module.weight.dtype), 2.0)
        return Adapter(name=f"a{index}", fingerprint=f"bench-{index}", weights=weights)

    def products(self) -> None:
        """The matrix products of a decode step alone, over the engine's own weights, in graph replay."""
        assert self.worker is not None
        runner = self.worker._engine._runner
        pairs = [group._fused for group in runner.lora_layers._groups]
        for num_tokens in (1, self.batch):
            inputs = {w.shape[1]: torch.randn(num_tokens, w.shape[1], device=DEVICE, dtype=w.dtype) for w, _ in pairs}

            def run(inputs: dict[int, torch.Tensor] = inputs) -> None:
                for weight, bias in pairs:
                    linear(inputs[weight.shape[1]], weight, bias)

            self.put(f"products ms T={num_tokens}", round(self._time_graph(run), 3))

    def _time_graph(self, run: Callable[[], None]) -> float:
        if DEVICE.type == "cpu":
            return _median_ms(run, 2)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        return _median_ms(graph.replay, 20)

    def throughput(self) -> None:
        """The whole run, base and composed: medians, and each as a share of the base."""
        many, few = len(self.adapters), min(8, len(self.adapters))
        kinds: dict[str, Callable[[int], Pairs]] = {
            "base": lambda _: [],
            f"mixture k=3, {few} adapters": lambda i: self._mixture(i, few),
            f"mixture k=3, {many} adapters": lambda i: self._mixture(i, many),
            f"selection or fusion, {many} adapters": lambda i: [(self.adapters[i % many], 1.0)],
        }
        for kind in kinds.values():
            self._run_all(kind)
        base = 0.0
        for name, kind in kinds.items():
            rates = [self._run_all(kind) for _ in range(self.rounds)]
            rate = statistics.median(rates)
            base = base or rate
            self.put(f"tok/s {name}", f"{rate:.0f} ({rate / base:.2f} of base; {min(rates):.0f} to {max(rates):.0f})")

    def alone(self) -> None:
        """One request: milliseconds per token once it runs."""
        assert self.worker is not None
        kinds: dict[str, Pairs] = {"base": [], "mixture k=3": self._mixture(0, 3)}
        for name, adapters in kinds.items():
            for _ in range(2):
                sampling = SamplingParams(max_tokens=self.num_out, ignore_eos=True)
                self.worker._engine._recorder._inter_token.clear()
                self.worker.submit(_prompt(0, self.num_in, self.is_tiny), sampling, adapters).result(300)
            self.put(f"alone ms/token {name}", round(self.worker.stats().inter_token.p50_ms, 3))

    def long_prompt(self) -> None:
        """Pauses between the tokens of running streams while a long prompt prefills."""
        assert self.worker is not None
        worker, recorder = self.worker, self.worker._engine._recorder
        num_out, length = (20, 100) if self.is_tiny else (160, 4000)
        sampling = SamplingParams(max_tokens=num_out, ignore_eos=True)
        for _ in range(2):
            streams = [
                worker.submit(_prompt(i, self.num_in, self.is_tiny), sampling, self._mixture(i, 6))
                for i in range(self.batch // 2)
            ]
            iterator = iter(streams[0])
            for _ in range(5):
                next(iterator)
            recorder._inter_token.clear()
            start = time.perf_counter()
            late = worker.submit(_prompt(999, length, self.is_tiny), SamplingParams(max_tokens=2, ignore_eos=True))
            late.result(300)
            first = time.perf_counter() - start
            for stream in streams[1:]:
                stream.result(300)
            list(iterator)
        pauses = worker.stats().inter_token
        self.put("long prompt: inter-token ms p50, p95, p99", [round(x, 2) for x in pauses])
        self.put("long prompt: p99 / p50", round(pauses.p99_ms / pauses.p50_ms, 2))
        self.put("long prompt: its own time to first token ms", round(1e3 * first, 1))

    def profile(self) -> None:
        """Where a step's milliseconds go, to `profile_*.txt`."""
        kinds: dict[str, Callable[[int], Pairs]] = {"base": lambda _: [], "mixture": lambda i: self._mixture(i, 8)}
        for name, kind in kinds.items():
            with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
                self._run_all(kind)
            sort = "self_cuda_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=sort, row_limit=40, max_name_column_width=70)
            if self.out is not None:
                (self.out / f"profile_{name}.txt").write_text(table)

    def close(self) -> None:
        """Leaks show here."""
        assert self.worker is not None
        self.worker.check_integrity()
        self.put("stats", self.worker.stats()._asdict())
        self.worker.close()

    def _mixture(self, index: int, num: int) -> Pairs:
        return [(self.adapters[(index + j) % min(num, len(self.adapters))], 1 / 3) for j in range(3)]

    def _run_all(self, kind: Callable[[int], Pairs]) -> float:
        """Tokens per second of the whole batch, from the first submission to the last token."""
        assert self.worker is not None
        sampling = SamplingParams(max_tokens=self.num_out, ignore_eos=True)
        prompts = [_prompt(i, self.num_in, self.is_tiny) for i in range(self.batch)]
        pairs = [kind(i) for i in range(self.batch)]
        start = time.perf_counter()
        running = [self.worker.submit(p, sampling, a) for p, a in zip(prompts, pairs, strict=True)]
        for generation in running:
            assert len(generation.result(300).token_ids) == self.num_out
        return self.batch * self.num_out / (time.perf_counter() - start)


def _prompt(seed: int, length: int, is_tiny: bool) -> list[int]:
    high = 259 if is_tiny else 128_000
    ids: list[int] = torch.randint(3, high, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def _moved(adapter: Adapter, device: torch.device) -> Adapter:
    weights = {
        path: LoraWeights(w.lora_A.to(device), w.lora_B.to(device), w.scaling) for path, w in adapter.weights.items()
    }
    return Adapter(name=adapter.name, fingerprint=adapter.fingerprint, weights=weights)


def _median_ms(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(3 + repeats):
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def main() -> None:
    """Run the sections, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    bench = Bench(arguments.out, is_tiny=arguments.tiny)
    bench.put("device", torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine())
    bench.put("versions", f"torch {torch.__version__}, transformers {transformers.__version__}")
    sections = ("correctness", "load", "products", "throughput", "alone", "long_prompt", "profile", "close")
    for name in sections:
        if arguments.only and name not in arguments.only:
            continue
        start = time.perf_counter()
        try:
            getattr(bench, name)()
        except Exception:  # noqa: BLE001 - one section's failure must not cost the others
            bench.put(f"FAILED {name}", traceback.format_exc(limit=-4))
        bench.put(f"seconds for {name}", round(time.perf_counter() - start, 1))
        if arguments.out is not None:
            (arguments.out / "bench_engine_gpu.json").write_text(json.dumps(bench.rows, indent=1, default=str))
    print("\n" + "\n".join(f"{name:55s} {value}" for name, value in bench.rows.items()))


if __name__ == "__main__":
    main()
