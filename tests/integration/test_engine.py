"""The engine against transformers' `generate` with merged weights, in whatever company a request runs."""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker, load_base_model, scheduler
from langchain_lora_retriever.errors import EngineDeadError, EngineError, InvalidRequestError, PromptTooLongError
from langchain_lora_retriever.types import Adapter, SamplingParams
from makers import ScriptedCompiler, make_adapter, make_tiny_model, make_tokenizer, merge_adapters

SCRIPTS = ScriptedCompiler()

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from langchain_lora_retriever.engine.scheduler import ScheduledRequest

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text")
SMALL = {"max_num_seqs": 16, "kv_cache_bytes": 2 << 20, "lora_cache_bytes": 4 << 20}
Pairs = list[tuple[Adapter, float]]


def make_prompts(*lengths: int) -> list[list[int]]:
    """Random prompts, one for each length."""
    return [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


def greedy(num_tokens: int = 20) -> SamplingParams:
    """Greedy sampling of exactly `num_tokens`."""
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def generate(model: Any, prompt: list[int], adapters: Pairs, num_tokens: int = 20) -> list[int]:
    """What transformers answers with the adapters merged into a copy of the weights."""
    merged = copy.deepcopy(model)
    merge_adapters(merged, adapters)
    ids = merged.generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return list(ids[0, len(prompt) :].tolist())


def make_adapters(model: Any, num: int = 5) -> list[Adapter]:
    """Adapters of different ranks, every other one on q and v alone."""
    return [
        make_adapter(model, f"a{i}", r=2 + 2 * i, **({"targets": ("q_proj", "v_proj")} if i % 2 else {}))
        for i in range(num)
    ]


def make_compositions(adapters: Sequence[Adapter], num: int) -> list[Pairs]:
    """In turn: one adapter, a mixture of three, the base model."""
    pick = lambda i: adapters[i % len(adapters)]  # noqa: E731
    return [([(pick(i), 1.0)], [(pick(i), 0.5), (pick(i + 1), 0.3), (pick(i + 2), 0.2)], [])[i % 3] for i in range(num)]


@pytest.fixture
def llama() -> Any:
    """A small Llama, fresh for every test: an engine changes its model in place."""
    return make_tiny_model("llama")


@pytest.fixture
def worker(llama: Any, byte_tokenizer: Any) -> Iterator[EngineWorker]:
    """An engine over a small Llama, checked for leaks at the end."""
    with EngineWorker(BaseModel(llama, byte_tokenizer, "tiny"), EngineConfig(**SMALL), compiler=SCRIPTS) as worker:
        yield worker
        worker.check_integrity()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_equal_generate_alone_and_in_a_batch(architecture: str, byte_tokenizer: Any) -> None:
    """Sixteen requests with other adapters, chunked prefill and a warm prefix cache change nobody's answer."""
    model = make_tiny_model(architecture)
    reference, adapters = copy.deepcopy(model), make_adapters(model)
    prompts = make_prompts(3, 17, 40, 33, 1, 64, 20, 100, 5, 8, 13, 21, 34, 55, 2, 16)
    compositions = make_compositions(adapters, len(prompts))
    expected = [generate(reference, *pair) for pair in zip(prompts, compositions, strict=True)]
    config = EngineConfig(**{**SMALL, "max_num_batched_tokens": 48})
    with EngineWorker(BaseModel(model, byte_tokenizer, "tiny"), config) as worker:
        together = [worker.submit(p, greedy(), c) for p, c in zip(prompts, compositions, strict=True)]
        assert [list(g.result(60).token_ids) for g in together] == expected
        for prompt, composition, tokens in zip(prompts, compositions, expected, strict=True):
            completion = worker.submit(prompt, greedy(), composition).result(60)
            assert list(completion.token_ids) == tokens
            assert completion.usage.num_cached_tokens == (len(prompt) - 1) // 16 * 16
        worker.check_integrity()


def test_prompts_cut_to_spare_padding_answer_the_same(byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts whose last tokens are left to the next step get the answers they would have got."""
    model = make_tiny_model("llama", max_position_embeddings=1024)
    reference, adapters = copy.deepcopy(model), make_adapters(model)
    prompts = make_prompts(300, 290, 65)
    compositions = make_compositions(adapters, len(prompts))
    config = EngineConfig(**{**SMALL, "kv_cache_bytes": 8 << 20, "max_num_batched_tokens": 1024})
    with EngineWorker(BaseModel(model, byte_tokenizer, "tiny"), config) as worker:
        engine, steps, is_held, may_begin = worker.core, [], threading.Event(), threading.Event()
        launch = engine.runner.launch

        def noted(scheduled: Sequence[ScheduledRequest]) -> Any:
            steps.append([item.num_new_tokens for item in scheduled])
            return launch(scheduled)

        monkeypatch.setattr(engine.runner, "launch", noted)
        monkeypatch.setattr(engine.scheduler, "_step_sizes", (512, 640, 768, 1024))
        worker._post(lambda: (is_held.set(), may_begin.wait(60))[0])
        assert is_held.wait(60)  # or it might take the first prompt along
        running = [worker.submit(p, greedy(), c) for p, c in zip(prompts, compositions, strict=True)]
        may_begin.set()
        got = [list(generation.result(60).token_ids) for generation in running]
        worker.check_integrity()
    assert steps[:3] == [[300, 290, 50], [1, 1, 15], [1, 1, 1]]
    assert got == [generate(reference, *pair) for pair in zip(prompts, compositions, strict=True)]


def test_a_preempted_request_tells_its_prompts_log_probabilities_once(llama: Any, byte_tokenizer: Any) -> None:
    """In its first delta, though its prompt is computed again later."""
    config = EngineConfig(max_num_seqs=2, kv_cache_bytes=6 * 16 * 2 * 2 * 16 * 2 * 4, lora_cache_bytes=4 << 20)
    first, second = make_prompts(30, 31)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, prompt_logprobs_from=0)
    with EngineWorker(BaseModel(llama, byte_tokenizer, "tiny"), config) as worker:
        older = worker.submit(first, greedy(40))
        deltas = list(worker.submit(second, sampling))
        assert older.result(60).finish_reason == "length"
        assert worker.stats().num_preemptions > 0
    told = [delta.prompt_logprobs for delta in deltas]
    assert told[0] is not None
    assert len(told[0]) == 30
    assert told[1:] == [None] * (len(told) - 1)


def test_preempted_requests_lose_nothing(llama: Any, byte_tokenizer: Any) -> None:
    """With a cache far too small for all, requests are preempted, computed again, and answer the same."""
    reference, adapters = copy.deepcopy(llama), make_adapters(llama)
    prompts = make_prompts(20, 21, 22, 23, 24, 25)
    compositions = make_compositions(adapters, len(prompts))
    config = EngineConfig(max_num_seqs=6, kv_cache_bytes=8 * 16 * 2 * 2 * 16 * 2 * 4, lora_cache_bytes=4 << 20)
    with EngineWorker(BaseModel(llama, byte_tokenizer, "tiny"), config) as worker:
        running = [worker.submit(p, greedy(30), c) for p, c in zip(prompts, compositions, strict=True)]
        got = [list(g.result(60).token_ids) for g in running]
        assert worker.stats().num_preemptions > 0
        worker.check_integrity()
    assert got == [generate(reference, p, c, 30) for p, c in zip(prompts, compositions, strict=True)]


def test_adapters_move_in_and_out_of_device_memory(llama: Any, byte_tokenizer: Any) -> None:
    """With room for two adapters at a time, six of them are served one after the other, each with its own answer."""
    reference, adapters = copy.deepcopy(llama), [make_adapter(llama, f"a{i}", r=4) for i in range(6)]
    prompt = make_prompts(12)[0]
    config = EngineConfig(**{**SMALL, "max_loras": 2})
    with EngineWorker(BaseModel(llama, byte_tokenizer, "tiny"), config) as worker:
        running = [worker.submit(prompt, greedy(), [(adapter, 1.0)]) for adapter in adapters * 2]
        got = [list(g.result(60).token_ids) for g in running]
        assert worker.stats().num_adapter_loads >= 6
        worker.check_integrity()
    assert got == [generate(reference, prompt, [(adapter, 1.0)]) for adapter in adapters] * 2


def test_a_replaced_adapter_does_not_meet_its_old_cache(worker: EngineWorker, llama: Any) -> None:
    """Same name, same prompt, other content: the answer is the new adapter's from the first token on."""
    prompt = make_prompts(60)[0]
    old, new = (make_adapter(llama, "same", seed=s) for s in (1, 2))
    first = worker.submit(prompt, greedy(), [(old, 1.0)]).result(60)
    second = worker.submit(prompt, greedy(), [(new, 1.0)]).result(60)
    assert second.usage.num_cached_tokens == 0
    assert first.token_ids != second.token_ids


def test_a_mixture_of_copies_equals_selection(worker: EngineWorker, llama: Any) -> None:
    """Three times the same adapter at a third each is that adapter."""
    prompt = make_prompts(12)[0]
    copies = [(make_adapter(llama, f"copy{i}", seed=5), 1 / 3) for i in range(3)]
    mixed = worker.submit(prompt, greedy(), copies).result(60)
    assert mixed.token_ids == worker.submit(prompt, greedy(), [(copies[0][0], 1.0)]).result(60).token_ids


def test_seeded_sampling_does_not_depend_on_company(worker: EngineWorker) -> None:
    """A seeded request draws the same tokens alone and among fifteen others."""
    prompts = make_prompts(*range(3, 19))
    sampling = [SamplingParams(temperature=1.5, top_p=0.9, seed=i, max_tokens=12, ignore_eos=True) for i in range(16)]
    together = [worker.submit(p, s) for p, s in zip(prompts, sampling, strict=True)]
    assert [g.result(60).token_ids for g in together] == [
        worker.submit(p, s).result(60).token_ids for p, s in zip(prompts, sampling, strict=True)
    ]


def test_stop_strings_and_limits_end_an_answer(worker: EngineWorker) -> None:
    """A stop string is cut from the text, and `finish_reason` says why an answer ended."""
    prompt = make_prompts(10)[0]
    whole = worker.submit(prompt, greedy(40)).result(60)
    assert whole.finish_reason == "length"
    assert whole.usage.num_output_tokens == 40
    stop = whole.text[5:7]
    cut = worker.submit(prompt, SamplingParams(max_tokens=40, ignore_eos=True, stop=(stop,))).result(60)
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_text_before_a_cut_character_arrives(worker: EngineWorker, byte_tokenizer: Any) -> None:
    """Wherever the token limit falls, the text is that of all tokens up to a character that is not whole."""
    for max_tokens in range(1, 12):
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        completion = worker.submit(make_prompts(8 + max_tokens)[0], sampling).result(60)
        assert completion.finish_reason == "length"
        whole = byte_tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert completion.text == whole.rstrip("\ufffd")


def test_end_of_sequence_ends_an_answer(llama: Any, byte_tokenizer: Any) -> None:
    """The model's end-of-sequence token stops the request and has no text."""
    prompt = make_prompts(10)[0]
    third = generate(llama, prompt, [], 3)[2]
    llama.generation_config.eos_token_id = [third]
    with EngineWorker(BaseModel(llama, byte_tokenizer, "tiny"), EngineConfig(**SMALL), compiler=SCRIPTS) as worker:
        completion = worker.submit(prompt, SamplingParams(max_tokens=40)).result(60)
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] == third


def test_aborted_requests_free_their_memory(worker: EngineWorker, llama: Any) -> None:
    """Closing a stream and aborting a waiting request disturb nobody and leave nothing behind."""
    prompts, adapters = make_prompts(*range(20, 40)), make_adapters(llama)
    compositions = make_compositions(adapters, len(prompts))
    alone = worker.submit(prompts[0], greedy(60), compositions[0]).result(60)
    running = [worker.submit(p, greedy(60), c) for p, c in zip(prompts, compositions, strict=True)]
    stream = iter(running[1])
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    for generation in running[2:]:
        generation.abort()
    assert running[0].result(60).token_ids == alone.token_ids
    worker.check_integrity()
    assert worker.stats().num_running == worker.stats().num_waiting == 0


def test_requests_that_cannot_be_served_are_refused_at_once(worker: EngineWorker, llama: Any) -> None:
    """Empty and over-long prompts, over-long compositions and adapters of another model never reach the queue."""
    with pytest.raises(InvalidRequestError, match="no tokens"):
        worker.submit([], greedy())
    with pytest.raises(PromptTooLongError, match="512 tokens"):
        worker.submit([5] * 512, greedy())
    with pytest.raises(InvalidRequestError, match="9 adapters"):
        worker.submit([5], greedy(), [(make_adapter(llama, "a"), 0.1)] * 9)
    with pytest.raises(InvalidRequestError, match=r"'wide'.*another base model"):
        worker.submit([5], greedy(), [(make_adapter(make_tiny_model(hidden_size=80), "wide"), 1.0)])


def test_an_answer_ends_at_the_context_window(worker: EngineWorker) -> None:
    """Prompt and answer together stop at the model's window, with `length`."""
    completion = worker.submit([5] * 500, greedy(100)).result(60)
    assert completion.finish_reason == "length"
    assert completion.usage.num_output_tokens == 12


def test_a_failing_step_fails_its_requests_and_the_engine_lives_on(
    worker: EngineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception inside a step reaches the requests in it; the next is served, and finds no page it did not fill."""
    prompt = list(range(20, 120))
    runner = worker.core.runner
    launch = runner.launch

    def fail_once(*args: Any) -> Any:
        monkeypatch.setattr(runner, "launch", launch)
        raise RuntimeError("broken step")

    monkeypatch.setattr(runner, "launch", fail_once)
    with pytest.raises(EngineError, match="broken step"):
        worker.submit(prompt, greedy()).result(60)
    completion = worker.submit(prompt, greedy()).result(60)
    assert (completion.finish_reason, completion.usage.num_cached_tokens) == ("length", 0)
    worker.check_integrity()


def test_a_dead_engine_says_so(llama: Any, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If scheduling itself breaks, waiting callers and later ones hear that the engine died, and of what."""
    worker = EngineWorker(BaseModel(llama, byte_tokenizer, "tiny"), EngineConfig(**SMALL))

    def broken() -> Any:
        raise RuntimeError("broken scheduler")

    monkeypatch.setattr(worker.core.scheduler, "schedule", broken)
    with pytest.raises(EngineDeadError, match="broken scheduler"):
        worker.submit([5, 6], greedy()).result(60)
    worker._thread.join(10)
    with pytest.raises(EngineDeadError, match="broken scheduler"):
        worker.submit([5, 6], greedy())


def test_a_closed_engine_gives_the_model_back(llama: Any, byte_tokenizer: Any) -> None:
    """After `close` the model generates by itself as before, and the engine refuses requests."""
    prompt = make_prompts(9)[0]
    expected = generate(llama, prompt, [])
    worker = EngineWorker(BaseModel(llama, byte_tokenizer, "tiny"), EngineConfig(**SMALL))
    with pytest.raises(EngineError, match="running engine"):
        llama(torch.tensor([prompt]))
    pending = worker.submit(prompt, greedy(200))
    worker.close()
    with pytest.raises(EngineDeadError):
        pending.result(60)
    with pytest.raises(EngineDeadError, match="closed"):
        worker.submit(prompt, greedy())
    assert generate(llama, prompt, []) == expected


def test_offloaded_models_answer_the_same(tmp_path: Path, llama: Any) -> None:
    """With layers on the CPU and on disk, moved in by accelerate, the tokens are those of the model in memory."""
    tokenizer = make_tokenizer()
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                  "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    base = load_base_model(tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "offload"))
    prompt, adapters = make_prompts(24)[0], make_adapters(llama)
    composition = make_compositions(adapters, 2)[1]
    with EngineWorker(base, EngineConfig(**SMALL)) as worker:
        got = list(worker.submit(prompt, greedy(), composition).result(60).token_ids)
    assert got == generate(llama, prompt, composition)


def test_models_that_keep_other_state_are_refused(byte_tokenizer: Any) -> None:
    """A recurrent architecture is refused by name when the engine is made."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mamba", vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(EngineError, match="MambaForCausalLM has no layer that attends"):
        EngineWorker(load_base_model((model, byte_tokenizer)))


def test_constraints_steer_and_end_an_answer(worker: EngineWorker) -> None:
    """A constraint's masks are obeyed, its forced tokens taken without a step, and its end ends the answer."""

    class Spell:
        """Allows only `x`, then forces `yz`, then is done."""

        is_shortened = False

        def __init__(self) -> None:
            self.accepted: list[int] = []

        @property
        def is_finished(self) -> bool:
            return len(self.accepted) == 3

        def fill_bitmask(self, row: torch.Tensor) -> None:
            row.zero_()
            token = worker.tokenizer.convert_tokens_to_ids("x")
            row[token // 32] = 1 << (token % 32)

        def accept(self, token_id: int) -> None:
            self.accepted.append(token_id)

        def forced_tokens(self) -> list[int]:
            return worker.tokenizer.convert_tokens_to_ids(["y", "z"]) if len(self.accepted) == 1 else []

    before = worker.stats().num_steps
    running = [worker.submit([5, 6, 7], greedy(9), grammar=SCRIPTS.add(Spell)), worker.submit([5, 6, 7], greedy(9))]
    steered, free = (generation.result(60) for generation in running)
    assert (steered.text, steered.finish_reason) == ("xyz", "stop")
    assert free.usage.num_output_tokens == 9
    assert worker.stats().num_steps - before <= 10


def test_an_error_in_one_constraint_fails_that_request_alone(worker: EngineWorker) -> None:
    """A grammar that raises ends its own request; the others in the batch go on."""

    class Broken:
        is_shortened = False
        is_finished = False

        def fill_bitmask(self, row: torch.Tensor) -> None: ...

        def accept(self, token_id: int) -> None:
            raise ValueError("broken grammar")

        def forced_tokens(self) -> list[int]:
            return []

    bad, good = worker.submit([5, 6], greedy(5), grammar=SCRIPTS.add(Broken)), worker.submit([5, 6], greedy(5))
    with pytest.raises(EngineError, match="broken grammar"):
        bad.result(60)
    assert good.result(60).usage.num_output_tokens == 5


def score_prompt(model: Any, prompt: list[int], adapters: Pairs) -> list[float]:
    """The log-probability of each token after the first, by transformers with the adapters merged."""
    merged = copy.deepcopy(model)
    merge_adapters(merged, adapters)
    logprobs = merged(torch.tensor([prompt])).logits[0].log_softmax(-1)
    return [float(logprobs[place, token]) for place, token in enumerate(prompt[1:])]


@pytest.mark.parametrize("max_scored", [256, 7])
def test_log_probabilities_of_prompts_are_the_models(
    llama: Any, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, max_scored: int
) -> None:
    """In chunks, in batches of other adapters, after a cached prefix, and of requests that were sent back."""
    monkeypatch.setattr(scheduler, "_MAX_SCORED_PLACES", max_scored)
    config = EngineConfig(
        max_num_seqs=6,
        max_num_batched_tokens=40,
        kv_cache_bytes=9 * 16 * 2 * 2 * 16 * 2 * 4,
        lora_cache_bytes=8 << 20,
        adapter_kinds=("vocabulary",),
    )
    compositions = make_compositions(make_adapters(llama), 6)
    compositions[4] = [(make_adapter(llama, "output", targets=("lm_head", "q_proj")), 1.0)]
    prompts = make_prompts(60, 75, 2, 33, 60, 48)
    starts = (0, 50, 1, 20, 32, 47)
    sampling = [SamplingParams(max_tokens=9, ignore_eos=True, prompt_logprobs_from=start) for start in starts]
    calls = list(zip(prompts, starts, compositions, strict=True))
    right = [score_prompt(llama, prompt, pairs)[max(start, 1) - 1 :] for prompt, start, pairs in calls]
    answers = [generate(llama, prompt, pairs, 9) for prompt, _, pairs in calls]
    with EngineWorker(BaseModel(llama, byte_tokenizer, "tiny"), config) as worker:
        for _ in range(2):
            running = [worker.submit(*call) for call in zip(prompts, sampling, compositions, strict=True)]
            for generation, logprobs, answer in zip(running, right, answers, strict=True):
                done = generation.result(60)
                assert done.prompt_logprobs == pytest.approx(logprobs, abs=2e-3)
                assert list(done.token_ids) == answer
        assert worker.stats().num_preemptions > 0
        again = [worker.submit(prompts[1], sampling[1], compositions[1]).result(60) for _ in range(2)][1]
        assert again.usage.num_cached_tokens == 48  # the pages before the first place that is scored
        assert again.prompt_logprobs == pytest.approx(right[1], abs=2e-3)
        worker.check_integrity()
