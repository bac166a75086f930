"""Fixtures that any test may use; what they are made of is in `makers.py`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest

import makers

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # a test's own processes see what it sees
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """The byte-level tokenizer."""
    return makers.make_tokenizer()


@pytest.fixture(scope="session")
def make_checkpoint() -> Any:
    """Write a random PEFT checkpoint for the tiny model: `make_checkpoint(folder, seed=0, r=4, ...)`."""
    return makers.make_checkpoint
