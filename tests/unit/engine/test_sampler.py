"""Choosing tokens: greedy, filtered, seeded, masked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from langchain_lora_retriever.engine.request import Request
from langchain_lora_retriever.engine.sampler import apply_bitmask, apply_top_k_top_p, choose, gumbel_noise
from langchain_lora_retriever.types import SamplingParams

VOCAB = 50


def make_request(**sampling: Any) -> Request:
    """A request without an engine."""
    return Request(0, [1], SamplingParams(**sampling), (), detokenizer=None)  # type: ignore[arg-type]


def make_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    """Random logits."""
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def sample(logits: torch.Tensor, requests: list[Request]) -> Any:
    """Choose, and read what was chosen."""
    return choose(logits, requests).read(requests)


def test_greedy_takes_the_largest() -> None:
    """Temperature 0 is the argmax."""
    logits = make_logits(3)
    assert sample(logits.clone(), [make_request()] * 3)[0] == logits.argmax(-1).tolist()


def test_a_seeded_draw_does_not_depend_on_the_batch() -> None:
    """The same request draws the same token alone, first, or last among others."""
    logits = make_logits(4)
    requests = [make_request(temperature=1.0, seed=s) for s in (1, 2, 3, 4)]
    together = sample(logits.clone(), requests)[0]
    alone = [sample(logits[i : i + 1].clone(), [requests[i]])[0][0] for i in range(4)]
    backwards = sample(logits.flip(0).clone(), requests[::-1])[0][::-1]
    assert together == alone == backwards


def test_draws_follow_the_distribution() -> None:
    """Over many seeds the frequencies match the softmax (chi-square, 5 degrees of freedom, p > 1e-4)."""
    num_draws, probabilities = 20_000, torch.tensor([0.4, 0.25, 0.15, 0.1, 0.07, 0.03])
    noise = gumbel_noise(torch.arange(num_draws), torch.full((num_draws,), 7), 6)
    counts = (probabilities.log() + noise).argmax(-1).bincount(minlength=6)
    expected = probabilities * num_draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 25.7


def test_noise_is_finite_and_differs_by_position() -> None:
    """No seed or position gives an infinity, and consecutive tokens draw independently."""
    noise = gumbel_noise(torch.tensor([0, 2**62, -1]), torch.tensor([0, 1, 2**31]), 10_000)
    assert noise.isfinite().all()
    assert not torch.equal(*gumbel_noise(torch.tensor([5, 5]), torch.tensor([0, 1]), 100))


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(2, 1.0, 2), (0, 0.5, 1), (0, 0.71, 2), (1, 0.9, 1), (0, 1.0, 4)])
def test_filters_keep_the_likeliest(top_k: int, top_p: float, kept: int) -> None:
    """top_k counts tokens, top_p counts probability, and one token always stays."""
    logits = torch.tensor([[0.6, 0.2, 0.15, 0.05]]).log()
    filtered = apply_top_k_top_p(logits, torch.tensor([top_k]), torch.tensor([top_p]))
    assert filtered.isfinite().sum() == kept
    assert torch.equal(filtered[:, :kept], logits[:, :kept])


def test_a_bitmask_forbids() -> None:
    """Tokens whose bit is 0 get minus infinity, also beyond the first word."""
    bitmask = torch.zeros(1, 2, dtype=torch.int32)
    bitmask[0, 1] = 1 << 3
    assert apply_bitmask(make_logits(1), bitmask).isfinite().nonzero().tolist() == [[0, 35]]
    assert apply_bitmask(make_logits(1), torch.full((1, 2), -1, dtype=torch.int32)).isfinite().all()


def test_logprobs_are_those_of_the_model() -> None:
    """Log-probabilities are of the logits as they came, and only for requests that asked."""
    logits = make_logits(2)
    token_ids, logprobs = sample(logits.clone(), [make_request(logprobs=3), make_request()])
    expected = logits.log_softmax(-1)[0]
    assert logprobs[1] is None
    assert logprobs[0] is not None
    assert math.isclose(logprobs[0].logprob, float(expected[token_ids[0]]), abs_tol=1e-5)
    assert [i for i, _ in logprobs[0].top] == expected.topk(3).indices.tolist()


def test_mixed_batches_keep_their_own_settings() -> None:
    """A greedy row beside a sampled one is still greedy, and the sampled one respects its top_k."""
    logits = make_logits(2)
    tokens, _ = sample(logits.clone(), [make_request(), make_request(temperature=5.0, top_k=1, seed=3)])
    assert tokens == logits.argmax(-1).tolist()
