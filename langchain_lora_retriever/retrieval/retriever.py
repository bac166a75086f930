"""Text to the adapters whose training data looks like it.

Source: LoraRetriever, arXiv:2402.09997, section 3.2.
"""

from __future__ import annotations

import logging
import math
import pickle
import threading
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NoReturn, Self, TypeAlias, TypeVar

import numpy as np

from langchain_lora_retriever.errors import (
    AdapterError,
    EncoderError,
    InvalidAdapterError,
    InvalidRequestError,
    InvalidSamplesError,
    LoraRetrieverError,
    fresh,
)
from langchain_lora_retriever.retrieval.arrival import SharedWork
from langchain_lora_retriever.retrieval.encoder import (
    DEFAULT_ENCODER,
    DEFAULT_INSTRUCTION,
    Encoder,
    SentenceTransformerEncoder,
    cut_middle,
)
from langchain_lora_retriever.retrieval.hybrid_encoder import HybridEncoder, default_encoder
from langchain_lora_retriever.retrieval.index import AdapterIndex
from langchain_lora_retriever.retrieval.label_penalty import LabelPenalty
from langchain_lora_retriever.retrieval.micro_batcher import MicroBatcher, Outcome
from langchain_lora_retriever.retrieval.vector_cache import AdapterVectors, Mean, TextVectors
from langchain_lora_retriever.support.forking import begin_in_every_process
from langchain_lora_retriever.support.native_memory import give_back_freed
from langchain_lora_retriever.support.nesting import check_unicode
from langchain_lora_retriever.support.progress import Progress
from langchain_lora_retriever.support.shown import shown
from langchain_lora_retriever.support.warn import warn
from langchain_lora_retriever.types import RetrievedAdapter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from langchain_lora_retriever.pool.pool import AdapterPool, PoolEntry, PoolState
    from langchain_lora_retriever.pool.task import TaskEntry

    Routed: TypeAlias = PoolEntry | TaskEntry

__all__ = ["DEFAULT_ENCODER", "DEFAULT_INSTRUCTION", "LoraRetriever"]

_logger = logging.getLogger(__name__)

T = TypeVar("T")
Vectors: TypeAlias = "NDArray[np.float32]"

_NUM_CANDIDATES = 32
"""Adapters whose answers are looked at, the nearest by cosine."""
_MAX_CHARACTERS = 1 << 17
"""Of a longer text the middle is not looked at: no encoder reads it, and it would take all the others' time."""
_MAX_SAMPLES = 256
"""Samples of an adapter that are looked at; of more, so many spread evenly over them."""
_NUM_TEXTS_AT_ONCE = 64
"""Samples that are embedded in one pass; prompts that wait come between two."""
_NUM_TEXTS_TOGETHER = 4096
"""Samples of neighbouring adapters that are sorted by length and embedded before their means are taken."""
_MIN_SAMPLES_OF_FLOOR = 5
_FLOOR_DEVIATIONS = 3.0
_MAX_ANSWER_WEIGHT = 1000
_SETTINGS = frozenset({"pool", "encoder", "instruction", "min_score", "answer_weight"})


@dataclass(frozen=True, slots=True)
class _View:
    """What a retriever knows of one version of its pool. Replaced as a whole, so that readers need no lock."""

    state: PoolState | None
    index: AdapterIndex | None
    fits: Mapping[str, LabelPenalty]
    floors: Mapping[str, float]
    rejected: Mapping[str, AdapterError]

    @property
    def version(self) -> int:
        """The pool's version; -1 before it was looked at."""
        return -1 if self.state is None else self.state.version


