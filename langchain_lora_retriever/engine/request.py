"""One generation: what was asked, how far it is, and what it has given so far."""

from __future__ import annotations

import hashlib
import secrets
import sys
import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from langchain_lora_retriever.engine.generation import Usage
from langchain_lora_retriever.errors import EngineError, LoraRetrieverError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from langchain_lora_retriever.engine.detokenizer import Detokenizer
    from langchain_lora_retriever.engine.generation import TokenLogprob
    from langchain_lora_retriever.engine.logits_rules import LogitsRules
    from langchain_lora_retriever.types import Adapter, SamplingParams

__all__ = ["Constraint", "Request", "composition_salt", "failure", "first_active"]

_TOKEN_BYTES = array("q").itemsize
_NO_PLACES = range(0)


class Constraint(Protocol):
    """Restricts which token may come next. One object per request; only the engine's thread calls it."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing more may be generated."""

    @property
    def is_shortened(self) -> bool:
        """Whether the answer was made to end early."""

    def fill_bitmask(self, row: torch.Tensor) -> None:
        """Write the allowed tokens into `row`, int32, wide enough for model and tokenizer; bit = 1: allowed."""

    def accept(self, token_id: int) -> None:
        """Advance by a token that was generated or forced."""

    def forced_tokens(self) -> Sequence[int]:
        """Tokens that must come next, taken without a model step; empty if there is a choice."""


def failure(what: str, cause: BaseException) -> LoraRetrieverError:
    """The error that ends a request for `cause`: that itself if it is a documented one, else an `EngineError`."""
    if isinstance(cause, LoraRetrieverError):
        return cause
    error = EngineError(f"{what}: {cause!r}")
    error.__cause__ = cause
    return error


def composition_salt(adapters: Sequence[tuple[Adapter, float]]) -> bytes:
    """Identify what computes the KV: the adapters' contents and weights.

    Names are not part of it: an adapter replaced under its old name must not meet the old one's KV.
    """
    digest = hashlib.blake2b(digest_size=16)
    for adapter, weight in adapters:
        digest.update(f"{adapter.fingerprint}:{weight!r};".encode())
    return digest.digest()


def first_active(invocation_tokens: Sequence[int], prompt_token_ids: Sequence[int]) -> int | None:
    """The first token of a prompt that runs an adapter: where its invocation begins for the last time.

    Args:
        invocation_tokens: The adapter's; none if it is active from the beginning.
        prompt_token_ids: The prompt. What is generated behind it changes nothing.

    Returns:
        An index; None if the prompt does not invoke the adapter, so that no token of the request runs it.

    Source: `peft.tuners.lora.variants.calculate_alora_offsets`.
    """
    if not invocation_tokens:
        return 0
    # Backwards, the last is the first; bytes are searched in linear time, whatever repeats in a stranger's adapter.
    text, wanted = (array("q", reversed(ids)).tobytes() for ids in (prompt_token_ids, invocation_tokens))
    place = text.find(wanted)
    while place % _TOKEN_BYTES and place > 0:  # within a token
        place = text.find(wanted, place + 1)
    return None if place < 0 else len(prompt_token_ids) - place // _TOKEN_BYTES - len(invocation_tokens)


