"""Logits to token ids, for every request of a step at once.

Random choices use the Gumbel-max trick over a counter-based hash of (seed, position, token), so that what a seeded
request draws depends on nothing else in the batch, on no generator's state, and is the same on every device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch

from langchain_lora_retriever.engine.generation import TokenLogprob
from langchain_lora_retriever.engine.logits_rules import apply_rules
from langchain_lora_retriever.engine.pinned_copy import copy_to_device, copy_to_host, upload
from langchain_lora_retriever.engine.request import failure
from langchain_lora_retriever.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from langchain_lora_retriever.engine.logits_rules import PendingTokens
    from langchain_lora_retriever.engine.request import Request
    from langchain_lora_retriever.errors import LoraRetrieverError

    Outcome: TypeAlias = "ChosenToken | LoraRetrieverError"

__all__ = [
    "Choice",
    "ChosenToken",
    "Outcome",
    "apply_bitmask",
    "apply_top_k_top_p",
    "choose",
    "gumbel_noise",
    "is_plain_greedy",
    "not_finite",
    "score",
]

_ROWS_SCORED_AT_ONCE = 32
"""Rows of a step's logits that are turned to float32 together for the tokens of prompts."""


class ChosenToken(NamedTuple):
    """A request's next token, with its log-probabilities if the request asked for them."""

    token_id: int
    logprob: TokenLogprob | None = None


class Choice(NamedTuple):
    """The chosen tokens of a step, and what is to be told of them; on the device or copied from it.

    Attributes:
        token_ids: `[num_requests]` int64; where a request fails, some token of the vocabulary.
        peaks: Each row's largest logit as the model gave it `[num_requests]`: NaN or infinite if the model failed.
        allowed_peaks: The same of the tokens that grammars allow, or None without a grammar; -inf if there are none.
        logprobs: The chosen tokens' `[num_requests]`, or None.
        top_logprobs: The likeliest tokens' `[num_requests, n]`, or None.
        top_token_ids: Their ids, or None.
        failures: What went wrong before the device was asked, by row.
        pairs: Where token ids and peaks lie side by side, see `of_pairs`; None where they do not.
    """

    token_ids: torch.Tensor
    peaks: torch.Tensor
    allowed_peaks: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    top_token_ids: torch.Tensor | None = None
    failures: Mapping[int, LoraRetrieverError] | None = None
    pairs: torch.Tensor | None = None

    @classmethod
    def of_pairs(cls, pairs: torch.Tensor) -> Choice:
        """The choice of a step that is plain greedy.

        Args:
            pairs: `[num_requests, 2]` int64, contiguous: token ids, and the bits of the peaks as float64.
        """
        return cls(pairs[:, 0], pairs.view(torch.float64)[:, 1], pairs=pairs)

    def to_host(self) -> Choice:
        """Begin to copy all of it to the host; to be read once the current stream has come this far.

        The next step may overwrite the pairs.
        """
        if self.pairs is not None:
            is_on_gpu = self.pairs.device.type == "cuda"
            return Choice.of_pairs(copy_to_host(self.pairs) if is_on_gpu else self.pairs.clone())
        return Choice._make(copy_to_host(part) if isinstance(part, torch.Tensor) else part for part in self)

    def read(self, requests: Sequence[Request]) -> list[Outcome]:
        """For each request the token chosen for it, or the error that ends it."""
        outcomes: list[Outcome] = list(map(ChosenToken, self.token_ids.tolist(), self._read_logprobs(requests)))
        peaks = self.peaks.tolist()
        allowed_peaks = peaks if self.allowed_peaks is None else self.allowed_peaks.tolist()
        for row, (peak, allowed_peak) in enumerate(zip(peaks, allowed_peaks, strict=True)):
            if not math.isfinite(peak):
                outcomes[row] = not_finite(requests[row])
            elif not math.isfinite(allowed_peak):
                outcomes[row] = _nothing_allowed()
        for row, error in (self.failures or {}).items():
            outcomes[row] = error
        return outcomes

    def _read_logprobs(self, requests: Sequence[Request]) -> list[TokenLogprob | None]:
        if self.logprobs is None or self.top_logprobs is None or self.top_token_ids is None:
            return [None] * len(requests)
        token_ids, chosen = self.token_ids.tolist(), self.logprobs.tolist()
        values, ids = self.top_logprobs.tolist(), self.top_token_ids.tolist()
        results: list[TokenLogprob | None] = []
        for row, request in enumerate(requests):
            num = request.sampling.logprobs
            if num is None:
                results.append(None)
            else:
                top = tuple(zip(ids[row][:num], values[row][:num], strict=True))
                results.append(TokenLogprob(token_ids[row], chosen[row], top))
        return results


