"""Who runs next: admission, chunked prefill, preemption."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from langchain_lora_retriever.engine.adapter_slots import AdapterSlots
from langchain_lora_retriever.engine.kv_blocks import KVCacheManager
from langchain_lora_retriever.engine.request import Request
from langchain_lora_retriever.engine.scheduler import Scheduler
from langchain_lora_retriever.types import Adapter, LoraWeights, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence


class NoStore:
    """Takes adapters and does nothing with them."""

    is_ready = True

    def are_ready(self, adapters: Sequence[Adapter]) -> bool:
        """As it was told."""
        return self.is_ready

    def load(self, slot: int, start: int, adapter: Adapter) -> None:
        """Ignore the adapter."""


def make_scheduler(
    num_blocks: int = 8, max_num_seqs: int = 4, max_num_batched_tokens: int = 16, **limits: Any
) -> Scheduler:
    """A scheduler over blocks of four tokens and two slots of four rows."""
    slots = AdapterSlots(NoStore(), max_loras=2, num_rows=8)
    cache = KVCacheManager(num_blocks, 4)
    return Scheduler(cache, slots, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, **limits)


def make_request(num_tokens: int, first: int = 0, *adapters: Adapter) -> Request:
    """A request whose tokens count up from `first`."""
    pairs: Any = tuple((adapter, 1.0) for adapter in adapters)
    return Request(first, list(range(first, first + num_tokens)), SamplingParams(), pairs, detokenizer=None)  # type: ignore[arg-type]


def run_step(scheduler: Scheduler) -> list[tuple[int, int, bool]]:
    """Schedule, pretend to compute, append a token where one is sampled; `(id, tokens, sampled)` rows."""
    scheduled = scheduler.schedule()
    rows = [(item.request.request_id, item.num_new_tokens, item.is_sampled) for item in scheduled]
    for item, (_, _, is_sampled) in zip(scheduled, rows, strict=True):
        item.request.num_computed_tokens += item.num_new_tokens
        if is_sampled:
            item.request.output_token_ids.append(7)
    scheduler.check_integrity()
    return rows


def test_a_long_prompt_is_prefilled_beside_decoding() -> None:
    """A running stream gets its token in every step while a prompt longer than the budget comes in chunks."""
    scheduler = make_scheduler()
    scheduler.add(make_request(3))
    assert run_step(scheduler) == [(0, 3, True)]
    scheduler.add(make_request(20, 100))
    assert run_step(scheduler) == [(0, 1, True), (100, 15, False)]
    assert run_step(scheduler) == [(0, 1, True), (100, 5, True)]


def test_requests_beyond_the_limit_wait_their_turn() -> None:
    """At most `max_num_seqs` run; the next is admitted when one finishes."""
    scheduler = make_scheduler(max_num_seqs=1)
    first, second = make_request(2), make_request(2, 50)
    scheduler.add(first)
    scheduler.add(second)
    assert run_step(scheduler) == [(0, 2, True)]
    scheduler.finish(first)
    assert run_step(scheduler) == [(50, 2, True)]


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    """When blocks run out the last admitted request is sent back to the queue's head, and loses no token."""
    scheduler = make_scheduler(num_blocks=4)
    old, young = make_request(8), make_request(7, 100)
    scheduler.add(old)
    scheduler.add(young)
    run_step(scheduler)
    assert [r.request_id for r in scheduler.running] == [0, 100]
    run_step(scheduler)
    assert scheduler.num_preemptions == 1
    assert list(scheduler.waiting) == [young]
    assert young.output_token_ids == [7]
    scheduler.finish(old)
    assert run_step(scheduler) == [(100, 4, True)]  # its first block is still known


def test_a_request_waits_while_its_adapters_do_not_fit() -> None:
    """Slots pinned by others delay a request; it holds nothing meanwhile."""
    scheduler = make_scheduler()
    a, b, c = (Adapter(n, n, {"m": LoraWeights(torch.zeros(4, 1), torch.zeros(1, 4), 1.0)}) for n in "abc")
    first, second = make_request(2, 0, a, b), make_request(2, 50, c)
    scheduler.add(first)
    scheduler.add(second)
    assert run_step(scheduler) == [(0, 2, True)]
    scheduler.finish(first)
    assert run_step(scheduler) == [(50, 2, True)]


