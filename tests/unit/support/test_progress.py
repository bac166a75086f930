"""What is shown of long work."""

from __future__ import annotations

import io
import logging
import sys
from types import ModuleType

import pytest

from langchain_lora_retriever.support import progress
from langchain_lora_retriever.support.progress import Progress

LOGGER = logging.getLogger("langchain_lora_retriever.test")


class Terminal(io.StringIO):
    """What is written to a terminal."""

    def isatty(self) -> bool:
        """It is one."""
        return True


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds in which nothing is shown."""
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)


def work() -> None:
    """Ten steps."""
    with Progress("Embedding samples", 10, LOGGER) as told:
        for _ in range(5):
            told.update(2)


@pytest.mark.usefixtures("at_once")
def test_lines_in_the_log_where_nobody_looks_on(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    """How much is done, and how long it will take; nothing is written beside the log."""
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with caplog.at_level(logging.INFO):
        work()
    assert not written.getvalue()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("Embedding samples: 2 of 10, ")
    assert lines[-1].startswith("Embedding samples: 10 of 10 in ")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("where", ["a terminal", "a notebook"])
def test_a_bar_where_somebody_looks_on(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a notebook's kernel standard error is no terminal, and is shown all the same."""
    written = Terminal() if where == "a terminal" else io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    if where == "a notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    work()
    assert "Embedding samples:" in written.getvalue()


def test_short_work_is_done_in_silence(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a bar nor a line."""
    written = Terminal()
    monkeypatch.setattr(sys, "stderr", written)
    with caplog.at_level(logging.INFO):
        work()
    assert (written.getvalue(), caplog.records) == ("", [])