class LoraRetriever:
    """Finds the adapters of a pool for texts, and follows the pool's changes. Any thread or event loop may call it.

    Adapters that this encoder cannot find are left out, and stand in `rejected`; the pool keeps them, for other
    retrievers and to be pinned. Settings are fixed: for others, make another retriever of the same pool.

    Semantics:
        embedding(text)    = E(instruction + text)
        embedding(adapter) = normalised mean over its samples' inputs of embedding(input), or the one it came with
        score              = cosine(embedding(text), embedding(adapter)) - answer_weight * lack(text, adapter)
        lack               = how much the text lacks of the answers that the adapter's samples offer (`LabelPenalty`)
        Of a text above 131,072 characters the middle is left out; of more than 256 samples 256 count, spread evenly.
        An adapter that a model card's words describe has the mean over these, without instruction, of meaning alone.

    Args:
        pool: The adapters.
        encoder: A sentence-transformers name or folder, or an `Encoder`; by default `default_encoder()`.
        instruction: Put before every text and sample.
        min_score: Adapters below it are not returned; with none left the base model answers alone. "auto" sets one for
            each adapter, by its own samples: three standard deviations below what they score on average, each without
            itself. Adapters of fewer than five samples have none.
        answer_weight: How much an adapter loses whose answers a text does not offer; 0 scores by cosine alone.
        cache_size: How many texts' embeddings are kept, in 64 MiB at most.
        cache_dir: Folder that keeps adapters' embeddings for the next start; None keeps none. Use it only
            with an encoder whose name changes whenever its weights do.

    Raises:
        InvalidRequestError: If a setting is out of range; also later, if one is assigned.
    """

    def __init__(
        self,
        pool: AdapterPool,
        encoder: str | Path | Encoder | None = None,
        *,
        instruction: str = DEFAULT_INSTRUCTION,
        min_score: float | Literal["auto"] | None = None,
        answer_weight: float = 0.0,
        cache_size: int = 4096,
        cache_dir: str | Path | None = None,
    ) -> None:
        if pool is None or isinstance(pool, str | Path):
            raise InvalidRequestError(f"pool={shown(pool)} is not allowed: pass an AdapterPool, AdapterPool(folder).")
        if not isinstance(instruction, str):
            raise InvalidRequestError(f"instruction={shown(instruction)} is not allowed: pass a string.")
        if not (min_score is None or min_score == "auto" or (_is_number(min_score) and -1 <= min_score <= 1)):
            raise InvalidRequestError(
                f"min_score={shown(min_score)} is not allowed: pass a number from -1 to 1, 'auto', or None."
            )
        if not (_is_number(answer_weight) and 0 <= answer_weight <= _MAX_ANSWER_WEIGHT):
            raise InvalidRequestError(
                f"answer_weight={shown(answer_weight)} is not allowed: pass a number from 0 to {_MAX_ANSWER_WEIGHT}."
            )
        if not isinstance(cache_size, int) or cache_size < 0:
            raise InvalidRequestError(f"cache_size={shown(cache_size)} is not allowed: pass 0 or more texts.")
        if encoder is None:
            encoder = default_encoder()
        if not isinstance(encoder, str | Path) and not callable(getattr(encoder, "encode", None)):
            raise InvalidRequestError(
                f"encoder={shown(encoder)} is not allowed: pass a sentence-transformers name or folder, or an Encoder."
            )
        if cache_dir is not None and (not isinstance(cache_dir, str | Path) or "\0" in str(cache_dir)):
            raise InvalidRequestError(f"cache_dir={shown(cache_dir)} is not allowed: pass a folder, or None.")
        check_unicode(instruction, "The instruction")
        check_unicode(str(cache_dir), "cache_dir")
        self.pool = pool
        self.encoder: Encoder = SentenceTransformerEncoder(encoder) if isinstance(encoder, str | Path) else encoder
        self.instruction = instruction
        self.min_score = min_score
        self.answer_weight = answer_weight
        self._batcher = MicroBatcher(self._encode)
        self._texts = TextVectors(cache_size)
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._view = _View(None, None, {}, {}, {})
        begin_in_every_process(self._begin)

    def _begin(self) -> None:
        self._refresh_lock = threading.Lock()  # one thread follows the pool
        self._refreshing = SharedWork(lambda: self._batcher.executor.submit(self.refresh))

    def __setattr__(self, name: str, value: object) -> None:
        if name in _SETTINGS and name in self.__dict__:
            raise InvalidRequestError(
                f"retriever.{name} cannot be assigned: what was embedded and cached follows from it, and other chat "
                f"models may share this retriever. Make another one: LoraRetriever(pool, encoder, {name}=...)."
            )
        super().__setattr__(name, value)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Itself: settings are fixed, and nothing is to be embedded again."""
        return self

    def __reduce__(self) -> NoReturn:
        raise pickle.PicklingError(
            "A LoraRetriever cannot be pickled: its pool, its encoder and what they made live in this process. "
            "Make one where it is needed: LoraRetriever(AdapterPool(path), encoder), with cache_dir=... to embed once."
        )

    @property
    def rejected(self) -> Mapping[str, AdapterError]:
        """Why adapters cannot be found with this encoder, by name; as of the last query or `refresh`."""
        return MappingProxyType(self._view.rejected)

    @cached_property
    def _dimension(self) -> int:
        try:
            dimension = int(self.encoder.dimension)
        except LoraRetrieverError:
            raise
        except Exception as error:
            raise EncoderError(f"The encoder {self.encoder.name!r} does not tell its dimension: {error}") from error
        if dimension < 1:
            raise EncoderError(f"The encoder {self.encoder.name!r} has dimension {dimension}; allowed is 1 or more.")
        return dimension

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
            InvalidRequestError: If `top_k` < 1, or the text is no string or no Unicode.
            UnknownAdapterError: If `exclude` names an adapter that is not in the pool.
            EncoderError: If the encoder cannot be loaded, or fails over the text.
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
        texts = _accept(texts)
        exclusions = self._check(len(texts), top_k, exclude)
        vectors = self.embed(texts)
        self.refresh()
        return self._search(texts, vectors, top_k, exclusions)

    async def aretrieve(self, text: str, *, top_k: int = 3, exclude: Collection[str] = ()) -> list[RetrievedAdapter]:
        """`retrieve` without blocking the event loop; concurrent calls are embedded together."""
        texts = _accept([text])
        exclusions = self._check(1, top_k, exclude)
        vectors = self._texts.get(texts)
        if not vectors:
            vectors = self._remember(texts, await self._batcher.arun(texts))
        for _ in range(2):  # what was under way already may have looked before the last change
            if self._view.version != self.pool.version:
                await self._refreshing.join()
        return self._search(texts, vectors[texts[0]][None], top_k, exclusions)[0]

    async def aprepare(self, texts: Sequence[str]) -> None:
        """Embed together texts that are about to be asked for, if the cache has room for them.

        Those that cannot be embedded are left to their own calls, which meet the same fault.
        """
        texts = _accept(texts)
        known = self._texts.get(texts)
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing and len(missing) <= self._texts.max_texts // 2:  # those of the last call may still be needed
            outcomes = zip(missing, await self._batcher.arun(missing), strict=True)
            self._texts.put({text: made for text, made in outcomes if not isinstance(made, BaseException)})

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Embed texts, the instruction before each, as queries are.

        Returns:
            `[len(texts), d]`, float32, each row of length 1.

        Raises:
            InvalidRequestError: If a text is no string or no Unicode.
            EncoderError: If the encoder cannot be loaded, or fails over one of the texts.
        """
        texts = _accept(texts)
        if not texts:
            return np.empty((0, self._dimension), dtype=np.float32)
        vectors = self._texts.get(texts)
        # Texts of one length together, so that little is padded.
        missing = sorted((text for text in dict.fromkeys(texts) if text not in vectors), key=len)
        if missing:
            vectors |= self._remember(missing, self._batcher.run(missing))
        return np.stack([vectors[text] for text in texts])

    def forget_texts(self) -> None:
        """Forget the texts' embeddings that are kept; the adapters' stay."""
        self._texts.clear()

    def adapter_vectors(self, names: Collection[str] | None = None) -> dict[str, Vectors]:
        """The embeddings `[d]`, of length 1, of the adapters that can be found (of these names, if given), by name."""
        self.refresh()
        index = self._view.index
        if index is None:
            return {}
        wanted = index.names if names is None else (name for name in names if name in index)
        return {name: index.vector(name) for name in sorted(wanted)}

    def floor(self, name: str) -> float:
        """The least score at which `min_score="auto"` takes a text for one of an adapter's kind, as of the last query.

        -inf of adapters of fewer than five samples, and of those that came with an embedding or have a card alone.
        """
        return self._view.floors.get(name, -math.inf)

    def refresh(self) -> None:
        """Follow the pool now: embed what is new or changed in it, and forget what is gone. Every query does.

        Raises:
            EncoderError: If the encoder fails over every text, samples or not. Nothing is changed.
        """
        if self._view.version == self.pool.version:
            return
        with self._refresh_lock:
            old, state = self._view, self.pool.state
            if old.version == state.version:
                return
            known = old.state.routed if old.state is not None else lambda _: None
            names = state.changed_since(old.version)
            if names is None:
                before = old.index.names if old.index else ()
                names = frozenset().union(state.entries, state.tasks, before, old.rejected)
            entries = {name: state.routed(name) for name in sorted(names)}
            there = {name: entry for name, entry in entries.items() if entry is not None}
            vectors, floors, refused = self._embed_adapters(
                {n: entry for n, entry in there.items() if n in old.rejected or not _found_alike(known(n), entry)}
            )
            gone = {name for name in entries if name not in there}
            rejected = {n: e for n, e in old.rejected.items() if n not in gone and n not in vectors} | refused
            index = AdapterIndex(self._dimension, num_sparse=self._num_words) if old.index is None else old.index.copy()
            index.remove(gone | refused.keys())
            index.update(list(vectors), np.array(list(vectors.values()), np.float32).reshape(-1, self._dimension))
            fits: Mapping[str, LabelPenalty] = {}
            if self.answer_weight:
                new = {n: LabelPenalty(_spread(e.samples)) for n, e in there.items() if e is not known(n)}
                fits = {name: fit for name, fit in {**old.fits, **new}.items() if name in index}
            floors = {name: floor for name, floor in {**old.floors, **floors}.items() if name in index}
            self._view = _View(state, index, fits, floors, rejected)
        for error in refused.values():
            warn(_logger, f"not found by prompts: {error}", stacklevel=3)

    @property
    def _num_words(self) -> int:
        """How many of a vector's last numbers are for words."""
        return self.encoder.num_words if isinstance(self.encoder, HybridEncoder) else 0

    def _encode(self, texts: Sequence[str]) -> Vectors:
        made = self.encoder.encode([self.instruction + text for text in texts])
        return _unit_rows(made, len(texts), self._dimension)

    def _remember(self, texts: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Vectors]:
        """Keep the vectors made; raise the first error there is, in this call's own name."""
        made = {t: v for t, v in zip(texts, outcomes, strict=True) if not isinstance(v, BaseException)}
        self._texts.put(made)
        for outcome in outcomes:
            if isinstance(outcome, LoraRetrieverError):
                raise fresh(outcome)
            if isinstance(outcome, BaseException):
                raise EncoderError(self._failure(outcome)) from outcome
        return made

    def _failure(self, error: BaseException) -> str:
        return f"The encoder {self.encoder.name!r} failed over a text: {type(error).__name__}: {str(error)[:500]}"

    def _check(
        self, num_texts: int, top_k: int, exclude: Collection[str] | Sequence[Collection[str]]
    ) -> list[frozenset[str]]:
        if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
            raise InvalidRequestError(f"top_k={shown(top_k)} is not allowed: pass an integer of 1 or more.")
        if _are_names(exclude):
            exclusions = [frozenset(str(name) for name in exclude)] * num_texts
        elif isinstance(exclude, Sequence) and not isinstance(exclude, str) and all(map(_are_names, exclude)):
            exclusions = [frozenset(names) for names in exclude]
            if len(exclusions) != num_texts:
                raise InvalidRequestError(f"exclude is for {len(exclusions)} texts, but there are {num_texts}.")
        else:
            raise InvalidRequestError(
                f"exclude={shown(exclude)} is not allowed: pass a collection of names, or a list of such collections, "
                "one for each text."
            )
        state = self.pool.state
        for name in frozenset().union(*exclusions):
            if name not in state.entries and name not in state.tasks:
                state[name]
        return exclusions

    def _search(
        self, texts: Sequence[str], queries: Vectors, top_k: int, exclude: Sequence[frozenset[str]]
    ) -> list[list[RetrievedAdapter]]:
        view = self._view
        if view.index is None:
            return [[] for _ in texts]
        # An adapter can only lose by its answers, so those to choose from are a few more than are wanted.
        fetch = top_k if not self.answer_weight else max(_NUM_CANDIDATES, 2 * top_k)
        found = view.index.search(queries, top_k=fetch, exclude=exclude)
        if self.answer_weight:
            found = [self._weigh(text, row, view.fits)[:top_k] for text, row in zip(texts, found, strict=True)]
        # Six digits: the last bits of a score depend on what else was embedded in the same batch.
        results = [[RetrievedAdapter(name, round(score, 6)) for name, score in row] for row in found]
        if self.min_score is not None:
            results = [[adapter for adapter in row if self._is_near(adapter, view)] for row in results]
        return results

    def _is_near(self, adapter: RetrievedAdapter, view: _View) -> bool:
        floor = view.floors.get(adapter.name, -math.inf) if self.min_score == "auto" else self.min_score
        return floor is None or adapter.score >= floor

    def _weigh(
        self, text: str, found: Sequence[tuple[str, float]], fits: Mapping[str, LabelPenalty]
    ) -> list[tuple[str, float]]:
        scored = [(name, score - self.answer_weight * fits[name].lack(text)) for name, score in found]
        return sorted(scored, key=lambda pair: (-pair[1], pair[0]))

    def _embed_adapters(
        self, entries: Mapping[str, Routed]
    ) -> tuple[dict[str, Vectors], dict[str, float], dict[str, AdapterError]]:
        """The embeddings `[d]` the adapters came with, or else the means over their samples; and who has none, why.

        Beside them the lowest scores at which "auto" still takes them for near.
        """
        kept = {} if self._saved is None else self._saved.load()
        known = {key: mean for key, mean in kept.items() if mean.vector.shape == (self._dimension,)}
        vectors: dict[str, Vectors] = {}
        floors: dict[str, float] = {}
        refused: dict[str, AdapterError] = {}
        waiting: dict[str, Routed] = {}
        for name, entry in entries.items():
            key = entry.routing_hash
            if entry.embedding is not None:
                adopted = self._adopt(entry, entry.embedding)
                if adopted is not None:
                    vectors[name], floors[name] = adopted, -math.inf
                else:
                    refused[name] = self._misfit(entry, entry.embedding)
            elif key in known:
                vectors[name], floors[name] = known[key]
            else:
                waiting[name] = entry
        made: dict[str, Mean] = {}
        for name, mean in self._means(waiting):
            if isinstance(mean, AdapterError):
                refused[name] = mean
            else:
                vectors[name], floors[name] = made[waiting[name].routing_hash] = mean
        if made:
            give_back_freed()
        if self._saved is not None and made:
            self._saved.save(known | made)
        if any(isinstance(error, InvalidSamplesError) for error in refused.values()):
            self._remember(["text"], self._batcher.run(["text"]))  # raises if it is the encoder that is at fault
        return vectors, floors, refused

    def _means(self, entries: Mapping[str, Routed]) -> Iterator[tuple[str, Mean | AdapterError]]:
        """The normalised mean of each adapter's samples, or the error of the first that cannot be embedded.

        Equal texts are embedded once, of whichever adapters they are.
        """
        shortened = {n: [cut_middle(t, _MAX_CHARACTERS) for t in _spread(e.routing_texts)] for n, e in entries.items()}
        texts = {name: own for name, own in shortened.items() if entries[name].samples}
        kept = TextVectors(1 << 20)
        with Progress("Embedding samples", sum(map(len, texts.values())), _logger) as progress:
            for group in _grouped(texts):
                wanted = [text for name in group for text in texts[name]]
                outcomes: dict[str, Outcome] = {**kept.get(wanted)}
                # Texts of one length together, so that little is padded.
                missing = sorted((text for text in dict.fromkeys(wanted) if text not in outcomes), key=len)
                progress.update(len(wanted) - len(missing))
                for start in range(0, len(missing), _NUM_TEXTS_AT_ONCE):
                    part = missing[start : start + _NUM_TEXTS_AT_ONCE]
                    outcomes.update(zip(part, self._batcher.run(part), strict=True))
                    if all(isinstance(outcomes[text], BaseException) for text in part):
                        self._remember(["text"], self._batcher.run(["text"]))  # as above, and before all are tried
                    progress.update(len(part))
                kept.put({text: made for text, made in outcomes.items() if not isinstance(made, BaseException)})
                for name in group:
                    yield name, self._mean(name, texts[name], outcomes)
        for name in shortened.keys() - texts.keys():
            yield name, self._mean_of_card(name, shortened[name])

    def _mean(self, name: str, texts: Sequence[str], outcomes: Mapping[str, Outcome]) -> Mean | AdapterError:
        vectors = []
        for text in texts:
            outcome = outcomes[text]
            if isinstance(outcome, BaseException):
                return InvalidSamplesError(
                    f"adapter {name!r}: its sample {text[:40]!a} cannot be embedded. {self._failure(outcome)}. "
                    "Mend the sample or leave it out."
                )
            vectors.append(outcome)
        rows = np.stack(vectors).astype(np.float64)
        return Mean(_normalise(rows.mean(axis=0)), _floor(rows))

    def _mean_of_card(self, name: str, texts: Sequence[str]) -> Mean | AdapterError:
        """The same over what a model card says: no prompt, so neither the instruction nor its words belong to it."""
        encoder = self.encoder.meaning if isinstance(self.encoder, HybridEncoder) else self.encoder
        dimension = self._dimension - self._num_words
        try:
            rows = self._batcher.alone(lambda: _unit_rows(encoder.encode(texts), len(texts), dimension))
        except LoraRetrieverError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever an encoder raises over a text
            return InvalidSamplesError(
                f"adapter {name!r}: its model card cannot be embedded. {self._failure(error)}. Give it samples."
            )
        mean = _normalise(rows.mean(axis=0))
        whole = self.encoder.without_words(mean) if isinstance(self.encoder, HybridEncoder) else mean
        assert whole is not None, "it is one of the encoder's own"
        return Mean(whole, -math.inf)

    def _adopt(self, entry: Routed, embedding: Vectors) -> Vectors | None:
        """The embedding an adapter came with, as this encoder's; None if it cannot be; warns of another encoder's name.

        A `HybridEncoder` takes one of the encoder that it adds words to.
        """
        name = self.encoder.name
        vector: Vectors | None = embedding if embedding.size == self._dimension else None
        if vector is None and isinstance(self.encoder, HybridEncoder):
            name, vector = self.encoder.meaning.name, self.encoder.without_words(embedding)
        if vector is not None and entry.encoder not in (None, name):
            warnings.warn(
                f"adapter {entry.name!r} came with an embedding by {entry.encoder!r}; the encoder here is {name!r}. If "
                "they are not the same model, its scores mean nothing.",
                stacklevel=2,
            )
        return vector

    def _misfit(self, entry: Routed, embedding: Vectors) -> InvalidAdapterError:
        return InvalidAdapterError(
            f"adapter {entry.name!r} came with an embedding of {embedding.size} numbers"
            f"{f' by {entry.encoder!r}' if entry.encoder else ''}, but the encoder {self.encoder.name!r} "
            f"makes {self._dimension}. Use the encoder it was made with, or give it samples."
        )