def score(logits: torch.Tensor, token_ids: Sequence[int]) -> torch.Tensor:
    """The log-probability `[n]` float32 of one token after each row, without waiting for the device.

    Args:
        logits: `[n, vocab_size]`, any float dtype.
        token_ids: The tokens.
    """
    wanted = upload(token_ids, torch.int64, logits.device)[:, None]
    pieces = zip(logits.split(_ROWS_SCORED_AT_ONCE), wanted.split(_ROWS_SCORED_AT_ONCE), strict=True)
    return torch.cat([rows.float().log_softmax(-1).gather(1, ids)[:, 0] for rows, ids in pieces])


def is_plain_greedy(request: Request) -> bool:
    """Whether its next token is the argmax of the logits and nothing else is asked."""
    sampling, rules = request.sampling, request.rules
    is_plain = sampling.temperature == 0 and sampling.logprobs is None and request.constraint is None
    return is_plain and (rules is None or not rules.is_active(request))


def choose(
    logits: torch.Tensor, requests: Sequence[Request], *, num_known: int = 0, pending: PendingTokens | None = None
) -> Choice:
    """Choose each request's next token, without waiting for the device.

    What goes wrong for one request is told in its row and changes no other's token.

    Args:
        logits: `[num_requests, vocab_size]`, any float dtype; may be overwritten.
        requests: The rows' requests.
        num_known: Token ids that grammars know of, which may be more than the model has.
        pending: The requests' last tokens, where the host does not know them.
    """
    if all(is_plain_greedy(request) for request in requests):
        peaks, token_ids = logits.max(-1)
        return Choice(token_ids, peaks)
    logits = logits.float()
    peaks, allowed_peaks, failures = logits.amax(-1), None, None
    logprobs = logits.log_softmax(-1) if any(r.sampling.logprobs is not None for r in requests) else None
    given = logits
    if any(request.rules is not None for request in requests):
        logits = apply_rules(logits, requests, pending)
    if any(request.constraint is not None for request in requests):
        bitmask, failures = _fill_bitmask(requests, max(num_known, logits.shape[1]))
        bitmask = copy_to_device(bitmask, logits.device)
        ruled, logits = logits, apply_bitmask(logits, bitmask)
        if ruled is not given:  # where the rules ban all that a grammar allows, the grammar counts
            is_stuck = logits.amax(-1, keepdim=True) == -torch.inf
            logits = torch.where(is_stuck, apply_bitmask(given, bitmask), logits)
        allowed_peaks = logits.amax(-1)
    random = [i for i, r in enumerate(requests) if r.sampling.temperature > 0]
    if random:
        rows = upload(random, torch.int64, logits.device)
        logits[rows] = _perturb(logits[rows], [requests[i] for i in random])
    token_ids = logits.argmax(-1)
    if logprobs is None:
        return Choice(token_ids, peaks, allowed_peaks, failures=failures)
    top = logprobs.topk(min(max(r.sampling.logprobs or 0 for r in requests), logprobs.shape[1]), dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])[:, 0]
    return Choice(token_ids, peaks, allowed_peaks, chosen, top.values, top.indices, failures)


