"""A step that was launched, and whose tokens are on their way to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from langchain_lora_retriever.engine.pinned_copy import copy_to_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.engine.request import Request
    from langchain_lora_retriever.engine.sampler import Choice, Outcome

__all__ = ["PendingStep"]


class PendingStep:
    """The tokens a launched step chooses.

    Args:
        requests: The requests it chooses for.
        choice: Their tokens, on the device.
        scored: Prompt tokens whose log-probabilities it tells, as requests and places in their prompts.
        logprobs: These log-probabilities `[len(scored)]`, on the device; None if there are none.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        choice: Choice,
        scored: Sequence[tuple[Request, int]] = (),
        logprobs: torch.Tensor | None = None,
    ) -> None:
        self.requests = requests
        self._choice = choice.to_host()
        self._scored = scored
        self._logprobs = None if logprobs is None else copy_to_host(logprobs)
        self._arrival: torch.cuda.Event | None = None
        if choice.token_ids.device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read(self) -> list[Outcome]:
        """Wait for the step; for each request its token, or the error that ends it.

        Mutates `prompt_logprobs` of requests that asked for them.
        """
        if self._arrival is not None:
            self._arrival.synchronize()
        if self._logprobs is not None:
            for (request, place), logprob in zip(self._scored, self._logprobs.tolist(), strict=True):
                request.prompt_logprobs[place] = logprob
        return self._choice.read(self.requests)
