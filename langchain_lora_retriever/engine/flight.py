"""A step that was launched, and whose tokens are on their way to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from langchain_lora_retriever.engine.sampler import Choice
from langchain_lora_retriever.engine.upload import copy_to_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.engine.request import Request, TokenLogprob

__all__ = ["Flight"]


class Flight:
    """The tokens a launched step chooses.

    Args:
        requests: The requests it chooses for.
        choice: Their tokens, on the device.
    """

    def __init__(self, requests: Sequence[Request], choice: Choice) -> None:
        self.requests = requests
        rest = (None if part is None else copy_to_host(part) for part in choice[1:])
        self._choice = Choice(copy_to_host(choice.token_ids), *rest)
        self._arrival: torch.cuda.Event | None = None
        if choice.token_ids.device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """Wait for the step; its token ids, and log-probabilities where they were asked for."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._choice.read(self.requests)
