"""From text to adapters, following a pool that changes."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import math
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from langchain_lora_retriever.errors import (
    EncoderError,
    InvalidAdapterError,
    InvalidRequestError,
    InvalidSamplesError,
    LoraRetrieverError,
    UnknownAdapterError,
)
from langchain_lora_retriever.pool.pool import AdapterPool
from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder
from langchain_lora_retriever.retrieval.retriever import DEFAULT_INSTRUCTION, LoraRetriever
from langchain_lora_retriever.retrieval.vector_cache import AdapterVectors, Mean, TextVectors
from makers import until

TOPICS = {
    "sql": ["select users from the table", "count rows in the table", "join the table of users"],
    "dates": ["write the date of tomorrow", "the date in iso format", "which date was monday"],
    "units": ["convert miles into km", "convert pounds into kg", "how many feet into metres"],
}


class WordEncoder:
    """Sums a fixed random vector per word; counts its calls and can be slow."""

    name = "words"

    def __init__(self, dimension=64, delay=0.0):
        self.dimension = dimension
        self.delay = delay
        self.batches = []

    def encode(self, texts):
        """Embed texts, not scaled: the retriever does that."""
        self.batches.append(list(texts))
        time.sleep(self.delay)
        rows = [
            sum(
                np.random.default_rng(int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)).normal(
                    size=self.dimension
                )
                for word in text.removeprefix(DEFAULT_INSTRUCTION).split()
            )
            for text in texts
        ]
        return np.array(rows, dtype=np.float32)

    @property
    def num_texts(self):
        """How many texts were encoded in all."""
        return sum(map(len, self.batches))


class UnitEncoder(WordEncoder):
    """The same, scaled to length 1, as a `HybridEncoder` expects."""

    def encode(self, texts):
        """Embed texts."""
        rows = super().encode(texts)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_checkpoint):
    """Weights do not matter here: one checkpoint for all."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "any")


@pytest.fixture
def pool(checkpoint):
    """Three adapters in memory."""
    pool = AdapterPool()
    for name, samples in TOPICS.items():
        pool.add(name, checkpoint, samples=samples)
    return pool


def test_adapters_without_samples_are_found_once_they_are_described(pool, checkpoint, retriever):
    """Until then every prompt finds the others."""
    pool.add("bare", checkpoint)
    assert {found.name for found in retriever.retrieve("the date", top_k=9)} == set(TOPICS)
    assert retriever.retrieve("the date", exclude=["bare", *TOPICS]) == []
    pool.update("bare", samples=["translate into french"])
    assert retriever.retrieve("translate into french", top_k=1)[0].name == "bare"


def test_a_pool_without_any_samples_finds_nothing(checkpoint):
    """The base model is left to answer."""
    pool = AdapterPool()
    pool.add("bare", checkpoint)
    assert LoraRetriever(pool, WordEncoder()).retrieve("the date") == []


@pytest.fixture
def retriever(pool):
    """A retriever over it."""
    return LoraRetriever(pool, WordEncoder())


def test_finds_the_adapter_trained_on_such_texts(retriever):
    """The nearest adapter comes first, scores fall, and stay within the cosine's range."""
    for name, text in [("sql", "rows of the table"), ("dates", "the date of monday"), ("units", "convert feet")]:
        found = retriever.retrieve(text)
        assert found[0].name == name
        assert len(found) == 3
        assert 1 >= found[0].score >= found[1].score >= found[2].score >= -1


def test_score_is_the_cosine_to_the_mean_of_samples(retriever):
    """The score is the definition's, with the instruction before samples and queries."""
    encoder = WordEncoder()

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    mean = unit(unit(encoder.encode(TOPICS["sql"])).mean(axis=0))
    expected = float(mean @ unit(encoder.encode(["table of dates"]))[0])
    scores = {adapter.name: adapter.score for adapter in retriever.retrieve("table of dates")}
    assert scores["sql"] == pytest.approx(expected, abs=2e-6)
    assert all(text.startswith(DEFAULT_INSTRUCTION) for batch in retriever.encoder.batches for text in batch)


def test_batch_equals_single(retriever):
    """Many texts at once find what each finds alone."""
    texts = [samples[0] for samples in TOPICS.values()]
    assert retriever.retrieve_batch(texts, top_k=2) == [retriever.retrieve(text, top_k=2) for text in texts]
    assert retriever.retrieve_batch([]) == []


def test_exclusion(retriever):
    """Names to leave out are left out, for all texts or per text, and all may be."""
    texts = ["rows of the table", "convert miles"]
    found = retriever.retrieve_batch(texts, top_k=1, exclude=["sql"])
    assert [row[0].name for row in found][1] == "units"
    assert found[0][0].name != "sql"
    per_text = retriever.retrieve_batch(texts, top_k=1, exclude=[(), {"units"}])
    assert per_text[0][0].name == "sql"
    assert per_text[1][0].name != "units"
    assert retriever.retrieve("table", exclude=list(TOPICS)) == []


