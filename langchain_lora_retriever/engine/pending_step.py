"""A step that was launched, and whose tokens are on their way to the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

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
    """

    def __init__(self, requests: Sequence[Request], choice: Choice) -> None:
        self.requests = requests
        self._choice = choice.to_host()
        self._arrival: torch.cuda.Event | None = None
        if choice.token_ids.device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read(self) -> list[Outcome]:
        """Wait for the step; for each request its token, or the error that ends it."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._choice.read(self.requests)
