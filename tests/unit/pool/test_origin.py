"""What a pool writes of where its adapters are from, and what it makes of such files that others wrote."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from langchain_lora_retriever import AdapterPool
from langchain_lora_retriever.pool.origin import HubOrigin, Origin, format_origin, read_origin
from langchain_lora_retriever.pool.regular_files import AdapterFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ORIGIN = Origin(HubOrigin("user/sql", "a" * 40, "v1", "sub"), "dataset", "f" * 64, "20 of 1,000 rows")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Whole, and as none if there is no file."""
    with AdapterFolder(tmp_path) as folder:
        assert read_origin(folder) == Origin()
        (tmp_path / "origin.json").write_text(format_origin(ORIGIN))
        assert read_origin(folder) == ORIGIN
    assert str(ORIGIN.hub) == "user/sql/sub@aaaaaaaaaaaa"


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff", b"[]", b"null", b"{}", b"[" * 100_000, b'{"hub": 3, "samples_from": "samples"}',
        json.dumps({**json.loads(format_origin(ORIGIN)), "samples_from": "elsewhere"}).encode(),
        json.dumps({**json.loads(format_origin(ORIGIN)), "note": "\n"}).encode(),
        json.dumps({**json.loads(format_origin(ORIGIN)), "note": "x" * 2000}).encode(),
        json.dumps({**json.loads(format_origin(ORIGIN)), "hub": {"repo_id": ["x"]}}).encode(),
    ],
)  # fmt: skip
def test_what_others_wrote_says_nothing(tmp_path: Path, content: bytes) -> None:
    """An adapter whose folder happens to hold such a file is what it was."""
    (tmp_path / "origin.json").write_bytes(content)
    with AdapterFolder(tmp_path) as folder:
        assert read_origin(folder) == Origin()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize("name", ["origin.json", "README.md"])
def test_what_is_no_file_hinders_nobody(write_adapter: Callable[..., Path], make: Any, name: str) -> None:
    """Neither is opened; the adapter is loaded, and is found by nothing."""
    folder = write_adapter("sql")
    make(folder / name)
    pool = AdapterPool()
    pool.add("sql", folder)
    assert not pool.state["sql"].is_described


def test_a_card_beside_the_weights_describes_an_adapter(write_adapter: Callable[..., Path], tmp_path: Path) -> None:
    """In a pool in memory, in a folder, and after both were copied; samples that are given take its place."""
    folder = write_adapter("sql")
    (folder / "README.md").write_text("# Queries\n\nIt writes queries for people.\n")
    memory, disk = AdapterPool(), AdapterPool(tmp_path / "pool", create=True)
    for pool in (memory, disk):
        pool.add("sql", folder)
    memory.save(tmp_path / "copy")
    for pool in (memory, disk, AdapterPool(tmp_path / "pool"), AdapterPool(tmp_path / "copy")):
        entry = pool.state["sql"]
        assert (entry.described_by, entry.card_text) == ("card text", ("Queries", "It writes queries for people."))
        assert pool.samples("sql") == ()
    disk.update("sql", samples=["How many users are there?"])
    assert disk.state["sql"].described_by == "samples"
    disk.update("sql", folder)
    assert disk.state["sql"].described_by == "samples"
