"""How likely an engine's model holds given answers to be: the score that calibrating a pool goes by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from langchain_lora_retriever.chat.messages import encode_chat
from langchain_lora_retriever.errors import InvalidSamplesError, PromptTooLongError
from langchain_lora_retriever.evaluation.in_order import in_order
from langchain_lora_retriever.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from langchain_lora_retriever.engine.api import EngineClient, Generation
    from langchain_lora_retriever.pool.samples import Sample
    from langchain_lora_retriever.types import Adapter

__all__ = ["AnswerLikelihood"]


class AnswerLikelihood:
    """Tells the mean log-likelihood of the tokens of answers, for `AdapterPool.calibrate`.

    A sample's input is shown as a user's message by the model's chat template. As many samples as the engine runs are
    scored at once, whichever adapters they are for.

    Args:
        engine: Runs the base model and the adapters.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._prompts: dict[tuple[str, str], tuple[list[int], int]] = {}

    def __call__(self, runs: Sequence[tuple[Adapter | None, Sample]]) -> Iterator[float]:
        """Yield the mean log-likelihood of each sample's output, in order.

        Args:
            runs: Adapters, None for the base model alone, and samples with an output.

        Raises:
            InvalidSamplesError: If a sample is longer than the model's context, or its output has no tokens.
            InvalidRequestError: If the engine cannot run one of the adapters.
        """
        submitted = ((None, self._submit(adapter, sample)) for adapter, sample in runs)
        for _, done in in_order(self._engine, submitted):
            assert done.prompt_logprobs, "they were asked for"
            yield math.fsum(done.prompt_logprobs) / len(done.prompt_logprobs)

    def _submit(self, adapter: Adapter | None, sample: Sample) -> Generation:
        token_ids, start = self._encode(sample)
        sampling = SamplingParams(max_tokens=1, prompt_logprobs_from=start)
        try:
            return self._engine.submit(token_ids, sampling, () if adapter is None else ((adapter, 1.0),))
        except PromptTooLongError as error:
            raise InvalidSamplesError(
                f"the sample {sample.input[:40]!a} and its output have {len(token_ids):,} tokens; allowed are fewer "
                f"than {self._engine.info.max_model_len:,}. Shorten it or leave it out."
            ) from error

    def _encode(self, sample: Sample) -> tuple[list[int], int]:
        """The tokens of a sample's prompt and answer, and the place of the answer's first."""
        key = (sample.input, sample.output or "")
        if key not in self._prompts:
            tokenizer = self._engine.tokenizer
            prompt = encode_chat(tokenizer, [{"role": "user", "content": sample.input}])
            answer = tokenizer.encode(sample.output or "", add_special_tokens=False)
            if not answer:
                raise InvalidSamplesError(f"the sample {sample.input[:40]!a} has an output without tokens. Mend it.")
            self._prompts[key] = ([*prompt, *answer], len(prompt))
        return self._prompts[key]
