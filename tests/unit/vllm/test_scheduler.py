"""Adapters are counted by composition in each of the schedulers that vLLM has had."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from langchain_lora_retriever.vllm.compositions import Compositions, Member
from langchain_lora_retriever.vllm.scheduler import counting


class _Scheduler:
    """What the two have in common: all requests that may be scheduled run after a step."""

    def __init__(self, vllm_config: Any) -> None:
        self.lora_config = vllm_config.lora_config
        self.running: list[Any] = []
        self.waiting: list[Any] = []

    def schedule(self) -> list[Any]:
        for request in list(self.waiting):
            if self.may_run(request):
                self.waiting.remove(request)
                self.running.append(request)
        return self.running


class _AsksOfEach(_Scheduler):
    """As in vLLM 0.32."""

    def may_run(self, request: Any) -> bool:
        return self._handle_blocked_waiting_request(request)

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        return request.status != "blocked"


class _AsksOfBlocked(_Scheduler):
    """As in vLLM 0.26."""

    def may_run(self, request: Any) -> bool:
        return not (
            self._is_blocked_waiting_status(request.status) and not self._try_promote_blocked_waiting_request(request)
        )

    @staticmethod
    def _is_blocked_waiting_status(status: str) -> bool:
        return status == "blocked"

    def _try_promote_blocked_waiting_request(self, request: Any) -> bool:
        if request.status != "blocked":
            raise AssertionError(request.status)
        return False


def config(max_loras: int) -> Any:
    """A set-up that our kernels run."""
    lora = {"max_loras": max_loras, "fully_sharded_loras": False, "max_lora_rank": 16, "lora_dtype": "bf16"}
    model = {"is_multimodal_model": False, "is_moe": False, "is_encoder_decoder": False, "runner_type": "generate"}
    return SimpleNamespace(
        lora_config=SimpleNamespace(**lora),
        model_config=SimpleNamespace(**model, dtype="bf16"),
        device_config=SimpleNamespace(device_type="cuda"),
    )


@pytest.mark.parametrize("theirs", [_AsksOfEach, _AsksOfBlocked])
def test_requests_run_while_their_adapters_fit(monkeypatch: Any, theirs: Any) -> None:
    """Two weightings of two adapters are two; a third adapter waits; a request that is blocked stays so."""
    made = iter(range(1, 100))
    monkeypatch.setattr(
        Compositions, "request", lambda _, name, members: _as_vllm_carries_it(name, next(made) + 1000, members)
    )
    compositions = Compositions()

    def request(*members: int, weight: float = 1.0, status: str = "waiting") -> Any:
        asked = [Member(number, str(number), f"/{number}", weight) for number in members]
        lora_request = compositions.request("mixture", asked) if asked else None
        return SimpleNamespace(lora_request=lora_request, status=status)

    scheduler = counting(theirs)(config(max_loras=2))
    first, second, third = request(1, 2), request(1, 2, weight=0.5), request(3)
    base, blocked = request(), request(1, status="blocked")
    scheduler.waiting = [first, third, second, base, blocked]
    assert scheduler.schedule() == [first, second, base]
    scheduler.running = [base]
    assert scheduler.schedule() == [base, third]
    assert scheduler.waiting == [blocked]
    assert not hasattr(scheduler, "_is_blocked_waiting_status") or not scheduler._is_blocked_waiting_status("waiting")


def _as_vllm_carries_it(name: str, number: int, members: Any) -> Any:
    import json

    return SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path="lora-retriever-composition:" + json.dumps(members)
    )
