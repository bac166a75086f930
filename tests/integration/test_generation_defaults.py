"""What a model's generation config asks for: honoured as transformers' `generate` does, or told by name."""

from __future__ import annotations

import json
import logging
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import torch

from langchain_lora_retriever.engine import BaseModel, Engine, EngineConfig, EngineWorker
from langchain_lora_retriever.errors import EngineError, InvalidRequestError
from langchain_lora_retriever.types import SamplingParams
from makers import ScriptedCompiler, make_tiny_model, make_tokenizer

SCRIPTS = ScriptedCompiler()

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL = {"max_num_seqs": 8, "kv_cache_bytes": 2 << 20, "lora_cache_bytes": 4 << 20, "max_num_batched_tokens": 32}
NUM_TOKENS = 24
PROMPTS = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 5, 9, 17, 40)]


def first_tokens(num: int) -> list[int]:
    """What the model would write without any rule, over all prompts."""
    return sorted({token for prompt in PROMPTS for token in generate(make_model(), prompt)[:num]})


def generate(model: Any, prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    """What transformers answers greedily."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return list(out[0, len(prompt) :].tolist())


def make_model(**settings: Any) -> Any:
    """A model that likes few tokens and repeats itself, with a generation config."""
    model = make_tiny_model()
    with torch.no_grad():
        model.lm_head.weight[16:] *= 0.3
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


RULES: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "reward for repetition": {"repetition_penalty": 0.8},
    "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "suppress_tokens": {"suppress_tokens": first_tokens(3)},
    "suppress_tokens beyond the vocabulary": {"suppress_tokens": [*first_tokens(1), -1, 5000]},
    "begin_suppress_tokens": {"begin_suppress_tokens": first_tokens(1)},
    "bad_words_ids": {"bad_words_ids": [[token] for token in first_tokens(2)]},
    "bad_words_ids of several tokens": {
        "bad_words_ids": [generate(make_model(), prompt)[1:end] for prompt in PROMPTS[::3] for end in (3, 4)]
    },
    "min_new_tokens": {"eos_token_id": first_tokens(4), "min_new_tokens": 7},
    "min_length": {"eos_token_id": first_tokens(4), "min_length": 12},
    "both": {"eos_token_id": first_tokens(4), "min_length": 20, "min_new_tokens": 3},
    "eos_token_id": {"eos_token_id": first_tokens(4)},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "renormalize_logits": {"renormalize_logits": True},
    "all": {
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": first_tokens(1), "min_new_tokens": 9,
        "begin_suppress_tokens": [7, 8], "eos_token_id": first_tokens(3), "forced_eos_token_id": 1,
        "bad_words_ids": [[9], [10, 11]],
    },
}  # fmt: skip


@pytest.fixture(params=[False, True], ids=["step by step", "ahead"])
def is_async(request: pytest.FixtureRequest) -> bool:
    """Whether steps are launched before the last one's tokens are read."""
    return bool(request.param)


def make_worker(model: Any, **config: Any) -> Any:
    """An engine, closed at the end."""
    return closing(
        EngineWorker(BaseModel(model, make_tokenizer(), "tiny"), EngineConfig(**{**SMALL, **config}), compiler=SCRIPTS)
    )


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_honoured_as_generate_does(rule: str, is_async: bool) -> None:
    """Token by token what `generate` gives in float32, in one batch of prompts of different lengths."""
    model = make_model(**RULES[rule])
    expected = [generate(model, prompt) for prompt in PROMPTS]
    if rule != "renormalize_logits":
        assert expected != [generate(make_model(), prompt) for prompt in PROMPTS], "the rule changes nothing"
    with make_worker(model, enable_async_scheduling=is_async) as worker:
        running = [worker.submit(prompt, SamplingParams(max_tokens=NUM_TOKENS)) for prompt in PROMPTS]
        assert [list(generation.result(60).token_ids) for generation in running] == expected


@pytest.mark.parametrize("rule", ["repetition_penalty", "all"])
def test_a_preempted_request_keeps_its_rules(rule: str, is_async: bool) -> None:
    """With so few pages that requests are sent back and computed again, all tokens stay the same."""
    model = make_model(**RULES[rule])
    expected = [generate(model, prompt) for prompt in PROMPTS]
    with make_worker(model, enable_async_scheduling=is_async, block_size=4, kv_cache_bytes=20 * 4 * 512) as worker:
        running = [worker.submit(prompt, SamplingParams(max_tokens=NUM_TOKENS)) for prompt in PROMPTS]
        assert [list(generation.result(60).token_ids) for generation in running] == expected
        assert worker.stats().num_preemptions > 0


@pytest.fixture
def penalised(is_async: bool) -> Iterator[EngineWorker]:
    """An engine whose model has a penalty of its own."""
    with make_worker(make_model(repetition_penalty=1.3, eos_token_id=None), enable_async_scheduling=is_async) as worker:
        yield worker


def test_a_call_has_its_own_penalty_beside_others(penalised: EngineWorker) -> None:
    """None takes the model's penalty, 1.0 switches it off, and neighbours in a batch each keep theirs."""
    penalties = (None, 1.0, 1.7, 0.7, 1)
    expected = [
        generate(make_model(repetition_penalty=1.3 if penalty is None else float(penalty), eos_token_id=None), prompt)
        for penalty, prompt in zip(penalties, PROMPTS, strict=True)
    ]
    running = [
        penalised.submit(prompt, SamplingParams(max_tokens=NUM_TOKENS, repetition_penalty=penalty, ignore_eos=True))
        for penalty, prompt in zip(penalties, PROMPTS, strict=True)
    ]
    assert [list(generation.result(60).token_ids) for generation in running] == expected


def test_a_penalty_acts_before_sampling(penalised: EngineWorker) -> None:
    """A sampled answer with a penalty is repeatable, another than without, and the same in company."""
    sampling = [
        SamplingParams(temperature=0.5, seed=3, max_tokens=NUM_TOKENS, repetition_penalty=penalty, ignore_eos=True)
        for penalty in (1.0, 5.0)
    ]
    alone = [penalised.submit(PROMPTS[1], each).result(60).token_ids for each in sampling]
    together = [penalised.submit(PROMPTS[1], each) for each in sampling]
    assert [generation.result(60).token_ids for generation in together] == alone
    assert len(set(alone[1])) > len(set(alone[0]))


def test_log_probabilities_are_the_models_own(penalised: EngineWorker) -> None:
    """A penalty changes which token comes, not what the model makes of it."""
    sampling = SamplingParams(max_tokens=4, logprobs=1, repetition_penalty=3.0, ignore_eos=True)
    completion = penalised.submit(PROMPTS[2], sampling).result(60)
    ids = torch.tensor([[*PROMPTS[2], *completion.token_ids]])
    expected = make_model()(ids).logits[0, len(PROMPTS[2]) - 1 : -1].log_softmax(-1)
    assert completion.logprobs is not None
    for row, entry in zip(expected, completion.logprobs, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)


def test_a_stop_token_ends_an_answer(penalised: EngineWorker, byte_tokenizer: Any) -> None:
    """It counts, has no text, and ends with `stop`; also past the model's own end."""
    whole = penalised.submit(PROMPTS[3], SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)).result(60)
    stop = whole.token_ids[6]
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, stop_token_ids=(stop, 300))
    cut = penalised.submit(PROMPTS[3], sampling).result(60)
    end = whole.token_ids.index(stop)
    assert (cut.token_ids, cut.finish_reason) == (whole.token_ids[: end + 1], "stop")
    assert cut.text == byte_tokenizer.decode(whole.token_ids[:end]).rstrip("\ufffd")


