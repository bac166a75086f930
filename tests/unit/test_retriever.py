"""From text to adapters, following a pool that changes."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time

import numpy as np
import pytest

from langchain_lora_retriever.errors import InvalidAdapterError, InvalidRequestError, UnknownAdapterError
from langchain_lora_retriever.micro_batcher import MicroBatcher
from langchain_lora_retriever.pool import AdapterPool
from langchain_lora_retriever.retriever import DEFAULT_INSTRUCTION, LoraRetriever

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
    ],
)
def test_bad_arguments(retriever, call):
    """Texts and exclusions of the wrong kind are refused."""
    with pytest.raises(InvalidRequestError):
        call(retriever)


@pytest.mark.parametrize("arguments", [{"min_score": 1.5}, {"min_score": float("nan")}, {"cache_size": -1}])
def test_bad_settings(pool, arguments):
    """Settings out of range are refused."""
    with pytest.raises(InvalidRequestError):
        LoraRetriever(pool, WordEncoder(), **arguments)


def test_min_score(pool):
    """Adapters below the score are dropped; with none left the list is empty."""
    all_of_them = LoraRetriever(pool, WordEncoder()).retrieve("rows of the table")
    bar = all_of_them[1].score
    assert LoraRetriever(pool, WordEncoder(), min_score=bar).retrieve("rows of the table") == all_of_them[:2]
    assert LoraRetriever(pool, WordEncoder(), min_score=1).retrieve("rows of the table") == []


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


def test_given_embeddings(pool, checkpoint):
    """An adapter may come with an embedding in place of samples."""
    retriever = LoraRetriever(pool, WordEncoder())
    pool.add("given", checkpoint, embedding=retriever.embed(["bake bread"])[0] * 7, encoder="words")
    found = retriever.retrieve("bake bread")[0]
    assert (found.name, found.score) == ("given", pytest.approx(1, abs=1e-5))


def test_embeddings_of_another_size_are_refused(pool, checkpoint):
    """An embedding that cannot be this encoder's takes its adapter out of use, by name."""
    pool.add("given", checkpoint, embedding=np.ones(5), encoder="org/other")
    retriever = LoraRetriever(pool, WordEncoder())
    with pytest.warns(UserWarning, match=r"'given'.*5 numbers by 'org/other'.*64"):
        assert len(retriever.retrieve("the table", top_k=9)) == 3
    assert isinstance(pool.rejected["given"], InvalidAdapterError)
    assert len(retriever.retrieve("the table", top_k=9)) == 3


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
    with pytest.raises(ValueError, match="allowed is"):
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


async def test_the_first_of_many_do_not_wait_for_the_last():
    """A full batch is embedded while later texts gather in the next; everybody gets the rows of their own texts."""
    batches = []

    def encode(texts):
        batches.append(list(texts))
        return np.array([[float(text)] for text in texts], dtype=np.float32)

    batcher = MicroBatcher(encode, max_texts=4)
    vectors = await asyncio.gather(*(batcher.arun([str(i), str(i + 100)]) for i in range(9)))
    assert [vector.tolist() for vector in vectors] == [[[i], [i + 100]] for i in range(9)]
    assert max(map(len, batches)) == 4
    assert batcher.run([str(i) for i in range(10)])[:, 0].tolist() == [*range(10)]


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
    await asyncio.sleep(0.01)
    tasks[2].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[2], asyncio.CancelledError)
    assert all(result[0].name == "sql" for i, result in enumerate(results) if i != 2)


async def test_a_failing_batch_tells_everyone_and_the_next_works():
    """Whoever is in a failing batch gets the error; the batcher goes on."""
    is_free = threading.Event()

    def encode(texts):
        is_free.wait(5)
        if "bad" in texts:
            raise RuntimeError("broken")
        return np.ones((len(texts), 2), dtype=np.float32)

    batcher = MicroBatcher(encode)
    first = asyncio.create_task(batcher.arun(["first"]))
    await asyncio.sleep(0.05)
    others = asyncio.gather(*(batcher.arun([text]) for text in ("bad", "good")), return_exceptions=True)
    await asyncio.sleep(0.05)
    is_free.set()
    assert (await first).shape == (1, 2)
    assert [str(failure) for failure in await others] == ["broken", "broken"]
    with pytest.raises(RuntimeError, match="broken"):
        batcher.run(["bad"])
    assert batcher.run(["good", "too"]).shape == (2, 2)


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
