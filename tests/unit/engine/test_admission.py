"""What is said of prompts that are none, whatever sequence they come in."""

from __future__ import annotations

from typing import Any

import pytest

from langchain_lora_retriever.engine.admission import Admission
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.types import SamplingParams

ADMISSION = Admission(max_model_len=64, vocab_size=100, max_adapters_per_request=1, fit=None)


class Index:
    """An integer by `__index__` alone, as those of numpy are."""

    def __index__(self) -> int:
        """Say which."""
        return 7


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((3, 4, 5.0), "with 2 of them at its beginning"),
        ((3, 1 << 70), "with 1 of them at its beginning"),
        (("a",), "with 0 of them at its beginning"),
        ((), "has no tokens"),
        ((3, -1), "the token -1 at place 1"),
        ((3, 4, 100), "the token 100 at place 2"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_told_with_its_place(kind: type, tokens: tuple[Any, ...], message: str) -> None:
    """A list is read at once, others token by token; the message is the same."""
    with pytest.raises(InvalidRequestError, match=message):
        ADMISSION.check(kind(tokens), SamplingParams(), ())


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_prompt_becomes_plain_integers(kind: type) -> None:
    """Whatever counts as one."""
    checked = ADMISSION.check(kind((3, True, Index())), SamplingParams(), ())
    assert checked == [3, 1, 7]
    assert {type(token) for token in checked} == {int}