def _floor(rows: NDArray[np.float64]) -> float:
    """The score of samples `[n, d]` with the mean of the others, less three standard deviations; none of a few."""
    if len(rows) < _MIN_SAMPLES_OF_FLOOR:
        return -math.inf
    scores = (rows * _normalise(rows.sum(axis=0) - rows)).sum(axis=1)
    return float(scores.mean() - _FLOOR_DEVIATIONS * scores.std())


def _accept(texts: object) -> list[str]:
    """Refuse what is no list of Unicode texts; leave out the middles of those that are too long."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError(f"texts={shown(texts)} is not allowed: pass a sequence of strings.")
    for text in texts:
        check_unicode(text, "The text to retrieve for")
    return [cut_middle(text, _MAX_CHARACTERS) for text in texts]


def _are_names(value: object) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(i, str) for i in value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _spread(samples: Sequence[T]) -> Sequence[T]:
    """At most `_MAX_SAMPLES` of them, evenly spread."""
    if len(samples) <= _MAX_SAMPLES:
        return samples
    return [samples[i * len(samples) // _MAX_SAMPLES] for i in range(_MAX_SAMPLES)]


def _grouped(texts: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    """The names in their order, in groups of so many texts together, and of one adapter at least."""
    group: list[str] = []
    num_texts = 0
    for name, own in texts.items():
        if group and num_texts + len(own) > _NUM_TEXTS_TOGETHER:
            yield group
            group, num_texts = [], 0
        group.append(name)
        num_texts += len(own)
    if group:
        yield group


def _found_alike(old: Routed | None, new: Routed) -> bool:
    return old is not None and (old is new or old.routing_hash == new.routing_hash)


def _unit_rows(made: object, num: int, dimension: int) -> Vectors:
    """What an encoder made of `num` texts, each row scaled to length 1.

    Raises:
        ValueError: If it is not `[num, dimension]`, or not finite.
    """
    vectors = np.asarray(made, dtype=np.float32)
    if vectors.shape != (num, dimension) or not np.isfinite(vectors).all():
        raise ValueError(
            f"it made an array of shape {vectors.shape} for {num} texts; "
            f"allowed is {(num, dimension)}, all numbers finite."
        )
    return _normalise(vectors)


def _normalise(vectors: NDArray[np.float32] | NDArray[np.float64]) -> Vectors:
    """Scale the last axis to length 1; zeros stay zeros."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=-1, keepdims=True)  # squares of float32 may overflow it
    scaled: Vectors = (vectors / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)
    return scaled
