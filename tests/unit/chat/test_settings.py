"""The settings of the chat model: assigned, copied, pickled, configured per run."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.runnables import ConfigurableField

from langchain_lora_retriever import AdapterPool, ChatLoraRetriever
from langchain_lora_retriever.registry import vector_folder

SQL = "How many users are in the table?"


def test_no_two_configurations_share_a_cached_answer(llm: ChatLoraRetriever, engine, pool, write_adapter) -> None:
    """LangChain's response cache tells every setting apart, and a pool from itself before a change."""
    cached = llm.model_copy(update={"cache": InMemoryCache()})
    copies = [cached.model_copy(update=change) for change in ({}, {"top_k": 1}, {"composition": "fusion"},
              {"temperature": 0.1}, {"weights": "uniform"}, {"min_score": 0.2}, {"adapters": ["sql"]})]  # fmt: skip
    for copied in copies:
        copied.invoke(SQL)
    assert len(engine.requests) == len(copies)
    cached.invoke(SQL)
    assert len(engine.requests) == len(copies)
    cached.invoke(SQL, top_k=2)
    cached.bind(adapters=["dates"]).invoke(SQL)
    assert len(engine.requests) == len(copies) + 2
    pool.update("sql", write_adapter("sql", seed=1))
    cached.invoke(SQL)
    assert len(engine.requests) == len(copies) + 3


@pytest.mark.parametrize(
    ("name", "near"),
    [("topk", "top_k"), ("model", "base_model"), ("max_new_tokens", "max_tokens"), ("adapter", "adapters")],
)
def test_a_setting_that_there_is_not_is_named_with_the_nearest(llm: ChatLoraRetriever, name: str, near: str) -> None:
    """By the constructor and by a copy, before anything is loaded."""
    said = f"'{name}' is no setting of the chat model. Did you mean '{near}'\\? It has: adapters, "
    with pytest.raises(ValueError, match=said):
        ChatLoraRetriever(base_model="fake/base", **{name: 1})
    with pytest.raises(ValueError, match=said):
        llm.model_copy(update={name: 1})


def test_settings_can_be_configurable(llm: ChatLoraRetriever, engine) -> None:
    """Composition, top_k and adapters can be set per run through `configurable_fields`."""
    runnable = llm.configurable_fields(
        top_k=ConfigurableField(id="top_k"), adapters=ConfigurableField(id="adapters"),
        composition=ConfigurableField(id="composition"),
    )  # fmt: skip
    config = {"configurable": {"top_k": 1, "composition": "selection"}}
    metadata = runnable.invoke(SQL, config=config).response_metadata
    assert (metadata["composition"], len(metadata["adapters"])) == ("selection", 1)
    pinned = runnable.invoke(SQL, config={"configurable": {"adapters": ["dates"]}})
    assert pinned.response_metadata["adapters"][0]["name"] == "dates"


def test_a_configurable_folder_pool_is_not_embedded_again(
    llm: ChatLoraRetriever, loads_engine, pool, tmp_path, monkeypatch
):
    """LangChain makes a chat model anew for every configured run; they share the retriever of one folder's pool."""
    encoder = llm.retriever.encoder
    encoded: list[str] = []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda texts: (encoded.extend(texts), encode(texts))[1])
    pool.save(tmp_path / "pool")
    folder = ChatLoraRetriever(base_model="fake/base", pool=tmp_path / "pool", encoder=encoder)
    runnable = folder.configurable_fields(top_k=ConfigurableField(id="top_k"))
    for top_k in (1, 2, 3):
        message = runnable.invoke(SQL, config={"configurable": {"top_k": top_k}})
        assert len(message.response_metadata["adapters"]) == top_k
    samples = [sample.input for name in pool.names for sample in pool.state[name].samples]
    for sample in samples:
        assert sum(text.endswith(sample) for text in encoded) == 1, sample


