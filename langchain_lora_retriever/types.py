"""The values that travel between the parts: adapters, routing decisions, sampling parameters.

All are frozen: a thread may hand any of them to another. None imports torch at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field

from langchain_lora_retriever.support.checks import settings

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
    """The low-rank update of one module: `y += scaling * (x @ lora_A.T) @ lora_B.T`.

    An embedding is a linear module whose input is the token, one-hot: its `in_features` are the vocabulary.

    Attributes:
        lora_A: `[r, in_features]`, any float dtype, on the CPU.
        lora_B: `[out_features, r]`, same dtype.
        scaling: `lora_alpha / r`, or `lora_alpha / sqrt(r)` for rsLoRA.
        magnitude: DoRA's magnitude of each output `[out_features]`: with `W` the base weight and
            `g = magnitude / norm(W + scaling * lora_B @ lora_A, dim=1)` the update is
            `y += (g - 1) * (W x) + g * scaling * lora_B @ lora_A @ x`. None is plain LoRA.

    Source: Liu et al., DoRA, arXiv:2402.09353.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

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
        invocation_tokens: Of an activated LoRA, the token ids from whose last occurrence in a prompt on it is active;
            empty for one that is active from the first token on.
    """

    name: str = field(compare=False)
    fingerprint: str
    weights: Mapping[str, LoraWeights] = field(compare=False, repr=False)
    base_model: str | None = field(default=None, compare=False)
    path: Path | None = field(default=None, compare=False)
    is_target: Callable[[str], bool] | None = field(default=None, compare=False, repr=False)
    members: tuple[tuple[Adapter, float], ...] = field(default=(), compare=False, repr=False)
    invocation_tokens: tuple[int, ...] = field(default=(), compare=False, repr=False)
    _rank: int = field(default=0, init=False, compare=False, repr=False)
    _is_dora: bool | None = field(default=None, init=False, compare=False, repr=False)

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
    def is_dora(self) -> bool:
        """Whether any of its modules has a magnitude."""
        if self._is_dora is None:
            # A fusion never is; of a file it is known without looking.
            known = False if self.members else getattr(self.weights, "is_dora", None)
            if known is None:
                known = any(w.magnitude is not None for w in self.weights.values())
            object.__setattr__(self, "_is_dora", known)
        return bool(self._is_dora)

    @property
    def num_rows(self) -> int:
        """Rank rows it takes in device memory: its rank, and one for DoRA's magnitudes."""
        return self.rank + self.is_dora

    @property
    def num_parameters(self) -> int:
        """Number of weights in all `lora_A`, `lora_B` and magnitudes."""
        shapes = self.shapes.values()
        num_magnitudes = sum(0 if w.magnitude is None else w.magnitude.numel() for w in shapes)
        return sum(w.lora_A.numel() + w.lora_B.numel() for w in shapes) + num_magnitudes

    @property
    def base_weights(self) -> Mapping[str, torch.Tensor]:
        """Weights of the base model's own that its file repeats, by module path; read when they are asked for.

        PEFT saves an embedding or an output layer that an adapter targets along with the adapter.
        """
        weights: Mapping[str, torch.Tensor] = getattr(self.weights, "base_weights", {})
        return weights


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

    def __str__(self) -> str:
        """As a log says it: `mixture of sql 0.94, dates 0.06`."""
        members = ", ".join(f"{adapter.name} {adapter.weight:.2f}" for adapter in self.adapters)
        return f"{self.mode} of {members}" if members else "the base model alone"

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


# What sampling may be asked for: `SamplingParams` and the calls of a chat model share it.
Temperature = Annotated[float, Field(ge=0, description="a finite number >= 0; 0 is greedy")]
TopK = Annotated[int, Field(ge=0, description="an integer >= 0; 0 keeps all")]
TopP = Annotated[float, Field(gt=0, le=1, description="a number in (0, 1]")]
Seed = Annotated[int | None, Field(description="an integer or None")]
MaxTokens = Annotated[int, Field(ge=1, description="an integer >= 1")]
RepetitionPenalty = Annotated[
    float | None, Field(ge=0.01, le=100, description="a number from 0.01 to 100, or None; 1 does nothing")
]
NonEmpty = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**63)]
STOP_STRINGS = Field(
    max_length=MAX_STOP_STRINGS,
    description=(
        f"a list of at most {MAX_STOP_STRINGS} non-empty strings, of {MAX_STOP_CHARACTERS:,} characters together"
    ),
)
STOP_TOKEN_IDS = Field(
    max_length=MAX_STOP_TOKEN_IDS, description=f"a list of at most {MAX_STOP_TOKEN_IDS:,} token ids, integers >= 0"
)


@AfterValidator
def are_short(texts: Sequence[str]) -> Sequence[str]:
    """Refuse stop strings that are too long together."""
    if sum(map(len, texts)) > MAX_STOP_CHARACTERS:
        raise ValueError
    return texts


@settings(slots=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it. Finite and >= 0; below 1e-5 and above 1e30 it
            counts as these.
        top_k: Keep the `top_k` most probable tokens; 0 keeps all, as any number does that the vocabulary does not have.
        top_p: Keep the smallest set of tokens whose probability reaches `top_p`, in (0, 1].
        seed: Makes a sampled answer repeatable, whatever else is in the batch; None draws a fresh one. Any
            integer; its lowest 63 bits count.
        max_tokens: Maximum number of tokens to generate, >= 1; the model's context may allow fewer.
        stop: Strings that end the answer; they are not part of it. At most 256, of 16,384 characters together. One may
            be or contain a special token, though these are left out of the text.
        stop_token_ids: Tokens that end the answer beside the model's own end-of-sequence tokens; their text is not part
            of it. At most 1,024.
        repetition_penalty: Divides positive logits of tokens that prompt or answer have already, multiplies negative
            ones; from 0.01 to 100, and 1 does nothing. None takes what the model's `generation_config` says.
        ignore_eos: Generate on past the end-of-sequence token (for benchmarks).
        logprobs: None for none; n >= 0 for the chosen token's and the n likeliest ones', before any penalty.
        prompt_logprobs_from: None for none; else the place of the first prompt token whose log-probability, given those
            before it, is reported, up to the prompt's last one. 0 counts as 1: nothing comes before the first token.
        skip_special_tokens: Leave special tokens out of the text.

    Raises:
        InvalidRequestError: If a value is out of its range.
    """

    temperature: Temperature = 0.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    seed: Seed = None
    max_tokens: MaxTokens = 256
    stop: Annotated[tuple[NonEmpty, ...], STOP_STRINGS, are_short] = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], STOP_TOKEN_IDS] = ()
    repetition_penalty: RepetitionPenalty = None
    ignore_eos: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=20, description="an integer from 0 to 20, or None")] = None
    prompt_logprobs_from: Annotated[
        int | None, Field(ge=0, description="the place of a prompt token, an integer >= 0, or None")
    ] = None
    skip_special_tokens: bool = True