def test_a_stop_token_that_the_model_lacks_is_refused(penalised: EngineWorker) -> None:
    """The error names the token and how many there are."""
    with pytest.raises(InvalidRequestError, match=r"stop_token_ids has 320, but .* 320 tokens"):
        penalised.submit(PROMPTS[0], SamplingParams(stop_token_ids=(5, 320)))


class OnlyEnd:
    """A grammar that allows the end-of-sequence token alone."""

    is_shortened = False

    is_finished = False

    def fill_bitmask(self, row: torch.Tensor) -> None:
        """Token 2."""
        row.zero_()
        row[0] = 1 << 2

    def accept(self, token_id: int) -> None:
        """Nothing to do."""

    def forced_tokens(self) -> list[int]:
        """None."""
        return []


def test_a_grammar_counts_where_rules_leave_it_nothing(is_async: bool) -> None:
    """A token that is banned comes if the grammar allows no other; neighbours without a grammar keep the ban."""
    model = make_model(min_new_tokens=5, suppress_tokens=[2])
    expected = generate(model, PROMPTS[1], 8)
    with make_worker(model, enable_async_scheduling=is_async) as worker:
        constrained = worker.submit(PROMPTS[1], SamplingParams(max_tokens=8), grammar=SCRIPTS.add(OnlyEnd))
        free = worker.submit(PROMPTS[1], SamplingParams(max_tokens=8))
        assert constrained.result(60).token_ids == (2,)
        assert list(free.result(60).token_ids) == expected


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"sequence_bias": [[[5], 2.0]]}, "sequence_bias"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"exponential_decay_length_penalty": (3, 1.5)}, "exponential_decay_length_penalty"),
        ({"encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty=1.5"),
        ({"stop_strings": ["x"]}, "stop_strings"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"forced_bos_token_id": 4}, "forced_bos_token_id"),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, "temperature=0.7, top_k=20"),
    ],
)
def test_what_is_not_honoured_is_told_once(
    settings: dict[str, Any], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning at load, with the field's name and value."""
    with caplog.at_level(logging.WARNING, "langchain_lora_retriever"), make_worker(make_model(**settings)) as worker:
        worker.submit(PROMPTS[0], SamplingParams(max_tokens=2)).result(60)
    assert [told in record.getMessage() for record in caplog.records] == [True]


def test_what_is_honoured_or_without_effect_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    """A config of rules and of what no token depends on gives no warning."""
    quiet = {
        "temperature": 0.7,
        "max_length": 99,
        "use_cache": True,
        "num_beams": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    with caplog.at_level(logging.WARNING, "langchain_lora_retriever"), make_worker(make_model(**RULES["all"], **quiet)):
        assert not caplog.records


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 0}, {"repetition_penalty": "much"}, {"repetition_penalty": float("nan")},
     {"no_repeat_ngram_size": -1}, {"min_new_tokens": 2.5}, {"suppress_tokens": "all"}, {"suppress_tokens": [[1]]},
     {"suppress_tokens": [2**70]},
     {"bad_words_ids": [3]}, {"bad_words_ids": [[]]}, {"begin_suppress_tokens": {"a": 1}}, {"eos_token_id": ["</s>"]}],
    ids=json.dumps,
)  # fmt: skip
def test_a_value_that_means_nothing_is_refused_at_load(settings: dict[str, Any]) -> None:
    """The error names the field, and the model is as it was."""
    model = make_model(**settings)
    (name,) = settings
    with pytest.raises(EngineError, match=f"generation_config has {name}="):
        Engine(BaseModel(model, make_tokenizer(), "tiny"), EngineConfig(**SMALL))
    assert model.config._attn_implementation != "langchain_lora_retriever_paged"
    assert "forward" not in vars(model.model.layers[0].self_attn.q_proj)