def test_rate_limiter_is_asked(llm: ChatLoraRetriever) -> None:
    """A rate limiter is acquired for every call."""
    from langchain_core.rate_limiters import InMemoryRateLimiter

    class Counting(InMemoryRateLimiter):
        count = 0

        def acquire(self, *, blocking: bool = True) -> bool:
            Counting.count += 1
            return True

    limited = llm.model_copy(update={"rate_limiter": Counting()})
    limited.batch(["a", "b"])
    assert Counting.count == 2


def test_tracing_parameters(llm: ChatLoraRetriever) -> None:
    """Traces name the provider, the model and the sampling."""
    params = llm._get_ls_params(stop=["x"])
    assert params["ls_provider"] == "lora-retriever"
    assert params["ls_model_name"] == "fake/base"
    assert (params["ls_temperature"], params["ls_stop"]) == (0.0, ["x"])
    assert not llm.is_lc_serializable()


def test_a_deep_copy_has_its_own_lists(llm: ChatLoraRetriever) -> None:
    """What is changed in a copy's settings stays there; engine, pool and retriever are shared."""
    copied = copy.deepcopy(llm)
    copied.stop.append("x")
    assert llm.stop == []
    assert copied.retriever is llm.retriever
    assert copied.base_model is llm.base_model


def test_another_base_model_brings_its_own_name_and_profile(engine) -> None:
    """What was found out from the old one goes with it."""
    llm = ChatLoraRetriever(base_model="org/one")
    llm.base_model = "org/two"
    assert (llm.model_name, llm.profile["name"]) == ("org/two", "org/two")
    assert llm.model_copy(update={"base_model": "org/three"}).profile["name"] == "org/three"
    named = ChatLoraRetriever(base_model="org/one", model_name="mine", profile={"max_input_tokens": 7})
    named.base_model = "org/two"
    assert (named.model_name, named.profile) == ("mine", {"max_input_tokens": 7})


def test_what_is_no_encoder_is_refused(engine) -> None:
    """At construction, and by assignment."""
    with pytest.raises(ValueError, match="encoder=3 is not allowed"):
        ChatLoraRetriever(base_model="fake/base", encoder=3)
    llm = ChatLoraRetriever(engine=engine)
    encoder = llm.encoder
    with pytest.raises(ValueError, match="encoder=3 is not allowed"):
        llm.encoder = 3
    assert llm.encoder is encoder


def test_repr_is_short(llm: ChatLoraRetriever) -> None:
    """Printing a chat model prints neither weights nor pool."""
    assert len(repr(llm)) < 1500


def test_a_pool_may_be_a_folder(engine, pool: AdapterPool, tmp_path, llm: ChatLoraRetriever) -> None:
    """A path is read into a pool."""
    pool.save(tmp_path / "pool")
    loaded = ChatLoraRetriever(base_model="fake/base", pool=tmp_path / "pool", encoder=llm.retriever.encoder)
    assert isinstance(loaded.pool, AdapterPool)
    assert loaded.route(SQL, top_k=1).names == ("sql",)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "hot"), ("max_tokens", -5), ("composition", "bogus"), ("pool", 7), ("stop", "x")],
)
def test_assignment_is_checked(llm: ChatLoraRetriever, name: str, value: Any) -> None:
    """What a constructor would refuse is refused, by assignment and in a copy, and nothing changes."""
    before = getattr(llm, name)
    with pytest.raises(ValueError, match=name):
        setattr(llm, name, value)
    with pytest.raises(ValueError, match=name):
        llm.model_copy(update={name: value})
    assert getattr(llm, name) == before


def test_assigning_a_pool_routes_in_it(llm: ChatLoraRetriever, pool: AdapterPool, write_adapter) -> None:
    """Of the chat model, and of a copy alone."""
    other = AdapterPool()
    other.add("other", write_adapter("other"), samples=[SQL])
    llm = ChatLoraRetriever(base_model="fake/base", pool=pool, encoder=llm.retriever.encoder, top_k=1)
    copied = llm.model_copy(update={"pool": other, "top_k": 2})
    assert copied.route(SQL).names == ("other",)
    assert llm.route(SQL).names == ("sql",)
    llm.pool = other
    llm.temperature = 0.5
    assert llm.route(SQL).names == ("other",)
    assert (llm.top_k, llm.temperature, copied.temperature) == (1, 0.5, 0.0)


