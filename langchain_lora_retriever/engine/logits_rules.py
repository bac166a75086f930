"""Penalties and bans that depend on the tokens so far, for every request of a step at once.

Why not transformers' `LogitsProcessor` classes: they take one setting for a batch of sequences of equal length,
and look at all tokens of a sequence again for each new one, on the host, waiting for the device.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

import torch

from langchain_lora_retriever.engine.pinned_copy import copy_to_device, upload

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from langchain_lora_retriever.engine.model.generation_defaults import GenerationDefaults
    from langchain_lora_retriever.engine.request import Request

__all__ = ["LogitsRules", "PendingTokens", "apply_rules"]


class PendingTokens(NamedTuple):
    """Last tokens that the host does not know yet.

    Attributes:
        chosen: Tokens on the device, int64.
        places: Where each request's last token is among them; -1 if the host knows it.
    """

    chosen: torch.Tensor
    places: Sequence[int]


class LogitsRules:
    """The rules of one request, and what it has to remember for them. One thread at a time may use it.

    Args:
        defaults: The model's rules.
        prompt_token_ids: The prompt.
        repetition_penalty: The request's own; None takes the model's.
        end_token_ids: Tokens that end the answer.
        max_num_tokens: Where prompt and answer end at the latest.
    """

    def __init__(
        self,
        defaults: GenerationDefaults,
        prompt_token_ids: Sequence[int],
        *,
        repetition_penalty: float | None,
        end_token_ids: Collection[int],
        max_num_tokens: int,
    ) -> None:
        self.repetition_penalty = defaults.repetition_penalty if repetition_penalty is None else repetition_penalty
        self._always = array("q", defaults.suppress_tokens)
        self._always.extend(word[0] for word in defaults.bad_words_ids if len(word) == 1)
        self._first = array("q", defaults.begin_suppress_tokens)
        self._ends = array("q", end_token_ids)
        # As `generate` has it: the one takes the place of the other.
        num_new = defaults.min_new_tokens or max(defaults.min_length - len(prompt_token_ids), 0)
        self._min_num_tokens = len(prompt_token_ids) + num_new if num_new else 0
        self._forced_last = array("q", defaults.forced_eos_token_ids)
        self._max_num_tokens = max_num_tokens
        self._ngram_size = defaults.no_repeat_ngram_size
        self._followers: dict[tuple[int, ...], array[int]] = {}
        self._words = [word for word in defaults.bad_words_ids if len(word) > 1]
        self._num_remembered = max([self._ngram_size, *map(len, self._words)]) - 1  # before the next token
        self._last: list[int] = []
        self._num_read = 0
        self._seen: set[int] = set()
        self._seen_ids = array("q")
        self._read(prompt_token_ids)

    @property
    def is_needed(self) -> bool:
        """Whether there is any rule at all."""
        return bool(self._is_always_active or self._first or self._min_num_tokens or self._forced_last)

    @property
    def needs_known_tokens(self) -> bool:
        """Whether the host must know the last token before the next is chosen."""
        return bool(self._ngram_size or self._words)

    @property
    def _is_always_active(self) -> bool:
        return self.repetition_penalty != 1 or bool(self._always) or self.needs_known_tokens

    def is_active(self, request: Request) -> bool:
        """Whether the request's next token may be another because of a rule."""
        return (
            self._is_always_active
            or request.num_tokens < self._min_num_tokens
            or (bool(self._first) and request.num_output_tokens == 0)
            or self.forced(request) is not None
        )

    def forced(self, request: Request) -> array[int] | None:
        """The tokens of which the request's next one must be one, or None."""
        is_last = request.num_tokens == self._max_num_tokens - 1
        return self._forced_last if self._forced_last and is_last else None

    def seen(self, request: Request) -> array[int]:
        """The tokens that the request has, each once, but for one that is pending."""
        self._read(request.output_token_ids[self._num_read :])
        self._num_read = len(request.output_token_ids)
        return self._seen_ids

    def banned(self, request: Request) -> list[array[int]]:
        """Tokens that may not come next. Call after `seen`."""
        banned = [self._always] if self._always else []
        if self._first and request.num_output_tokens == 0:
            banned.append(self._first)
        if request.num_tokens < self._min_num_tokens:
            banned.append(self._ends)
        if self._ngram_size:
            followers = self._followers.get(self._end(self._ngram_size - 1))
            if followers is not None:
                banned.append(followers)
        ends = [word[-1] for word in self._words if self._end(len(word) - 1) == word[:-1]]
        return [*banned, array("q", ends)] if ends else banned

    def _end(self, num: int) -> tuple[int, ...]:
        return tuple(self._last[len(self._last) - num :]) if num <= len(self._last) else (-1,)

    def _read(self, token_ids: Sequence[int]) -> None:
        if self.repetition_penalty != 1:
            for token_id in token_ids:
                if token_id not in self._seen:
                    self._seen.add(token_id)
                    self._seen_ids.append(token_id)
        if not self.needs_known_tokens:
            return
        for token_id in token_ids:
            if self._ngram_size and len(self._last) >= self._ngram_size - 1:
                self._followers.setdefault(self._end(self._ngram_size - 1), array("q")).append(token_id)
            self._last.append(token_id)
            if len(self._last) > self._num_remembered:
                del self._last[0]