def test_unknown_names_in_exclude(retriever):
    """A name that is not in the pool is refused with near names."""
    with pytest.raises(UnknownAdapterError, match="'sql'"):
        retriever.retrieve("a", exclude=["sqll"])


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True, None])
def test_bad_top_k(retriever, top_k):
    """Only integers of 1 or more are legal."""
    with pytest.raises(InvalidRequestError, match="top_k"):
        retriever.retrieve("a", top_k=top_k)


def test_top_k_beyond_the_pool(retriever):
    """More than the pool has is all it has."""
    assert len(retriever.retrieve("the table", top_k=1000)) == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.retrieve(7),
        lambda r: r.retrieve_batch("one string"),
        lambda r: r.retrieve("a", exclude="sql"),
        lambda r: r.retrieve_batch(["a"], exclude=[("sql",), ()]),
        lambda r: r.retrieve_batch(["a", "b"], exclude=["sql", ("sql",)]),
        lambda r: r.retrieve_batch(7),
        lambda r: r.retrieve_batch(None),
        lambda r: r.retrieve_batch(["a", None]),
        lambda r: r.retrieve("a", exclude=7),
        lambda r: r.retrieve("a", exclude=[7]),
        lambda r: r.retrieve("a", exclude=[[["sql"]]]),
        lambda r: r.retrieve("half a pair: \ud83d"),
        lambda r: r.embed(["a", "\udc00"]),
        lambda r: asyncio.run(r.aretrieve("\ud83d")),
    ],
)
def test_bad_arguments(retriever, call):
    """Texts and exclusions of the wrong kind are refused."""
    with pytest.raises(InvalidRequestError):
        call(retriever)


@pytest.mark.parametrize(
    "arguments",
    [
        {"min_score": 1.5},
        {"min_score": float("nan")},
        {"min_score": "0.5"},
        {"cache_size": -1},
        {"cache_size": 1.5},
        {"answer_weight": -1},
        {"answer_weight": float("inf")},
        {"answer_weight": 10**400},
        {"answer_weight": "1"},
        {"instruction": None},
        {"instruction": "\ud800"},
        {"encoder": object()},
        {"encoder": 7},
        {"cache_dir": 7},
        {"cache_dir": "a\0b"},
        {"cache_dir": "\ud800"},
    ],
)
def test_bad_settings(pool, arguments):
    """Settings out of range are refused."""
    with pytest.raises(InvalidRequestError):
        LoraRetriever(pool, **{"encoder": WordEncoder(), **arguments})


@pytest.mark.parametrize("pool", ["my-pool", Path("my-pool"), None])
def test_what_is_no_pool_is_refused(pool):
    """A folder's name in place of the pool is told at once, with what to write."""
    with pytest.raises(InvalidRequestError, match=r"pool=.*AdapterPool\(folder\)"):
        LoraRetriever(pool, WordEncoder())


def test_min_score(pool):
    """Adapters below the score are dropped; with none left the list is empty."""
    all_of_them = LoraRetriever(pool, WordEncoder()).retrieve("rows of the table")
    bar = all_of_them[1].score
    assert LoraRetriever(pool, WordEncoder(), min_score=bar).retrieve("rows of the table") == all_of_them[:2]
    assert LoraRetriever(pool, WordEncoder(), min_score=1).retrieve("rows of the table") == []


def test_an_automatic_min_score_is_each_adapters_own(pool, checkpoint, tmp_path):
    """An adapter of prompts that are all alike is near to its like alone; one of few samples or a vector to all."""
    alike = [f"Write the date {day} May in ISO form please now" for day in range(1, 13)]
    apart = [f"{word} a thing" for word in ("sing", "paint", "cook", "plant", "mend", "find", "count", "sell")]
    pool.add("alike", checkpoint, samples=alike)
    pool.add("apart", checkpoint, samples=apart)
    plain = LoraRetriever(pool, WordEncoder(), cache_dir=tmp_path)
    for retriever in (
        LoraRetriever(pool, WordEncoder(), min_score="auto", cache_dir=tmp_path),
        LoraRetriever(pool, WordEncoder(), min_score="auto", cache_dir=tmp_path),
    ):
        assert retriever.retrieve("Write the date 30 May in ISO form please now")[0].name == "alike"
        for text in ("in ISO please", "a thing to burn"):
            found = {adapter.name for adapter in plain.retrieve(text, top_k=9)}
            near = {adapter.name for adapter in retriever.retrieve(text, top_k=9)}
            assert "alike" in found - near
            assert {"sql", "dates", "cooking"} & near == {"sql", "dates", "cooking"} & found
        assert "apart" in {adapter.name for adapter in retriever.retrieve("a thing to burn", top_k=9)}


