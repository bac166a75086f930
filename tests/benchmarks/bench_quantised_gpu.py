"""Quantised base models on a GPU: tokens, memory and speed beside bf16, in one run.

    PYTHONPATH=.:kernels:tests python tests/benchmarks/bench_quantised_gpu.py [--size 8b] [--only bf16 nf4] [--out f]

A Llama of random weights is saved once and loaded with each of transformers' configurations. For each are told: the
device memory after loading and with the engine; how many tokens of some greedy answers, without an adapter and with
one (PEFT), are those that the same quantised model finds likeliest behind the ones before, and how far behind its
likeliest the others are (products of other shapes round otherwise, and random weights have near-ties: bf16 says how
many); tokens per second of 64 requests, 128 tokens in, 64 out, base and 32 adapters of rank 16; and one layer's
products by themselves, without which a slower engine cannot be judged. NF4 is loaded and served with no more than
16 GiB of device memory for PyTorch. GPTQ and AWQ are checkpoints: one is written of the same weights, rounded to
nearest, and loaded with a kernel of gptqmodel's that needs no compiler (Triton on a GPU, torch on a CPU), or, if named
by `--only`, with Marlin's, which gptqmodel compiles by nvcc when it is first asked for, which takes minutes. AWQ is
loaded by transformers in fp16 on a GPU, whatever is asked for. A scheme whose package is not installed, or does not run
here, is told and left out; so are those whose turn has not come after `--seconds`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from four_bits import save_four_bits
from langchain_lora_retriever.engine import EngineConfig, EngineWorker, load_base_model
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.types import Adapter, SamplingParams
from makers import make_tokenizer

HAS_GPU = torch.cuda.is_available()  # the script can be tried without
DEVICE = "cuda" if HAS_GPU else "cpu"

SIZES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
             "num_key_value_heads": 4, "vocab_size": 512},
}  # fmt: skip
NUM_REQUESTS, NUM_IN, NUM_OUT = (64, 128, 64) if HAS_GPU else (4, 16, 6)
NUM_ADAPTERS, NUM_DISTINCT, RANK = 32, 4, 16
CAPPED, CAP = "nf4", 16 << 30
GROUP_SIZE = 128  # of the checkpoints of four bits


def torchao(kind: str, **settings: Any) -> Any:
    """A configuration of torchao."""
    from torchao import quantization

    return transformers.TorchAoConfig(getattr(quantization, kind)(**settings))


SCHEMES: dict[str, Any] = {
    "bf16": lambda: None,
    "int8": lambda: torchao("Int8WeightOnlyConfig"),
    "int4": lambda: torchao("Int4WeightOnlyConfig", group_size=128, int4_packing_format="tile_packed_to_4d"),
    "float8": lambda: torchao("Float8WeightOnlyConfig"),
    "float8-dynamic": lambda: torchao("Float8DynamicActivationFloat8WeightConfig"),
    "nf4": lambda: transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "bnb-int8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
    "gptq": lambda: transformers.GPTQConfig(bits=4, backend="triton" if HAS_GPU else "gptq_torch_aten"),
    "awq": lambda: transformers.AwqConfig(backend="gemm_triton" if HAS_GPU else "torch_awq"),
    "gptq-marlin": lambda: transformers.GPTQConfig(bits=4, backend="marlin"),
    "awq-marlin": lambda: transformers.AwqConfig(backend="marlin"),
}
COMPILED = ("gptq-marlin", "awq-marlin")


def make_model(folder: Path, size: str) -> None:
    """Random weights whose activations keep their size from layer to layer, in bf16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES[size], max_position_embeddings=4096, tie_word_embeddings=False)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def checkpoint_of(scheme: str, root: Path) -> Path:
    """What the scheme loads: the model in bf16, which it quantises, or a checkpoint of the same in four bits."""
    method = scheme.partition("-")[0]
    if method not in {"gptq", "awq"}:
        return root / "model"
    folder = root / method
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.bfloat16, device_map=DEVICE)
        save_four_bits(model, folder, method, GROUP_SIZE)
        make_tokenizer().save_pretrained(folder)
    return folder


def make_adapters(folder: Path) -> list[Path]:
    """Random adapters on all linear modules, in bf16; those that share a file of weights have other scalings."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model"))
    linears = {n: m for n, m in skeleton.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    for seed in range(NUM_DISTINCT):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        tensors = {}
        for name, module in linears.items():
            a = torch.randn(RANK, module.in_features, generator=generator, device=DEVICE) * module.in_features**-0.5
            b = torch.randn(module.out_features, RANK, generator=generator, device=DEVICE) * 0.02
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.bfloat16().cpu()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.bfloat16().cpu()
        save_file(tensors, folder / f"weights{seed}.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "base_model_name_or_path": "random",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in linears}),
    }  # fmt: skip
    paths = [folder / f"a{i}" for i in range(NUM_ADAPTERS)]
    for i, path in enumerate(paths):
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2.0 * RANK + 0.01 * i}))
        os.link(folder / f"weights{i % NUM_DISTINCT}.safetensors", path / "adapter_model.safetensors")
    return paths


def make_prompts(num: int, length: int) -> list[list[int]]:
    """Random tokens of the tokenizer's."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 259, (num, length), generator=generator).tolist()


@torch.inference_mode()
def gaps(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """How far each token's logit is below the likeliest's there, by the model itself."""
    ids = torch.tensor([prompt + answer[:-1]], device=DEVICE)
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 :].float()
    chosen = logits.gather(1, torch.tensor(answer, device=DEVICE)[:, None])[:, 0]
    found: list[float] = (logits.amax(1) - chosen).tolist()
    return found


