"""What a step computes, as flat lists over its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_lora_retriever.engine.request import Request
    from langchain_lora_retriever.engine.scheduler import ScheduledRequest

__all__ = ["PackedBatch"]


class PackedBatch(NamedTuple):
    """The tokens of a step, sequence after sequence.

    Attributes:
        scheduled: The sequences.
        token_ids: 0 where the token is pending.
        positions: Each token's place in its sequence.
        rows: Each token's request's row.
        sources: Where a pending token stands among those the last step chose; -1 for all others.
        sampled_tokens: Indices of the tokens after which one is chosen.
        sampled_requests: Their requests.
    """

    scheduled: Sequence[ScheduledRequest]
    token_ids: list[int]
    positions: list[int]
    rows: list[int]
    sources: list[int]
    sampled_tokens: list[int]
    sampled_requests: list[Request]

    @classmethod
    def pack(cls, scheduled: Sequence[ScheduledRequest], last_choice: Mapping[Request, int]) -> PackedBatch:
        """Lay the scheduled tokens side by side.

        Args:
            scheduled: The sequences and how many tokens of each.
            last_choice: Place of each request among those the last step chose a token for.
        """
        batch = cls(scheduled, [], [], [], [], [], [])
        for item in scheduled:
            request, start, num = item.request, item.request.num_computed_tokens, item.num_new_tokens
            known = request.tokens_between(start, start + num)
            batch.token_ids.extend(known)
            batch.sources.extend([-1] * len(known))
            if len(known) < num:
                batch.token_ids.append(0)
                batch.sources.append(last_choice[request])
            batch.positions.extend(range(start, start + num))
            batch.rows.extend([request.row] * num)
            if item.is_sampled:
                batch.sampled_tokens.append(len(batch.token_ids) - 1)
                batch.sampled_requests.append(request)
        return batch

    @property
    def is_decode(self) -> bool:
        """Whether every sequence computes one token and has one chosen."""
        return len(self.sampled_tokens) == len(self.token_ids)
