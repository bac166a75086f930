"""What is warned of is said once."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from langchain_lora_retriever.support.warn import warn


def test_log_and_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Where logging is set up both have it, as it is: with whatever signs."""
    with pytest.warns(UserWarning, match="100 % wrong"):
        warn(logging.getLogger("langchain_lora_retriever.x"), "100 % wrong", stacklevel=1)
    assert [record.getMessage() for record in caplog.records] == ["100 % wrong"]


def test_once_where_nobody_has_set_up_logging() -> None:
    """Python would print both."""
    code = """
import logging
from langchain_lora_retriever.support.warn import warn
warn(logging.getLogger("langchain_lora_retriever.x"), "it is refused", stacklevel=1)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.count("it is refused") == 1
