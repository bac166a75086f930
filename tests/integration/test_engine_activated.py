"""Activated LoRA wherever it is invoked: PEFT's probabilities, and what comes before computed once for everybody."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker
from langchain_lora_retriever.errors import InvalidAdapterError, InvalidRequestError
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.pool.checkpoint_files import CONFIG_FILE
from langchain_lora_retriever.types import Adapter, SamplingParams
from makers import VOCAB_SIZE, make_adapter, make_checkpoint, make_tiny_model, make_tokenizer, mixture_logits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BLOCK = 8
INVOCATION = [210, 211]
DOCUMENT = torch.randint(3, 200, (40,), generator=torch.Generator().manual_seed(0)).tolist()
PLACES = {
    "at the start": [*INVOCATION, *DOCUMENT[:17]],
    "alone": INVOCATION,
    "at a page's start": [*DOCUMENT[:16], *INVOCATION, *DOCUMENT[20:25]],
    "across two pages": [*DOCUMENT[:15], *INVOCATION, *DOCUMENT[20:25]],
    "within a page": [*DOCUMENT[:11], *INVOCATION, *DOCUMENT[20:36]],
    "at the end": [*DOCUMENT[:21], *INVOCATION],
    "at the end, as a page": [*DOCUMENT[:22], *INVOCATION],
    "twice": [*DOCUMENT[:5], *INVOCATION, *DOCUMENT[5:18], *INVOCATION, *DOCUMENT[20:23]],
    "twice in a row": [*DOCUMENT[:14], *INVOCATION, *INVOCATION, 9],
    "half of it after all of it": [*DOCUMENT[:9], *INVOCATION, 4, INVOCATION[0]],
}
TOLERANCE = 2e-4
Pairs = list[tuple[Adapter, float]]


def make_worker(**settings: Any) -> EngineWorker:
    """An engine over the tiny Llama."""
    config = EngineConfig(**{
        "max_num_seqs": 3, "block_size": BLOCK, "kv_cache_bytes": 2 << 20, "lora_cache_bytes": 16 << 20,
        "adapter_kinds": ("dora",), **settings,
    })  # fmt: skip
    return EngineWorker(BaseModel(make_tiny_model(), make_tokenizer(), "tiny"), config)


def activated(name: str, invocation: Sequence[int] = INVOCATION, *, is_dora: bool = False) -> Adapter:
    """An activated LoRA."""
    return make_adapter(make_tiny_model(), name, r=3, is_dora=is_dora, invocation_tokens=tuple(invocation))


def sampling(**settings: Any) -> SamplingParams:
    """A few tokens, whatever they are."""
    return SamplingParams(**{"max_tokens": 4, "ignore_eos": True, "logprobs": 0, **settings})


def assert_greedy(done: Any, logits: torch.Tensor) -> None:
    """The tokens of an answer are as likely as these logits say, and none is likelier."""
    logprobs = logits.log_softmax(-1)[-len(done.token_ids) - 1 : -1]
    expected = [float(row[token]) for row, token in zip(logprobs, done.token_ids, strict=True)]
    assert [item.logprob for item in done.logprobs] == pytest.approx(expected, abs=TOLERANCE)
    assert expected == pytest.approx(logprobs.amax(-1).tolist(), abs=TOLERANCE)


def assert_right(worker: EngineWorker, prompt: list[int], pairs: Pairs) -> int:
    """A mixture's answer is the reference's; how many tokens of its prompt were there already."""
    done = worker.submit(prompt, sampling(), pairs).result(60)
    assert_greedy(done, mixture_logits(make_tiny_model(), pairs, prompt, done.token_ids))
    return done.usage.num_cached_tokens


@cache
def roomy() -> EngineWorker:
    """An engine that takes whole prompts; it ends with the process."""
    return make_worker()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An activated LoRA that PEFT wrote."""
    lora = {"target_modules": "all-linear", "alora_invocation_tokens": INVOCATION, "std": 0.2}
    folder: Path = make_checkpoint(tmp_path_factory.mktemp("activated") / "a", model=make_tiny_model(), **lora)
    return folder