def add_card(pool, checkpoint):
    """Add an adapter that a model card alone describes."""
    (checkpoint / "README.md").write_text("# Bread\n\nIt bakes bread for people.\n")
    try:
        pool.add("card", checkpoint)
    finally:
        (checkpoint / "README.md").unlink()


@pytest.mark.parametrize("wrap", [lambda encoder: encoder, HybridEncoder], ids=["plain", "words"])
def test_a_model_card_counts_by_meaning_alone(pool, checkpoint, wrap):
    """Neither the instruction nor its words are part of it; it stands beside adapters of samples."""
    add_card(pool, checkpoint)
    encoder = UnitEncoder()
    retriever = LoraRetriever(pool, wrap(encoder))
    found = {adapter.name: adapter.score for adapter in retriever.retrieve("bakes bread", top_k=9)}
    mean = encoder.encode(["Bread", "It bakes bread for people."]).mean(axis=0)
    query = encoder.encode([retriever.instruction + "bakes bread"])[0]
    assert found["card"] == pytest.approx(float(query @ mean / np.linalg.norm(mean)), abs=1e-5)


def test_a_model_card_that_cannot_be_embedded_costs_its_adapter_alone(pool, checkpoint, monkeypatch):
    """It is named; others are found."""
    add_card(pool, checkpoint)
    encoder = WordEncoder()
    encode = encoder.encode
    for made in (lambda texts: np.full((len(texts), 64), np.nan), lambda texts: np.ones((1, 64))):
        monkeypatch.setattr(encoder, "encode", lambda texts, made=made: (made if "Bread" in texts else encode)(texts))
        retriever = LoraRetriever(pool, encoder)
        with pytest.warns(UserWarning, match="'card': its model card cannot be embedded"):
            assert len(retriever.retrieve("bakes bread", top_k=9)) == 3
        assert list(retriever.rejected) == ["card"]


def test_a_model_card_is_embedded_while_nothing_else_is(pool, checkpoint, monkeypatch):
    """An encoder is asked by one thread at a time, whatever for."""
    add_card(pool, checkpoint)
    encoder = WordEncoder(delay=0.01)
    encode, is_busy, overlaps = encoder.encode, threading.Lock(), []

    def watched(texts):
        overlaps.append(not is_busy.acquire(blocking=False))
        try:
            return encode(texts)
        finally:
            if not overlaps[-1]:
                is_busy.release()

    monkeypatch.setattr(encoder, "encode", watched)
    retriever = LoraRetriever(pool, encoder)
    thread = threading.Thread(target=lambda: [retriever.embed([f"text {i}"]) for i in range(10)])
    thread.start()
    retriever.refresh()
    thread.join()
    assert not any(overlaps)
    assert len(retriever.retrieve("bakes bread", top_k=9)) == 4


@pytest.mark.parametrize("has_words", [False, True])
@pytest.mark.parametrize("names", [("v1", "v2"), ("v2", "v1")])
def test_equal_scores_are_ordered_by_name_whatever_else_is_asked(checkpoint, names, has_words):
    """Not by who came first, who is left out, or what others in the batch leave out."""
    pool = AdapterPool()
    for name in ("other", *names):
        pool.add(
            name, checkpoint, samples=["zebra stripes"] if name == "other" else ["count the orders", "count users"]
        )
    encoder = HybridEncoder(WordEncoder()) if has_words else WordEncoder()
    retriever = LoraRetriever(pool, encoder)
    query = "count the users"
    found = [
        retriever.retrieve(query, top_k=1), retriever.retrieve(query, top_k=1, exclude=["other"]),
        *retriever.retrieve_batch([query, query], top_k=1, exclude=[[], ["other"]]),
    ]  # fmt: skip
    assert [row[0].name for row in found] == ["v1"] * 4


def test_an_adapter_that_was_given_an_embedding_has_no_floor_of_its_samples(pool):
    """What its samples' scores said of "auto" is gone with them, as for a retriever that never saw them."""
    encoder = WordEncoder()
    retriever = LoraRetriever(pool, encoder, min_score="auto")
    name = next(iter(TOPICS))
    assert retriever.retrieve(TOPICS[name][0], top_k=1)[0].name == name
    pool.update(name, embedding=encoder.encode(["poem about the sea"])[0], encoder=encoder.name)
    fresh = LoraRetriever(pool, encoder, min_score="auto")
    assert retriever.retrieve("poem of stars") == fresh.retrieve("poem of stars")
    assert retriever.floor(name) == fresh.floor(name) == -math.inf


