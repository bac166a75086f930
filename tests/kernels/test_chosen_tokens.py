"""Greedy choices in Triton against `torch.max`, and how the next step takes them."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs it so",
)
UNTOUCHED = -7
INF, NAN = float("inf"), float("nan")


def choose(logits: torch.Tensor, vocab_size: int | None = None) -> tuple[list[int], list[float]]:
    """Token ids and peaks; rows behind the last one keep what they held."""
    from lora_retriever_kernels.chosen_tokens import choose_greedily

    num_rows = logits.shape[0]
    chosen = torch.full((num_rows + 2, 2), UNTOUCHED, device=DEVICE)
    choose_greedily(chosen, logits, vocab_size or logits.shape[1])
    assert (chosen[num_rows:] == UNTOUCHED).all()
    return chosen[:num_rows, 0].tolist(), chosen.view(torch.float64)[:num_rows, 1].tolist()


def first_largest(logits: torch.Tensor) -> list[int]:
    """The definition of the token: the lowest of those with the largest logit."""
    return [int((row == row.max()).nonzero()[0]) for row in logits]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 320, 4096, 4097, 12_301])
def test_the_largest_logit_and_its_first_place(width: int, dtype: torch.dtype) -> None:
    """One block and several, full and not; in few digits many logits are equally large."""
    logits = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).mul(3).round().to(DEVICE, dtype)
    tokens, peaks = choose(logits)
    assert tokens == first_largest(logits)
    assert peaks == logits.amax(-1).double().tolist()


def test_float64_is_not_rounded() -> None:
    """Two logits that are one number in float32."""
    logits = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64, device=DEVICE)
    assert choose(logits) == ([1], [1.0 + 1e-12])


@pytest.mark.parametrize("places", [(0, 1), (3, 9000), (4095, 4096), (8999, 9000)])
def test_of_equal_logits_the_lowest_token_is_taken(places: tuple[int, int]) -> None:
    """Within a block and in two; zeros of both signs are equal."""
    logits = torch.full((3, 9001), -1.0, device=DEVICE)
    logits[0, list(places)] = 5.0
    logits[1, list(places)] = torch.tensor([-0.0, 0.0], device=DEVICE)
    logits[2, list(places)] = torch.tensor([0.0, -0.0], device=DEVICE)
    assert choose(logits) == ([places[0]] * 3, [5.0, 0.0, 0.0])


def test_columns_beyond_the_vocabulary_are_not_looked_at() -> None:
    """Larger numbers and NaN there, in the vocabulary's last block and in others; rows that lie apart."""
    wide = torch.randn(4, 13_000, device=DEVICE)
    for logits in (wide, wide[:, :9_000], wide.t().contiguous().t()):
        for vocab_size in (1, 300, 4096, 5_000):
            logits[:, vocab_size:] = torch.tensor([[100.0], [INF], [NAN], [0.0]], device=DEVICE)
            tokens, peaks = choose(logits, vocab_size)
            inside = logits[:, :vocab_size]
            assert tokens == first_largest(inside)
            assert peaks == inside.amax(-1).double().tolist()
            logits[:, vocab_size:] = torch.randn_like(logits[:, vocab_size:])
    assert choose(wide, 20_000)[0] == first_largest(wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_that_are_not_finite(dtype: torch.dtype) -> None:
    """A NaN is told, wherever it stands and whatever else there is; rows beside it are as they would be without."""
    logits = torch.randn(7, 9_001, device=DEVICE).to(dtype)
    logits[0, [5_000, 8_500]] = NAN
    logits[1, [3, 8_999]] = torch.tensor([INF, NAN], device=DEVICE, dtype=dtype)
    logits[2, :] = NAN
    logits[3, :] = -INF
    logits[4, 4_200] = INF
    logits[5, 1:] = -INF
    tokens, peaks = choose(logits)
    assert tokens[:6] == [5_000, 8_999, 0, 0, 4_200, 0]
    assert tokens[6] == first_largest(logits[6:])[0]
    assert [str(peak) for peak in peaks[:5]] == ["nan", "nan", "nan", "-inf", "inf"]
    assert peaks[5:] == logits[5:].amax(-1).double().tolist()


def test_no_rows() -> None:
    """A step that samples nothing."""
    assert choose(torch.zeros(0, 320, device=DEVICE)) == ([], [])


@pytest.mark.parametrize("num_tokens", [0, 1, 64, 257, 700])
def test_pending_tokens_are_filled_in(num_tokens: int) -> None:
    """From any row, several from one; all others stay, whatever their negative source."""
    from lora_retriever_kernels.chosen_tokens import fill_in_pending

    generator = torch.Generator().manual_seed(num_tokens)
    chosen = torch.randint(2**40, (9, 2), generator=generator)
    token_ids = torch.randint(2**40, (num_tokens,), generator=generator)
    sources = torch.randint(-9, 9, (num_tokens,), generator=generator)
    expected = torch.where(sources >= 0, chosen[sources.clamp_min(0), 0], token_ids)
    filled = fill_in_pending(token_ids.to(DEVICE), sources.to(DEVICE), chosen.to(DEVICE))
    assert filled.tolist() == expected.tolist()