def test_assigning_a_pool_beside_a_retriever_is_refused(llm: ChatLoraRetriever) -> None:
    """The retriever has its own."""
    with pytest.raises(ValueError, match="The pool is not the retriever's"):
        llm.pool = AdapterPool()


def test_assigning_a_base_model_renames_the_model() -> None:
    """Unless the caller gave the name."""
    llm = ChatLoraRetriever(base_model="fake/base")
    llm.base_model = "fake/other"
    assert llm.model_name == "fake/other"


def test_a_deep_copy_shares_what_is_loaded(llm: ChatLoraRetriever) -> None:
    """Settings are its own; the pool and the retriever are not copied."""
    copied = copy.deepcopy({"chain": [llm]})["chain"][0]
    copied.temperature = 0.9
    assert llm.temperature == 0.0
    assert copied.retriever is llm.retriever
    assert copied.invoke(SQL).text == llm.invoke(SQL).text


def test_pickling_takes_names_and_folders(llm: ChatLoraRetriever, write_adapter, tmp_path) -> None:
    """What another process can load travels as its name; what it cannot is said in words."""
    write_adapter("sql")
    pool = AdapterPool(tmp_path / "pool", create=True)
    pool.add("sql", tmp_path / "checkpoints" / "sql", samples=[SQL])
    named = ChatLoraRetriever(base_model="fake/base", pool=pool, temperature=0.3)
    restored = pickle.loads(pickle.dumps(named))
    assert (restored.pool.names, restored.temperature, restored.base_model) == (pool.names, 0.3, "fake/base")
    with pytest.raises(pickle.PicklingError, match="its pool, encoder lives in this process's memory"):
        pickle.dumps(ChatLoraRetriever(base_model="fake/base", pool=AdapterPool(), encoder=llm.retriever.encoder))


@pytest.mark.parametrize("endless", [lambda: range(10**30), lambda: itertools.repeat("x"), itertools.count])
def test_a_setting_without_an_end_is_refused(llm: ChatLoraRetriever, endless: Any) -> None:
    """Before anybody goes through it, which would take all the memory there is."""
    for name in set(ChatLoraRetriever.model_fields) - {"cache", "rate_limiter"}:
        with pytest.raises(ValueError, match=rf"{name}|There is no|pass an|own encoder|pool"):
            llm.model_copy(update={name: endless()})


def test_what_is_shown_is_short(llm: ChatLoraRetriever) -> None:
    """Base model, pool and composition, and the adapters that are pinned."""
    assert (
        repr(llm)
        == "ChatLoraRetriever(base_model='fake/base', pool=AdapterPool(in memory, 3 adapters), composition='mixture')"
    )
    assert "adapters=['sql']" in repr(llm.model_copy(update={"adapters": ["sql"]}))
    assert str(llm) == repr(llm).removeprefix("ChatLoraRetriever(").removesuffix(")").replace(
        ", pool", " pool"
    ).replace(", composition", " composition")


def test_what_a_named_encoder_made_is_kept(pool, loads_engine, tmp_path, monkeypatch) -> None:
    """Adapters' embeddings lie in the user's cache, or where a variable says, or nowhere."""
    for folder in (tmp_path / "there", None):
        monkeypatch.setenv("LORA_RETRIEVER_CACHE", str(folder or ""))
        assert vector_folder() == folder
    monkeypatch.delenv("LORA_RETRIEVER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert vector_folder() == tmp_path / "langchain-lora-retriever"
    llm = ChatLoraRetriever(base_model="fake/base", pool=pool, encoder="an/encoder")
    assert llm.retriever._cache_dir == tmp_path / "langchain-lora-retriever"