def test_an_adapter_refused_for_a_passing_fault_is_found_after_an_update(checkpoint, monkeypatch):
    """Though what it is found by is the same as before."""
    encoder = WordEncoder()
    encode = encoder.encode

    def fail(texts):
        if any("users" in text for text in texts):
            raise MemoryError("out of memory")
        return encode(texts)

    pool = AdapterPool()
    pool.add("a", checkpoint, samples=["how many users"])
    pool.add("b", checkpoint, samples=["poems"])
    retriever = LoraRetriever(pool, encoder)
    monkeypatch.setattr(encoder, "encode", fail)
    retriever.refresh()
    assert set(retriever.rejected) == {"a"}
    monkeypatch.setattr(encoder, "encode", encode)
    pool.update("a")
    assert retriever.retrieve("how many users", top_k=1)[0].name == "a"
    assert not retriever.rejected


def test_an_empty_pool_finds_nothing():
    """Before the first add nothing is found."""
    assert LoraRetriever(AdapterPool(), WordEncoder()).retrieve("a") == []


def test_follows_the_pool(pool, checkpoint, retriever):
    """Added, updated and removed adapters are found, found elsewhere, and no longer found."""
    assert retriever.retrieve("translate french words")[0].name in TOPICS
    pool.add("french", checkpoint, samples=["translate into french"])
    assert retriever.retrieve("translate french words")[0].name == "french"
    pool.update("french", samples=["bake bread"])
    assert retriever.retrieve("bake bread")[0].name == "french"
    pool.remove("french")
    assert "french" not in [adapter.name for adapter in retriever.retrieve("bake bread", top_k=9)]


def test_only_changes_are_embedded(pool, checkpoint, retriever):
    """A change of the pool embeds the changed adapter's samples alone; new weights embed nothing."""
    retriever.retrieve("the table")
    before = retriever.encoder.num_texts
    pool.add("french", checkpoint, samples=["translate into french", "french words"])
    retriever.retrieve("the table")
    assert retriever.encoder.num_texts == before + 2
    pool.update("french", checkpoint)
    pool.remove("sql")
    retriever.retrieve("the table")
    assert retriever.encoder.num_texts == before + 2


def test_texts_are_remembered(pool):
    """A repeated text is not embedded again, until newer ones push it out."""
    retriever = LoraRetriever(pool, WordEncoder(), cache_size=2)
    retriever.retrieve("a")
    before = retriever.encoder.num_texts
    retriever.retrieve("a")
    assert retriever.encoder.num_texts == before
    retriever.retrieve_batch(["b", "c"])
    retriever.retrieve("a")
    assert retriever.encoder.num_texts == before + 3


def test_embeddings_survive_a_restart(pool, tmp_path):
    """With a cache folder a second start embeds no samples; a damaged file is made again."""
    expected = LoraRetriever(pool, WordEncoder(), cache_dir=tmp_path).retrieve("the table")
    second = LoraRetriever(pool, WordEncoder(), cache_dir=tmp_path)
    assert second.retrieve("the table") == expected
    assert second.encoder.num_texts == 1
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"damaged")
    assert LoraRetriever(pool, WordEncoder(), cache_dir=tmp_path).retrieve("the table") == expected
    other = LoraRetriever(pool, WordEncoder(), cache_dir=tmp_path, instruction="other: ")
    other.retrieve("the table")
    assert other.encoder.num_texts == 10


def test_kept_embeddings_of_another_size_give_way(pool, checkpoint, tmp_path):
    """An encoder that grew under its old name is no fault of the adapters that it embeds next."""
    LoraRetriever(pool, WordEncoder(), cache_dir=tmp_path).refresh()
    other = AdapterPool()
    other.add("weather", checkpoint, samples=["What is the weather?"])
    for _ in range(2):
        found = LoraRetriever(other, WordEncoder(dimension=65), cache_dir=tmp_path).retrieve("the weather")
        assert found[0].name == "weather"


def test_another_default_encoder_moves_in_without_a_word(pool, tmp_path, caplog):
    """Embeddings of meaning alone stay where they are; those with words are made once, and then read.

    So it is with a file of an earlier form, which had no floors.
    """
    LoraRetriever(pool, UnitEncoder(), cache_dir=tmp_path).refresh()
    (before,) = tmp_path.iterdir()
    content = before.read_bytes()
    expected = LoraRetriever(pool, HybridEncoder(UnitEncoder())).retrieve("the table", top_k=9)
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error")
        for num_texts in (10, 1):
            moved = LoraRetriever(pool, HybridEncoder(UnitEncoder()), cache_dir=tmp_path)
            assert moved.retrieve("the table", top_k=9) == expected
            assert moved.encoder.meaning.num_texts == num_texts
        (after,) = set(tmp_path.iterdir()) - {before}
        with np.load(after) as arrays:
            np.savez(after, hashes=arrays["hashes"], vectors=arrays["vectors"])
        for num_texts in (10, 1):
            moved = LoraRetriever(pool, HybridEncoder(UnitEncoder()), cache_dir=tmp_path)
            assert moved.retrieve("the table", top_k=9) == expected
            assert moved.encoder.meaning.num_texts == num_texts
    assert not caplog.records
    assert before.read_bytes() == content


