"""Choosing tokens: greedy, filtered, seeded, masked."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from langchain_lora_retriever.engine.pending_step import PendingStep
from langchain_lora_retriever.engine.request import Request
from langchain_lora_retriever.engine.sampler import (
    Choice,
    ChosenToken,
    apply_bitmask,
    apply_top_k_top_p,
    choose,
    gumbel_noise,
)
from langchain_lora_retriever.errors import EngineError, InvalidRequestError, LoraRetrieverError
from langchain_lora_retriever.types import SamplingParams
from makers import make_adapter, make_tiny_model

VOCAB = 50


def make_request(**sampling: Any) -> Request:
    """A request without an engine."""
    return Request(0, [1], SamplingParams(**sampling), (), detokenizer=None)  # type: ignore[arg-type]


def make_logits(num_rows: int, seed: int = 0) -> torch.Tensor:
    """Random logits."""
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def outcomes(logits: torch.Tensor, requests: list[Request]) -> list[ChosenToken | LoraRetrieverError]:
    """Choose, and read what was chosen."""
    return choose(logits.clone(), requests).read(requests)


def sample(logits: torch.Tensor, requests: list[Request]) -> Any:
    """The tokens and the log-probabilities of requests that all go well."""
    return tuple(map(list, zip(*outcomes(logits, requests), strict=True)))


def test_greedy_takes_the_largest() -> None:
    """Temperature 0 is the argmax."""
    logits = make_logits(3)
    assert sample(logits.clone(), [make_request()] * 3)[0] == logits.argmax(-1).tolist()


def test_a_greedy_choice_in_pairs_outlives_the_next_step() -> None:
    """Token ids and peaks are read as they were when the step was launched; a peak that is not finite is a failure."""
    pairs = torch.zeros(4, 2, dtype=torch.int64)
    pairs[:3, 0] = torch.tensor([7, 2**40, 0])
    pairs.view(torch.float64)[:3, 1] = torch.tensor([1.5, -3e38, math.nan])
    requests = [make_request()] * 3
    step = PendingStep(requests, Choice.of_pairs(pairs[:3]))
    pairs.fill_(-1)
    *tokens, failed = step.read()
    assert tokens == [ChosenToken(7), ChosenToken(2**40)]
    assert isinstance(failed, EngineError)
    assert "not finite" in str(failed)


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


class Grammar:
    """Allows some tokens, or fails."""

    is_finished = False

    def __init__(self, allowed: set[int], error: BaseException | None = None) -> None:
        self.allowed = allowed
        self.error = error

    def fill_bitmask(self, row: torch.Tensor) -> None:
        """Write the mask, and only then fail: what is left of it must not count."""
        row.zero_()
        for token in self.allowed:
            row[token // 32] |= 1 << (token % 32)
        if self.error is not None:
            raise self.error

    def accept(self, token_id: int) -> None:
        """Nothing to do."""

    def forced_tokens(self) -> list[int]:
        """None."""
        return []


class Panic(BaseException):
    """As a library in Rust panics: no Exception."""


GOOD = [{}, {"temperature": 1.3, "seed": 4}, {"temperature": 0.7, "top_p": 0.8, "seed": 5}, {"logprobs": 2}]


@pytest.mark.parametrize("error", [ValueError("broken"), EngineError("too complex"), Panic("panic")], ids=repr)
def test_a_failing_grammar_is_its_own_request_s_affair(error: BaseException) -> None:
    """The others' tokens stay, in every company; the error is a documented one that says what was raised."""
    requests = [make_request(**settings) for settings in GOOD]
    logits = make_logits(len(GOOD) + 1)
    bad = make_request()
    bad.constraint = Grammar({1, 2}, error)
    got = outcomes(logits, [*requests, bad])
    assert got[:-1] == outcomes(logits[:-1], requests)
    assert isinstance(got[-1], EngineError)
    assert str(error) in str(got[-1])


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("is_everywhere", [False, True])
@pytest.mark.parametrize("others", [[{}, {}], GOOD], ids=["all greedy", "mixed"])
def test_logits_that_are_not_finite_end_their_own_request(
    others: list[dict[str, Any]], is_everywhere: bool, junk: float
) -> None:
    """NaN and +inf anywhere in a row, and a row of -inf, are an error in words; some -inf are masks of the model's."""
    requests = [make_request(**settings) for settings in others]
    logits = make_logits(len(others) + 1)
    logits[-1] = torch.full((VOCAB,), junk) if is_everywhere else logits[-1].index_fill(0, torch.tensor([7]), junk)
    bad = make_request()
    bad.adapters = ((make_adapter(make_tiny_model(), "huge"), 1.0),)
    got = outcomes(logits, [*requests, bad])
    assert got[:-1] == outcomes(logits[:-1], requests)
    if junk == -math.inf and not is_everywhere:
        assert isinstance(got[-1], ChosenToken)
    else:
        with pytest.raises(EngineError, match=r"'huge'.*not finite"):
            raise got[-1]  # type: ignore[misc]


