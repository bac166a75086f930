"""Which adapters a call runs, around an engine without a model."""

from __future__ import annotations

import json
import math

import pytest

from langchain_lora_retriever import AdapterPool, ChatLoraRetriever, Composition, LoraRetriever
from langchain_lora_retriever.engine import Registration
from langchain_lora_retriever.errors import (
    InvalidAdapterError,
    InvalidRequestError,
    UnknownAdapterError,
)

SQL = "How many users are in the table?"
FRENCH = "Translate good morning into French."


def test_invoke_routes_and_reports(llm: ChatLoraRetriever, engine) -> None:
    """An answer says which model, which composition and which adapters gave it."""
    message = llm.invoke(SQL, top_k=2)
    assert message.content == "The answer."
    metadata = message.response_metadata
    assert metadata["model_name"] == "fake/base"
    assert metadata["model_provider"] == "lora-retriever"
    assert metadata["finish_reason"] == "stop"
    assert metadata["composition"] == "mixture"
    assert metadata["adapters"][0]["name"] == "sql"
    assert sum(a["weight"] for a in metadata["adapters"]) == pytest.approx(1)
    assert engine.requests[0].names[0] == "sql"
    assert message.usage_metadata == {
        "input_tokens": len(engine.requests[0].prompt_token_ids),
        "output_tokens": len("The answer."),
        "total_tokens": len(engine.requests[0].prompt_token_ids) + len("The answer."),
        "input_token_details": {"cache_read": 0},
    }
    assert message.usage_metadata["total_tokens"] == message.usage_metadata["input_tokens"] + 11


def test_route_is_what_invoke_runs(llm: ChatLoraRetriever, engine) -> None:
    """`route` decides as a call does and generates nothing."""
    composition = llm.route(FRENCH, composition="selection")
    assert isinstance(composition, Composition)
    assert composition.names == ("french",)
    assert not engine.requests
    assert llm.invoke(FRENCH, composition="selection").response_metadata["adapters"][0]["name"] == "french"


async def test_aroute_is_route(llm: ChatLoraRetriever) -> None:
    """The asynchronous decision is the same."""
    assert (await llm.aroute(FRENCH)).names == llm.route(FRENCH).names


def test_route_text_replaces_the_prompt(llm: ChatLoraRetriever) -> None:
    """A RAG prompt is routed on its question, not on its context."""
    bound = llm.bind(route_text=SQL, top_k=1)
    assert bound.invoke(FRENCH).response_metadata["adapters"][0]["name"] == "sql"


def test_pinned_adapters(llm: ChatLoraRetriever, engine) -> None:
    """Names take the place of retrieval, share their weight and have no score."""
    metadata = llm.bind(adapters=["dates", "french"]).invoke(SQL).response_metadata
    assert metadata["adapters"] == [
        {"name": "dates", "score": None, "weight": 0.5},
        {"name": "french", "score": None, "weight": 0.5},
    ]
    assert engine.requests[0].names == ["dates", "french"]


def test_no_adapters_is_the_base_model(llm: ChatLoraRetriever, engine) -> None:
    """`adapters=[]` runs the base model alone."""
    assert llm.invoke(SQL, adapters=[]).response_metadata["adapters"] == []
    assert engine.requests[0].names == []


def test_the_model_argument_names_an_adapter(llm: ChatLoraRetriever, engine) -> None:
    """As on OpenAI-style servers, `model` picks an adapter, or the base model by its own name."""
    assert llm.invoke(FRENCH, model="sql").response_metadata["model_name"] == "sql"
    llm.invoke(FRENCH, model="fake/base")
    assert [request.names for request in engine.requests] == [["sql"], []]


def test_excluded_adapters_are_not_retrieved(llm: ChatLoraRetriever) -> None:
    """The right adapter can be masked."""
    assert "sql" not in llm.route(SQL, exclude_adapters=["sql"]).names


@pytest.mark.parametrize("argument", ["adapters", "exclude_adapters"])
def test_an_unknown_adapter_raises(llm: ChatLoraRetriever, engine, argument: str) -> None:
    """A name that is not in the pool is never silently served by the base model."""
    with pytest.raises(UnknownAdapterError, match="sqll"):
        llm.invoke(SQL, **{argument: ["sqll"]})
    assert not engine.requests


def test_min_score_leaves_the_base_model_alone(llm: ChatLoraRetriever) -> None:
    """Under the minimum similarity nothing is composed."""
    assert llm.route(SQL, min_score=0.999).names == ()


