"""Who runs in the next step, and how many of their tokens.

Prefill and decode are one thing here: every request has tokens that are not yet computed, and a step computes some of
them. A decoding request has one; a waiting prompt has many, and takes what the token budget leaves.
"""

from __future__ import annotations

import bisect
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.engine.adapter_slots import AdapterSlots
    from langchain_lora_retriever.engine.kv_blocks import KVCacheManager
    from langchain_lora_retriever.engine.request import Request

__all__ = ["ScheduledRequest", "Scheduler"]

_MIN_TOKENS_TO_TRIM = 512
"""Tokens of the smallest step whose time grows with its padding; smaller ones take as long as reading the weights."""
_MAX_SCORED_PLACES = 256
"""Places of prompts in a step whose logits are wanted for the tokens that follow there: each takes a row of the
vocabulary's length."""
_MIN_PROMPTS = 2
"""Prompts in a step of which one may get its first token a step later for the others' sake."""
_MIN_PADDING_SAVED_PER_TOKEN = 2
"""Tokens of padding saved, at least, for each that is left to the next step."""


class ScheduledRequest(NamedTuple):
    """A request and how many of its tokens the step computes."""

    request: Request
    num_new_tokens: int

    @property
    def is_sampled(self) -> bool:
        """Whether the step reaches the request's last token, so that the next one is chosen."""
        return self.request.num_computed_tokens + self.num_new_tokens == self.request.num_tokens

    @property
    def scored_places(self) -> range:
        """The places in its prompt whose next tokens' log-probabilities the step is to tell."""
        start = self.request.num_computed_tokens
        return self.request.scored_places(start, start + self.num_new_tokens)


