"""What a server's settings say of an engine in another process."""

from __future__ import annotations

from typing import Any

import pytest

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.serving.config import MAX_WAITING, ServeConfig
from langchain_lora_retriever.serving.engines import EngineElsewhere


def elsewhere(**engine_config: Any) -> EngineElsewhere:
    """Of these limits."""
    return EngineElsewhere.of(ServeConfig(base_model="org/model", chat={"engine_config": engine_config}))


def test_who_asks_an_engine_limits_what_waits() -> None:
    """By the limit that is set, by the server's own, or not at all; the engine itself has none."""
    assert elsewhere(max_num_seqs=8, max_waiting=5).max_in_flight() == 13
    assert elsewhere(max_num_seqs=8).max_in_flight(3) == MAX_WAITING + 24
    assert elsewhere(max_num_seqs=8, max_waiting=None).max_in_flight() is None
    assert elsewhere(max_num_seqs=8, max_waiting=5).recipe.config.max_waiting is None


@pytest.mark.parametrize("given", [3, ["max_num_seqs"], {"max_waiting": -1}, {"max_num_seq": 3}])
def test_limits_that_are_none_are_refused(given: Any) -> None:
    """In words."""
    with pytest.raises(InvalidRequestError):
        EngineElsewhere.of(ServeConfig(base_model="org/model", chat={"engine_config": given}))