def test_an_automatic_min_score_may_be_asked_for_by_a_call(llm: ChatLoraRetriever) -> None:
    """It is that of a retriever with such a setting; a chat model may have it too."""
    alike = [f"Write the date {day} May in ISO form please now" for day in range(1, 13)]
    llm.pool.update("dates", samples=alike)
    automatic = LoraRetriever(llm.pool, llm.retriever.encoder, min_score="auto")
    for text in ("Write the date 30 May in ISO form please now", "now please in May", SQL):
        expected = tuple(adapter.name for adapter in automatic.retrieve(text))
        assert llm.route(text, min_score="auto", weights="uniform").names == expected
    assert "dates" in llm.route("now please in May", weights="uniform").names
    assert "dates" not in llm.route("now please in May", min_score="auto", weights="uniform").names
    assert llm.retriever.floor("dates") > llm.retriever.floor("sql") == -math.inf
    with pytest.raises(InvalidRequestError, match=r"min_score='low' is not allowed: pass a cosine.*'auto', or None"):
        llm.route(SQL, min_score="low")


def test_top_k_larger_than_the_pool(llm: ChatLoraRetriever) -> None:
    """All there are is the most there can be."""
    assert len(llm.route(SQL, top_k=8).names) == 3


def test_selection_of_two_pinned_adapters_is_refused(llm: ChatLoraRetriever) -> None:
    """Selection runs one adapter; which of two is not guessed."""
    with pytest.raises(InvalidRequestError, match="runs one adapter"):
        llm.invoke(SQL, adapters=["sql", "dates"], composition="selection")


def test_an_empty_pool_is_the_base_model(engine) -> None:
    """Before an adapter is added the base model answers alone."""
    llm = ChatLoraRetriever(engine=engine)
    assert llm.invoke("hi").response_metadata["adapters"] == []


def test_an_adapter_that_does_not_fit_is_rejected(llm: ChatLoraRetriever, pool: AdapterPool, write_adapter) -> None:
    """Adapters of another base model are left out by name when the engine is known; later ones when they come."""
    pool.add("wide", write_adapter("wide", size=16), samples=[SQL])
    assert "wide" not in [a["name"] for a in llm.invoke(SQL).response_metadata["adapters"]]
    assert "wide" in llm.rejected
    assert "wide" in pool
    with pytest.raises(InvalidAdapterError, match="wide"):
        llm.invoke(SQL, adapters=["wide"])
    pool.update("sql", write_adapter("sql", size=16))
    assert "sql" not in [a["name"] for a in llm.invoke(SQL).response_metadata["adapters"]]


def test_a_rejected_adapter_named_a_hundred_times_gathers_nothing(
    llm: ChatLoraRetriever, pool: AdapterPool, write_adapter
) -> None:
    """Every call that names a refused adapter gets an error of its own, without the frames of those before."""
    pool.add("wide", write_adapter("wide", size=16), samples=[SQL])
    llm.invoke(SQL)
    depths = set()
    for _ in range(100):
        with pytest.raises(InvalidAdapterError, match="wide") as info:
            llm.invoke("hi", adapters=["wide"])
        depths.add(len(info.traceback))
    assert len(depths) == 1


def test_an_adapter_that_may_not_be_meant_for_the_model_is_told_once(
    llm: ChatLoraRetriever, engine, pool: AdapterPool, write_adapter, caplog, recwarn
) -> None:
    """It is served, as its tensors fit; a warning and the log name it, and what it was trained for."""
    folder = write_adapter("foreign")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/another"}))
    missing = {"foreign": ("v_proj",)}
    engine.register = lambda adapters: [Registration(None, missing.get(adapter.name, ())) for adapter in adapters]
    pool.add("foreign", folder, samples=[SQL])
    assert llm.invoke(SQL, adapters=["foreign"]).response_metadata["adapters"][0]["name"] == "foreign"
    said = [record.message for record in caplog.records]
    assert any("'foreign'" in text and "lacks 1 of the 2 modules" in text for text in said)
    assert any("trained for the base model 'org/another'; the one here is 'fake/base'" in text for text in said)
    assert sum("'foreign'" in str(warning.message) for warning in recwarn.list) == 2
    llm.invoke(SQL, adapters=["foreign"])
    assert [record.message for record in caplog.records] == said


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_one_other_base_model_are_told_in_one_warning(
    llm: ChatLoraRetriever, engine, pool: AdapterPool, write_adapter, caplog
) -> None:
    """Twelve that were trained from one folder are no twelve paragraphs."""
    for index in range(12):
        folder = write_adapter(f"a{index:02}")
        config = json.loads((folder / "adapter_config.json").read_text())
        made_for = "org/one" if index < 10 else "org/other"
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": made_for}))
        pool.add(folder.name, folder, samples=[SQL])
    llm.invoke(SQL)
    said = [record.message for record in caplog.records if "trained for" in record.message]
    assert len(said) == 2
    assert said[0].startswith(
        "10 adapters ('a00', 'a01', 'a02', 'a03', 'a04', 'a05', 'a06', 'a07', ...) were trained for"
    )
    assert "'a10', 'a11'" in said[1]