def test_a_request_waits_for_its_adapters_only_beside_others() -> None:
    """While its adapters travel others run; with nobody else to serve there is nothing to gain by waiting."""
    store = NoStore()
    store.is_ready = False
    slots = AdapterSlots(store, max_loras=2, num_rows=8)
    scheduler = Scheduler(KVCacheManager(8, 4), slots, max_num_seqs=4, max_num_batched_tokens=16)
    a = Adapter("a", "a", {"m": LoraWeights(torch.zeros(4, 1), torch.zeros(1, 4), 1.0)})
    b = Adapter("b", "b", {"m": LoraWeights(torch.zeros(4, 1), torch.zeros(1, 4), 1.0)})
    for request in (make_request(2, 0, a), make_request(2, 50, b)):
        scheduler.add(request)
    assert run_step(scheduler) == [(0, 2, True)]
    assert run_step(scheduler) == [(0, 1, True)]
    store.is_ready = True
    assert run_step(scheduler) == [(0, 1, True), (50, 2, True)]


def test_a_step_tells_so_many_log_probabilities_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What of a prompt is beyond them waits for the next step; who asks for none goes on."""
    monkeypatch.setattr("langchain_lora_retriever.engine.scheduler._MAX_SCORED_PLACES", 3)
    scheduler = make_scheduler()
    first, second, third = make_request(8, 0), make_request(6, 100), make_request(2, 200)
    first.sampling = SamplingParams(prompt_logprobs_from=4)
    second.sampling = SamplingParams(prompt_logprobs_from=0)
    for request in (first, second):
        scheduler.add(request)
    assert run_step(scheduler) == [(0, 6, False)]
    scheduler.add(third)
    assert run_step(scheduler) == [(0, 2, True), (100, 2, False), (200, 2, True)]
    assert run_step(scheduler) == [(0, 1, True), (100, 4, True), (200, 1, True)]


def test_a_waiting_request_can_be_forgotten() -> None:
    """Finishing a request that never ran takes it from the queue."""
    scheduler = make_scheduler()
    request = make_request(2)
    scheduler.add(request)
    scheduler.finish(request)
    assert scheduler.schedule() == []


def launch_step(scheduler: Scheduler) -> list[int]:
    """Schedule and pretend to launch: sampled requests have a pending token; their ids and those of the others."""
    scheduled = scheduler.schedule()
    for item in scheduled:
        is_sampled = item.is_sampled
        item.request.num_computed_tokens += item.num_new_tokens
        item.request.num_pending_tokens += is_sampled
    scheduler.check_integrity()
    return [item.request.request_id for item in scheduled]


def collect(*requests: Request) -> None:
    """The pending tokens become known."""
    for request in requests:
        request.num_pending_tokens -= 1
        request.output_token_ids.append(7)


def test_many_streams_limit_a_prompt_and_many_prompts_do_not() -> None:
    """A prompt beside more streams comes in small chunks; alone, or among as many prompts, it has the whole step."""
    scheduler = make_scheduler(num_blocks=32, max_num_prefill_tokens=3)
    scheduler.add(make_request(2, 0))
    scheduler.add(make_request(2, 100))
    assert run_step(scheduler) == [(0, 2, True), (100, 2, True)]
    scheduler.add(make_request(8, 200))
    assert run_step(scheduler) == [(0, 1, True), (100, 1, True), (200, 3, False)]
    scheduler.add(make_request(6, 300))
    assert run_step(scheduler) == [(0, 1, True), (100, 1, True), (200, 5, True), (300, 6, True)]


def test_each_of_several_prompts_beside_streams_has_a_part_of_the_step() -> None:
    """Short prompts go in whole, though together they are longer than one alone may be."""
    scheduler = make_scheduler(num_blocks=32, max_num_seqs=7, max_num_prefill_tokens=3)
    for start in range(0, 400, 100):
        scheduler.add(make_request(2, start))
    run_step(scheduler)
    for start, length in ((400, 3), (500, 2), (600, 8)):
        scheduler.add(make_request(length, start))
    streams = [(start, 1, True) for start in range(0, 400, 100)]
    assert run_step(scheduler) == [*streams, (400, 3, True), (500, 2, True), (600, 3, False)]


def test_a_stream_behind_a_long_prompt_has_its_token_in_every_step() -> None:
    """Also when the streams before the prompt have ended, and it may have the whole step."""
    scheduler = make_scheduler(num_blocks=100, max_num_seqs=5, max_num_prefill_tokens=4)
    earlier = [make_request(2, start) for start in (0, 100, 200)]
    for request in earlier:
        scheduler.add(request)
    run_step(scheduler)
    scheduler.add(make_request(32, 300))
    scheduler.add(make_request(2, 400))
    streams = [(start, 1, True) for start in (0, 100, 200)]
    assert run_step(scheduler) == [*streams, (300, 4, False), (400, 2, True)]
    for request in earlier:
        scheduler.finish(request)
    assert run_step(scheduler) == [(300, 15, False), (400, 1, True)]
    assert run_step(scheduler) == [(300, 13, True), (400, 1, True)]


def test_a_pending_token_is_scheduled_unless_it_is_the_last() -> None:
    """A stream goes on before its token is known; one that ends with it does not."""
    scheduler = make_scheduler()
    first, second = make_request(2, 0), make_request(2, 100)
    second.max_num_tokens = 3
    scheduler.add(first)
    scheduler.add(second)
    assert launch_step(scheduler) == [0, 100]
    assert launch_step(scheduler) == [0]
    collect(first, second)
    scheduler.finish(second)
    assert second.is_finished
    assert launch_step(scheduler) == [0]
    collect(first)
    assert (first.num_known_tokens, first.num_pending_tokens) == (4, 1)


def test_a_preempted_request_waits_for_its_pending_token() -> None:
    """It is computed again only when all of its tokens are known."""
    scheduler = make_scheduler(num_blocks=4)
    first, second = make_request(7, 0), make_request(7, 100)
    scheduler.add(first)
    scheduler.add(second)
    assert launch_step(scheduler) == [0, 100]
    assert launch_step(scheduler) == [0, 100]
    collect(first, second)
    assert launch_step(scheduler) == [0]  # a third block for the first is one of the second's
    assert scheduler.waiting[0] is second
    assert second.num_pending_tokens == 1
    collect(first)
    scheduler.finish(first)
    assert launch_step(scheduler) == []
    collect(second)
    assert launch_step(scheduler) == [100]
    assert second.num_computed_tokens == 9


def test_a_step_is_not_padded_for_a_prompts_last_tokens() -> None:
    """A few tokens more than a size are left to the next step; without them the answers come all the same."""
    scheduler = make_scheduler(num_blocks=512, max_num_batched_tokens=2048, step_sizes=(512, 640, 768, 2048))
    for first, num_tokens in enumerate((300, 300, 45)):
        scheduler.add(make_request(num_tokens, first))
    assert run_step(scheduler) == [(0, 300, True), (1, 300, True), (2, 40, False)]
    assert run_step(scheduler) == [(0, 1, True), (1, 1, True), (2, 5, True)]
    assert run_step(scheduler) == [(0, 1, True), (1, 1, True), (2, 1, True)]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((645,), id="one prompt, which nobody else gains by"),
        pytest.param((300, 285), id="the padding is hardly more than what would be left"),
        pytest.param((300, 212), id="no padding"),
        pytest.param((300, 200), id="below the smallest size that counts"),
        pytest.param((1000, 1100), id="more than the largest size"),
        pytest.param((643, 2), id="the last prompt is no longer than what would be left"),
    ],
)
def test_a_step_keeps_its_tokens_where_nothing_is_gained(sizes: tuple[int, ...]) -> None:
    """A prompt is cut for the sake of padding only if that saves more than it costs."""
    scheduler = make_scheduler(num_blocks=1024, max_num_batched_tokens=4096, step_sizes=(512, 640, 768, 2048))
    for first, num_tokens in enumerate(sizes):
        scheduler.add(make_request(num_tokens, first))
    assert run_step(scheduler) == [(i, num, True) for i, num in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "steps"),
    [
        pytest.param((15, 5), [[15, 5]], id="all of them"),
        pytest.param((15, 6), [[15, 1], [1, 5]], id="too many"),
        pytest.param((40,), [[16], [16], [8]], id="a long one, in pieces as usual"),
        pytest.param((35,), [[16], [19]], id="a long one, the last piece with the rest"),
    ],
)
def test_a_step_has_more_tokens_than_usual_where_that_ends_the_prompts(
    sizes: tuple[int, ...], steps: list[list[int]]
) -> None:
    """And no more than there may be."""
    scheduler = make_scheduler(num_blocks=64, max_num_batched_tokens=20, num_usual_tokens=16)
    for first, num_tokens in enumerate(sizes):
        scheduler.add(make_request(num_tokens, 100 * first))
    assert [[num for _, num, _ in run_step(scheduler)] for _ in steps] == steps


def test_streams_count_among_what_ends_the_prompts() -> None:
    """Two of them, and a prompt of as many tokens as are left, or of one more."""
    for num_tokens, computed in ((18, 18), (19, 14)):
        scheduler = make_scheduler(num_blocks=64, max_num_batched_tokens=20, num_usual_tokens=16)
        for first in (0, 100):
            scheduler.add(make_request(4, first))
        run_step(scheduler)
        scheduler.add(make_request(num_tokens, 200))
        assert [num for _, num, _ in run_step(scheduler)] == [1, 1, computed]


def test_a_request_whose_adapters_cannot_be_loaded_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those behind it are admitted in the same step, and nothing stays held."""
    scheduler = make_scheduler()
    broken = OSError("the file is gone")

    def load(_slot: int, _start: int, adapter: Adapter) -> None:
        if adapter.name == "gone":
            raise broken

    monkeypatch.setattr(scheduler._slots._store, "load", load)
    kept, gone = (Adapter(n, n, {"m": LoraWeights(torch.zeros(4, 1), torch.zeros(1, 4), 1.0)}) for n in ("a", "gone"))
    requests = [make_request(4, 0, kept), make_request(4, 1, gone), make_request(4, 2)]
    for request in requests:
        scheduler.add(request)
    assert run_step(scheduler) == [(0, 4, True), (2, 4, True)]
    assert scheduler.take_refused() == [(requests[1], broken)]
    assert not scheduler.waiting


