"""What the page asks a server for: the pool as a map, near-duplicates, refusals, the engine at work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from langchain_lora_retriever import AdapterPool, ChatLoraRetriever, LoraRetriever
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.evaluation.pool_map import make_map
from langchain_lora_retriever.serving.config import ServeConfig
from langchain_lora_retriever.serving.explorer import Explorer
from servers import running

if TYPE_CHECKING:
    from pathlib import Path

    from langchain_lora_retriever.testing import FakeEngine

SQL = "How many users are in the table?"


def test_the_pool_as_a_map(llm: ChatLoraRetriever) -> None:
    """Adapters with samples and places; a prompt lies nearest to what it finds; the server's own settings."""
    with running(llm) as address:
        pool = httpx.get(f"{address}/v1/pool").json()
        place = httpx.post(f"{address}/v1/pool/place", json={"input": "How do you say good morning in French?"}).json()
    assert [adapter["name"] for adapter in pool["adapters"]] == ["dates", "french", "sql"]
    assert pool["adapters"][2]["samples"][0] == "How many users signed up in May?"
    assert pool["settings"] == {"composition": "mixture", "top_k": 3, "max_tokens": 256, "temperature": 0.0}
    assert pool["model"] == "fake/base"
    assert 0 < pool["explained"] <= 1
    far = {a["name"]: np.linalg.norm(np.subtract(a["place"], place["place"])) for a in pool["adapters"]}
    assert min(far, key=far.get) == "french"


def test_the_engine_at_work(llm: ChatLoraRetriever) -> None:
    """Numbers a page can show: no NaN, which JSON does not have."""
    with running(llm) as address:
        llm.invoke(SQL)
        answer = httpx.get(f"{address}/v1/stats")
        stats = answer.json()
        llm.runtime.engine.close()
        assert httpx.get(f"{address}/v1/stats").json()["is_alive"] is False
    assert (stats["is_alive"], stats["max_num_seqs"], stats["num_finished"]) == (True, 8, 1)
    assert stats["time_to_first_token"] == {"p50_ms": None, "p95_ms": None, "p99_ms": None}
    assert "NaN" not in answer.text


@pytest.mark.filterwarnings("ignore:refused")
def test_why_adapters_are_rejected(engine: FakeEngine, write_adapter: Any, tmp_path: Path) -> None:
    """By name and with the reason, which does not say where the pool lies on the server's disk."""
    folder = tmp_path / "private" / "pool"
    pool = AdapterPool(folder, create=True)
    pool.add("sql", write_adapter("sql"), samples=[SQL])
    pool.add("wide", write_adapter("wide", size=16), samples=["x"])
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{")
    with running(ChatLoraRetriever(engine=engine, pool=folder, encoder=Letters())) as address:
        told = httpx.get(f"{address}/v1/pool").json()
    assert set(told["rejected"]) == {"broken", "wide"}
    assert "does not fit" in told["rejected"]["wide"]
    assert "private" not in str(told)
    assert {adapter["name"]: adapter["is_routed"] for adapter in told["adapters"]} == {"sql": True, "wide": False}


def test_near_duplicates(engine: FakeEngine, write_adapter: Any) -> None:
    """Two adapters of the same samples are; they are looked for once, and again when the pool changes."""
    pool, samples = AdapterPool(), [f"Count the users of city {i}." for i in range(6)]
    for name in ("count", "count-again"):
        pool.add(name, write_adapter(name), samples=samples)
    pool.add(
        "french", write_adapter("french"), samples=[f"Bonjour, mes amis, {word}!" for word in ("toi", "moi", "lui")]
    )
    explorer = Explorer(ChatLoraRetriever(engine=engine, retriever=LoraRetriever(pool, Letters())))
    (pair,) = explorer.twins()["twins"]
    assert (pair["first"], pair["second"]) == ("count", "count-again")
    assert explorer.twins()["twins"] is explorer.twins()["twins"]
    pool.remove("count-again")
    assert explorer.twins() == {"twins": []}


def test_large_pools_are_not_compared_by_a_server(llm: ChatLoraRetriever, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what does."""
    monkeypatch.setattr("langchain_lora_retriever.serving.explorer._MAX_COMPARED", 2)
    with pytest.raises(InvalidRequestError, match="pool inspect"):
        Explorer(llm).twins()


def test_an_empty_pool_is_shown(engine: FakeEngine) -> None:
    """With nothing on the map, and a place for every text."""
    explorer = Explorer(ChatLoraRetriever(engine=engine, retriever=LoraRetriever(AdapterPool(), Letters())))
    assert explorer.pool()["adapters"] == []
    assert explorer.place("x") == {"place": [0.0, 0.0]}


def test_the_page_is_self_contained(llm: ChatLoraRetriever, tmp_path: Path) -> None:
    """Static files that need no key and may load nothing from elsewhere; all else needs the key."""
    keys = tmp_path / "keys"
    keys.write_text("key-0123456789abcdef\n")
    with running(llm, ServeConfig(api_key_file=keys)) as address:
        for path, kind in (("/", "text/html"), ("/ui/page.js", "text/javascript"), ("/ui/page.css", "text/css")):
            answer = httpx.get(f"{address}{path}")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
            assert "unsafe" not in policy
            assert "http" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        for path in ("/v1/pool", "/v1/pool/twins", "/v1/stats", "/ui/nothing"):
            assert httpx.get(f"{address}{path}").status_code == 401
        assert httpx.post(f"{address}/v1/pool/place", json={"input": "x"}).status_code == 401


def test_a_map_of_any_number_of_adapters() -> None:
    """None, one, two, many: places are finite, and the same pool is drawn the same way round."""
    rng = np.random.default_rng(0)
    for num in (0, 1, 2, 3, 40):
        vectors = rng.normal(size=(num, 8)).astype(np.float32)
        mapped = make_map([str(i) for i in range(num)], vectors)
        assert mapped.places.shape == (num, 2)
        assert np.isfinite(mapped.places).all()
        assert np.allclose(mapped.place(vectors), mapped.places)
        assert np.allclose(make_map([str(i) for i in range(num)], vectors).directions, mapped.directions)
    with pytest.raises(InvalidRequestError, match="one row per name"):
        make_map(["a"], np.zeros((2, 8), np.float32))


class Letters:
    """Embeds a text by its letters."""

    name = "letters"
    dimension = 32

    def encode(self, texts: Any) -> Any:
        """Return letter counts `[n, 32]`."""
        rows = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for letter in text.lower():
                row[ord(letter) % self.dimension] += 1
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