@pytest.mark.parametrize("num_batched_tokens", [3, 8, 64])
def test_wherever_it_is_invoked_the_probabilities_are_pefts(checkpoint: Path, num_batched_tokens: int) -> None:
    """At every token of a prompt, in chunks that split an invocation; then again behind pages that the base filled."""
    adapter = read_adapter(checkpoint)
    peft = PeftModel.from_pretrained(copy.deepcopy(make_tiny_model()), checkpoint).eval()
    with make_worker(max_num_batched_tokens=num_batched_tokens) as worker:
        for what, prompt in PLACES.items():
            with torch.no_grad():
                logprobs = peft(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
            whole = worker.submit(prompt, sampling(max_tokens=1, prompt_logprobs_from=1), [(adapter, 1.0)]).result(60)
            got = [*whole.prompt_logprobs, whole.logprobs[0].logprob]
            wanted = [float(row[token]) for row, token in zip(logprobs, [*prompt[1:], *whole.token_ids], strict=True)]
            assert got == pytest.approx(wanted, abs=TOLERANCE), what
        worker.check_integrity()
    with make_worker(max_num_batched_tokens=num_batched_tokens) as worker:
        for what, prompt in PLACES.items():
            worker.submit([*prompt, 9], sampling(max_tokens=1)).result(60)  # the base has read all of it
            first = max(i for i in range(len(prompt)) if prompt[i : i + 2] == INVOCATION)
            num_cached = assert_right(worker, prompt, [(adapter, 1.0)])
            assert num_cached == min(first, len(prompt) - 1) // BLOCK * BLOCK, what
        worker.check_integrity()


@pytest.mark.parametrize("is_dora", [False, True], ids=["lora", "dora"])
def test_mixtures_of_activated_and_plain_adapters(is_dora: bool) -> None:
    """Each begins where it is invoked; what comes before the first is the rest's, whoever else is in the mixture."""
    model = make_tiny_model()
    plain = make_adapter(model, "plain", r=4, is_dora=is_dora)
    early, late = activated("early", is_dora=is_dora), activated("late", [220])
    other, asleep = activated("other", [220], is_dora=is_dora), activated("asleep", [230, 231])
    prompt = [*DOCUMENT[:19], *INVOCATION, *DOCUMENT[:12], 220, 8, 9]  # invoked at 19, and at 33
    cases: list[tuple[Pairs, int]] = [
        ([(plain, 0.5), (early, 0.25), (late, 0.25)], 0),
        ([(plain, 0.5), (early, 0.25), (late, 0.25)], 32),
        ([(plain, 0.5), (early, 0.25), (other, 0.25)], 32),
        ([(plain, 0.5), (late, 0.5)], 16),
        ([(plain, 0.5), (asleep, 0.5)], 32),  # now the plain one's up to 33
        ([(plain, 0.25), (early, 0.75)], 0),
        ([(early, 0.5), (late, 0.5)], 0),
        ([(late, 1.0)], 16),  # the base's up to 19
        ([], 32),
    ]
    with make_worker() as worker:
        for pairs, num_cached in cases:
            assert assert_right(worker, prompt, pairs) == num_cached, pairs
        worker.check_integrity()


def test_a_preempted_request_is_activated_again_where_it_was() -> None:
    """Three that do not fit at once, each with an invocation of its own, answer as they do with room."""
    prompts = {name: [*DOCUMENT[:13], first, first + 1, 7, 8] for name, first in (("a", 210), ("b", 220), ("c", 230))}
    adapters = {name: activated(name, prompt[13:15]) for name, prompt in prompts.items()}
    long = sampling(max_tokens=30)
    alone = {n: roomy().submit(p, long, [(adapters[n], 1.0)]).result(60) for n, p in prompts.items()}
    page = BLOCK * 512
    with make_worker(kv_cache_bytes=12 * page, max_model_len=48, enable_prefix_caching=False) as worker:
        running = {name: worker.submit(prompt, long, [(adapters[name], 1.0)]) for name, prompt in prompts.items()}
        for name, generation in running.items():
            assert generation.result(60).token_ids == alone[name].token_ids
        assert worker.stats().num_preemptions > 0
        worker.check_integrity()
    for name, done in alone.items():
        assert_greedy(done, mixture_logits(make_tiny_model(), [(adapters[name], 1.0)], prompts[name], done.token_ids))


def test_an_empty_invocation_is_none(checkpoint: Path, tmp_path: Path) -> None:
    """PEFT takes an empty list for plain LoRA, active from the first token on."""
    folder = tmp_path / "empty"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "alora_invocation_tokens": []}))
    adapter = read_adapter(folder)
    assert adapter.invocation_tokens == ()
    peft = PeftModel.from_pretrained(copy.deepcopy(make_tiny_model()), folder).eval()
    prompt = DOCUMENT[:12]
    done = roomy().submit(prompt, sampling(max_tokens=1), [(adapter, 1.0)]).result(60)
    with torch.no_grad():
        logprobs = peft(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    assert done.logprobs[0].logprob == pytest.approx(float(logprobs[done.token_ids[0]]), abs=TOLERANCE)
    assert done.token_ids[0] == int(logprobs.argmax())


def test_an_invocation_that_the_model_has_no_tokens_for_is_refused() -> None:
    """By name, when the pool is looked at and when it is asked for: every prompt would be answered by the base."""
    foreign = activated("foreign", [210, VOCAB_SIZE])
    (error,) = (r.error for r in roomy().register([foreign]))
    assert isinstance(error, InvalidAdapterError)
    assert f"'foreign' (None) is an activated LoRA, and its invocation has the token {VOCAB_SIZE}" in str(error)
    assert f"'tiny' has {VOCAB_SIZE} tokens, from 0: no prompt can invoke it" in str(error)
    with pytest.raises(InvalidRequestError, match=r"'foreign'.*another base model"):
        roomy().submit(DOCUMENT, sampling(), [(foreign, 1.0)])
    assert [r.error for r in roomy().register([activated("own", [VOCAB_SIZE - 1])])] == [None]
