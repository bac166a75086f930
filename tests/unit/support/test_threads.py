"""Work that one thread does for all who want it."""

from __future__ import annotations

import gc
import weakref

from langchain_lora_retriever.support.threads import SingleFlight
from makers import until


class Result:
    """What work makes."""


async def test_a_flight_that_landed_is_forgotten() -> None:
    """Its result lives as long as somebody has it, and no longer; who comes later begins another."""
    flights: SingleFlight[Result] = SingleFlight()
    first, second = await flights.run(Result), await flights.run(Result)
    assert first is not second
    held = weakref.ref(second)
    del first, second
    await until(lambda: gc.collect() >= 0 and held() is None)
