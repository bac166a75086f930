"""How many adapters a step of vLLM's may have: those that its requests' compositions are made of."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.vllm.compositions import members_of
from langchain_lora_retriever.vllm.limits import why_not

if TYPE_CHECKING:
    from vllm.v1.request import Request

__all__ = ["counting"]


class _AdapterCount:
    """Admits a request once its adapters fit beside those of all that run.

    vLLM counts a request as one adapter, and so would let compositions of more adapters run than there are slots, and
    keep back those of few adapters with many different weights. Its own count is switched off.
    """

    lora_config: Any
    running: list[Request]

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self._max_loras = 0
        if self.lora_config is not None and why_not(vllm_config) is None:
            self._max_loras = self.lora_config.max_loras
            self.lora_config = None
        self._in_use: set[int] = set()
        self._num_counted = 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._in_use, self._num_counted = set(), 0
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Whether a waiting request may be scheduled now. Within a step `running` only grows from here on."""
        is_ready: bool = super()._handle_blocked_waiting_request(request)  # type: ignore[misc]
        return is_ready and (not self._max_loras or request.lora_request is None or self._has_room(request))

    def _has_room(self, request: Request) -> bool:
        for running in self.running[self._num_counted :]:
            self._in_use |= _adapter_ids(running)
        self._num_counted = len(self.running)
        wanted = self._in_use | _adapter_ids(request)
        return len(wanted) <= self._max_loras


def _adapter_ids(request: Request) -> set[int]:
    lora_request = request.lora_request
    if lora_request is None:
        return set()
    return {member.lora_int_id for member in members_of(lora_request)} or {lora_request.lora_int_id}


@cache
def counting(scheduler: type) -> type:
    """A scheduler of vLLM's that counts adapters right."""
    return type(scheduler.__name__, (_AdapterCount, scheduler), {"__module__": __name__})
