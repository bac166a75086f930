"""Tokens per second of vLLM with its own kernels and with ours: base, n adapters (one per request), mixtures of three.

    python tests/benchmarks/bench_vllm.py MODEL [--dummy] [--adapters 8 32] [--requests 64] [--prompt 128] [--answer 64]

MODEL is a folder with a `config.json` (with --dummy its weights are random). Each set-up runs in a process of its own
and is timed over the second of two runs. Adapters: rank 16, random, on every linear module. All arguments that follow
`--` are vLLM's, as JSON: `-- '{"dtype": "bfloat16", "gpu_memory_utilization": 0.9}'`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from langchain_lora_retriever.vllm.modules import module_shapes

RANK = 16
RUN = Path(__file__).parents[1] / "in_vllm" / "run_vllm.py"


def make_adapters(model: str, root: Path, count: int) -> list[str]:
    """Random PEFT checkpoints; their folders."""
    shapes = module_shapes(AutoConfig.from_pretrained(model))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": "all-linear", "bias": "none"}
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        tensors = {}
        for name, (width_in, width_out) in shapes.items():
            for part, shape in (("lora_A", (RANK, width_in)), ("lora_B", (width_out, RANK))):
                values = torch.randn(shape, generator=generator) * width_in**-0.5
                tensors[f"base_model.model.{name}.{part}.weight"] = values.bfloat16()
        folder = root / str(index)
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return [str(root / str(index)) for index in range(count)]


def measure(options: Any, folders: list[str], k: int, plugins: str) -> float:
    """Tokens per second of all requests together."""

    def members(i: int) -> list[Any]:
        chosen = {(i + j * 7) % len(folders) for j in range(k)} if folders else set()
        return [[str(index), folders[index], 1 / k] for index in sorted(chosen)]

    prompts = [[(31 * i + 7 * j) % 1000 + 10 for j in range(options.prompt)] for i in range(options.requests)]
    arguments = {
        "max_loras": max(1, len(folders)),
        "max_lora_rank": RANK,
        "max_model_len": options.prompt + options.answer,
    }
    job = {
        "model": options.model,
        "arguments": {**arguments, **({"load_format": "dummy"} if options.dummy else {}), **options.vllm},
        "requests": [[prompt, members(i)] for i, prompt in enumerate(prompts)],
        "max_tokens": options.answer,
        "num_runs": 2,
    }
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder, "answers.json")
        command = [sys.executable, str(RUN), json.dumps(job), str(answers)]
        subprocess.run(command, env={**os.environ, "VLLM_PLUGINS": plugins}, stdout=sys.stderr, check=True)
        seconds = json.loads(answers.read_text())["seconds"]
    return options.requests * options.answer / float(seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dummy", action="store_true")
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 32])
    for name, value in (("requests", 64), ("prompt", 128), ("answer", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("vllm", nargs="?", type=json.loads, default={})
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folders = make_adapters(options.model, Path(root), max(options.adapters))
        base = measure(options, [], 1, "none")
        print(f"{'adapters':>8} {'k':>2} {'kernels':>7} {'tokens/s':>9} {'of base':>8}")
        print(f"{0:>8} {'':>2} {'':>7} {base:>9.0f} {1:>8.2f}")
        for count in options.adapters:
            for k, plugins in ((1, "none"), (1, "lora_retriever"), (3, "lora_retriever")):
                rate = measure(options, folders[:count], k, plugins)
                kernels = "ours" if plugins == "lora_retriever" else "vLLM's"
                print(f"{count:>8} {k:>2} {kernels:>7} {rate:>9.0f} {rate / base:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