def test_given_embeddings(pool, checkpoint):
    """An adapter may come with an embedding in place of samples."""
    retriever = LoraRetriever(pool, WordEncoder())
    pool.add("given", checkpoint, embedding=retriever.embed(["bake bread"])[0] * 7, encoder="words")
    found = retriever.retrieve("bake bread")[0]
    assert (found.name, found.score) == ("given", pytest.approx(1, abs=1e-5))


def test_embeddings_of_another_size_are_refused(pool, checkpoint):
    """An adapter whose embedding cannot be this encoder's is not found, by name; the pool keeps it."""
    pool.add("given", checkpoint, embedding=np.ones(5), encoder="org/other")
    retriever = LoraRetriever(pool, WordEncoder())
    with pytest.warns(UserWarning, match=r"'given'.*5 numbers by 'org/other'.*64"):
        assert len(retriever.retrieve("the table", top_k=9)) == 3
    assert isinstance(retriever.rejected["given"], InvalidAdapterError)
    assert not pool.rejected
    assert len(retriever.retrieve("the table", top_k=9)) == 3


def test_a_refused_adapter_that_is_gone_is_refused_no_more(pool, checkpoint):
    """Also where so much has changed that nobody remembers what."""
    pool.add("given", checkpoint, embedding=np.ones(5))
    retriever = LoraRetriever(pool, WordEncoder())
    with pytest.warns(UserWarning, match="'given'"):
        retriever.refresh()
    assert list(retriever.rejected) == ["given"]
    pool._replace_state({name: entry for name, entry in pool.state.entries.items() if name != "given"}, {})
    retriever.refresh()
    assert not retriever.rejected


def test_embeddings_of_meaning_alone_are_found_with_words(pool, checkpoint):
    """One by the encoder that a hybrid adds words to scores by meaning; by another's name it is warned about."""
    retriever = LoraRetriever(pool, HybridEncoder(UnitEncoder()))
    meaning = UnitEncoder().encode([retriever.instruction + "bake bread"])[0]
    pool.add("given", checkpoint, embedding=meaning, encoder="words")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = retriever.retrieve("bake bread")[0]
    assert (found.name, found.score) == ("given", pytest.approx(1, abs=1e-5))
    pool.add("other", checkpoint, embedding=meaning, encoder="org/other")
    with pytest.warns(UserWarning, match="encoder here is 'words'.*scores mean nothing"):
        retriever.refresh()


def test_embeddings_of_another_encoder_are_warned_about(pool, checkpoint):
    """An embedding of the right size by another encoder is used, with a warning."""
    pool.add("given", checkpoint, embedding=np.ones(64), encoder="org/other")
    with pytest.warns(UserWarning, match="scores mean nothing"):
        assert len(LoraRetriever(pool, WordEncoder()).retrieve("the table", top_k=9)) == 4


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.full((1, 64), np.nan)])
def test_an_encoder_that_breaks_its_word(pool, bad):
    """An encoder that returns another shape or NaN is an error, not a wrong route."""
    encoder = WordEncoder()
    encoder.encode = lambda _: bad
    with pytest.raises(EncoderError, match="allowed is"):
        LoraRetriever(pool, encoder).embed(["a"])


async def test_concurrent_coroutines_are_embedded_together(pool):
    """Forty coroutines take a few batches, not forty, and get what single calls get."""
    retriever = LoraRetriever(pool, WordEncoder(delay=0.02))
    retriever.retrieve("warm up")
    retriever.encoder.batches.clear()
    texts = [f"table number {i}" for i in range(40)]
    found = await asyncio.gather(*(retriever.aretrieve(text) for text in texts))
    assert len(retriever.encoder.batches) <= 4
    assert found == [retriever.retrieve(text) for text in texts]


