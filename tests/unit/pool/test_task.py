"""Task entries: kept with a pool, found like adapters, and run by those they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from langchain_lora_retriever import AdapterPool, LoraRetriever
from langchain_lora_retriever.errors import (
    DuplicateAdapterError,
    InvalidRequestError,
    InvalidSamplesError,
    UnknownAdapterError,
)
from langchain_lora_retriever.retrieval.routing import Router, RoutingOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import WordEncoder

POEMS = ["Write a poem on the moon.", "Write a short poem on rain."]
MEMBERS = {"french": 1.0, "sql": 3.0}


@pytest.fixture
def disk(tmp_path: Path, pool: AdapterPool) -> AdapterPool:
    """The pool of three adapters, in a folder."""
    pool.save(tmp_path / "pool")
    return AdapterPool(tmp_path / "pool")


def test_a_task_is_kept_with_the_pool(disk: AdapterPool, tmp_path: Path) -> None:
    """In memory, in its folder, in a copy; gone once it is removed. It is no adapter."""
    before = disk.fingerprint
    task = disk.add_task("poems", MEMBERS, POEMS)
    assert task.members == (("sql", 0.75), ("french", 0.25))
    disk.save(tmp_path / "copy")
    for pool in (disk, AdapterPool(tmp_path / "pool"), AdapterPool(tmp_path / "copy")):
        assert pool.names == ("dates", "french", "sql")
        assert pool.tasks["poems"].members == task.members
        assert [sample.input for sample in pool.tasks["poems"].samples] == POEMS
        assert pool.fingerprint == disk.fingerprint != before
    with pytest.raises(UnknownAdapterError, match=r"'poems' is a task, not an adapter\. It stands for 'sql', 'french'"):
        _ = disk["poems"]
    disk.remove("poems")
    assert not disk.tasks
    assert not AdapterPool(tmp_path / "pool").tasks
    assert disk.fingerprint == before


def test_bad_tasks_are_refused_and_change_nothing(disk: AdapterPool, write_adapter: Callable[..., Path]) -> None:
    """Names that are taken, members that are no adapters, shares that are none, no samples."""
    disk.add_task("poems", MEMBERS, POEMS)
    version = disk.version
    cases: list[tuple[Any, type[Exception], str]] = [
        (("poems", MEMBERS, POEMS), DuplicateAdapterError, "a task 'poems'"),
        (("sql", MEMBERS, POEMS), DuplicateAdapterError, "an adapter 'sql'"),
        (("more", {"nobody": 1.0}, POEMS), UnknownAdapterError, "'nobody'"),
        (("more", {"poems": 1.0}, POEMS), UnknownAdapterError, "is a task"),
        (("more", {}, POEMS), InvalidRequestError, "task 'more' has members={}"),
        (("more", {"sql": 0.0}, POEMS), InvalidRequestError, "the share 0.0"),
        (("more", {"sql": float("nan")}, POEMS), InvalidRequestError, "the share nan"),
        (
            ("more", {"sql": 10**400, "french": 1.5}, POEMS),
            InvalidRequestError,
            "an integer of 1329 bits>; allowed .* a float",
        ),
        (
            ("more", {"sql": 1e308, "french": 1e-308}, POEMS),
            InvalidRequestError,
            r"'french' with the share 1e-308, which is nothing beside the largest, 1e\+308",
        ),
        (("more", {"sql": True}, POEMS), InvalidRequestError, "the share True"),
        (("more", ["sql"], POEMS), InvalidRequestError, "shares by adapters' names"),
        (("more", {f"a{i}": 1.0 for i in range(9)}, POEMS), InvalidRequestError, "1 to 8 of them"),
        (("more", MEMBERS, []), InvalidSamplesError, "task 'more'"),
    ]
    for arguments, error, match in cases:
        with pytest.raises(error, match=match):
            disk.add_task(*arguments)
    with pytest.raises(DuplicateAdapterError, match="a task 'poems'"):
        disk.add("poems", write_adapter("poems"))
    assert disk.version == version
    assert list(disk.tasks) == ["poems"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("task.json", "{"),
        ("task.json", '{"members": {"sql": "much"}}'),
        ("task.json", "[1]"),
        ("samples.jsonl", ""),
    ],
)
def test_a_task_whose_files_are_broken_is_refused_alone(
    tmp_path: Path, disk: AdapterPool, name: str, content: str
) -> None:
    """It is in `rejected` by name, and may be removed."""
    disk.add_task("poems", MEMBERS, POEMS)
    (tmp_path / "pool" / "poems" / name).write_text(content)
    with pytest.warns(UserWarning, match="poems"):
        pool = AdapterPool(tmp_path / "pool")
    assert list(pool.rejected) == ["poems"]
    assert len(pool) == 3
    pool.remove("poems")
    assert not (tmp_path / "pool" / "poems").exists()


def test_a_task_that_lost_its_samples_is_refused_by_name(tmp_path: Path, disk: AdapterPool) -> None:
    """As an adapter that lost a file is: nothing goes without a word."""
    disk.add_task("poems", MEMBERS, POEMS)
    (tmp_path / "pool" / "poems" / "samples.jsonl").unlink()
    with pytest.warns(UserWarning, match="poems"):
        pool = AdapterPool(tmp_path / "pool")
    assert "samples.jsonl" in str(pool.rejected["poems"])


def options(**settings: Any) -> RoutingOptions:
    """Options of a call."""
    return RoutingOptions(**settings)


def route(
    pool: AdapterPool, encoder: Any, text: str = POEMS[0], refused: Any = dict, **settings: Any
) -> dict[str, float]:
    """The shares of the adapters that a text runs."""
    composition = Router(LoraRetriever(pool, encoder), refused=refused).route(text, options(**settings))
    return {adapter.name: adapter.weight for adapter in composition.adapters}


def test_prompts_of_a_task_run_its_adapters(pool: AdapterPool, word_encoder: WordEncoder) -> None:
    """By its shares; in a selection the first; others' prompts are routed as before."""
    before = route(pool, word_encoder, "How many users signed up?", weight_temperature=0.001)
    pool.add_task("poems", MEMBERS, POEMS)
    assert route(pool, word_encoder, weight_temperature=0.001) == {"sql": 0.75, "french": 0.25}
    assert route(pool, word_encoder, top_k=1) == {"sql": 0.75, "french": 0.25}
    assert route(pool, word_encoder, composition="selection") == {"sql": 1.0}
    assert route(pool, word_encoder, "How many users signed up?", weight_temperature=0.001) == before == {"sql": 1.0}
    mixed = route(pool, word_encoder, weight_temperature=10.0)
    assert len(mixed) <= 3
    assert sum(mixed.values()) == 1
    found = LoraRetriever(pool, word_encoder).retrieve(POEMS[0])
    assert found[0].name == "poems"


