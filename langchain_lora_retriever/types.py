"""The values that travel between the parts: adapters, routing decisions, sampling parameters.

All are frozen: a thread may hand any of them to another. None imports torch at run time.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from langchain_lora_retriever.errors import InvalidRequestError
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch

__all__ = [
    "Adapter",
    "ComposedAdapter",
    "Composition",
    "CompositionMode",
    "LoraWeights",
    "RetrievedAdapter",
    "SamplingParams",
]

CompositionMode: TypeAlias = Literal["selection", "fusion", "mixture"]

MAX_STOP_STRINGS = 256
MAX_STOP_CHARACTERS = 16_384  # of all stop strings of a request together
MAX_STOP_TOKEN_IDS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeights:
    """The low-rank update of one linear module: `y += scaling * (x @ lora_A.T) @ lora_B.T`.

    Attributes:
        lora_A: `[r, in_features]`, any float dtype, on the CPU.
        lora_B: `[out_features, r]`, same dtype.
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float

    @property
    def r(self) -> int:
        """The rank."""
        return self.lora_A.shape[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One LoRA adapter, read and validated. Two adapters are equal when their content is.

    Attributes:
        name: Name in the pool.
        fingerprint: Hex hash of configuration and weights. Caches are keyed by this, never by `name`.
        weights: Module path in the base model (`"model.layers.0.self_attn.q_proj"`) to its weights. They may be read
            from a file when they are asked for, which raises `AdapterError` if it is another by then; `dict(weights)`
            reads it once.
        base_model: `base_model_name_or_path` of the PEFT configuration, if it names one.
        path: Folder it was read from; None for one made in memory (a fusion).
        is_target: Whether its configuration targets a module of the base model, by module path; None if unknown.
        members: Of a fusion, the adapters it averages, with their weights. Its own weights are computed when they are
            asked for.
    """

    name: str = field(compare=False)
    fingerprint: str
    weights: Mapping[str, LoraWeights] = field(compare=False, repr=False)
    base_model: str | None = field(default=None, compare=False)
    path: Path | None = field(default=None, compare=False)
    is_target: Callable[[str], bool] | None = field(default=None, compare=False, repr=False)
    members: tuple[tuple[Adapter, float], ...] = field(default=(), compare=False, repr=False)
    _rank: int = field(default=0, init=False, compare=False, repr=False)

    @property
    def shapes(self) -> Mapping[str, LoraWeights]:
        """`weights` for shapes, dtypes and scalings alone, without reading a file: tensors may be on meta."""
        shapes: Mapping[str, LoraWeights] = getattr(self.weights, "shapes", self.weights)
        return shapes

    @property
    def rank(self) -> int:
        """Largest rank over the modules."""
        if not self._rank:  # counted once: that takes two milliseconds where weights are mapped from a file
            ranks = [member.rank for member, _ in self.members] or [w.r for w in self.shapes.values()]
            object.__setattr__(self, "_rank", max(ranks))
        return self._rank

    @property
    def num_parameters(self) -> int:
        """Number of weights in all `lora_A` and `lora_B`."""
        return sum(w.lora_A.numel() + w.lora_B.numel() for w in self.shapes.values())


@dataclass(frozen=True, slots=True)
class RetrievedAdapter:
    """An adapter found for a text.

    Attributes:
        name: Name in the pool.
        score: Cosine similarity in [-1, 1].
    """

    name: str
    score: float


@dataclass(frozen=True, slots=True)
class ComposedAdapter:
    """One member of a composition.

    Attributes:
        name: Name in the pool.
        weight: Its share; the weights of a composition sum to 1.
        score: Cosine similarity that retrieved it; None when the caller pinned it.
    """

    name: str
    weight: float
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Composition:
    """What to run for a prompt: a mode and a short list of weighted adapters.

    No adapters means that the base model answers alone.

    Source: LoraRetriever, arXiv:2402.09997, section 3.3.
    """

    mode: CompositionMode
    adapters: tuple[ComposedAdapter, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, best first."""
        return tuple(adapter.name for adapter in self.adapters)

    def to_metadata(self) -> dict[str, Any]:
        """`{"composition": mode, "adapters": [{"name", "score", "weight"}, ...]}`, JSON-ready."""
        return {
            "composition": self.mode,
            "adapters": [{"name": a.name, "score": a.score, "weight": a.weight} for a in self.adapters],
        }


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it. Finite and >= 0; below 1e-5 and above 1e30 it
            counts as these.
        top_k: Keep the `top_k` most probable tokens; 0 keeps all, as any number does that the vocabulary does not have.
        top_p: Keep the smallest set of tokens whose probability reaches `top_p`, in (0, 1].
        seed: Makes a sampled answer repeatable, whatever else is in the batch; None draws a fresh one. Any
            integer; its lowest 63 bits count.
        max_tokens: Most tokens to generate, >= 1; the model's context may allow fewer.
        stop: Strings that end the answer; they are not part of it. At most 256, of 16,384 characters together. One may
            be or contain a special token, though these are left out of the text.
        stop_token_ids: Tokens that end the answer beside the model's own end-of-sequence tokens; their text is not part
            of it. At most 1,024.
        repetition_penalty: Divides positive logits of tokens that prompt or answer have already, multiplies negative
            ones; from 0.01 to 100, and 1 does nothing. None takes what the model's `generation_config` says.
        ignore_eos: Generate on past the end-of-sequence token (for benchmarks).
        logprobs: None for none; n >= 0 for the chosen token's and the n likeliest ones', before any penalty.
        skip_special_tokens: Leave special tokens out of the text.

    Raises:
        InvalidRequestError: If a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    repetition_penalty: float | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Refuse values that no sampler can honour."""
        _require(_is_number(self.temperature) and self.temperature >= 0,
                 "temperature", self.temperature, "a finite number >= 0; 0 is greedy")  # fmt: skip
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "an integer >= 0; 0 keeps all")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        _require(self.seed is None or _is_int(self.seed), "seed", self.seed, "an integer or None")
        _require(_is_int(self.max_tokens) and self.max_tokens >= 1,
                 "max_tokens", self.max_tokens, "an integer >= 1")  # fmt: skip
        _require(isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
                 "stop", self.stop, "a tuple of non-empty strings")  # fmt: skip
        num_characters = sum(map(len, self.stop))
        _require(len(self.stop) <= MAX_STOP_STRINGS and num_characters <= MAX_STOP_CHARACTERS,
                 "stop", self.stop, f"at most {MAX_STOP_STRINGS} strings of {MAX_STOP_CHARACTERS:,} characters "
                 f"together; these are {len(self.stop):,} of {num_characters:,}")  # fmt: skip
        _require(isinstance(self.stop_token_ids, tuple) and is_stop_token_ids(self.stop_token_ids),
                 "stop_token_ids", self.stop_token_ids,
                 f"a tuple of at most {MAX_STOP_TOKEN_IDS:,} token ids, integers >= 0")  # fmt: skip
        _require(self.repetition_penalty is None or is_repetition_penalty(self.repetition_penalty),
                 "repetition_penalty", self.repetition_penalty, "a number from 0.01 to 100, or None")  # fmt: skip
        _require(self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= 20),
                 "logprobs", self.logprobs, "an integer from 0 to 20, or None")  # fmt: skip
        for name in ("ignore_eos", "skip_special_tokens"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")


def is_repetition_penalty(value: object) -> bool:
    """Whether logits can be divided by and multiplied with it."""
    return _is_number(value) and 0.01 <= value <= 100  # type: ignore[operator]


def is_stop_token_ids(value: Sequence[object]) -> bool:
    """Whether these are token ids, and no more of them than a request may have."""
    return len(value) <= MAX_STOP_TOKEN_IDS and all(_is_int(i) and 0 <= i < 2**63 for i in value)  # type: ignore[operator]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise InvalidRequestError(f"{name}={shown(value)} is not allowed: pass {allowed}.")
