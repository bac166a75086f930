"""The public face as users write it. Nothing here runs: mypy reads it, strictly (`tests/unit/test_typing.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, assert_type

from langchain_lora_retriever import (
    Adapter,
    AdapterPool,
    ChatLoraRetriever,
    Composition,
    EngineClient,
    EngineConfig,
    LoraRetriever,
    RetrievedAdapter,
    Runtime,
    SamplingParams,
    close_engines,
)
from langchain_lora_retriever.engine import EngineWorker, Grammar, load_base_model
from langchain_lora_retriever.testing import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from langchain_lora_retriever.errors import AdapterError

# What the constructor takes.
ChatLoraRetriever(base_model="org/model", pool="folder", encoder="org/encoder")
ChatLoraRetriever(base_model=Path("model"), pool=Path("folder"), engine_config={"max_num_seqs": 8}, top_k=2)
ChatLoraRetriever(base_model="org/model", pool=None, retriever=None, engine_config=EngineConfig(max_num_seqs=8))
llm = ChatLoraRetriever(engine=FakeEngine(["yes"]), retriever=LoraRetriever(AdapterPool()), temperature=0.5)

# What is there afterwards: one type each.
assert_type(llm.pool, AdapterPool)
assert_type(llm.retriever, LoraRetriever)
assert_type(llm.engine_config, EngineConfig)
assert_type(llm.instruction, str)
assert_type(llm.encoder.dimension, int)
assert_type(llm.runtime, Runtime)
assert_type(llm.runtime.engine, EngineClient)
assert_type(llm.route("hello"), Composition)
names: tuple[str, ...] = llm.pool.names
rejected: Mapping[str, AdapterError] = llm.rejected
found: list[RetrievedAdapter] = llm.retriever.retrieve("hello", top_k=2)
text: str = str(llm.invoke("hello").text)


def serve(client: EngineClient, adapter: Adapter) -> str:
    """Anything that keeps the protocol will do."""
    first = client.register([adapter])[0]
    if first.error is not None:
        raise first.error
    generation = client.submit([1, 2], SamplingParams(max_tokens=4), [(adapter, 0.5)], grammar=Grammar('start: "a"\n'))
    return "".join(delta.text for delta in generation) or generation.result().text


clients: list[EngineClient] = [FakeEngine(), EngineWorker(load_base_model("org/model"))]
close_engines()
