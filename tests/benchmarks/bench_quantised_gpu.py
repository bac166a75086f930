"""Quantised base models on a GPU: tokens, memory and speed beside bf16, in one run.

    PYTHONPATH=.:kernels:tests python tests/benchmarks/bench_quantised_gpu.py [--size 8b] [--only bf16 nf4] [--out f]

A Llama of random weights is saved once and loaded with each of transformers' configurations. For each are told: the
device memory after loading and with the engine; how many of some greedy answers, without an adapter and with one
(PEFT), are token for token those of `generate` of the same quantised model (products of other shapes round otherwise:
random weights have near-ties, at which a few answers part); tokens per second of 64 requests, 128 tokens in, 64 out,
base and 32 adapters of rank 16; and one layer's products by themselves, without which a slower engine cannot be
judged. A scheme whose package is not installed, or does not run here, is told and left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from langchain_lora_retriever.engine import EngineConfig, EngineWorker, load_base_model
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.types import SamplingParams
from makers import make_checkpoint, make_tokenizer

SIZES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
             "num_key_value_heads": 4, "vocab_size": 512},
}  # fmt: skip
NUM_REQUESTS, NUM_IN, NUM_OUT = 64, 128, 64


def torchao(kind: str, **settings: Any) -> Any:
    """A configuration of torchao."""
    from torchao import quantization

    return transformers.TorchAoConfig(getattr(quantization, kind)(**settings))


SCHEMES: dict[str, Any] = {
    "bf16": lambda: None,
    "int8": lambda: torchao("Int8WeightOnlyConfig"),
    "int4": lambda: torchao("Int4WeightOnlyConfig", group_size=128),
    "float8": lambda: torchao("Float8WeightOnlyConfig"),
    "float8-dynamic": lambda: torchao("Float8DynamicActivationFloat8WeightConfig"),
    "nf4": lambda: transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "bnb-int8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
}


def make_model(folder: Path, size: str) -> None:
    """Random weights whose activations keep their size from layer to layer, in bf16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES[size], max_position_embeddings=4096, tie_word_embeddings=False)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_prompts(num: int, length: int) -> list[list[int]]:
    """Random tokens of the tokenizer's."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 259, (num, length), generator=generator).tolist()


def generate(model: Any, prompt: list[int]) -> list[int]:
    """What the model answers by itself."""
    ids = torch.tensor([prompt], device="cuda")
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return list(out[0, len(prompt) :].tolist())


def tokens_per_second(worker: EngineWorker, adapters: list[Any]) -> float:
    """Median of three rounds after one."""
    sampling = SamplingParams(max_tokens=NUM_OUT, ignore_eos=True)
    times = []
    for round_ in range(4):
        prompts = make_prompts(NUM_REQUESTS, NUM_IN + round_)
        start = time.perf_counter()
        running = [
            worker.submit(p, sampling, [(adapters[i % len(adapters)], 1.0)] if adapters else [])
            for i, p in enumerate(prompts)
        ]
        for generation in running:
            generation.result(600)
        times.append(time.perf_counter() - start)
    return NUM_REQUESTS * NUM_OUT / sorted(times[1:])[1]


def product_ms(model: Any) -> float:
    """One layer's seven products over 64 tokens, in a CUDA graph as the engine runs them; without one if it must."""
    layer = model.model.layers[0]
    modules = [m for m in layer.modules() if hasattr(m, "in_features")]
    inputs = [torch.randn(NUM_REQUESTS, m.in_features, device="cuda", dtype=torch.bfloat16) for m in modules]

    def run() -> None:
        for module, x in zip(modules, inputs, strict=True):
            module(x)

    with torch.inference_mode():
        for _ in range(3):
            run()
        call = run
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            call = graph.replay
        except RuntimeError:
            torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(50):
            call()
        end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end) / 50)


def measure(scheme: str, folder: Path, adapters: list[Path]) -> dict[str, Any]:
    """Everything of one scheme."""
    from peft import PeftModel

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = SCHEMES[scheme]()
    kwargs = {} if config is None else {"quantization_config": config}
    base = load_base_model(folder, dtype=torch.bfloat16, **kwargs)
    row: dict[str, Any] = {"weights GiB": torch.cuda.memory_allocated() / 2**30, "products ms": product_ms(base.model)}
    prompts = make_prompts(6, 24)
    expected = [generate(base.model, prompt) for prompt in prompts]
    adapted = PeftModel.from_pretrained(base.model, adapters[0])
    expected += [generate(adapted, prompt) for prompt in prompts]
    adapted.unload()
    chosen = [read_adapter(path) for path in adapters]
    limits = EngineConfig(kv_cache_bytes=4 << 30, lora_cache_bytes=4 << 30, captured_num_adapters=(0, 1))
    with EngineWorker(base, limits) as worker:
        executor = worker.core.runner.executor
        row |= {"fused": executor.num_fused_layers, "graphs": len(executor.graphs)}
        sampling = SamplingParams(max_tokens=16, ignore_eos=True)
        pairs: list[list[Any]] = [[]] * len(prompts) + [[(chosen[0], 1.0)]] * len(prompts)
        running = [worker.submit(p, sampling, pair) for p, pair in zip(prompts * 2, pairs, strict=True)]
        got = [list(g.result(600).token_ids) for g in running]
        row["answers equal"] = f"{sum(map(list.__eq__, got, expected))} of {len(expected)}"
        row["first tokens equal"] = (
            f"{sum(a[0] == b[0] for a, b in zip(got, expected, strict=True))} of {len(expected)}"
        )
        row["base tok/s"] = tokens_per_second(worker, [])
        row["32 adapters tok/s"] = tokens_per_second(worker, chosen)
        row["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def main() -> None:
    """Measure each scheme and print a line of JSON for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--only", nargs="*", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    make_model(root / "model", arguments.size)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(root / "model"))
    adapters = [
        make_checkpoint(root / f"a{i}", seed=i, model=skeleton, r=16, lora_alpha=32, target_modules="all-linear")
        for i in range(32)
    ]
    del skeleton
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "size": arguments.size}
    lines = []
    for scheme in arguments.only:
        try:
            row = measure(scheme, root / "model", adapters)
        except Exception:  # noqa: BLE001 - told, and the others are measured
            row = {"failed": traceback.format_exc(limit=-3)}
        rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
        lines.append(json.dumps({"scheme": scheme, **about, **rounded}))
        print(lines[-1], flush=True)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