def total(scheduler: Scheduler, requests: Sequence[Request]) -> int:
    """Tokens computed until each request has its first token; blocks and slots are checked in every step."""
    num = 0
    while any(not request.output_token_ids for request in requests):
        rows = run_step(scheduler)
        assert rows
        num += sum(tokens for _, tokens, is_sampled in rows if not is_sampled or tokens > 1)
        for request in requests:
            if request.output_token_ids and not request.is_finished:
                scheduler.finish(request)
    return num


@pytest.mark.parametrize("limits", [{}, {"max_num_prefill_tokens": 4}], ids=["whole", "in pieces"])
def test_what_requests_have_in_common_is_computed_once(limits: dict[str, Any]) -> None:
    """Also if they come together: whoever is admitted, or goes on, has the blocks that another fills in the step."""
    scheduler = make_scheduler(40, max_num_seqs=6, max_num_batched_tokens=16, **limits)
    scheduler.add(make_request(3, 900))
    run_step(scheduler)  # a stream, so that prompts come in pieces
    common = list(range(100, 124))
    requests = [make_request(1, i) for i in range(5)]
    for i, request in enumerate(requests):
        request.prompt_token_ids = [*common, 500 + i, 600 + i]
        scheduler.add(request)
    assert total(scheduler, requests) == len(common) + 2 * len(requests)
    assert sum(request.num_cached_tokens or 0 for request in requests) == 4 * len(common)


def test_what_is_left_to_the_next_step_is_nobody_s_yet() -> None:
    """A prompt whose last tokens are not computed in this step after all does not say that they are."""
    scheduler = make_scheduler(2000, max_num_seqs=8, max_num_batched_tokens=2048, step_sizes=(512, 768))
    first, second = make_request(400), make_request(120, 1000)
    scheduler.add(first)
    scheduler.add(second)
    assert run_step(scheduler) == [(0, 400, True), (1000, 112, False)]
    assert len(second.block_hashes) == 112 // 4
    twin = make_request(120, 1000)
    scheduler.add(twin)
    run_step(scheduler)
    assert twin.num_cached_tokens == 116
