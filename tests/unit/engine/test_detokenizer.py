"""Tokens to text: whole characters, stop strings held back."""

from __future__ import annotations

from typing import Any

import pytest

from langchain_lora_retriever.engine import detokenizer as module
from langchain_lora_retriever.engine.detokenizer import Detokenizer


def push_all(tokenizer: Any, text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """The pieces that come out as a text's tokens go in, flushed at the end."""
    detokenizer = Detokenizer(tokenizer, stop)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = [detokenizer.push(i) for i in ids]
    return pieces if detokenizer.is_stopped else [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語 and 🙂", " leading and trailing "])
def test_text_comes_out_whole(byte_tokenizer: Any, text: str) -> None:
    """The pieces join to the text, and none ends inside a character, although every byte is a token."""
    pieces = push_all(byte_tokenizer, text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stop_string_is_cut_across_tokens(byte_tokenizer: Any) -> None:
    """A stop string that spans tokens ends the text before it, and no part of it was let out."""
    assert "".join(push_all(byte_tokenizer, "one STOP two", ("STOP",))) == "one "


def test_a_false_start_is_let_out(byte_tokenizer: Any) -> None:
    """Text that only began like a stop string comes out once that is clear."""
    pieces = push_all(byte_tokenizer, "one STO two", ("STOP",))
    assert "".join(pieces) == "one STO two"
    assert pieces[4:7] == ["", "", ""]


def test_the_earliest_stop_string_wins(byte_tokenizer: Any) -> None:
    """Of several stop strings the one that begins first cuts."""
    assert "".join(push_all(byte_tokenizer, "a b c d", ("c", "b"))) == "a "


def test_held_text_is_flushed_at_the_end(byte_tokenizer: Any) -> None:
    """If generation ends while text is held back, that text still arrives."""
    assert "".join(push_all(byte_tokenizer, "one ST", ("STOP",))) == "one ST"


def test_special_tokens_are_skipped(byte_tokenizer: Any) -> None:
    """End-of-sequence and the like have no text."""
    detokenizer = Detokenizer(byte_tokenizer)
    assert [detokenizer.push(i) for i in (1, 2, 0)] == ["", "", ""]


@pytest.mark.parametrize("text", ["plain words here", "naïve café", "日本語 and 🙂"])
def test_tokenizers_without_a_fast_backend_work_too(byte_tokenizer: Any, text: str) -> None:
    """The window decoder gives the same text as the library's stream."""
    stream = module._WindowStream(byte_tokenizer)
    assert "".join(stream.step(i) for i in byte_tokenizer(text, add_special_tokens=False).input_ids) == text
