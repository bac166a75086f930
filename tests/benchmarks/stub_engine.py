"""An engine without a model, for measuring what lies before it. Imports neither torch nor transformers."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from langchain_lora_retriever.engine.admission import Admission
from langchain_lora_retriever.engine.api import Delta, EngineInfo, EngineStats, Registration, Usage
from langchain_lora_retriever.engine.generation import Generation, deliver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.types import Adapter, SamplingParams


class StubEngine:
    """Gives each running request a token a step, `rate` tokens a second in all; keeps the last adapters it ran.

    Args:
        rate: Most tokens a second.
        num_steps: Steps a second.
        num_resident: Adapters it keeps.
    """

    tokenizer: Any = None
    is_alive = True

    def __init__(self, rate: float = 10_000.0, num_steps: float = 150.0, num_resident: int = 160) -> None:
        self.info = EngineInfo(name="stub", max_model_len=1 << 20, max_num_seqs=64)
        self.admission = Admission(
            max_model_len=self.info.max_model_len, vocab_size=1 << 17, max_adapters_per_request=8, fit=None
        )
        self._per_step = max(1, int(rate / num_steps))
        self._seconds = 1.0 / num_steps
        self._left: OrderedDict[Generation, list[int]] = OrderedDict()
        self._resident: OrderedDict[str, None] = OrderedDict()
        self._max_resident = num_resident
        self._counts = [0, 0, 0, 0]  # requests, of which all was resident; adapters, that were
        threading.Thread(target=self._tick, daemon=True).start()

    @property
    def resident_fingerprints(self) -> list[str]:
        """The adapters it keeps."""
        return list(self._resident)

    def stats(self) -> EngineStats:
        """Requests are counted as loads and hits of adapters."""
        num_requests, num_whole, num_adapters, num_found = self._counts
        return EngineStats(
            num_finished=num_requests, num_preemptions=num_whole, num_adapter_hits=num_found,
            num_adapter_loads=num_adapters - num_found, num_running=len(self._left),
        )  # fmt: skip

    def register(self, adapters: Sequence[Adapter]) -> list[Registration]:
        """Every adapter fits."""
        return self.admission.register(adapters)

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        adapters: Sequence[tuple[Adapter, float]] = (),
        *,
        grammar: Any = None,
        output_token_ids: Sequence[int] = (),
    ) -> Generation:
        """Join the steps."""
        generation = Generation(on_abort=lambda: self._left.pop(generation, None))
        found = sum(adapter.fingerprint in self._resident for adapter, _ in adapters)
        self._counts[0] += 1
        self._counts[1] += found == len(adapters)
        self._counts[2] += len(adapters)
        self._counts[3] += found
        for adapter, _ in adapters:
            self._resident[adapter.fingerprint] = None
            self._resident.move_to_end(adapter.fingerprint)
        while len(self._resident) > self._max_resident:
            self._resident.popitem(last=False)
        self._left[generation] = [len(output_token_ids), sampling.max_tokens, len(prompt_token_ids)]
        return generation

    def close(self) -> None:
        """End."""
        self.is_alive = False

    def _tick(self) -> None:
        due = time.perf_counter()
        while self.is_alive:
            due = max(due + self._seconds, time.perf_counter() - 0.1)
            time.sleep(max(0.0, due - time.perf_counter()))
            news: list[tuple[Generation, Delta | Exception]] = []
            for generation in list(self._left)[: self._per_step]:
                state = self._left.get(generation)
                if state is None:
                    continue
                self._left.move_to_end(generation)
                place, limit, num_prompt = state
                state[0] += 1
                usage = Usage(num_prompt, 0, limit) if place + 1 == limit else None
                reason = None if usage is None else "length"
                news.append((generation, Delta(f"w{place} ", (3 + place % 200,), None, reason, usage)))
                if usage is not None:
                    del self._left[generation]
            deliver(news)
