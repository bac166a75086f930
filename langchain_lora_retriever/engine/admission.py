"""What an engine asks of a request before it takes it: a value, so that callers elsewhere can ask it themselves."""

from __future__ import annotations

from array import array
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from langchain_lora_retriever.engine.api import Registration
from langchain_lora_retriever.errors import InvalidRequestError, PromptTooLongError
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.engine.adapter_fit import AdapterFit
    from langchain_lora_retriever.types import Adapter, SamplingParams

__all__ = ["Admission"]

_MAX_WEIGHT = 3.4028234663852886e38
"""The largest float32: an adapter's weight is one on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What can ever be served. Any thread may ask; it can be pickled.

    Attributes:
        max_model_len: Maximum number of tokens of prompt and answer together.
        vocab_size: Tokens that the model has, from 0.
        max_adapters_per_request: Longest composition.
        fit: Which adapters can run; None lets all.
    """

    max_model_len: int
    vocab_size: int
    max_adapters_per_request: int
    fit: AdapterFit | None

    def register(self, adapters: Sequence[Adapter]) -> list[Registration]:
        """Say of each adapter whether it can run; see `EngineClient.register`."""
        return [Registration() if self.fit is None else self.fit.register(adapter) for adapter in adapters]

    def check(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapters: Sequence[tuple[Adapter, float]],
        output_token_ids: Sequence[int] = (),
    ) -> list[int]:
        """Refuse a request that can never be served.

        Returns:
            The prompt's tokens as plain integers.

        Raises:
            PromptTooLongError: If the prompt leaves no room for a single token.
            InvalidRequestError: If the prompt is empty or has a token that the model lacks, or `stop_token_ids` has
                one, or `prompt_logprobs_from` is beyond its last, or the answer's beginning is all of it, or an adapter
                is not for this model, or a weight is not a finite number, or the composition can never be in device
                memory.
        """
        token_ids = self._check_prompt(prompt_token_ids)
        _check_scored(sampling, len(token_ids))
        limit = min(sampling.max_tokens, self.max_model_len - len(token_ids))
        if len(output_token_ids) >= limit:
            raise InvalidRequestError(
                f"The answer may have {limit} tokens, and output_token_ids has {len(output_token_ids)} already: an "
                "answer that has ended cannot go on."
            )
        self._check_vocabulary(output_token_ids, "output_token_ids has")
        unknown = [i for i in sampling.stop_token_ids if i >= self.vocab_size]
        if unknown:
            raise InvalidRequestError(
                f"stop_token_ids has {unknown[0]}, but the model's vocabulary has {self.vocab_size} tokens, from 0: "
                "pass ids of the tokenizer that the model came with."
            )
        self._check_adapters(adapters)
        return token_ids

    def _check_prompt(self, prompt_token_ids: Sequence[int]) -> list[int]:
        token_ids = array("q")
        try:
            num_tokens = len(prompt_token_ids)
            if num_tokens >= self.max_model_len:
                raise PromptTooLongError(
                    f"The prompt has {num_tokens} tokens, but prompt and answer together may have at most "
                    f"{self.max_model_len}: shorten the prompt, or raise max_model_len or kv_cache_bytes."
                )
            if isinstance(prompt_token_ids, list):
                with suppress(TypeError, OverflowError):
                    token_ids.fromlist(prompt_token_ids)  # all of them or none, in half the time
            if not token_ids:
                token_ids.extend(iter(prompt_token_ids))
        except (TypeError, OverflowError) as error:
            raise InvalidRequestError(
                f"A prompt is a sequence of token ids, integers from 0 to {self.vocab_size - 1}; this one is a "
                f"{type(prompt_token_ids).__name__} with {len(token_ids)} of them at its beginning: {error}."
            ) from error
        if not token_ids:
            raise InvalidRequestError("The prompt has no tokens: pass at least one.")
        plain = token_ids.tolist()
        self._check_vocabulary(plain, "The prompt has")
        return plain

    def _check_vocabulary(self, token_ids: Sequence[int], what: str) -> None:
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.vocab_size):
            place = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < self.vocab_size)
            raise InvalidRequestError(
                f"{what} the token {token_ids[place]} at place {place}, but the model's vocabulary has "
                f"{self.vocab_size} tokens, from 0: the tokenizer has more tokens than the model; use the "
                "tokenizer that the model came with."
            )

    def _check_adapters(self, adapters: Sequence[tuple[Adapter, float]]) -> None:
        if len(adapters) > self.max_adapters_per_request:
            raise InvalidRequestError(
                f"The request composes {len(adapters)} adapters; the engine takes at most "
                f"{self.max_adapters_per_request}: lower top_k or raise max_adapters_per_request."
            )
        for adapter, weight in adapters:
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= _MAX_WEIGHT:
                raise InvalidRequestError(
                    f"The weight of adapter {adapter.name!r} is {shown(weight)}: pass a finite number."
                )
        if adapters and self.fit is not None:
            self.fit.check_together([adapter for adapter, _ in adapters])


def _check_scored(sampling: SamplingParams, num_tokens: int) -> None:
    """Refuse to score a prompt from a place on where it has no token with one before it."""
    start = sampling.prompt_logprobs_from
    if start is not None and max(start, 1) >= num_tokens:
        allowed = f"a place from 0 to {num_tokens - 1}" if num_tokens > 1 else "a prompt of two tokens or more"
        raise InvalidRequestError(
            f"prompt_logprobs_from={start} is not allowed for a prompt of {num_tokens} tokens: pass {allowed}, or None."
        )