def test_concurrent_threads_are_embedded_together(pool):
    """Twenty threads take a few batches, and get what single calls get."""
    retriever = LoraRetriever(pool, WordEncoder(delay=0.05))
    retriever.retrieve("warm up")
    retriever.encoder.batches.clear()
    found, texts = {}, [f"table number {i}" for i in range(20)]
    threads = [
        threading.Thread(target=lambda text=text: found.__setitem__(text, retriever.retrieve(text))) for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(retriever.encoder.batches) <= 5
    assert all(found[text] == retriever.retrieve(text) for text in texts)


async def test_the_event_loop_is_not_blocked(pool):
    """While samples and texts are embedded the loop goes on."""
    retriever = LoraRetriever(pool, WordEncoder(delay=0.1))
    task, ticks = asyncio.create_task(retriever.aretrieve("the table")), 0
    while not task.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert (await task)[0].name == "sql"
    assert ticks > 10


async def test_a_cancelled_coroutine_leaves_others_alone(pool):
    """Cancelling one of several queued queries does not disturb the rest."""
    retriever = LoraRetriever(pool, WordEncoder(delay=0.05))
    tasks = [asyncio.create_task(retriever.aretrieve(f"table {i}")) for i in range(5)]
    await until(lambda: retriever.encoder.batches)
    tasks[2].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[2], asyncio.CancelledError)
    assert all(result[0].name == "sql" for i, result in enumerate(results) if i != 2)


