"""The public face is typed as users write it."""

from __future__ import annotations

from pathlib import Path

import pytest
from mypy import api

from langchain_lora_retriever import ChatLoraRetriever
from langchain_lora_retriever.chat.settings import GivenSettings

USAGE = Path(__file__).parents[1] / "typing" / "usage.py"


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["", "llm.pool.names + 1", "ChatLoraRetriever(tempratur=1)", "llm.top_k.upper()"])
def test_mypy_reads_usage_strictly(tmp_path: Path, wrong: str) -> None:
    """It finds nothing in what is right, and what is wrong where it is."""
    file = tmp_path / "usage.py"
    file.write_text(USAGE.read_text(encoding="utf-8") + wrong + "\n")
    said, _, status = api.run(["--strict", "--config-file", str(USAGE.parents[2] / "pyproject.toml"), str(file)])
    assert bool(status) == bool(wrong), said
    assert said.count("error:") == bool(wrong), said


def test_the_types_of_the_constructor_name_every_setting() -> None:
    """A new field has a type there too."""
    assert set(GivenSettings.__annotations__) == set(ChatLoraRetriever.model_fields)
