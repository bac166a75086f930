"""Logits to token ids, for every request of a step at once.

Random choices use the Gumbel-max trick over a counter-based hash of (seed, position, token), so that what a seeded
request draws depends on nothing else in the batch, on no generator's state, and is the same on every device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from langchain_lora_retriever.engine.request import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.engine.request import Request

__all__ = ["apply_bitmask", "apply_top_k_top_p", "gumbel_noise", "sample"]


def sample(logits: torch.Tensor, requests: Sequence[Request]) -> tuple[list[int], list[TokenLogprob | None]]:
    """Choose each request's next token.

    Args:
        logits: `[num_requests, vocab_size]`, any float dtype; may be overwritten.
        requests: The rows' requests.

    Returns:
        Token ids, and for each request its token's log-probabilities if it asked for them.
    """
    logits = logits.float()
    logprobs = logits.log_softmax(-1) if any(r.sampling.logprobs is not None for r in requests) else None
    constrained = [i for i, r in enumerate(requests) if r.constraint is not None and r.constraint.is_active]
    if constrained:
        logits = _constrain(logits, requests, constrained)
    random = [i for i, r in enumerate(requests) if r.sampling.temperature > 0]
    if random:
        rows = torch.tensor(random, device=logits.device)
        logits[rows] = _perturb(logits[rows], [requests[i] for i in random])
    chosen = logits.argmax(-1)
    token_ids: list[int] = chosen.tolist()
    if logprobs is None:
        return token_ids, [None] * len(requests)
    return token_ids, _read_logprobs(logprobs, token_ids, requests)


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
    return apply_bitmask(logits, bitmask.to(logits.device))


def _perturb(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Scale, filter and add noise, so that the argmax is a draw."""
    device = logits.device
    temperature = torch.tensor([r.sampling.temperature for r in requests], device=device)
    logits = logits / temperature[:, None].clamp_min(1e-5)
    if any(r.sampling.top_k or r.sampling.top_p < 1 for r in requests):
        top_k = torch.tensor([r.sampling.top_k for r in requests], device=device)
        top_p = torch.tensor([r.sampling.top_p for r in requests], device=device)
        logits = apply_top_k_top_p(logits, top_k, top_p)
    seeds = torch.tensor([r.seed & 0x7FFFFFFFFFFFFFFF for r in requests], device=device)
    positions = torch.tensor([len(r.output_token_ids) for r in requests], device=device)
    return logits + gumbel_noise(seeds, positions, logits.shape[1])


def _read_logprobs(
    logprobs: torch.Tensor, token_ids: list[int], requests: Sequence[Request]
) -> list[TokenLogprob | None]:
    most = max(r.sampling.logprobs or 0 for r in requests)
    values, ids = (t.tolist() for t in logprobs.topk(most, dim=-1))
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device)[:, None])[:, 0].tolist()
    results: list[TokenLogprob | None] = []
    for row, request in enumerate(requests):
        num = request.sampling.logprobs
        if num is None:
            results.append(None)
        else:
            top = tuple(zip(ids[row][:num], values[row][:num], strict=True))
            results.append(TokenLogprob(token_ids[row], chosen[row], top))
    return results
