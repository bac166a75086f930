"""An encoder with words."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from langchain_lora_retriever import AdapterPool
from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.retrieval.encoder import DEFAULT_ENCODER, DEFAULT_INSTRUCTION, Encoder
from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder, default_encoder
from langchain_lora_retriever.retrieval.retriever import LoraRetriever


class BlindEncoder:
    """Sees no difference between texts."""

    name = "blind"
    dimension = 3

    def encode(self, texts):
        """Return the same unit vector for every text."""
        return np.tile(np.array([[1.0, 0.0, 0.0]], dtype=np.float32), (len(texts), 1))


def test_encoders_that_see_differently_have_names_of_their_own() -> None:
    """Embeddings are kept by it; the usual ones' names stay as they were."""
    usual = HybridEncoder(BlindEncoder())
    assert usual.name == "blind + 1 x 1024 words"
    others = [{"instruction": "Find: "}, {"weight": 1.0000001}, {"weight": 2}, {"num_words": 8}]
    assert len({usual.name, *(HybridEncoder(BlindEncoder(), **other).name for other in others)}) == 5


def test_words_tell_texts_apart_that_the_encoder_cannot() -> None:
    """A shared template makes texts alike; the inner encoder's part stays in front."""
    encoder = HybridEncoder(BlindEncoder())
    assert isinstance(encoder, Encoder)
    a, b, c = encoder.encode(["Translate: dogs", "Translate: cats", "How many users are there?"])
    assert a @ b > a @ c + 0.1
    assert encoder.dimension == len(a) == 1027
    np.testing.assert_allclose(np.linalg.norm([a, b, c], axis=1), 1, atol=1e-6)
    assert a[:3] == pytest.approx([0.5**0.5, 0, 0])


def test_weight_sets_the_share_of_words() -> None:
    """The more words count, the farther apart texts without a common word are."""
    similarity = [np.dot(*HybridEncoder(BlindEncoder(), weight=w).encode(["dogs", "cats"])) for w in (0.1, 1, 10)]
    assert similarity == pytest.approx([1 / 1.1, 1 / 2, 1 / 11])


def test_instruction_and_blank_texts_hold_no_words() -> None:
    """The instruction's words do not count, and a text without words is embedded all the same."""
    encoder = HybridEncoder(BlindEncoder())
    plain, instructed, blank = encoder.encode(["dogs", DEFAULT_INSTRUCTION + "dogs", " "])
    np.testing.assert_array_equal(plain, instructed)
    assert blank[:3] == pytest.approx([1, 0, 0])
    assert encoder.encode([]).shape == (0, 1027)


def test_vectors_are_the_same_in_every_process() -> None:
    """A published embedding means the same elsewhere: no randomised hash is involved."""
    code = "import zlib; print([zlib.crc32(w.encode()) % 1024 for w in ('dogs', '?', 'naïve')])"
    here = [int(np.flatnonzero(HybridEncoder(BlindEncoder()).encode([w])[0][3:])[0]) for w in ("dogs", "?", "naïve")]
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert str(here) == there.strip()


def test_name_tells_settings_apart() -> None:
    """Vectors of different settings never meet in a cache."""
    names = {HybridEncoder(BlindEncoder(), weight=w, num_words=n).name for w in (1, 2) for n in (64, 128)}
    assert len(names) == 4
    assert all(name.startswith("blind") for name in names)


@pytest.mark.parametrize("setting", [{"weight": 0}, {"weight": float("nan")}, {"num_words": 0}])
def test_settings_out_of_range_are_refused(setting) -> None:
    """The error names the setting."""
    with pytest.raises(InvalidRequestError, match=next(iter(setting))):
        HybridEncoder(BlindEncoder(), **setting)


def test_a_vector_of_meaning_alone_scores_as_meaning_does() -> None:
    """An adapter that came with an embedding by the encoder that words are added to is found beside others."""
    encoder = HybridEncoder(BlindEncoder(), weight=3.0)
    vector = encoder.without_words(np.array([0.6, 0.8, 0.0], dtype=np.float32))
    assert vector is not None
    assert encoder.encode(["dogs"])[0] @ vector == pytest.approx(0.6)
    assert encoder.without_words(np.ones(4, dtype=np.float32)) is None


def test_one_of_a_name_can_be_made_elsewhere() -> None:
    """Pickled, it is its recipe; one of an object of this process is what that object is."""
    encoder = HybridEncoder("some/encoder", weight=2.0, num_words=64)
    copied = pickle.loads(pickle.dumps(encoder))
    assert copied.recipe == encoder.recipe == ("some/encoder", 2.0, 64, DEFAULT_INSTRUCTION)
    assert copied.name == encoder.name
    assert HybridEncoder(BlindEncoder()).recipe is None


def test_the_default_is_mini_lm_and_words() -> None:
    """Nothing is loaded before it is needed."""
    assert default_encoder().name == f"{DEFAULT_ENCODER} + 1 x 1024 words"
    assert LoraRetriever(AdapterPool()).encoder.name == default_encoder().name