def test_members_that_cannot_run_are_left_out(pool: AdapterPool, word_encoder: WordEncoder) -> None:
    """Excluded by a call, refused by the engine, removed meanwhile; with none left the task is not found."""
    pool.add_task("poems", MEMBERS, POEMS)
    cold = {"weight_temperature": 0.001}
    assert route(pool, word_encoder, exclude_adapters=["sql"], **cold) == {"french": 1.0}
    assert route(pool, word_encoder, exclude_adapters=["poems", "french", "dates"], **cold) == {"sql": 1.0}
    refused = {"sql": ValueError("it does not fit")}
    assert route(pool, word_encoder, refused=lambda: refused, **cold) == {"french": 1.0}
    pool.remove("sql")
    assert route(pool, word_encoder, **cold) == {"french": 1.0}
    assert set(route(pool, word_encoder, exclude_adapters=["french"], **cold)) == {"dates"}
    with pytest.raises(UnknownAdapterError, match="is a task"):
        route(pool, word_encoder, adapters=["poems"])


def test_a_task_of_another_process_is_seen(disk: AdapterPool) -> None:
    """Once the pool is told to look; nothing is another where nothing has changed."""
    assert disk.path is not None
    other = AdapterPool(disk.path)
    disk.add_task("poems", MEMBERS, POEMS)
    assert other.refresh()
    task, adapter = other.tasks["poems"], other["sql"]
    assert task.members == (("sql", 0.75), ("french", 0.25))
    assert not other.refresh()
    disk.remove("french")
    assert other.refresh()
    assert other.tasks["poems"] is task
    assert other["sql"] is adapter
    disk.remove("poems")
    assert other.refresh()
    assert not other.tasks