def test_removal_under_load(pool, checkpoint):
    """Adding and removing while threads retrieve raises nothing, and never returns a strange name."""
    retriever = LoraRetriever(pool, WordEncoder())
    stop, errors = threading.Event(), []

    def query():
        i = 0
        while not stop.is_set():
            i += 1
            try:
                names = {adapter.name for adapter in retriever.retrieve(f"table {i % 50}", top_k=9)}
                assert set(TOPICS) <= names <= {*TOPICS, "extra"}
            except Exception as error:  # noqa: BLE001
                errors.append(error)

    threads = [threading.Thread(target=query) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(15):
        pool.add("extra", checkpoint, samples=[f"extra sample {i}"])
        pool.remove("extra")
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("name", ["pool", "encoder", "instruction", "min_score", "answer_weight"])
def test_settings_are_fixed(retriever, name):
    """A setting that is assigned is refused in words, before the first query and after; nothing is changed."""
    before = getattr(retriever, name)
    for _ in range(2):
        with pytest.raises(InvalidRequestError, match=rf"retriever\.{name} cannot be assigned.*{name}=\.\.\."):
            setattr(retriever, name, 0.3)
        retriever.retrieve("the table")
    assert getattr(retriever, name) is before


def test_a_copy_is_the_retriever_itself(retriever):
    """Copies share what was embedded; a pickle is refused in words."""
    assert copy.deepcopy(retriever) is copy.copy(retriever) is retriever
    with pytest.raises(pickle.PicklingError, match="Make one where it is needed"):
        pickle.dumps(retriever)


class PickyEncoder(WordEncoder):
    """Refuses texts that hold one of some words."""

    def __init__(self, *refused, **arguments):
        super().__init__(**arguments)
        self.refused = set(refused)

    def encode(self, texts):
        """Raise if a text of the batch is refused."""
        vectors = super().encode(texts)
        if self.refused & {word for text in texts for word in text.split()}:
            raise UnicodeError("a word I do not read")
        return vectors


async def test_a_text_that_the_encoder_refuses_is_its_own_calls_error(pool):
    """Of forty calls at once those with a bad text fail, each with an error of its own; the others are answered."""
    retriever = LoraRetriever(pool, PickyEncoder("bad", delay=0.01))
    retriever.retrieve("warm up")
    texts = [f"bad table {i % 2}" if i % 9 == 4 else f"table {i}" for i in range(40)]
    found = await asyncio.gather(*(retriever.aretrieve(text) for text in texts), return_exceptions=True)
    errors = [result for text, result in zip(texts, found, strict=True) if text.startswith("bad")]
    assert len({id(error) for error in errors}) == len(errors) == 4
    assert all(type(error) is EncoderError and "UnicodeError: a word I do not read" in str(error) for error in errors)
    assert all(result[0].name == "sql" for text, result in zip(texts, found, strict=True) if text.startswith("table"))


async def test_preparing_many_texts_keeps_what_could_be_embedded(pool):
    """A bad text among those embedded ahead costs the others nothing."""
    retriever = LoraRetriever(pool, PickyEncoder("bad"))
    await retriever.aprepare(["the table", "bad", "the date"])
    before = retriever.encoder.num_texts
    retriever.refresh()
    samples = retriever.encoder.num_texts - before
    retriever.retrieve_batch(["the table", "the date"])
    assert retriever.encoder.num_texts == before + samples


def test_a_row_that_is_not_finite_is_its_own_texts_error(pool):
    """NaN for one text of a batch fails that text alone."""
    encoder = WordEncoder()
    retriever = LoraRetriever(pool, encoder)
    retriever.refresh()
    encode = encoder.encode
    encoder.encode = lambda texts: np.array(
        [np.full(64, np.nan) if "bad" in text else row for text, row in zip(texts, encode(texts), strict=True)]
    )
    found, errors = {}, {}

    def query(text):
        try:
            found[text] = retriever.retrieve(text)
        except EncoderError as error:
            errors[text] = error

    threads = [threading.Thread(target=query, args=(text,)) for text in ("bad", "table one", "table two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(errors) == {"bad"}
    assert set(found) == {"table one", "table two"}


def test_a_sample_that_cannot_be_embedded_costs_its_adapter_alone(pool, checkpoint):
    """All other adapters are found; the error names the adapter and the sample, and a mended sample brings it back."""
    pool.add("french", checkpoint, samples=["translate into french", "french bad words"])
    retriever = LoraRetriever(pool, PickyEncoder("bad"))
    with pytest.warns(UserWarning, match=r"'french'.*'french bad words'.*a word I do not read"):
        assert len(retriever.retrieve("translate into french", top_k=9)) == 3
    assert isinstance(retriever.rejected["french"], InvalidSamplesError)
    assert "french" in pool
    assert not pool.rejected
    before = retriever.encoder.num_texts
    pool.remove("sql")
    retriever.refresh()
    assert retriever.encoder.num_texts == before  # what was refused is not tried again while it is the same
    assert list(retriever.rejected) == ["french"]
    pool.update("french", samples=["translate into french"])
    assert retriever.retrieve("translate into french")[0].name == "french"
    assert not retriever.rejected


def test_an_encoder_that_is_away_refuses_no_adapter(pool):
    """If it is the encoder that fails, and not a sample, the call fails; the next finds all adapters."""
    encoder = WordEncoder()
    retriever = LoraRetriever(pool, encoder)
    retriever.embed(["the table"])
    encode, encoder.encode = encoder.encode, lambda _: (_ for _ in ()).throw(ConnectionError("away"))
    with pytest.raises(EncoderError, match="ConnectionError: away"):
        retriever.retrieve("the table")
    assert not retriever.rejected
    encoder.encode = encode
    assert len(retriever.retrieve("the table")) == 3


def test_retrievers_of_one_pool_leave_each_other_alone(pool, checkpoint):
    """Two encoders of different dimension find each what is theirs, one after the other and at once."""
    small, large = WordEncoder(dimension=32), WordEncoder(dimension=64)
    vector = np.ones(32)
    pool.add("small only", checkpoint, embedding=vector)
    pool.add("large only", checkpoint, embedding=np.ones(64))
    retrievers = {"small only": LoraRetriever(pool, small), "large only": LoraRetriever(pool, large)}
    for name, retriever in retrievers.items():
        with pytest.warns(UserWarning, match="not found by prompts"):
            names = {adapter.name for adapter in retriever.retrieve("the table", top_k=9)}
        assert names == {*TOPICS, name}
        assert {*retriever.rejected, name} == set(retrievers)
    seen, errors = [], []

    def query(name):
        for i in range(30):
            try:
                seen.append((name, {a.name for a in retrievers[name].retrieve(f"table {i}", top_k=9)} - set(TOPICS)))
            except LoraRetrieverError as error:
                errors.append(error)

    threads = [threading.Thread(target=query, args=(name,)) for name in retrievers for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        pool.update("sql", samples=["select from the table"])
    for thread in threads:
        thread.join()
    assert not errors
    assert all(found == {name} for name, found in seen)
    assert not pool.rejected


def test_equal_texts_are_embedded_once(pool, checkpoint):
    """Among the texts of a call and among the samples of the pool."""
    for name in ("copy", "other"):
        pool.add(name, checkpoint, samples=TOPICS["sql"] + ["one more", "one more"])
    retriever = LoraRetriever(pool, WordEncoder())
    retriever.refresh()
    assert retriever.encoder.num_texts == 9 + 1
    retriever.embed(["a", "b", "a"])
    assert retriever.encoder.num_texts == 9 + 1 + 2


def test_many_samples_are_embedded_in_bounded_batches(pool, checkpoint):
    """Of ten thousand samples 256 from first to last are embedded, at most 64 at once."""
    pool.add("huge", checkpoint, samples=[f"sample {i}" for i in range(10_000)])
    retriever = LoraRetriever(pool, WordEncoder())
    retriever.refresh()
    texts = [text for batch in retriever.encoder.batches for text in batch if "sample" in text]
    assert len(texts) == 256
    assert max(map(len, retriever.encoder.batches)) <= 64
    assert texts[0].endswith("sample 0")
    assert int(texts[-1].rsplit(" ", 1)[1]) > 9_900


def test_a_long_text_is_read_at_both_ends(pool):
    """An encoder is never given ten million characters, and what is asked at either end counts."""
    retriever = LoraRetriever(pool, WordEncoder())
    for text in ("rows of the table " + "x" * 10_000_000, "x" * 10_000_000 + " rows of the table"):
        assert retriever.retrieve(text)[0].name == "sql"
    assert max(len(text) for batch in retriever.encoder.batches for text in batch) < 140_000


def test_texts_kept_are_bounded_in_bytes():
    """However many and long they are; the most recent ones stay."""
    kept = TextVectors(10_000, max_bytes=100_000)
    for i in range(200):
        kept.put({f"{i} {'x' * 10_000}": np.full(500, i, np.float32)})
    assert sys.getsizeof(kept._vectors) + sum(v.nbytes + sys.getsizeof(k) for k, v in kept._vectors.items()) < 110_000
    assert kept.get([f"199 {'x' * 10_000}"]).popitem()[1][0] == 199
    assert not kept.get([f"0 {'x' * 10_000}"])


def test_embeddings_on_disk_are_bounded_and_finite(tmp_path):
    """The newest stay; what a file holds beside numbers is not taken."""
    kept = AdapterVectors(tmp_path, encoder="e", instruction="", max_bytes=10 * 64 * 4)
    kept.save({f"h{i}": Mean(np.full(64, np.nan if i == 95 else i, np.float32), 0.5) for i in range(100)})
    assert list(kept.load()) == [f"h{i}" for i in range(90, 100) if i != 95]


def test_a_forked_child_retrieves(pool):
    """A child that is forked while another thread embeds, follows the pool and waits, has locks of its own."""
    encoder, is_embedding, is_free = WordEncoder(), threading.Event(), threading.Event()
    retriever = LoraRetriever(pool, encoder)
    expected = retriever.retrieve("the table")
    encode = encoder.encode

    def held(texts):
        is_embedding.set()
        is_free.wait(30)
        return encode(texts)

    encoder.encode = held
    pool.update("sql", samples=["select from the table"])
    thread = threading.Thread(target=retriever.refresh)
    thread.start()
    assert is_embedding.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        encoder.encode = encode
        try:
            found = asyncio.run(retriever.aretrieve("count the table"))
            os._exit(0 if len(found) == len(expected) else 1)
        finally:
            os._exit(2)
    is_free.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_equal_samples_are_embedded_once(checkpoint):
    """Whichever adapters they are of, and as few passes as they fit into."""
    pool, encoder = AdapterPool(), WordEncoder()
    for index in range(40):
        pool.add(
            f"a{index:02}", checkpoint, samples=["shared by all", "shared by two " * (index // 2 + 1), f"own {index}"]
        )
    retriever = LoraRetriever(pool, encoder)
    retriever.refresh()
    texts = [text for batch in encoder.batches for text in batch]
    assert len(texts) == len(set(texts)) == 1 + 20 + 40
    assert len(encoder.batches) == 1


def test_a_long_embedding_is_told_in_the_log(checkpoint, caplog, monkeypatch):
    """How far it is while it lasts, and how long it took."""
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(
        "langchain_lora_retriever.support.progress.time", SimpleNamespace(monotonic=lambda: next(clock))
    )
    caplog.set_level("INFO", "langchain_lora_retriever")
    pool = AdapterPool()
    for index in range(20):
        pool.add(f"a{index}", checkpoint, samples=[f"{index} {i}" for i in range(10)])
    LoraRetriever(pool, WordEncoder()).refresh()
    told = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("Embedding samples: ") and line.endswith(" s left") for line in told)
    assert "Embedding samples: 200 of 200" in told[-1]


def test_an_encoder_that_is_away_is_not_asked_for_every_sample(checkpoint):
    """The first batch that fails whole is followed by one word; if that fails too, it is the encoder."""
    pool, encoder = AdapterPool(), WordEncoder()
    for index in range(100):
        pool.add(f"a{index}", checkpoint, samples=[f"{index} {i}" for i in range(10)])

    def away(texts):
        encoder.batches.append(texts)
        raise EncoderError("the service is away")

    encoder.encode = away
    with pytest.raises(EncoderError, match="away"):
        LoraRetriever(pool, encoder).refresh()
    assert len(encoder.batches) == 2


def test_a_full_disk_keeps_no_half_of_the_embeddings(pool, tmp_path, monkeypatch):
    """They are made, and made again at the next start; nothing is left behind."""

    def write(stream, **_):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", write)
    assert LoraRetriever(pool, WordEncoder(), cache_dir=tmp_path).retrieve("rows of the table")
    assert not list(tmp_path.iterdir())