def test_a_grammar_that_hides_a_nan_does_not_hide_the_failure() -> None:
    """A masked token's NaN is one of the model's all the same."""
    logits = make_logits(1)
    logits[0, 7] = math.nan
    request = make_request()
    request.constraint = Grammar({1, 2})
    with pytest.raises(EngineError, match="not finite"):
        raise outcomes(logits, [request])[0]  # type: ignore[misc]


@pytest.mark.parametrize("settings", GOOD)
@pytest.mark.parametrize("allowed", [set(), {VOCAB + 3, 200}], ids=["nothing", "tokens that the model lacks"])
def test_a_grammar_that_leaves_no_token_is_told(allowed: set[int], settings: dict[str, Any]) -> None:
    """A row without a token is no token 0 but an error; its mask may be as wide as the tokenizer."""
    request = make_request(**settings)
    request.constraint = Grammar(allowed)
    got = choose(make_logits(1), [request], num_known=300).read([request])[0]
    with pytest.raises(EngineError, match="allows no token"):
        raise got  # type: ignore[misc]


EXTREMES: list[dict[str, Any]] = [
    {"top_k": 2**63}, {"top_k": 10**400}, {"top_k": VOCAB + 1}, {"top_p": 5e-324}, {"top_p": 1.0},
    {"temperature": 5e-324}, {"temperature": 1e-300}, {"temperature": 1e300}, {"temperature": 2**60},
    {"seed": -1}, {"seed": 2**64}, {"seed": -(10**400)}, {"max_tokens": 10**400}, {"logprobs": 20},
]  # fmt: skip


@pytest.mark.parametrize("vocab_size", [VOCAB, 3])
@pytest.mark.parametrize("extreme", EXTREMES, ids=lambda extreme: next(iter(extreme)))
def test_values_beyond_a_tensor_s_width_change_no_neighbour(extreme: dict[str, Any], vocab_size: int) -> None:
    """What means something plain is done, with masks and filters beside it; the others' tokens stay."""
    requests = [make_request(**settings) for settings in GOOD]
    logits = make_logits(len(GOOD) + 1)[:, :vocab_size]
    odd = make_request(**{"temperature": 1.0, "top_p": 0.9, "seed": 1, "logprobs": 2, **extreme})
    odd.constraint = Grammar({0, 2})
    got = outcomes(logits, [*requests, odd])
    assert got[:-1] == outcomes(logits[:-1], requests)
    assert isinstance(got[-1], ChosenToken)
    assert got[-1].token_id in {0, 2}


@pytest.mark.parametrize(
    "refused",
    [
        {"temperature": 10**400}, {"temperature": math.inf}, {"temperature": math.nan}, {"temperature": -5e-324},
        {"temperature": True}, {"temperature": "1"}, {"top_p": 10**400}, {"top_p": 0}, {"top_k": -(10**5000)},
        {"top_k": 1.0}, {"seed": 1.5}, {"max_tokens": -(10**5000)}, {"logprobs": 10**5000}, {"stop": ("",)},
        {"stop": ["a"]}, {"skip_special_tokens": "no"}, {"ignore_eos": 1}, {"max_tokens": "x" * 10**6},
    ],
    ids=lambda refused: next(iter(refused)),
)  # fmt: skip
def test_values_without_a_meaning_are_refused_in_words(refused: dict[str, Any]) -> None:
    """The error names the setting and shows at most the beginning of the value."""
    with pytest.raises(InvalidRequestError, match=next(iter(refused))) as caught:
        SamplingParams(**refused)
    assert len(str(caught.value)) < 500