class Scheduler:
    """Continuous batching, first come first served, with chunked prefill and preemption by recomputation.

    Args:
        kv_cache: Where blocks come from.
        slots: Where device memory for adapters comes from.
        max_num_seqs: Maximum number of requests running at once.
        max_num_batched_tokens: Maximum number of tokens computed in one step.
        num_usual_tokens: Up to how many of these prompts fill a step; it has more only where no prompt waits any
            longer then: a few tokens with others take less time than by themselves. None: up to the maximum.
        max_num_prefill_tokens: Maximum number of tokens of one prompt in a step that also serves streams, while those
            are more than the requests that wait for their first token; None sets no such limit.
        step_sizes: Numbers of tokens, ascending, to which steps with prompts in them are padded.
    """

    def __init__(
        self,
        kv_cache: KVCacheManager,
        slots: AdapterSlots,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_usual_tokens: int | None = None,
        max_num_prefill_tokens: int | None = None,
        step_sizes: Sequence[int] = (),
    ) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._refused: list[tuple[Request, Exception]] = []
        self._kv_cache = kv_cache
        self._slots = slots
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._num_usual_tokens = max_num_batched_tokens if num_usual_tokens is None else num_usual_tokens
        self._max_num_prefill_tokens = max_num_prefill_tokens
        self._step_sizes = step_sizes
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def schedule(self) -> list[ScheduledRequest]:
        """Choose the next step.

        Running requests come first, and prompts among them leave the streams behind them their tokens, so that no
        stream waits for somebody's prompt.

        Mutates the requests' blocks, slots and rows. A waiting request that cannot be admitted (its adapters cannot be
        loaded) leaves the queue for `take_refused`. Empty only if nothing is waiting or running, or what runs has
        pending tokens to be collected first.
        """
        self._kv_cache.begin_step()
        budget, prompt_limit, num_streams = self._limits()
        scores = _MAX_SCORED_PLACES
        scheduled: list[ScheduledRequest] = []
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            num_new_tokens = request.num_tokens - request.num_computed_tokens
            if num_new_tokens == 1:
                num_streams -= 1
            elif num_new_tokens > 1:
                self._kv_cache.extend_prefix(request)
                num_new_tokens = _num_next(request, min(max(0, budget - num_streams), prompt_limit), scores)
            if request.is_exhausted or not num_new_tokens:
                index += 1
                continue
            while not self._kv_cache.allocate(request, request.num_computed_tokens + num_new_tokens):
                self._preempt_last()
                if index >= len(self.running):
                    break  # the request itself was the last one
            else:
                self._schedule(scheduled, ScheduledRequest(request, num_new_tokens))
                budget -= num_new_tokens
                scores -= len(scheduled[-1].scored_places)
                index += 1
        while self.waiting and budget > 0 and len(self.running) < self._max_num_seqs:
            try:
                admitted = self._admit(self.waiting[0], min(budget, prompt_limit), scores)
            except Exception as error:  # noqa: BLE001 - loading an adapter reads somebody's file; it ends its request
                self._release(self.waiting[0])
                self._refused.append((self.waiting.popleft(), error))
                continue
            if admitted is None:
                break
            self.waiting.popleft()
            self.running.append(admitted.request)
            self._schedule(scheduled, admitted)
            budget -= admitted.num_new_tokens
            scores -= len(admitted.scored_places)
        return self._without_surplus(scheduled)

    def _schedule(self, scheduled: list[ScheduledRequest], item: ScheduledRequest) -> None:
        """Add to the step; whoever comes next may have the blocks that it fills."""
        scheduled.append(item)
        self._kv_cache.commit(item.request, item.request.num_computed_tokens + item.num_new_tokens)

    def take_refused(self) -> list[tuple[Request, Exception]]:
        """The requests that could not be admitted since this was asked last, and why."""
        refused, self._refused = self._refused, []
        return refused

    def finish(self, request: Request) -> None:
        """Release everything a request holds; it is neither waiting nor running afterwards."""
        request.is_finished = True
        if request in self.running:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def forget(self) -> None:
        """Let go of all requests, with what they hold; nothing is scheduled any more."""
        self.waiting.clear()
        self.running.clear()
        self._refused.clear()

    def check_integrity(self) -> None:
        """Assert that blocks and slots are held by running requests and by nobody else."""
        self._kv_cache.check_integrity(self.running)
        self._slots.check_integrity([r.lora_slots for r in self.running if r.lora_slots is not None])
        assert all(not r.block_ids and r.lora_slots is None for r in self.waiting), "a waiting request holds memory"
        rows = sorted(self._free_rows + [r.row for r in self.running])
        assert rows == list(range(self._max_num_seqs)), "rows were lost"

    def _admit(self, request: Request, budget: int, scores: int) -> ScheduledRequest | None:
        if request.num_pending_tokens:  # preempted a moment ago; its last token is not known yet
            return None
        adapters = [adapter for adapter, _ in request.adapters]
        if self.running and not self._slots.are_ready(adapters):
            return None  # others need not wait for its adapters
        slots = self._slots.acquire(adapters)
        if slots is None:
            return None
        request.lora_slots = slots
        self._kv_cache.match_prefix(request)
        num_new_tokens = _num_next(request, budget, scores)
        num_tokens = request.num_computed_tokens + num_new_tokens
        if not num_new_tokens or not self._kv_cache.allocate(request, num_tokens):
            self._release(request)
            return None
        if request.num_cached_tokens is None:  # a preempted request keeps what its first admission found
            request.num_cached_tokens = request.num_computed_tokens
        request.row = self._free_rows.pop()
        return ScheduledRequest(request, num_new_tokens)

    def _without_surplus(self, scheduled: list[ScheduledRequest]) -> list[ScheduledRequest]:
        """Leave a prompt's last few tokens to the next step if this one would be padded by many for them.

        Five prompts of 128 tokens and three streams are 643 tokens, and would take as long as 768.
        """
        num_tokens = sum([item.num_new_tokens for item in scheduled])
        index = bisect.bisect_right(self._step_sizes, num_tokens)
        if num_tokens < _MIN_TOKENS_TO_TRIM or not 0 < index < len(self._step_sizes) or self._kv_cache.has_lent:
            return scheduled
        num_surplus = num_tokens - self._step_sizes[index - 1]
        num_padding = self._step_sizes[index] - num_tokens
        prompts = [place for place, item in enumerate(scheduled) if item.num_new_tokens > 1]
        if len(prompts) < _MIN_PROMPTS or num_surplus * _MIN_PADDING_SAVED_PER_TOKEN > num_padding:
            return scheduled
        last = scheduled[prompts[-1]]
        if last.num_new_tokens > num_surplus:
            scheduled[prompts[-1]] = last = last._replace(num_new_tokens=last.num_new_tokens - num_surplus)
            self._kv_cache.retract(last.request, last.request.num_computed_tokens + last.num_new_tokens)
        return scheduled

    def _limits(self) -> tuple[int, int, int]:
        """Tokens of the step, and of one prompt in it; and how many streams run."""
        left = [request.num_tokens - request.num_computed_tokens for request in self.running]
        num_streams = left.count(1)
        return self._budget(sum(left)), self._prompt_limit(num_streams), num_streams

    def _budget(self, num_needed: int) -> int:
        """As many tokens as usual, or what all requests need if that is little more: those that run, so many."""
        most, usual = self._max_num_batched_tokens, self._num_usual_tokens
        if usual == most:
            return most
        for request in self.waiting:
            if num_needed > most:
                break
            num_needed += request.num_tokens - request.num_computed_tokens
        return most if num_needed <= most else usual

    def _prompt_limit(self, num_streams: int) -> int:
        """A prompt may have the whole step unless few of them would hold up many streams.

        Then each gets a part, so that a long one comes in pieces and short ones, which soon are streams too, do not.
        """
        num_others = len(self.waiting) + len(self.running) - num_streams
        if self._max_num_prefill_tokens is None or num_streams <= num_others:
            return self._max_num_batched_tokens
        return self._max_num_prefill_tokens

    def _preempt_last(self) -> None:
        """Send the youngest running request back to the head of the queue; it will be computed again."""
        request = self.running.pop()
        self._release(request)
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _release(self, request: Request) -> None:
        self._kv_cache.free(request)
        if request.row >= 0:
            self._free_rows.append(request.row)
            request.row = -1
        if request.lora_slots is not None:
            self._slots.release(request.lora_slots)
            request.lora_slots = None


def _num_next(request: Request, budget: int, scores: int) -> int:
    """Tokens of a request that a step computes, if it may compute `budget` and tell `scores` log-probabilities."""
    start = request.num_computed_tokens
    num_tokens = min(request.num_tokens - start, budget)
    places = request.scored_places(start, start + num_tokens)
    return num_tokens if len(places) <= scores else places[0] + scores - start
