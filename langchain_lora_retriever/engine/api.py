"""The seam: what an engine is to those above it, in this process or another. Nothing here imports torch.

What crosses it is a value. Down go token ids, `SamplingParams`, a grammar as text, and adapters, which stand for their
contents: an engine goes by `Adapter.fingerprint`, reads `Adapter.weights` where it packs them, and averages a fusion
(`Adapter.members`) there too. Back come deltas, which carry all there is to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from langchain_lora_retriever.engine.generation import (
    Completion,
    Delta,
    FinishReason,
    Generation,
    TokenLogprob,
    Usage,
)
from langchain_lora_retriever.engine.stats import EngineStats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.errors import AdapterError
    from langchain_lora_retriever.types import Adapter, SamplingParams

__all__ = [
    "Completion",
    "Delta",
    "EngineClient",
    "EngineInfo",
    "EngineStats",
    "FinishReason",
    "Generation",
    "Grammar",
    "Registration",
    "TokenLogprob",
    "Usage",
]


class Grammar(NamedTuple):
    """What an answer is constrained to, as text.

    Attributes:
        text: As llguidance reads it.
        is_foreign: A caller wrote its rules, which may be ambiguous beyond measure.
        is_json: The answer is JSON, between tags or alone, and can be closed to fit the token limit.
        parts: Grammars of what JSON may begin, and must end then: the next record of a list.
    """

    text: str
    is_foreign: bool = False
    is_json: bool = False
    parts: tuple[str, ...] = ()


class Registration(NamedTuple):
    """What an engine says of an adapter.

    Attributes:
        error: Why it can never run it; None if it can.
        missing_modules: Modules that the adapter's configuration targets and its file lacks. They run as the base
            model's.
    """

    error: AdapterError | None = None
    missing_modules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What does not change while an engine runs.

    Attributes:
        name: The base model, as it was loaded.
        base_names: What the base model is known as; empty for one that was handed over without a name.
        device: Where it computes, as torch writes it: "cpu", "cuda:0".
        max_model_len: Maximum number of tokens of prompt and answer together.
        max_num_seqs: Maximum number of requests running at once.
    """

    name: str
    base_names: frozenset[str] = frozenset()
    device: str = ""
    max_model_len: int
    max_num_seqs: int


@runtime_checkable
class EngineClient(Protocol):
    """An engine as a chat model, a server or a batch job sees it. Any thread or event loop may call every method.

    `EngineWorker` is one, with the model in this process; `testing.FakeEngine` is one without a model.
    """

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, for those who make prompts and read answers."""

    @property
    def info(self) -> EngineInfo:
        """What does not change while it runs."""

    @property
    def is_alive(self) -> bool:
        """Whether it still takes requests."""

    def register(self, adapters: Sequence[Adapter]) -> list[Registration]:
        """Say of each adapter whether it can run here. Contents are looked at once.

        A request may name an adapter that was never registered; it is looked at then.
        """

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapters: Sequence[tuple[Adapter, float]] = (),
        *,
        grammar: Grammar | None = None,
        output_token_ids: Sequence[int] = (),
    ) -> Generation:
        """Queue a request, without waiting for anything.

        What the request needs first (its grammar compiled, its fusion averaged) is made while others run; what goes
        wrong with it is told by the `Generation`.

        Args:
            prompt_token_ids: The prompt, at least one token.
            sampling: How tokens are chosen and when to stop.
            adapters: `(adapter, weight)` pairs, weights finite; empty runs the base model.
            grammar: What the answer is constrained to.
            output_token_ids: The answer's beginning, which an engine that was lost has given: this one goes on after
                it. Deltas, text and log-probabilities are of what is new; usage counts all of it. A sampled answer
                goes on as it would have with the same `seed`.

        Raises:
            PromptTooLongError: If the prompt leaves no room for a single token.
            InvalidRequestError: If the prompt is empty or not of this vocabulary, or an adapter or the composition can
                never run here, or `output_token_ids` is all of the answer.
            EngineDeadError: If the engine has stopped.
            EngineOverloadedError: If as many requests wait already as may.
        """

    def stats(self) -> EngineStats:
        """A snapshot of what the engine has been doing."""

    def close(self) -> None:
        """Stop: running requests end with `EngineDeadError`. Idempotent."""
