"""Logits to token ids, for every request of a step at once.

Random choices use the Gumbel-max trick over a counter-based hash of (seed, position, token), so that what a seeded
request draws depends on nothing else in the batch, on no generator's state, and is the same on every device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from langchain_lora_retriever.engine.request import TokenLogprob
from langchain_lora_retriever.engine.upload import copy_to_device, upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.engine.request import Request

__all__ = ["Choice", "apply_bitmask", "apply_top_k_top_p", "choose", "gumbel_noise", "is_plain_greedy"]


class Choice(NamedTuple):
    """The chosen tokens of a step, and log-probabilities if a request asked for them; on the device or copied from it.

    Attributes:
        token_ids: `[num_requests]` int64.
        logprobs: The chosen tokens' `[num_requests]`, or None.
        top_logprobs: The likeliest tokens' `[num_requests, n]`, or None.
        top_token_ids: Their ids, or None.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    top_token_ids: torch.Tensor | None = None

    def read(self, requests: Sequence[Request]) -> tuple[list[int], list[TokenLogprob | None]]:
        """Token ids, and for each request its token's log-probabilities if it asked for them."""
        token_ids: list[int] = self.token_ids.tolist()
        if self.logprobs is None or self.top_logprobs is None or self.top_token_ids is None:
            return token_ids, [None] * len(requests)
        chosen, values, ids = self.logprobs.tolist(), self.top_logprobs.tolist(), self.top_token_ids.tolist()
        results: list[TokenLogprob | None] = []
        for row, request in enumerate(requests):
            num = request.sampling.logprobs
            if num is None:
                results.append(None)
            else:
                top = tuple(zip(ids[row][:num], values[row][:num], strict=True))
                results.append(TokenLogprob(token_ids[row], chosen[row], top))
        return token_ids, results


def is_plain_greedy(request: Request) -> bool:
    """Whether its next token is the argmax of the logits and nothing else is asked."""
    return request.sampling.temperature == 0 and request.sampling.logprobs is None and request.constraint is None


def choose(logits: torch.Tensor, requests: Sequence[Request]) -> Choice:
    """Choose each request's next token, without waiting for the device.

    Args:
        logits: `[num_requests, vocab_size]`, any float dtype; may be overwritten.
        requests: The rows' requests.
    """
    if all(is_plain_greedy(request) for request in requests):
        return Choice(logits.argmax(-1))
    logits = logits.float()
    logprobs = logits.log_softmax(-1) if any(r.sampling.logprobs is not None for r in requests) else None
    constrained = [i for i, r in enumerate(requests) if r.constraint is not None and r.constraint.is_active]
    if constrained:
        logits = _constrain(logits, requests, constrained)
    random = [i for i, r in enumerate(requests) if r.sampling.temperature > 0]
    if random:
        rows = upload(random, torch.int64, logits.device)
        logits[rows] = _perturb(logits[rows], [requests[i] for i in random])
    token_ids = logits.argmax(-1)
    if logprobs is None:
        return Choice(token_ids)
    top = logprobs.topk(max(r.sampling.logprobs or 0 for r in requests), dim=-1)
    return Choice(token_ids, logprobs.gather(1, token_ids[:, None])[:, 0], top.values, top.indices)


def apply_bitmask(logits: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    """Forbid tokens whose bit is 0.

    Args:
        logits: `[num_rows, vocab_size]`.
        bitmask: int32 `[num_rows, ceil(vocab_size / 32)]`, token t is bit `t % 32` of word `t // 32`.
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


def _hash32(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer hash in int64 lanes. Source: C. Wellons, "Prospecting for hash functions" (lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def _constrain(logits: torch.Tensor, requests: Sequence[Request], rows: list[int]) -> torch.Tensor:
    bitmask = torch.full((len(requests), -(-logits.shape[1] // 32)), -1, dtype=torch.int32)
    for row in rows:
        constraint = requests[row].constraint
        assert constraint is not None
        constraint.fill_bitmask(bitmask[row])
    return apply_bitmask(logits, copy_to_device(bitmask, logits.device))


def _perturb(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Scale, filter and add noise, so that the argmax is a draw."""
    device = logits.device
    temperature = upload([r.sampling.temperature for r in requests], torch.float32, device)
    logits = logits / temperature[:, None].clamp_min(1e-5)
    if any(r.sampling.top_k or r.sampling.top_p < 1 for r in requests):
        top_k = upload([r.sampling.top_k for r in requests], torch.int64, device)
        top_p = upload([r.sampling.top_p for r in requests], torch.float32, device)
        logits = apply_top_k_top_p(logits, top_k, top_p)
    seeds = upload([r.seed & 0x7FFFFFFFFFFFFFFF for r in requests], torch.int64, device)
    positions = upload([r.num_output_tokens for r in requests], torch.int64, device)
    return logits + gumbel_noise(seeds, positions, logits.shape[1])