def apply_rules(logits: torch.Tensor, requests: Sequence[Request], pending: PendingTokens | None) -> torch.Tensor:
    """A copy of the logits in which the requests' rules are applied; without waiting for the device.

    As `generate` does: first the penalty, then the bans. A repeated pair of row and token gets the same value twice.

    Args:
        logits: `[num_requests, vocab_size]` float32.
        requests: The rows' requests.
        pending: Their last tokens, where the host does not know them.
    """
    penalties = [1.0] * len(requests)
    seen, banned, forced = _Pairs(), _Pairs(), _Pairs()
    for row, request in enumerate(requests):
        rules = request.rules
        if rules is None or not rules.is_active(request):
            continue
        tokens = rules.seen(request)
        if rules.repetition_penalty != 1:
            penalties[row] = rules.repetition_penalty
            seen.add(row, tokens)
        for tokens in rules.banned(request):
            banned.add(row, tokens)
        tokens_left = rules.forced(request)
        if tokens_left is not None:
            forced.add(row, tokens_left)
    logits = logits.clone()
    if seen.rows:
        rows, columns = seen.on(logits)
        if pending is not None:
            hidden = [row for row in seen.rows if pending.places[row] >= 0]
            places = upload([pending.places[row] for row in hidden], torch.int64, logits.device)
            rows = torch.cat([rows, upload(hidden, torch.int64, logits.device)])
            columns = torch.cat([columns, pending.chosen[places]])
        scores = logits[rows, columns]
        factors = upload(penalties, torch.float32, logits.device)[rows]
        logits[rows, columns] = torch.where(scores < 0, scores * factors, scores / factors)
    if banned.rows:
        logits.index_put_(banned.on(logits), logits.new_full((), -torch.inf))  # a Python number would be waited for
    if forced.rows:
        logits.index_fill_(0, upload(forced.rows, torch.int64, logits.device), -torch.inf)
        logits.index_put_(forced.on(logits), logits.new_zeros(()))
    return logits


class _Pairs:
    """Pairs of row and token, collected on the host."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._tokens: list[array[int]] = []

    def add(self, row: int, tokens: array[int]) -> None:
        """Add a row's tokens."""
        if tokens:
            self.rows.append(row)
            self._tokens.append(tokens)

    def on(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the pairs into logits, on their device; without tokens that these lack."""
        columns = torch.cat([torch.frombuffer(tokens, dtype=torch.int64) for tokens in self._tokens])
        rows = torch.tensor(self.rows).repeat_interleave(torch.tensor(list(map(len, self._tokens))))
        inside = (columns >= 0) & (columns < logits.shape[1])
        if not inside.all():
            rows, columns = rows[inside], columns[inside]
        return copy_to_device(rows, logits.device), copy_to_device(columns, logits.device)
