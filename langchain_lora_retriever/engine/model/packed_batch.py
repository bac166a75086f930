"""What a step computes, as flat arrays over its tokens, and which adapters run for them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from langchain_lora_retriever.engine.model.recurrent import StatePiece

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from langchain_lora_retriever.engine.request import Request
    from langchain_lora_retriever.engine.scheduler import ScheduledRequest

__all__ = ["LoraSpans", "PackedBatch"]

_NONE = array("q", (-1,))


@dataclass(frozen=True, slots=True)
class LoraSpans:
    """The adapters of a step's packed sequences. One within which an adapter becomes active counts as two.

    Attributes:
        counts: Tokens of each sequence.
        slots: Slots of each sequence's adapters.
        weights: Their weights.
        num_adapters: Maximum number of adapters of a sequence.
        active: All the slots that the step names.
    """

    counts: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    num_adapters: int
    active: frozenset[int]

    @classmethod
    def of(cls, scheduled: Sequence[ScheduledRequest]) -> LoraSpans:
        """The adapters that scheduled requests hold, as far as they are active for the step's tokens."""
        counts: list[int] = []
        slots: list[tuple[int, ...]] = []
        weights: list[tuple[float, ...]] = []
        for request, num in scheduled:
            if not request.adapters:
                counts.append(num)
                slots.append(())
                weights.append(())
                continue
            held = request.lora_slots or ()
            for count, active in _active(request, num):
                counts.append(count)
                slots.append(tuple([held[i] for i in active]) if held else ())
                weights.append(tuple([request.adapters[i][1] for i in active]))
        most = max(map(len, slots), default=0)
        return cls(tuple(counts), tuple(slots), tuple(weights), most, frozenset().union(*slots))

    def per_token(self, num_adapters: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots, int32, and weights, float32, of each token: `[num_tokens, k]`; where there are fewer, -1 and 0.

        Args:
            num_adapters: `k`; by default the most of a sequence.
        """
        k = self.num_adapters if num_adapters is None else num_adapters
        # numpy reads nested tuples several times as fast as torch does.
        slots = np.array([row + (-1,) * (k - len(row)) for row in self.slots], np.int32).reshape(len(self.slots), k)
        weights = np.array([row + (0.0,) * (k - len(row)) for row in self.weights], np.float32).reshape(
            len(self.slots), k
        )
        return torch.from_numpy(slots.repeat(self.counts, 0)), torch.from_numpy(weights.repeat(self.counts, 0))


def _active(request: Request, num: int) -> Iterable[tuple[int, tuple[int, ...]]]:
    """How many of a request's next `num` tokens run which of its adapters, run by run."""
    if len(request.states) == 1:
        return ((num, request.states[0][1]),)
    return _active_by_state(request, num)


def _active_by_state(request: Request, num: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    start = request.num_computed_tokens
    end = start + num
    nexts = [*(first for first, _ in request.states[1:]), end]
    for (first, active), following in zip(request.states, nexts, strict=True):
        count = min(following, end) - max(first, start)
        if count > 0:
            yield count, active


class PackedBatch(NamedTuple):
    """The tokens of a step, sequence after sequence; arrays are of int64, so that nobody need look at each number.

    Attributes:
        scheduled: The sequences.
        token_ids: 0 where the token is pending.
        positions: Each token's place in its sequence.
        rows: Each token's request's row.
        sources: Where a pending token stands among those the last step chose; -1 for all others.
        sampled_tokens: Indices of the tokens after which one is chosen.
        sampled_requests: Their requests.
        lora: The sequences' adapters.
        scored_tokens: Indices of the tokens after which the logits are wanted for the prompt's next one.
        scored_requests: Their requests, and the place of that next one.
    """

    scheduled: Sequence[ScheduledRequest]
    token_ids: array[int]
    positions: array[int]
    rows: array[int]
    sources: array[int]
    sampled_tokens: list[int]
    sampled_requests: list[Request]
    lora: LoraSpans
    scored_tokens: list[int]
    scored_requests: list[tuple[Request, int]]

    @classmethod
    def pack(cls, scheduled: Sequence[ScheduledRequest], last_choice: Mapping[Request, int]) -> PackedBatch:
        """Lay the scheduled tokens side by side.

        Args:
            scheduled: The sequences and how many tokens of each.
            last_choice: Place of each request among those the last step chose a token for.
        """
        token_ids, positions, rows, sources = array("q"), array("q"), array("q"), array("q")
        sampled_tokens: list[int] = []
        sampled_requests: list[Request] = []
        scored_tokens: list[int] = []
        scored_requests: list[tuple[Request, int]] = []
        for item in scheduled:
            request, num = item
            first, start = len(token_ids), request.num_computed_tokens
            end = start + num
            num_known = min(num, request.num_known_tokens - start)
            if num_known:
                token_ids.fromlist(request.tokens_between(start, end))
                sources.extend(_NONE * num_known)
            if num_known < num:
                token_ids.append(0)
                sources.append(last_choice[request])
            if num == 1:
                positions.append(start)
                rows.append(request.row)
            else:
                positions.frombytes(np.arange(start, end, dtype=np.int64).tobytes())
                rows.extend(array("q", (request.row,)) * num)
            for place in request.scored_places(start, end):
                scored_tokens.append(first + place - start)
                scored_requests.append((request, place + 1))
            if item.is_sampled:
                sampled_tokens.append(first + num - 1)
                sampled_requests.append(request)
        return cls(
            scheduled, token_ids, positions, rows, sources, sampled_tokens, sampled_requests,
            LoraSpans.of(scheduled), scored_tokens, scored_requests,
        )  # fmt: skip

    def state_pieces(self, device: torch.device) -> list[StatePiece]:
        """How layers that keep states take the tokens."""
        sequences = [
            (item.request.row, item.request.num_computed_tokens, item.num_new_tokens) for item in self.scheduled
        ]
        return StatePiece.of(sequences, device)

    @property
    def tokens_with_logits(self) -> list[int]:
        """Indices of the tokens after which logits are wanted: the sampled ones, then the scored ones."""
        return self.sampled_tokens + self.scored_tokens

    @property
    def is_decode(self) -> bool:
        """Whether every sequence computes one token and has one chosen."""
        return len(self.sampled_tokens) == len(self.token_ids)