def apply_bitmask(logits: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    """Forbid tokens whose bit is 0.

    Args:
        logits: `[num_rows, vocab_size]`.
        bitmask: int32 `[num_rows, >= ceil(vocab_size / 32)]`, token t is bit `t % 32` of word `t // 32`.
    """
    shifts = torch.arange(32, device=logits.device, dtype=torch.int32)
    allowed = (bitmask.unsqueeze(-1) >> shifts) & 1
    return logits.masked_fill(allowed.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def apply_top_k_top_p(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep each row's `top_k` likeliest tokens, then of those the fewest whose probability reaches `top_p`.

    Args:
        logits: `[num_rows, vocab_size]` float32.
        top_k: `[num_rows]` int64; 0 keeps all.
        top_p: `[num_rows]` float32 in (0, 1].
    """
    values, order = logits.sort(-1, descending=True)
    ranks = torch.arange(values.shape[1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, values.shape[1])
    values = values.masked_fill(ranks >= limit[:, None], -torch.inf)
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # the likeliest token has nothing before it: it always stays
    values = values.masked_fill((before >= top_p[:, None]) & (ranks > 0), -torch.inf)
    return torch.empty_like(logits).scatter_(1, order, values)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, a pure function of (seed, position, token).

    Args:
        seeds: `[num_rows]` int64.
        positions: `[num_rows]` int64, the index of the token to be chosen.
        vocab_size: Number of columns.

    Returns:
        `[num_rows, vocab_size]` float32, finite.
    """
    low, high = seeds & _MASK32, (seeds >> 32) & _MASK32
    keys = _hash32(_hash32(_hash32(low) ^ high) ^ (positions & _MASK32))
    tokens = torch.arange(vocab_size, device=seeds.device)
    bits = _hash32(_hash32(tokens)[None, :] ^ keys[:, None])
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # 24 significant bits: exact in float32, never 0 or 1
    return -(-uniform.log()).log()


_MASK32 = 0xFFFFFFFF
_MASK63 = 0x7FFFFFFFFFFFFFFF
_COLDEST, _HOTTEST = 1e-5, 1e30  # beyond, float32 logits overflow or -inf becomes NaN; draws are the same within and at


def _hash32(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer hash in int64 lanes. Source: C. Wellons, "Prospecting for hash functions" (lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def _fill_bitmask(requests: Sequence[Request], num_tokens: int) -> tuple[torch.Tensor, dict[int, LoraRetrieverError]]:
    """The tokens that each request's grammar allows, `[num_requests, ceil(num_tokens / 32)]`; what failed, by row."""
    bitmask = torch.full((len(requests), -(-num_tokens // 32)), -1, dtype=torch.int32)
    failures: dict[int, LoraRetrieverError] = {}
    for row, request in enumerate(requests):
        if request.constraint is not None:
            try:
                request.constraint.fill_bitmask(bitmask[row])
            except BaseException as error:  # noqa: BLE001 - panics of llguidance too; it ends the request it came from
                failures[row] = failure("The request's grammar failed while it was followed", error)
                bitmask[row] = -1
    return bitmask, failures


def not_finite(request: Request) -> EngineError:
    """What ends a request whose numbers overflowed on their way through the model."""
    names = ", ".join(repr(adapter.name) for adapter, _ in request.adapters)
    if names:
        return EngineError(
            f"The logits of this request, which runs the adapters {names}, are not finite: its numbers overflowed on "
            "their way through the model. The adapters' weights are too large for it: train them anew, or run others."
        )
    return EngineError(
        "The logits of this request are not finite: its numbers overflowed on their way through the base model. Load "
        "the model in a dtype of wider range, bfloat16 or float32."
    )


def _nothing_allowed() -> EngineError:
    return EngineError(
        "The request's grammar allows no token that the model has, so the answer cannot go on: change the grammar, or "
        "the tokenizer if it has more tokens than the model."
    )


def _perturb(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Scale, filter and add noise, so that the argmax is a draw."""
    device = logits.device
    temperatures = [min(max(r.sampling.temperature, _COLDEST), _HOTTEST) for r in requests]
    logits = logits / upload(temperatures, torch.float32, device)[:, None]
    if any(r.sampling.top_k or r.sampling.top_p < 1 for r in requests):
        top_k = upload([min(r.sampling.top_k, logits.shape[1]) for r in requests], torch.int64, device)
        top_p = upload([r.sampling.top_p for r in requests], torch.float32, device)
        logits = apply_top_k_top_p(logits, top_k, top_p)
    seeds = upload([r.seed & _MASK63 for r in requests], torch.int64, device)
    positions = upload([r.num_output_tokens for r in requests], torch.int64, device)
    return logits + gumbel_noise(seeds, positions, logits.shape[1])
