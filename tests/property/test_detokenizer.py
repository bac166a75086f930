"""Streamed text is what the tokenizer decodes, whatever tokens come in whatever order."""

from __future__ import annotations

import codecs
from functools import cache
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from langchain_lora_retriever.engine.detokenizer import Detokenizer, Vocabulary

SPECIAL = ["<s>", "</s>", "<|end|>"]
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def byte_level() -> Any:
    """Every byte, and merges that lie across characters: `" 日"` up to its second byte, the rest of it and a letter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["ab", "Ġa", "Ġæ", "Ġæĺ", "¥a", "ðŁ", "ðŁĺ", "ðŁĺĢ", "Ģa", "a\u00c3", "ï¿", "ï¿½", "ĊĊ"]
    merges = [("a", "b"), ("Ġ", "a"), ("Ġ", "æ"), ("Ġæ", "ĺ"), ("¥", "a"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("ðŁĺ", "Ģ"),
              ("Ģ", "a"), ("a", "\u00c3"), ("ï", "¿"), ("ï¿", "½"), ("Ċ", "Ċ")]  # fmt: skip
    vocab = {symbol: index for index, symbol in enumerate([*alphabet, *merged])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast(backend)


def sentencepiece_like() -> Any:
    """Pieces with a leading blank, bytes for what has no piece, and the decoder of Llama 2."""
    pieces = ["<unk>", *BYTES, "▁", "▁the", "s", "▁▁", "▁日", "本", "é", "\ufffd", "a\ufffd"]
    backend = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(backend)


def metaspace() -> Any:
    """Pieces with a leading blank and no bytes, as T5 and XLM-R have."""
    pieces = ["<unk>", "▁", "▁the", "s", "▁▁", "▁日", "本", "\ufffd", "<0x41>"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.decoder = decoders.Metaspace()
    return fast(backend)


def fast(backend: Tokenizer) -> Any:
    """Wrapped, with special tokens."""
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


class PlainTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python alone: a letter is a token."""

    def __init__(self, **kwargs: Any) -> None:
        self._letters = [*"abcdef", " ", "日", "é", "\n"]
        super().__init__(bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|end|>"], **kwargs)

    @property
    def vocab_size(self) -> int:
        """Letters."""
        return len(self._letters)

    def get_vocab(self) -> dict[str, int]:
        """Letters and special tokens."""
        return {letter: index for index, letter in enumerate(self._letters)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._letters.index(token) if token in self._letters else 0

    def _convert_id_to_token(self, index: int) -> str:
        return self._letters[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Nothing between them."""
        return "".join(tokens)


MAKERS = {maker.__name__: maker for maker in (byte_level, sentencepiece_like, metaspace, PlainTokenizer)}


@cache
def tokenizer(kind: str) -> Any:
    """One of the tokenizers."""
    return MAKERS[kind]()


@cache
def vocabulary(kind: str) -> Vocabulary:
    """What an engine keeps of it."""
    return Vocabulary(tokenizer(kind))


def push_all(kind: str, ids: list[int], stop: tuple[str, ...] = (), *, skips: bool = True) -> tuple[list[str], bool]:
    """The pieces that come out, the last one at the end, and whether a stop string came."""
    detokenizer = Detokenizer(tokenizer(kind), stop, skip_special_tokens=skips, vocabulary=vocabulary(kind))
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.is_stopped:
            return pieces, True
    return [*pieces, detokenizer.flush()], False


def draw_ids(data: st.DataObject, kind: str, max_size: int = 40) -> list[int]:
    """Any tokens; special ones and those around a few characters often."""
    known = tokenizer(kind).get_vocab()
    names = [
        *SPECIAL,
        *"æĺ¥ðŁa",
        "Ġæĺ",
        "▁",
        "▁the",
        "<0xE6>",
        "<0x97>",
        "<0xA5>",
        "<0x0A>",
        "<0x41>",
        "<0x80>",
        "\ufffd",
    ]
    often = [known[name] for name in names if name in known]
    token = st.one_of(st.sampled_from(often), st.sampled_from(sorted(known.values())))
    return data.draw(st.lists(token, max_size=max_size))


def draw_plain_ids(data: st.DataObject, kind: str) -> list[int]:
    """The same without special tokens."""
    return [i for i in draw_ids(data, kind) if i not in vocabulary(kind).special_tokens]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("skips", [True, False], ids=["skipped", "kept"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_tokens_give_what_decoding_them_gives(kind: str, skips: bool, data: st.DataObject) -> None:
    """All of the decoded text comes out but for a last character that is not whole."""
    ids = draw_ids(data, kind)
    pieces, _ = push_all(kind, ids, skips=skips)
    whole = tokenizer(kind).decode(ids, skip_special_tokens=skips)
    text = "".join(pieces)
    if text != whole.rstrip("\ufffd"):
        # A run of byte tokens that the end cuts: it decodes to replacement characters alone, here what is whole stays.
        known = vocabulary(kind)
        shown = [i for i in ids if not skips or i not in known.special_tokens]
        run = list(takewhile(known.byte_tokens.__contains__, reversed(shown)))[::-1]
        values = bytes(known.byte_tokens[i] for i in run)
        end = codecs.getincrementaldecoder("utf-8")().decode(values)
        assert text == (whole[: len(whole) - len(run)] + end if len(shown) > len(run) else end.removeprefix(" "))


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_stop_string_cuts_the_decoded_text(kind: str, data: st.DataObject) -> None:
    """A stop string that the text has ends it where the text has it first.

    Bytes that are no text are left out: a run of them is settled at once where stop strings look at it.
    """
    ids = draw_plain_ids(data, kind)
    whole = "".join(push_all(kind, ids)[0])
    assume("\ufffd" not in whole)
    start = data.draw(st.integers(0, max(len(whole) - 1, 0)))
    stop = whole[start : start + data.draw(st.integers(1, 6))]
    if stop:
        pieces, is_stopped = push_all(kind, ids, (stop,))
        assert is_stopped
        assert "".join(pieces) == whole[: whole.index(stop)]


@pytest.mark.parametrize("kind", MAKERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_special_token_stops_where_it_stands(kind: str, data: st.DataObject) -> None:
    """A stop string that is a special token ends the answer at the token's first place, before it."""
    known = tokenizer(kind).get_vocab()
    ids = draw_plain_ids(data, kind)
    place = data.draw(st.integers(0, len(ids)))
    pieces, is_stopped = push_all(kind, [*ids[:place], known["<|end|>"], *ids[place:]], ("<|end|>",))
    assert is_stopped
    assert len(pieces) == place + 1
    assert "".join(pieces) == "".join(push_all(kind, ids[:place])[0])