@dataclass(slots=True, eq=False)
class Request:
    """A generation on its way through the engine. Only the engine's thread touches it after submission.

    Attributes:
        request_id: Unique within its engine.
        prompt_token_ids: The prompt, at least one token.
        sampling: How tokens are chosen and when to stop.
        adapters: `(adapter, weight)` pairs; empty runs the base model.
        activations: The first token that runs each of them, by `first_active`; all from the first one on by default.
        constraint: Grammar of the answer, if any.
        rules: Penalties and bans, if there are any.
        end_token_ids: Tokens that end it.
        seed: Seed of its random choices, if it makes any.
        states: From which token on which of its adapters run: `(first token, indices of adapters)`, ascending from 0.
        salts: What identifies each of these states where KV is computed, by its first token.
        output_token_ids: Tokens generated so far.
        prompt_logprobs: Log-probabilities of prompt tokens that were asked for and are known, by the token's place.
        has_told_prompt: Whether they were taken: a request that is preempted later does not tell them again.
        max_num_tokens: Prompt and answer together end here at the latest.
        num_computed_tokens: Leading tokens whose KV is in the cache, or will be once the launched steps are done.
        num_pending_tokens: Last tokens that launched steps choose and that are not known here yet: one between two
            steps, two while one step is launched before the other's are read.
        num_cached_tokens: Prompt tokens found in the prefix cache at first admission, or computed by others meanwhile.
        block_ids: Its pages of the KV cache, in order.
        block_hashes: Hash chain over its full pages.
        lora_slots: Slots its adapters are pinned to while it runs.
        row: Its place among the running requests, kept while it runs; -1 while it does not.
        is_finished: Whether it has left the engine.
        arrival: When it was made, by `time.monotonic`.
    """

    request_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapters: tuple[tuple[Adapter, float], ...]
    detokenizer: Detokenizer
    activations: tuple[int | None, ...] = ()
    constraint: Constraint | None = None
    rules: LogitsRules | None = None
    end_token_ids: frozenset[int] = frozenset()
    max_num_tokens: int = sys.maxsize
    seed: int = 0
    states: tuple[tuple[int, tuple[int, ...]], ...] = ()
    salts: dict[int, bytes] = field(default_factory=dict)
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: dict[int, float] = field(default_factory=dict)
    has_told_prompt: bool = False
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    num_cached_tokens: int | None = None
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    lora_slots: tuple[int, ...] | None = None
    num_delivered_tokens: int = 0
    row: int = -1
    is_finished: bool = False
    arrival: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Fix the seed, and what its adapters do to which tokens, for its whole life."""
        if self.sampling.seed is not None:
            self.seed = self.sampling.seed
        elif self.sampling.temperature > 0:
            self.seed = secrets.randbits(62)
        firsts = self.activations or (0,) * len(self.adapters)
        if not any(firsts) and None not in firsts:
            self.states = ((0, tuple(range(len(firsts)))),)
            self.salts = {0: composition_salt(self.adapters)}
            return
        changes = sorted({0, *(first for first in firsts if first is not None)})
        self.states = tuple(
            (change, tuple(i for i, first in enumerate(firsts) if first is not None and first <= change))
            for change in changes
        )
        self.salts = {change: composition_salt([self.adapters[i] for i in active]) for change, active in self.states}

    @property
    def num_tokens(self) -> int:
        """Tokens so far, prompt and output, pending ones included."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending_tokens

    @property
    def num_known_tokens(self) -> int:
        """Tokens so far, without pending ones."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, pending ones included."""
        return len(self.output_token_ids) + self.num_pending_tokens

    @property
    def is_exhausted(self) -> bool:
        """Whether the pending token is the last there may be."""
        return self.num_pending_tokens > 0 and self.num_tokens >= self.max_num_tokens

    @property
    def needs_known_tokens(self) -> bool:
        """Whether its last token must be known here before the next one can be chosen."""
        return self.constraint is not None or (self.rules is not None and self.rules.needs_known_tokens)

    @property
    def first_scored_place(self) -> int:
        """The first place of the prompt after which logits are wanted to tell how likely its next token is."""
        start = self.sampling.prompt_logprobs_from
        return sys.maxsize if start is None or self.has_told_prompt else max(start, 1) - 1

    def scored_places(self, start: int, end: int) -> range:
        """Those of the places from `start` to before `end` after which logits are wanted for that."""
        if self.sampling.prompt_logprobs_from is None or self.has_told_prompt:
            return _NO_PLACES
        return range(max(start, self.first_scored_place), min(end, len(self.prompt_token_ids) - 1))

    def take_prompt_logprobs(self) -> tuple[float, ...] | None:
        """The prompt's log-probabilities that were asked for, in order, once; None from then on, or if none were."""
        if not self.prompt_logprobs:
            return None
        taken, self.prompt_logprobs = self.prompt_logprobs, {}
        self.has_told_prompt = True
        return tuple(taken[place] for place in sorted(taken))

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output, in order, without pending ones."""
        return self.prompt_token_ids + self.output_token_ids

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(len(self.prompt_token_ids), self.num_cached_tokens or 0, len(self.output_token_ids))

    def tokens_between(self, start: int, end: int) -> list[int]:
        """`token_ids[start:end]` without joining the two lists."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : end - num_prompt]
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        return self.prompt_token_ids[start:] + self.output_token_ids[: end - num_prompt]
