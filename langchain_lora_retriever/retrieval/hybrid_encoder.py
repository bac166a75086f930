"""An encoder that sees words as well as meaning."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.retrieval.encoder import (
    DEFAULT_ENCODER,
    DEFAULT_INSTRUCTION,
    SentenceTransformerEncoder,
)
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from langchain_lora_retriever.retrieval.encoder import Encoder

__all__ = ["HybridEncoder", "default_encoder"]

_WORD = re.compile(r"\w+|[^\w\s]")
_MAX_WEIGHT, _MAX_NUM_WORDS = 1_000_000, 1 << 20


def default_encoder() -> HybridEncoder:
    """Make the encoder that retrievers use unless they are given another: MiniLM, and words."""
    return HybridEncoder(DEFAULT_ENCODER)


class HybridEncoder:
    """Appends to an encoder's vectors which words and marks a text holds.

    Prompts for one adapter often share a template, whose words a sentence encoder blurs. In the mean over an adapter's
    samples the words of the template add up and those of the subject matter cancel out.

    Semantics:
        words[h(w) mod num_words] += sign(w) for every distinct word or punctuation mark w; scaled to length 1
        encode(text) = normalize(encoder(text) ++ sqrt(weight) * words)

    Args:
        encoder: A sentence-transformers name or folder, or an encoder.
        weight: How much words count against meaning.
        num_words: Length of the part for words; several words may share a place.
        instruction: Text whose words do not count, where a text starts with it.

    Raises:
        InvalidRequestError: If an argument is out of its range.
    """

    def __init__(
        self,
        encoder: str | Path | Encoder,
        *,
        weight: float = 1.0,
        num_words: int = 1024,
        instruction: str = DEFAULT_INSTRUCTION,
    ) -> None:
        if not isinstance(weight, int | float) or not 0 < weight <= _MAX_WEIGHT:
            raise InvalidRequestError(
                f"weight={shown(weight)} is not allowed: pass a number above 0, at most {_MAX_WEIGHT}."
            )
        if not isinstance(num_words, int) or not 1 <= num_words <= _MAX_NUM_WORDS:
            raise InvalidRequestError(
                f"num_words={shown(num_words)} is not allowed: pass an integer from 1 to {_MAX_NUM_WORDS}."
            )
        if not isinstance(instruction, str):
            raise InvalidRequestError(f"instruction={shown(instruction)} is not allowed: pass a string.")
        self._source = encoder
        self.meaning: Encoder = SentenceTransformerEncoder(encoder) if isinstance(encoder, str | Path) else encoder
        self._weight = weight
        self.num_words = num_words
        self._instruction = instruction

    def __reduce__(self) -> tuple[Callable[..., HybridEncoder], tuple[object, ...]]:
        """Made anew where it is unpickled, if it was made of a name or a folder, or of what can be pickled."""
        return _make, (self._source, self._weight, self.num_words, self._instruction)

    @property
    def recipe(self) -> tuple[str, float, int, str] | None:
        """What another of the same kind is made of; None if that is an object of this process."""
        if not isinstance(self._source, str | Path):
            return None
        return (str(self._source), self._weight, self.num_words, self._instruction)

    @property
    def name(self) -> str:
        """The encoder's name, how much words count, and behind which instruction, unless it is the usual one."""
        weight = f"{self._weight:g}"
        weight = weight if float(weight) == self._weight else repr(self._weight)
        behind = "" if self._instruction == DEFAULT_INSTRUCTION else f" behind {self._instruction!r}"
        return f"{self.meaning.name} + {weight} x {self.num_words} words{behind}"

    @property
    def dimension(self) -> int:
        """Length of a vector: the encoder's and `num_words`."""
        return self.meaning.dimension + self.num_words

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts, `[len(texts), d]` float32, each row of length 1."""
        words = np.zeros((len(texts), self.num_words), dtype=np.float32)
        for row, text in zip(words, texts, strict=True):
            for word in set(_WORD.findall(text.removeprefix(self._instruction))):
                code = zlib.crc32(word.encode())  # the same in every process, unlike hash()
                row[code % self.num_words] += 1 if code >> 20 & 1 else -1
        words *= self._weight**0.5 / np.maximum(np.linalg.norm(words, axis=1, keepdims=True), 1e-12)
        vectors = np.concatenate([self.meaning.encode(texts), words], axis=1)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def without_words(self, vector: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """A vector `[d]` of the encoder that words are added to, as one of this encoder; None if its length is another.

        Its score for a text is that of meaning alone.

        Args:
            vector: Of length 1.
        """
        if vector.shape != (self.meaning.dimension,):
            return None
        scaled = vector * (1 + self._weight) ** 0.5
        return np.concatenate([scaled, np.zeros(self.num_words)]).astype(np.float32)


def _make(encoder: str | Path | Encoder, weight: float, num_words: int, instruction: str) -> HybridEncoder:
    return HybridEncoder(encoder, weight=weight, num_words=num_words, instruction=instruction)
