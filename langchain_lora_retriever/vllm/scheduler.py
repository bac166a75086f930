"""How many adapters a step of vLLM's may have: those that its requests' compositions are made of."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.vllm.compositions import members_of
from langchain_lora_retriever.vllm.limits import why_not
from langchain_lora_retriever.vllm.versions import waiting_methods

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

    def _admits(self, request: Request) -> bool:
        """Whether there is room for a waiting request's adapters. Within a step `running` only grows from here on."""
        return not self._max_loras or request.lora_request is None or self._has_room(request)

    def _has_room(self, request: Request) -> bool:
        for running in self.running[self._num_counted :]:
            self._in_use |= _adapter_ids(running)
        self._num_counted = len(self.running)
        wanted = self._in_use | _adapter_ids(request)
        return len(wanted) <= self._max_loras


class _AskedOfEach(_AdapterCount):
    """Where vLLM asks one method of every waiting request (0.32)."""

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        is_ready: bool = super()._handle_blocked_waiting_request(request)  # type: ignore[misc]
        return is_ready and self._admits(request)


class _AskedOfBlocked(_AdapterCount):
    """Where vLLM asks a method of those whose status blocks them (0.26): while it schedules, each one's does."""

    _is_scheduling = False

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._is_scheduling = True
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self._is_scheduling = False

    def _is_blocked_waiting_status(self, status: Any) -> bool:
        return self._is_scheduling or bool(super()._is_blocked_waiting_status(status))  # type: ignore[misc]

    def _try_promote_blocked_waiting_request(self, request: Request) -> bool:
        if super()._is_blocked_waiting_status(request.status):  # type: ignore[misc]
            is_ready: bool = super()._try_promote_blocked_waiting_request(request)  # type: ignore[misc]
            if not is_ready:
                return False
        return self._admits(request)


def _adapter_ids(request: Request) -> set[int]:
    lora_request = request.lora_request
    if lora_request is None:
        return set()
    return {member.lora_int_id for member in members_of(lora_request)} or {lora_request.lora_int_id}


@cache
def counting(scheduler: type) -> type:
    """A scheduler of vLLM's that counts adapters right."""
    counted = _AskedOfEach if len(waiting_methods(scheduler)) == 1 else _AskedOfBlocked
    return type(scheduler.__name__, (counted, scheduler), {"__module__": __name__})
