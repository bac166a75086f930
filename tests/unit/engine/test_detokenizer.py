"""Tokens to text: whole characters, stop strings held back."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from langchain_lora_retriever.engine.detokenizer import Detokenizer, Vocabulary


def push_ids(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """The pieces that come out as tokens go in, flushed at the end."""
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = [detokenizer.push(i) for i in ids]
    return pieces if detokenizer.is_stopped else [*pieces, detokenizer.flush()]


def push_all(tokenizer: Any, text: str, stop: tuple[str, ...] = ()) -> list[str]:
    """The same for a text's tokens."""
    return push_ids(tokenizer, tokenizer(text, add_special_tokens=False).input_ids, stop)


@pytest.fixture(scope="module")
def sloppy_tokenizer() -> Any:
    """A byte-level tokenizer with a token that ends within a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, "a\u00c3"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "\u00c3")]))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class SlowTokenizer:
    """What a tokenizer in Python offers: no backend."""

    def __init__(self, tokenizer: Any) -> None:
        self.all_special_ids, self.all_special_tokens = tokenizer.all_special_ids, tokenizer.all_special_tokens
        self.get_vocab, self.decode = tokenizer.get_vocab, tokenizer.decode


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


@pytest.mark.parametrize(
    ("stop", "text"),
    [("</s>", "one"), ("one</s>", ""), ("e</s>t", "on"), ("</s>two", "one"), ("</s></s>", "onetwo"), ("s>", "onetwo")],
)
def test_a_stop_string_may_hold_special_tokens(byte_tokenizer: Any, stop: str, text: str) -> None:
    """It cuts before them, as it would with text, although they are not shown; a part of one does not count."""
    ids = byte_tokenizer("one</s>two", add_special_tokens=False).input_ids
    assert "".join(push_ids(byte_tokenizer, ids, (stop,))) == text


def test_a_special_token_that_is_spelt_out_stops_too(byte_tokenizer: Any) -> None:
    """The text of a special token, written in other tokens, is text like any other."""
    ids = [byte_tokenizer.convert_tokens_to_ids(letter) for letter in "one</s>two"]
    assert "".join(push_ids(byte_tokenizer, ids, ("</s>",))) == "one"


def test_a_cut_character_takes_nothing_with_it(sloppy_tokenizer: Any) -> None:
    """Of a token that holds a letter and half a character the letter comes at once, and the other half completes it."""
    known = sloppy_tokenizer.get_vocab()
    detokenizer = Detokenizer(sloppy_tokenizer)
    assert detokenizer.push(known["a\u00c3"]) == "a"
    assert detokenizer.push(known["\u00a9"]) == "\u00e9"
    assert detokenizer.push(known["a\u00c3"]) == "a"
    assert detokenizer.flush() == ""


def test_bytes_that_are_no_text_do_not_add_up(byte_tokenizer: Any) -> None:
    """Among thousands of stray bytes every step decodes a few tokens, and none is lost."""
    vocabulary = Vocabulary(byte_tokenizer)
    longest, decode = 0, vocabulary.decode

    def measure(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    vocabulary.decode = measure
    detokenizer = Detokenizer(byte_tokenizer, vocabulary=vocabulary)
    stray = [byte_tokenizer.convert_tokens_to_ids(symbol) for symbol in ("Ģ", "ð", "Ł")]  # 80, F0 9F
    ids = stray * 1000
    pieces = [detokenizer.push(i) for i in [*ids, byte_tokenizer.convert_tokens_to_ids("a")]]
    assert "".join(pieces) == byte_tokenizer.decode([*ids, byte_tokenizer.convert_tokens_to_ids("a")])
    assert longest < 16


@pytest.mark.parametrize("text", ["plain words here", "naïve café", "日本語 and 🙂"])
def test_tokenizers_without_a_fast_backend_work_too(byte_tokenizer: Any, text: str) -> None:
    """Where there is no backend, the tokenizer's own `decode` gives the same text."""
    slow = SlowTokenizer(byte_tokenizer)
    assert "".join(push_ids(slow, byte_tokenizer(text, add_special_tokens=False).input_ids)) == text
    ids = byte_tokenizer("one</s>two", add_special_tokens=False).input_ids
    assert "".join(push_ids(slow, ids)) == "onetwo"
    assert "".join(push_ids(slow, ids, ("</s>",))) == "one"
