"""One request of `VllmEngine`: what vLLM is asked, and its tokens made the deltas that our engine would give."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.engine.detokenizer import Detokenizer, Vocabulary
from langchain_lora_retriever.engine.generation import Delta, TokenLogprob, Usage
from langchain_lora_retriever.errors import InvalidRequestError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from langchain_lora_retriever.engine.api import Grammar
    from langchain_lora_retriever.engine.generation import FinishReason, Generation
    from langchain_lora_retriever.types import Adapter, SamplingParams

__all__ = ["VllmRequest", "vllm_sampling"]

_MAX_SEED = (1 << 63) - 1


class VllmRequest:
    """A request that is under way.

    Text is made of tokens by our own detokenizer: what is certain, and where a stop string cuts, is as in our engine.

    Attributes:
        generation: What its caller holds.
        task: What waits for vLLM; None before it has begun.
        token_ids: The prompt, and the answer's beginning if it was given.
        num_prompt_tokens: Tokens of the prompt.
        max_tokens: Most tokens that are to come.
        adapters: What it runs, ordered: one sum, whatever order it was asked in.
        has_begun: Whether something has come.
    """

    def __init__(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        adapters: Sequence[tuple[Adapter, float]],
        grammar: Grammar | None,
        given: Sequence[int],
        *,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        max_model_len: int,
    ) -> None:
        self.generation: Generation
        self.task: asyncio.Task[None] | None = None
        self.sampling = sampling
        self.adapters = sorted(adapters, key=lambda pair: pair[0].fingerprint)
        self.grammar = grammar
        self.num_prompt_tokens = len(prompt_token_ids)
        self.token_ids = [*prompt_token_ids, *given]
        limit = min(sampling.max_tokens, max_model_len - len(prompt_token_ids))
        self.max_tokens = limit - len(given)
        self.has_begun = False
        self._num_tokens = len(given)
        self._num_cached_tokens = 0
        self._new_token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[float, ...] | None = None
        self._detokenizer = Detokenizer(
            tokenizer, sampling.stop, skip_special_tokens=sampling.skip_special_tokens, vocabulary=vocabulary
        )
        for token_id in given:
            self._detokenizer.push(token_id)  # its text was given where it was chosen

    def take(self, output: Any) -> Delta | None:
        """Take in what vLLM has to say of the request (a `RequestOutput`); None if no text is certain yet."""
        self.has_begun = True
        (completion,) = output.outputs
        if output.num_cached_tokens:
            self._num_cached_tokens = min(output.num_cached_tokens, self.num_prompt_tokens)
        start = self.sampling.prompt_logprobs_from
        if start is not None and output.prompt_logprobs:  # they come once; an empty list then
            self._prompt_logprobs = self._scores(output.prompt_logprobs, max(start, 1))
        finish_reason: FinishReason | None = None if completion.finish_reason is None else _finish(completion)
        text = self._read(completion, is_stop=finish_reason == "stop")
        if self._detokenizer.is_stopped:
            finish_reason = "stop"
        if finish_reason is not None and not self._detokenizer.is_stopped:
            text += self._detokenizer.flush()
        if not text and finish_reason is None:
            return None
        token_ids, self._new_token_ids = tuple(self._new_token_ids), []
        logprobs = None
        if self.sampling.logprobs is not None:
            logprobs, self._logprobs = tuple(self._logprobs), []
        scores, self._prompt_logprobs = self._prompt_logprobs, None
        usage = None
        if finish_reason is not None:
            usage = Usage(self.num_prompt_tokens, self._num_cached_tokens, self._num_tokens)
        return Delta(text, token_ids, logprobs, finish_reason, usage, prompt_logprobs=scores)

    def _read(self, completion: Any, *, is_stop: bool) -> str:
        """The text that new tokens make certain; those behind a stop string are dropped."""
        text = ""
        for place, token_id in enumerate(completion.token_ids):
            self._num_tokens += 1
            self._new_token_ids.append(token_id)
            if self.sampling.logprobs is not None:
                self._logprobs.append(_logprob(token_id, completion.logprobs[place], self.sampling.logprobs))
            if is_stop and place == len(completion.token_ids) - 1:
                break  # a token that ends the answer has no text
            text += self._detokenizer.push(token_id)
            if self._detokenizer.is_stopped:
                break
        return text

    def _scores(self, by_place: Sequence[Any], start: int) -> tuple[float, ...]:
        places = range(start, self.num_prompt_tokens)
        return tuple(float(by_place[place][self.token_ids[place]].logprob) for place in places)


def _finish(completion: Any) -> FinishReason:
    return "length" if completion.finish_reason == "length" else "stop"


def _logprob(token_id: int, by_token: Any, num_top: int) -> TokenLogprob:
    likeliest = sorted(by_token.items(), key=lambda item: -item[1].logprob)[:num_top]
    top = tuple((other, float(entry.logprob)) for other, entry in likeliest)
    return TokenLogprob(token_id, float(by_token[token_id].logprob), top)


def _lark(text: str) -> str:
    """A grammar in Lark's form, which is how vLLM hands one to llguidance.

    Raises:
        InvalidRequestError: If it is in llguidance's own, of several parts.
    """
    if text.startswith("{"):
        grammars = json.loads(text)["grammars"]
        if len(grammars) != 1 or not grammars[0].get("lark_grammar"):
            raise InvalidRequestError("The answer cannot be constrained in vLLM: it takes grammars in Lark's form.")
        text = grammars[0]["lark_grammar"]
    return text


def vllm_sampling(request: VllmRequest, default_penalty: float) -> Any:
    """What vLLM is asked (its `SamplingParams`). Stop strings are not: the request finds them in its own text."""
    from vllm import SamplingParams as VllmSampling  # noqa: PLC0415 - vLLM may be absent
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # noqa: PLC0415

    sampling, grammar = request.sampling, request.grammar
    penalty = sampling.repetition_penalty
    return VllmSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=None if sampling.seed is None else sampling.seed & _MAX_SEED,
        max_tokens=request.max_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        repetition_penalty=default_penalty if penalty is None else penalty,
        ignore_eos=sampling.ignore_eos and grammar is None,  # where a grammar has ended nothing else may come
        logprobs=sampling.logprobs,
        prompt_logprobs=None if sampling.prompt_logprobs_from is None else 0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=None if grammar is None else StructuredOutputsParams(grammar=_lark(grammar.text)),
    )
