"""What the page shows of a server beside answers: the pool as a map, near-duplicates, refusals, the engine at work."""

from __future__ import annotations

import math
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.evaluation.inspection import find_twins
from langchain_lora_retriever.evaluation.pool_map import PoolMap, make_map
from langchain_lora_retriever.serving.errors import read_body
from langchain_lora_retriever.support.threads import run_in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.responses import Response

    from langchain_lora_retriever.chat.model import ChatLoraRetriever
    from langchain_lora_retriever.runtime import Runtime

__all__ = ["Explorer", "explorer_paths"]

_NUM_SAMPLES = 3
"""Samples of an adapter that are shown."""
_MAX_SAMPLE = 300
"""Characters of one."""
_MAX_COMPARED = 200
"""Adapters up to which near-duplicates are looked for: every sample is embedded, and every pair compared."""

T = TypeVar("T")


class _PlaceRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    input: str


def explorer_paths(llm: ChatLoraRetriever) -> list[tuple[str, list[str], Callable[[Request], Awaitable[Response]]]]:
    """The explorer's paths, their methods, and what answers them. None of them changes anything."""
    explorer = Explorer(llm)

    async def pool(_: Request) -> Response:
        return JSONResponse(await run_in_thread(explorer.pool))

    async def twins(_: Request) -> Response:
        return JSONResponse(await run_in_thread(explorer.twins))

    async def place(request: Request) -> Response:
        asked = await read_body(request, _PlaceRequest)
        return JSONResponse(await run_in_thread(lambda: explorer.place(asked.input)))

    async def stats(_: Request) -> Response:
        return JSONResponse(explorer.stats())

    return [
        ("/v1/pool", ["GET"], pool),
        ("/v1/pool/twins", ["GET"], twins),
        ("/v1/pool/place", ["POST"], place),
        ("/v1/stats", ["GET"], stats),
    ]


class Explorer:
    """Answers the page's questions about a chat model. Any thread may ask; nothing is changed by it.

    What is worked out of the pool is kept until the pool changes.

    Args:
        llm: The chat model.
    """

    def __init__(self, llm: ChatLoraRetriever) -> None:
        self._llm = llm
        self._runtime = llm.runtime
        self._map = _OfPool(llm.runtime, self._make_map)
        self._twins = _OfPool(llm.runtime, self._find_twins)

    def pool(self) -> dict[str, Any]:
        """The adapters with their places on the map, those that cannot be used and why, and the settings of a call."""
        state, rejected, mapped = self._runtime.pool.state, self._runtime.rejected, self._map.get()
        places = dict(zip(mapped.names, mapped.places.tolist(), strict=True))
        llm, encoder = self._llm, self._runtime.retriever.encoder.name
        return {
            "model": llm.model_name,
            "encoder": "" if Path(encoder).is_absolute() else encoder,
            "explained": mapped.explained,
            "settings": {
                "composition": llm.composition,
                "top_k": llm.top_k,
                "max_tokens": llm.max_tokens,
                "temperature": llm.temperature,
            },
            "adapters": [
                {
                    "name": name,
                    "rank": entry.adapter.rank,
                    "num_samples": len(entry.samples),
                    "samples": [sample.input[:_MAX_SAMPLE] for sample in entry.samples[:_NUM_SAMPLES]],
                    "place": places.get(name),
                    "is_routed": entry.is_described and name not in rejected,
                }
                for name, entry in ((name, state.entries[name]) for name in state.names)
            ],
            "rejected": {name: self._without_path(str(error)) for name, error in sorted(rejected.items())},
        }

    def place(self, text: str) -> dict[str, Any]:
        """Where a text lies on the map.

        Raises:
            InvalidRequestError: If it is no Unicode text.
            EncoderError: If the encoder fails over it.
        """
        return {"place": self._map.get().place(self._runtime.retriever.embed([text]))[0].tolist()}

    def twins(self) -> dict[str, Any]:
        """Pairs of adapters that the encoder cannot tell apart by their samples.

        Raises:
            InvalidRequestError: If the pool is too large to compare every pair while others wait.
        """
        num_adapters = len(self._runtime.pool)
        if num_adapters > _MAX_COMPARED:
            raise InvalidRequestError(
                f"Near-duplicates are looked for here in pools of at most {_MAX_COMPARED} adapters; this one has "
                f"{num_adapters}: run `lora-retriever pool inspect`."
            )
        return {"twins": self._twins.get()}

    def stats(self) -> dict[str, Any]:
        """What the engine runs, waits for and holds; latencies in milliseconds, null before there is one."""
        engine = self._runtime.running_engine
        if engine is None:
            return {"is_alive": False}
        stats, info = engine.stats()._asdict(), engine.info
        latencies = {name: stats.pop(name)._asdict() for name in ("time_to_first_token", "inter_token")}
        return {
            "is_alive": engine.is_alive,
            "device": info.device,
            "max_num_seqs": info.max_num_seqs,
            "max_model_len": info.max_model_len,
            **stats,
            **{
                name: {key: value if math.isfinite(value) else None for key, value in percentiles.items()}
                for name, percentiles in latencies.items()
            },
        }

    def _make_map(self) -> PoolMap:
        retriever = self._runtime.retriever
        vectors = retriever.adapter_vectors()
        rows = np.stack([*vectors.values()]) if vectors else np.zeros((0, retriever.encoder.dimension))
        return make_map(list(vectors), rows)

    def _find_twins(self) -> list[dict[str, Any]]:
        return [asdict(pair) for pair in find_twins(self._runtime.retriever)]

    def _without_path(self, text: str) -> str:
        """Leave out where the pool lies on the server's disk."""
        path = self._runtime.pool.path
        return text if path is None else text.replace(f"{path}/", "").replace(str(path), "the pool")


class _OfPool(Generic[T]):
    """Something that is worked out of the pool, by one thread, and kept until the pool changes."""

    def __init__(self, runtime: Runtime, work: Callable[[], T]) -> None:
        self._runtime = runtime
        self._work = work
        self._lock = threading.Lock()
        self._kept: tuple[int, T] | None = None

    def get(self) -> T:
        """It, for the pool as it is."""
        with self._lock:
            version = self._runtime.pool.version
            if self._kept is None or self._kept[0] != version:
                self._kept = version, self._work()
            return self._kept[1]
