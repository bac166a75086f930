"""`lora-retriever serve` as it is started: a process of its own, the demo's model, real clients, and its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import openai
import psutil
import pytest
from langchain_openai import ChatOpenAI

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.demo, pytest.mark.slow]

CABLE = "A cable measures 730.1 km. How long is it in m?"


@pytest.fixture(params=[[], ["--engine-process"]], ids=["one process", "two processes"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its address once it has said that it is ready."""
    command = [sys.executable, "-c", "from langchain_lora_retriever.cli import app; app()", "serve", "--port", "0"]
    command += request.param
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    try:
        said = ""
        while not (ready := re.search(r"is served at (http://\S+)/v1", said)):
            line = process.stderr.readline()
            assert line, f"the server ended: {said[-2000:]}"
            said += line
        yield process, ready[1]
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.timeout(280)
def test_a_server_from_its_start_to_its_end(server: tuple[subprocess.Popen[str], str]) -> None:
    """It answers OpenAI's client and LangChain's, whole and streamed; told to stop, it lets an open stream end."""
    process, address = server
    children = psutil.Process(process.pid).children(recursive=True)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
    messages = [{"role": "user", "content": CABLE}]
    answer = client.chat.completions.create(model="auto", messages=messages)
    assert answer.choices[0].message.content == "730100 m"
    assert answer.lora_retriever["adapters"][0]["name"] == "unit_length"
    llm = ChatOpenAI(base_url=f"{address}/v1", api_key="none", model="auto", timeout=120)
    assert "".join(chunk.content for chunk in llm.stream(CABLE)) == "730100 m"
    base = client.chat.completions.create(
        model="HuggingFaceTB/SmolLM2-135M-Instruct", messages=[{"role": "user", "content": "Tell me a long story."}],
        max_tokens=64, stream=True,
    )  # fmt: skip
    texts = [next(base).choices[0].delta.content]
    process.send_signal(signal.SIGINT)
    chunks = list(base)
    texts += [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert chunks[-1].choices[0].finish_reason in {"stop", "length"}
    assert len("".join(texts)) > 16
    assert process.wait(60) == 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")
