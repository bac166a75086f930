"""vLLM's own `LoRARequest`s on our kernels: with one process and with two tensor-parallel ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment that has it")

from in_vllm.tiny import RANKS, tiny_model, vllm_arguments
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.types import SamplingParams
from makers import make_checkpoint

pytestmark = pytest.mark.timeout(300)

PROMPTS = [[5 + (7 * i + j * j) % 300 for j in range(length)] for i, length in enumerate((4, 19, 40))]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARTIAL = ["q_proj", "v_proj", "up_proj"]  # slices of joined layers are missing


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: Any) -> dict[str, Path]:
    """Adapters as PEFT saves them."""
    root, model = tmp_path_factory.mktemp("adapters"), tiny_model()
    return {
        name: make_checkpoint(
            root / name, model=model, seed=seed, std=0.3, r=r, target_modules=PARTIAL if name == "b" else TARGETS
        )
        for seed, (name, r) in enumerate(zip("abcd", RANKS, strict=False))
    }


def in_vllm(model: Path, folders: dict[str, Path], requests: Any, plugins: str | None = None, **more: Any) -> Any:
    """What vLLM answers in a process of its own."""
    arguments = vllm_arguments(enable_lora=True, max_loras=3, max_lora_rank=8, **more)
    asked = [[prompt, [[name, str(folders[name]), weight] for name, weight in members]] for prompt, members in requests]
    job = {"model": str(model), "arguments": arguments, "requests": asked, "max_tokens": 16}
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process less to start
    environment = {**os.environ, **alone, **({} if plugins is None else {"VLLM_PLUGINS": plugins})}
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder, "answers.json")
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("run_vllm.py")), json.dumps(job), str(answers)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        return json.loads(answers.read_text())["token_ids"]


def in_ours(engine: Any, folders: dict[str, Path], requests: Any) -> Any:
    """What our engine answers."""
    sampling = SamplingParams(max_tokens=16, ignore_eos=True)
    pool = {name: read_adapter(folder, name=name) for name, folder in folders.items()}
    running = [engine.submit(prompt, sampling, [(pool[n], w) for n, w in members]) for prompt, members in requests]
    return [list(generation.result(120).token_ids) for generation in running]


def test_plain_adapters_answer_as_on_vllms_kernels(model_folder: Path, checkpoints: dict[str, Path], ours: Any) -> None:
    """Four adapters of different ranks over three slots, beside the base model; in vLLM alone without the base.

    vLLM 0.32's own kernels for a CPU add the last slot's adapter to requests of the base model in the same batch.
    """
    requests = [(prompt, members) for prompt in PROMPTS for members in ((), *([(name, 1.0)] for name in checkpoints))]
    answers = in_vllm(model_folder, checkpoints, requests)
    assert answers == in_ours(ours, checkpoints, requests)
    assert len({tuple(answer) for answer in answers[:5]}) == 5
    with_adapters = [i for i, (_, members) in enumerate(requests) if members]
    without_plugin = in_vllm(model_folder, checkpoints, [requests[i] for i in with_adapters], plugins="none")
    assert [answers[i] for i in with_adapters] == without_plugin


def test_two_ranks_answer_as_one(model_folder: Path, checkpoints: dict[str, Path], ours: Any) -> None:
    """Plain adapters and mixtures over column- and row-parallel layers, two processes, each its part of A or B."""
    mixtures = ((), [("a", 1.0)], [("a", 0.7), ("b", 0.3)], [("c", 0.5), ("a", 0.3), ("b", 0.2)])
    requests = [(prompt, members) for prompt in PROMPTS for members in mixtures]
    answers = in_vllm(model_folder, checkpoints, requests, tensor_parallel_size=2)
    assert answers == in_ours(ours, checkpoints, requests)
