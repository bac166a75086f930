"""Text to the adapters whose training data looks like it.

Source: LoraRetriever, arXiv:2402.09997, section 3.2.
"""

from __future__ import annotations

import asyncio
import math
import threading
import warnings
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from langchain_lora_retriever.answer_fit import AnswerFit
from langchain_lora_retriever.encoder import DEFAULT_ENCODER, DEFAULT_INSTRUCTION, Encoder, SentenceTransformerEncoder
from langchain_lora_retriever.errors import InvalidAdapterError, InvalidRequestError
from langchain_lora_retriever.index import AdapterIndex
from langchain_lora_retriever.micro_batcher import MicroBatcher
from langchain_lora_retriever.types import RetrievedAdapter
from langchain_lora_retriever.vector_cache import AdapterVectors, TextVectors

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from langchain_lora_retriever.pool import AdapterPool, PoolEntry

__all__ = ["DEFAULT_ENCODER", "DEFAULT_INSTRUCTION", "LoraRetriever"]

Vectors: TypeAlias = "NDArray[np.float32]"

_NUM_CANDIDATES = 32
"""Adapters whose answers are looked at, the nearest by cosine."""


class LoraRetriever:
    """Finds the adapters of a pool for texts, and follows the pool's changes. Any thread or event loop may call it.

    Semantics:
        embedding(text)    = E(instruction + text)
        embedding(adapter) = normalised mean over its samples' inputs of embedding(input), or the one it came with
        score              = cosine(embedding(text), embedding(adapter)) - answer_weight * lack(text, adapter)
        lack               = how much the text lacks of the answers that the adapter's samples offer (`AnswerFit`)

    Args:
        pool: The adapters.
        encoder: A sentence-transformers name or folder, or an `Encoder`.
        instruction: Put before every text and sample.
        min_score: Adapters below it are not returned; with none left the base model answers alone.
        answer_weight: How much an adapter loses whose answers a text does not offer; 0 scores by cosine alone.
        cache_size: How many texts' embeddings are kept.
        cache_dir: Folder that keeps adapters' embeddings for the next start; None keeps none. Use it only
            with an encoder whose name changes whenever its weights do.

    Raises:
        InvalidRequestError: If `min_score`, `answer_weight` or `cache_size` is out of range.
    """

    def __init__(
        self,
        pool: AdapterPool,
        encoder: str | Path | Encoder = DEFAULT_ENCODER,
        *,
        instruction: str = DEFAULT_INSTRUCTION,
        min_score: float | None = None,
        answer_weight: float = 0.0,
        cache_size: int = 4096,
        cache_dir: str | Path | None = None,
    ) -> None:
        if min_score is not None and not -1 <= min_score <= 1:
            raise InvalidRequestError(f"min_score={min_score!r} is not allowed: pass a number from -1 to 1, or None.")
        if not 0 <= answer_weight < math.inf:
            raise InvalidRequestError(f"answer_weight={answer_weight!r} is not allowed: pass a finite number >= 0.")
        if cache_size < 0:
            raise InvalidRequestError(f"cache_size={cache_size!r} is not allowed: pass 0 or more texts.")
        self.pool = pool
        self.encoder: Encoder = SentenceTransformerEncoder(encoder) if isinstance(encoder, str | Path) else encoder
        self.instruction = instruction
        self.min_score = min_score
        self.answer_weight = answer_weight
        self._batcher = MicroBatcher(self._encode)
        self._texts = TextVectors(cache_size)
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._sync_lock = threading.Lock()  # one thread follows the pool; guards indexed and version
        self._index_lock = threading.Lock()  # never held while texts are embedded
        self._indexed: Mapping[str, PoolEntry] = {}
        self._fits: Mapping[str, AnswerFit] = {}
        self._version = -1

    @cached_property
    def _index(self) -> AdapterIndex:
        return AdapterIndex(self.encoder.dimension)

    @cached_property
    def _saved(self) -> AdapterVectors | None:
        if self._cache_dir is None:
            return None
        return AdapterVectors(self._cache_dir, encoder=self.encoder.name, instruction=self.instruction)

    def retrieve(self, text: str, *, top_k: int = 3, exclude: Collection[str] = ()) -> list[RetrievedAdapter]:
        """The adapters most like a text, best first.

        Args:
            text: The text.
            top_k: How many; a pool with fewer returns all it has.
            exclude: Names to leave out.

        Returns:
            At most `top_k`; [] if none reaches `min_score`.

        Raises:
            InvalidRequestError: If `top_k` < 1 or the text is not a string.
            UnknownAdapterError: If `exclude` names an adapter that is not in the pool.
        """
        return self.retrieve_batch([text], top_k=top_k, exclude=exclude)[0]

    def retrieve_batch(
        self,
        texts: Sequence[str],
        *,
        top_k: int = 3,
        exclude: Collection[str] | Sequence[Collection[str]] = (),
    ) -> list[list[RetrievedAdapter]]:
        """`retrieve` for many texts at once.

        Args:
            texts: The texts.
            top_k: How many for each.
            exclude: Names to leave out everywhere, or one collection of names per text.
        """
        exclusions = self._check(texts, top_k, exclude)
        vectors = self.embed(texts)
        self._synchronise()
        return self._search(texts, vectors, top_k, exclusions)

    async def aretrieve(self, text: str, *, top_k: int = 3, exclude: Collection[str] = ()) -> list[RetrievedAdapter]:
        """`retrieve` without blocking the event loop; concurrent calls are embedded together."""
        exclusions = self._check([text], top_k, exclude)
        vectors = self._texts.get([text])
        if not vectors:
            (vector,) = await self._batcher.arun([text])
            vectors = {text: vector}
            self._texts.put(vectors)
        if self._version != self.pool.version:
            await asyncio.wrap_future(self._batcher.executor.submit(self._synchronise))
        return self._search([text], vectors[text][None], top_k, exclusions)[0]

    async def aprepare(self, texts: Sequence[str]) -> None:
        """Embed together texts that are about to be asked for, if the cache has room for them."""
        known = self._texts.get(texts)
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing and len(missing) <= self._texts.max_texts // 2:  # those of the last call may still be needed
            self._texts.put(dict(zip(missing, await self._batcher.arun(missing), strict=True)))

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Embed texts, the instruction before each, as queries are.

        Returns:
            `[len(texts), d]`, float32, each row of length 1.
        """
        if not texts:
            return np.empty((0, self.encoder.dimension), dtype=np.float32)
        vectors = self._texts.get(texts)
        missing = [text for text in dict.fromkeys(texts) if text not in vectors]
        if missing:
            made = dict(zip(missing, self._batcher.run(missing), strict=True))
            self._texts.put(made)
            vectors |= made
        return np.stack([vectors[text] for text in texts])

    def _encode(self, texts: Sequence[str]) -> Vectors:
        vectors = np.asarray(self.encoder.encode([self.instruction + text for text in texts]), dtype=np.float32)
        if vectors.shape != (len(texts), self.encoder.dimension) or not np.isfinite(vectors).all():
            raise ValueError(
                f"the encoder {self.encoder.name!r} made an array of shape {vectors.shape} for {len(texts)} texts; "
                f"allowed is {(len(texts), self.encoder.dimension)}, all numbers finite."
            )
        return _normalise(vectors)

    def _check(
        self, texts: Sequence[str], top_k: int, exclude: Collection[str] | Sequence[Collection[str]]
    ) -> list[frozenset[str]]:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InvalidRequestError(f"texts={texts!r:.80} is not allowed: pass a sequence of strings.")
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise InvalidRequestError(f"top_k={top_k!r} is not allowed: pass an integer of 1 or more.")
        if isinstance(exclude, str):
            raise InvalidRequestError(f"exclude={exclude!r} is not allowed: pass a collection of names.")
        if all(isinstance(item, str) for item in exclude):
            exclusions = [frozenset(str(name) for name in exclude)] * len(texts)
        else:
            if any(isinstance(item, str) for item in exclude):
                raise InvalidRequestError(f"exclude={exclude!r} mixes names and collections of names: pass one kind.")
            exclusions = [frozenset(names) for names in exclude]
            if len(exclusions) != len(texts):
                raise InvalidRequestError(f"exclude is for {len(exclusions)} texts, but there are {len(texts)}.")
        state = self.pool.state
        for name in frozenset().union(*exclusions):
            if name not in state.entries:
                state[name]
        return exclusions

    def _search(
        self, texts: Sequence[str], queries: Vectors, top_k: int, exclude: Sequence[frozenset[str]]
    ) -> list[list[RetrievedAdapter]]:
        # An adapter can only lose by its answers, so those to choose from are a few more than are wanted.
        fetch = top_k if not self.answer_weight else max(_NUM_CANDIDATES, 2 * top_k)
        with self._index_lock:
            found = self._index.search(queries, top_k=fetch, exclude=exclude)
            fits = self._fits
        if self.answer_weight:
            found = [
                sorted(
                    ((name, score - self.answer_weight * fits[name].lack(text)) for name, score in row),
                    key=lambda pair: (-pair[1], pair[0]),
                )[:top_k]
                for text, row in zip(texts, found, strict=True)
            ]
        # Six digits: the last bits of a score depend on what else was embedded in the same batch.
        results = [[RetrievedAdapter(name, round(score, 6)) for name, score in row] for row in found]
        if self.min_score is not None:
            results = [[adapter for adapter in row if adapter.score >= self.min_score] for row in results]
        return results

    def _synchronise(self) -> None:
        """Bring the index up to the pool: embed what is new or changed, drop what is gone."""
        if self._version == self.pool.version:
            return
        with self._sync_lock:
            state = self.pool.state
            if self._version == state.version:
                return
            entries = {name: entry for name, entry in state.entries.items() if entry.is_described}
            for name, error in self._misfits(entries):
                del entries[name]
                self.pool.reject(name, error)
            changed = [name for name in sorted(entries) if not _found_alike(self._indexed.get(name), entries[name])]
            vectors = self._embed_adapters([entries[name] for name in changed])
            fits = {name: self._fit(name, entry) for name, entry in entries.items()} if self.answer_weight else {}
            with self._index_lock:
                self._fits = fits
                self._index.remove([name for name in self._indexed if name not in entries])
                self._index.update(changed, vectors)
            self._indexed = entries
            self._version = state.version

    def _embed_adapters(self, entries: Sequence[PoolEntry]) -> Vectors:
        """`[len(entries), d]`: the embeddings the adapters came with, or else the means over their samples."""
        known: dict[str, Vectors] = {} if self._saved is None else self._saved.load()
        vectors = np.empty((len(entries), self._index.dimension), dtype=np.float32)
        made: dict[str, Vectors] = {}
        for row, entry in enumerate(entries):
            if entry.embedding is not None:
                vectors[row] = entry.embedding
            elif entry.routing_hash in known and known[entry.routing_hash].size == self._index.dimension:
                vectors[row] = known[entry.routing_hash]
            else:
                samples = self._batcher.run([sample.input for sample in entry.samples])
                vectors[row] = made[entry.routing_hash] = _normalise(samples.mean(axis=0))
        if self._saved is not None and made:
            self._saved.save(known | made)
        return vectors

    def _fit(self, name: str, entry: PoolEntry) -> AnswerFit:
        if entry is self._indexed.get(name):
            return self._fits[name]
        return AnswerFit(entry.samples)

    def _misfits(self, entries: Mapping[str, PoolEntry]) -> list[tuple[str, InvalidAdapterError]]:
        """Adapters that came with an embedding of another size; warns about other encoders' of the same size."""
        misfits = []
        for name, entry in entries.items():
            if entry.embedding is None or entry is self._indexed.get(name):
                continue
            if entry.embedding.size != self._index.dimension:
                error = InvalidAdapterError(
                    f"adapter {name!r} came with an embedding of {entry.embedding.size} numbers"
                    f"{f' by {entry.encoder!r}' if entry.encoder else ''}, but the encoder {self.encoder.name!r} "
                    f"makes {self._index.dimension}. Use the encoder it was made with, or give it samples."
                )
                misfits.append((name, error))
            elif entry.encoder is not None and entry.encoder != self.encoder.name:
                warnings.warn(
                    f"adapter {name!r} came with an embedding by {entry.encoder!r}; the encoder here is "
                    f"{self.encoder.name!r}. If they are not the same model, its scores mean nothing.",
                    stacklevel=2,
                )
        return misfits


def _found_alike(old: PoolEntry | None, new: PoolEntry) -> bool:
    return old is not None and (old is new or old.routing_hash == new.routing_hash)


def _normalise(vectors: Vectors) -> Vectors:
    """Scale the last axis to length 1; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: Vectors = (vectors / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)
    return scaled
