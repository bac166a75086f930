"""Fixtures that any test may use; what they are made of is in `makers.py`."""

from __future__ import annotations

from typing import Any

import pytest

import makers


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """The byte-level tokenizer."""
    return makers.make_tokenizer()


@pytest.fixture(scope="session")
def make_checkpoint() -> Any:
    """Write a random PEFT checkpoint for the tiny model: `make_checkpoint(folder, seed=0, r=4, ...)`."""
    return makers.make_checkpoint