def told(found: list[list[float]]) -> dict[str, Any]:
    """Of some answers: how many of all tokens, and of the first ones, are the likeliest; how far the others are."""
    firsts, every = [each[0] for each in found], [gap for each in found for gap in each]
    return {
        "likeliest": f"{every.count(0.0)} of {len(every)}", "first ones": f"{firsts.count(0.0)} of {len(firsts)}",
        "farthest": round(max(every), 4),
    }  # fmt: skip


def tokens_per_second(worker: EngineWorker, adapters: list[Adapter]) -> list[float]:
    """Median, least and most of three rounds after one."""
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
    rates = [NUM_REQUESTS * NUM_OUT / seconds for seconds in times[1:]]
    return [statistics.median(rates), min(rates), max(rates)]


def product_ms(model: Any) -> float:
    """One layer's seven products over 64 tokens, in a CUDA graph as the engine runs them; without one if it must."""
    if not HAS_GPU:
        return 0.0
    layer = model.model.layers[0]
    modules = [m for m in layer.modules() if hasattr(m, "in_features")]
    inputs = [torch.randn(NUM_REQUESTS, m.in_features, device="cuda", dtype=model.dtype) for m in modules]

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


def begin(scheme: str) -> None:
    """Give back what the scheme before has held, and say how much memory this one may have."""
    gc.collect()
    if HAS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total) if scheme == CAPPED else 1.0)


def gib_on_device() -> float:
    """What is taken of the device, by whatever: PyTorch, the libraries, the context."""
    free, total = torch.cuda.mem_get_info() if HAS_GPU else (0, 0)
    return (total - free) / 2**30


def measure(scheme: str, root: Path, adapters: list[Path], chosen: list[Adapter]) -> dict[str, Any]:
    """Everything of one scheme."""
    from peft import PeftModel

    config = SCHEMES[scheme]()
    folder = checkpoint_of(scheme, root)
    begin(scheme)
    kwargs = {} if config is None else {"quantization_config": config}
    start = time.perf_counter()
    base = load_base_model(folder, dtype=torch.bfloat16, **kwargs)
    seconds = time.perf_counter() - start
    row: dict[str, Any] = {
        "dtype": str(base.model.dtype), "seconds to load": seconds,
        "weights GiB": torch.cuda.memory_allocated() / 2**30, "products ms": product_ms(base.model),
    }  # fmt: skip
    prompts = make_prompts(6, 24)
    size = 4 << 30 if HAS_GPU else 16 << 20
    limits = EngineConfig(
        kv_cache_bytes=size, lora_cache_bytes=size, captured_num_adapters=(0, 1), captured_ranks=(RANK,)
    )
    start = time.perf_counter()
    with EngineWorker(base, limits) as worker:
        executor = worker.core.runner.executor
        row |= {
            "seconds to start": time.perf_counter() - start, "fused": getattr(executor, "num_fused_layers", 0),
            "graphs": len(executor.graphs),
        }  # fmt: skip
        sampling = SamplingParams(max_tokens=16, ignore_eos=True)
        pairs: list[list[Any]] = [[]] * len(prompts) + [[(chosen[0], 1.0)]] * len(prompts)
        running = [worker.submit(p, sampling, pair) for p, pair in zip(prompts * 2, pairs, strict=True)]
        got = [list(g.result(600).token_ids) for g in running]
        row["base tok/s"] = tokens_per_second(worker, [])
        row["32 adapters tok/s"] = tokens_per_second(worker, chosen)
        row["adapters resident"] = len(worker.resident_fingerprints)
        row |= {"peak GiB": torch.cuda.max_memory_allocated() / 2**30, "GiB on the device": gib_on_device()}
    answers = list(zip(prompts * 2, got, strict=True))
    row["base tokens"] = told([gaps(base.model, *each) for each in answers[: len(prompts)]])
    adapted = PeftModel.from_pretrained(base.model, adapters[0])
    row["PEFT's tokens"] = told([gaps(adapted, *each) for each in answers[len(prompts) :]])
    return row


def rounded(value: Any) -> Any:
    """The same with no more digits than are of interest."""
    if isinstance(value, list):
        return [round(each) for each in value]
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    """Measure each scheme and print a line of JSON for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8b")
    uncompiled = [scheme for scheme in SCHEMES if scheme not in COMPILED]
    parser.add_argument("--only", nargs="*", choices=SCHEMES, default=uncompiled)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no scheme is begun")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    root = Path(tempfile.mkdtemp())
    make_model(root / "model", arguments.size)
    adapters = make_adapters(root)
    chosen = [read_adapter(path) for path in adapters]
    print(f"model and adapters made in {time.perf_counter() - start:.1f} s", flush=True)
    name = torch.cuda.get_device_name() if HAS_GPU else "CPU"
    about = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__,
             "size": arguments.size}  # fmt: skip
    lines = []
    for scheme in arguments.only:
        try:
            is_due = time.perf_counter() - start <= arguments.seconds
            row = measure(scheme, root, adapters, chosen) if is_due else {"failed": "its turn did not come"}
        except Exception:  # noqa: BLE001 - told, and the others are measured
            row = {"failed": traceback.format_exc(limit=-3)}
        lines.append(json.dumps({"scheme": scheme, **about, **{key: rounded(value) for key, value in row.items()}}))
        print(lines[-1], flush=True)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
