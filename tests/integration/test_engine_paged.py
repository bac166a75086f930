"""The Triton backend, captured decode steps and asynchronous scheduling give the tokens of `generate`."""

from __future__ import annotations

import copy
import gc
import os
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from langchain_lora_retriever.engine import BaseModel, Engine, EngineConfig, EngineWorker
from langchain_lora_retriever.engine.model import joint_linears, paged_step, runner
from langchain_lora_retriever.errors import EngineError
from langchain_lora_retriever.types import Adapter, LoraWeights, SamplingParams
from makers import ScriptedCompiler, make_adapter, make_tiny_model, make_tokenizer, merge_adapters

SCRIPTS = ScriptedCompiler()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs it so",
)
SMALL: dict[str, Any] = {"max_num_seqs": 8, "kv_cache_bytes": 2 << 20, "lora_cache_bytes": 4 << 20}
NUM_TOKENS = 4
IN_PARTS = {"qwen3", "gemma2", "olmo2"}
EXTRA: dict[str, dict[str, Any]] = {
    "llama4_text": {"attention_chunk_size": 8, "layer_types": ["chunked_attention", "full_attention"],
                    "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 96,
                    "no_rope_layers": [1, 0], "interleave_moe_layer_step": 3},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": False},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.1, "logits_scaling": 2.0},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "num_hidden_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}  # fmt: skip
Pairs = list[tuple[Adapter, float]]


@pytest.fixture(autouse=True)
def _few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter every program takes milliseconds, whether it finds keys or not."""
    if DEVICE == "cpu":
        monkeypatch.setattr(paged_step, "choose_num_splits", lambda *_: 3)


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    """The byte-level tokenizer; made here, so that the file also runs without the conftest."""
    return make_tokenizer()


def generate(model: Any, prompt: list[int], adapters: Pairs, num_tokens: int) -> list[int]:
    """What transformers answers with the adapters merged into a copy of the weights."""
    merged = copy.deepcopy(model)
    merge_adapters(merged, adapters)
    ids = torch.tensor([prompt], device=DEVICE)
    out = merged.to(DEVICE).generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return list(out[0, len(prompt) :].tolist())


def make_prompt(length: int) -> list[int]:
    """A random prompt."""
    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def make_cases(model: Any, *lengths: int) -> list[tuple[list[int], Pairs]]:
    """Prompts, in turn with one adapter, a mixture of three, none."""
    a = [make_adapter(model, f"a{i}", r=2 + 2 * i) for i in range(4)]
    kinds: list[Pairs] = [[(a[0], 1.0)], [(a[1], 0.5), (a[2], 0.3), (a[3], 0.2)], []]
    return [(make_prompt(length), kinds[i % 3]) for i, length in enumerate(lengths)]


@needs_triton
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"enable_fused_layers": False, "enable_cuda_graphs": False, "enable_async_scheduling": False}),
        ("qwen3", {}),
        ("mistral", {"enable_cuda_graphs": False}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("llama4_text", {"enable_fused_layers": False}),
        ("smollm3", {}),
        ("gpt_oss", {}),
        ("olmo2", {}),
    ],
)
def test_the_triton_backend_gives_the_tokens_of_generate(
    architecture: str, options: dict[str, Any], byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked prompts, mixtures, decode steps with padding, and prompts behind a cached prefix.

    In three models products come in parts, where they may: with a norm behind the sum, before it, and both.
    """
    num_in_parts = 0
    if architecture in IN_PARTS:

        def in_parts(self: Any, x: torch.Tensor) -> torch.Tensor:
            nonlocal num_in_parts
            num_in_parts += 1
            y = self(x).float()
            return torch.stack([0.75 * y, 0.25 * y])

        for kind in (joint_linears._SideBySide, joint_linears._Packed):
            monkeypatch.setattr(kind, "in_parts", in_parts)
    if DEVICE == "cpu":  # the interpreter runs one program after the other
        from langchain_lora_retriever.engine.model import paged_step

        monkeypatch.setattr(paged_step, "choose_num_splits", lambda *_: 2)
    model = make_tiny_model(architecture, **EXTRA.get(architecture, {}))
    cases = make_cases(model, 3, 37, 20)
    expected = [generate(model, *case, NUM_TOKENS) for case in cases]
    settings = {**SMALL, "enable_async_scheduling": True, **options}
    config = EngineConfig(attention_backend="triton", max_num_batched_tokens=24, **settings)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    with EngineWorker(BaseModel(model.to(DEVICE), byte_tokenizer, "tiny"), config) as worker:
        executor = worker.core.runner.executor
        assert executor.name == "triton"
        assert executor.is_fused == config.enable_fused_layers
        assert (num_in_parts >= 2 * model.config.num_hidden_layers) == (architecture in IN_PARTS)
        running = [worker.submit(prompt, sampling, adapters) for prompt, adapters in cases]
        assert [list(g.result(120).token_ids) for g in running] == expected
        again = worker.submit(cases[1][0], sampling, cases[1][1]).result(120)
        assert list(again.token_ids) == expected[1]
        assert again.usage.num_cached_tokens == 32
        num_rotary = {"gemma3_text": 2, "llama4_text": 0}.get(architecture, 1)
        assert executor._rotary_tables.num_tables == num_rotary
        worker.check_integrity()
    if options == {} and architecture == "llama":
        assert "forward" not in vars(model.model.layers[0])
        assert "forward" not in vars(model.model.norm)
        assert "forward" not in vars(model.model.rotary_emb)


@needs_triton
def test_a_start_that_fails_gives_the_model_back_on_the_triton_backend(
    byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers and rotations have their own forwards again, whatever failed after they were replaced."""
    from langchain_lora_retriever.engine.model.triton_executor import TritonExecutor

    model = make_tiny_model().to(DEVICE)
    config = EngineConfig(attention_backend="triton", **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(TritonExecutor, "_capture_all", Mock(side_effect=torch.OutOfMemoryError))
        with pytest.raises(torch.OutOfMemoryError):
            EngineWorker(BaseModel(model, byte_tokenizer, "tiny"), config)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    with EngineWorker(BaseModel(model, byte_tokenizer, "tiny"), config) as worker:
        assert len(worker.submit([5, 6], SamplingParams(max_tokens=2, ignore_eos=True)).result(120).token_ids) == 2


@needs_triton
def test_the_triton_backend_keeps_what_is_not_finite_with_its_request(
    byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages, rows and padding that an overflowing adapter used harm neither those beside it nor those after it."""
    if DEVICE == "cpu":
        from langchain_lora_retriever.engine.model import paged_step

        monkeypatch.setattr(paged_step, "choose_num_splits", lambda *_: 2)
    model = make_tiny_model()
    mild, other = make_adapter(model, "mild"), make_adapter(model, "other", r=3)
    wild = Adapter(
        "wild",
        "f" * 64,
        {n: LoraWeights(w.lora_A.clamp(-1, 1) * 3e38, w.lora_B.clamp(-1, 1) * 1e38, 2.0)
         for n, w in make_adapter(model, "wild", r=5).weights.items()},
    )  # fmt: skip
    settings = {**SMALL, "kv_cache_bytes": 6 * 16 * 512, "max_model_len": 64}
    config = EngineConfig(
        attention_backend="triton", enable_prefix_caching=False, enable_async_scheduling=True, **settings
    )
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    cases: list[tuple[list[int], Pairs]] = [(make_prompt(17), [(mild, 0.7), (other, 0.3)]), (make_prompt(5), [])]
    with EngineWorker(BaseModel(model.to(DEVICE), byte_tokenizer, "tiny"), config) as worker:
        expected = [worker.submit(prompt, sampling, adapters).result(120).token_ids for prompt, adapters in cases]
        for _ in range(2):
            ill = worker.submit(make_prompt(30), sampling, [(wild, 0.5), (mild, 0.5)])
            running = [worker.submit(prompt, sampling, adapters) for prompt, adapters in cases]
            assert [generation.result(120).token_ids for generation in running] == expected
            with pytest.raises(EngineError, match=r"'wild'.*not finite"):
                ill.result(120)
        worker.check_integrity()


@needs_triton
@pytest.mark.parametrize("enable_cuda_graphs", [True, False])
def test_steps_that_are_not_plain_greedy_on_the_triton_backend(
    enable_cuda_graphs: bool, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A penalty knows the token that the step before chose, though the step has overwritten it with its own greedy one.

    Steps with draws and with log-probabilities in them, and plain ones after and before, take one another's tokens.
    """
    if DEVICE == "cpu":
        from langchain_lora_retriever.engine.model import paged_step

        monkeypatch.setattr(paged_step, "choose_num_splits", lambda *_: 2)
    model = make_tiny_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight[16:] *= 0.3  # it repeats itself
    model.generation_config.repetition_penalty = 1.4
    prompts = [make_prompt(length) for length in (3, 9)]
    num_tokens = 8
    penalised = [generate(model, prompt, [], num_tokens) for prompt in prompts]
    model.generation_config.repetition_penalty = 1.0
    plain = [generate(model, prompt, [], num_tokens) for prompt in prompts]
    assert penalised != plain
    config = EngineConfig(
        attention_backend="triton", enable_async_scheduling=True, enable_cuda_graphs=enable_cuda_graphs, **SMALL
    )
    greedy, penalty = (SamplingParams(max_tokens=num_tokens, ignore_eos=True, repetition_penalty=p) for p in (1.0, 1.4))
    short = SamplingParams(max_tokens=3, ignore_eos=True, temperature=1.0, seed=1, logprobs=1)
    with EngineWorker(BaseModel(model.to(DEVICE), byte_tokenizer, "tiny"), config) as worker:
        assert worker.core.runner.executor.name == "triton"
        running = [worker.submit(prompt, penalty) for prompt in prompts]
        assert [list(generation.result(120).token_ids) for generation in running] == penalised
        running = [worker.submit(prompt, greedy) for prompt in prompts]
        drawn = worker.submit(prompts[0], short)
        assert [list(generation.result(120).token_ids) for generation in running] == plain
        assert drawn.result(120).token_ids == worker.submit(prompts[0], short).result(120).token_ids
        worker.check_integrity()


@needs_triton
def test_states_of_sequences_are_kept_on_the_triton_backend(
    byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of streams run from static inputs, with padding, those with prompts piece by piece."""
    if DEVICE == "cpu":
        from langchain_lora_retriever.engine.model import paged_step

        monkeypatch.setattr(paged_step, "choose_num_splits", lambda *_: 2)
    model = make_tiny_model("lfm2", **EXTRA["lfm2"])
    adapter = make_adapter(model, "a", targets=("in_proj", "out_proj", "q_proj"), scaling=1.0)
    cases: list[tuple[list[int], Pairs]] = [(make_prompt(n), kind) for n, kind in zip(
        (3, 30, 17), ([(adapter, 1.0)], [], [(adapter, 1.0)]), strict=True
    )]  # fmt: skip
    expected = [generate(model, *case, NUM_TOKENS) for case in cases]
    config = EngineConfig(attention_backend="triton", max_num_batched_tokens=24, enable_async_scheduling=True, **SMALL)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    with EngineWorker(BaseModel(model.to(DEVICE), byte_tokenizer, "tiny"), config) as worker:
        executor = worker.core.runner.executor
        assert executor.name == "triton"
        assert executor.graphs
        assert all(shape.is_decode for shape, *_ in executor.graphs)
        running = [worker.submit(prompt, sampling, adapters) for prompt, adapters in cases]
        assert [list(g.result(120).token_ids) for g in running] == expected
        worker.check_integrity()
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def make_strange(model: Any) -> tuple[Any, int, str]:
    """One of three layers does what no fused forward knows of."""
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    return model, 2, "model.layers.1 stays unfused: fused it computes something else"


def make_multiplied(model: Any) -> tuple[Any, int, str]:
    """All layers do."""
    return model, 0, "model.layers.0 stays unfused"


def make_last_strange(model: Any) -> tuple[Any, int, str]:
    """The last layer does, so that the norm behind it takes nothing from it."""
    layer = model.model.layers[2]
    layer.self_attn.register_forward_hook(lambda _module, _args, output: (0.7 * output[0], output[1]))
    return model, 2, "model.layers.2 stays unfused"


@needs_triton
@pytest.mark.parametrize(
    ("architecture", "change"),
    [("gemma2", make_strange), ("llama", make_last_strange), ("granite", make_multiplied)],
)
def test_layers_that_are_built_otherwise_run_unfused_beside_the_others_on_the_triton_backend(
    architecture: str,
    change: Any,
    byte_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each is judged alone, and the tokens are those of the model."""
    if DEVICE == "cpu":
        from langchain_lora_retriever.engine.model import paged_step

        monkeypatch.setattr(paged_step, "choose_num_splits", lambda *_: 2)
    layers = {"num_hidden_layers": 3}
    if architecture == "gemma2":
        layers["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    model, num_fused, words = change(make_tiny_model(architecture, **EXTRA.get(architecture, {}), **layers))
    prompt = make_prompt(20)
    expected = generate(model, prompt, [], NUM_TOKENS)
    config = EngineConfig(attention_backend="triton", **SMALL)
    with EngineWorker(BaseModel(model.to(DEVICE), byte_tokenizer, "tiny"), config) as worker:
        executor = worker.core.runner.executor
        assert executor.name == "triton"
        assert executor.num_fused_layers == num_fused
        assert words in caplog.text
        assert "fused it fails" not in caplog.text, "a rotation wider than a head is not tried"
        running = worker.submit(prompt, SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True))
        assert list(running.result(120).token_ids) == expected
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@needs_triton
@pytest.mark.parametrize("where", ["_read_norm", "gated_activation"])
def test_a_fused_forward_that_fails_leaves_the_triton_backend_unfused(
    where: str, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is read and where it is tried out: the engine starts, says why, and answers the same."""
    from langchain_lora_retriever.engine.model import fused_layers

    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("renamed in another version")

    monkeypatch.setattr(fused_layers, where, fail)
    model = make_tiny_model("llama")
    expected = generate(model, make_prompt(5), [], 2)
    config = EngineConfig(attention_backend="triton", **SMALL)
    with EngineWorker(BaseModel(model.to(DEVICE), byte_tokenizer, "tiny"), config) as worker:
        executor = worker.core.runner.executor
        assert executor.name == "triton"
        assert executor.num_fused_layers == 0
        assert "renamed in another version" in caplog.text
        running = worker.submit(make_prompt(5), SamplingParams(max_tokens=2, ignore_eos=True))
        assert list(running.result(120).token_ids) == expected


@needs_triton
def test_steps_are_captured_for_the_launches_by_which_they_are_found(byte_tokenizer: Any) -> None:
    """Those of higher ranks as well, which few adapters and many share."""
    settings = {**SMALL, "max_num_seqs": 64, "lora_cache_bytes": 32 << 20, "captured_ranks": (16, 64)}
    config = EngineConfig(attention_backend="triton", max_loras=64, **settings)
    with EngineWorker(BaseModel(make_tiny_model().to(DEVICE), byte_tokenizer, "tiny"), config) as worker:
        runner_ = worker.core.runner
        launches = {}
        for (shape, launch, _), graph in runner_.executor._graphs.items():  # type: ignore[union-attr]
            _, num_active, rank_bound, _ = graph._forward.args  # type: ignore[attr-defined]
            made_for = runner_.lora_layers.launch_shape(shape.num_tokens, shape.num_adapters, num_active, rank_bound)
            launches[shape, launch] = made_for
    assert {launch[0] for _, launch in launches if launch is not None} == {16, 64}
    assert all(made_for == launch for (_, launch), made_for in launches.items())


def live_bytes() -> int:
    """Memory of all plain tensors that Python still knows, on any device."""
    tensors = [found for found in gc.get_objects() if type(found) in {torch.Tensor, torch.nn.Parameter}]
    storages = [found.untyped_storage() for found in tensors if found.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_a_closed_engine_has_let_go_of_its_memory(
    backend: Any, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of keys and values, of adapters and of those on their way, though somebody still holds the engine."""
    plan_memory = runner.plan_memory

    def plan(*args: Any) -> Any:
        return plan_memory(*args)._replace(num_staging_rows=256, num_pinned_bytes=1 << 20)

    monkeypatch.setattr(runner, "plan_memory", plan)
    model = make_tiny_model("llama").to(DEVICE)
    adapters = [(make_adapter(model, "a", targets=("q_proj", "down_proj", "lm_head")), 1.0)]
    settings = {**SMALL, "kv_cache_bytes": 8 << 20, "lora_cache_bytes": 8 << 20}
    config = EngineConfig(attention_backend=backend, freeze_heap=False, adapter_kinds=("vocabulary",), **settings)
    gc.collect()
    before = live_bytes()
    with EngineWorker(BaseModel(model, byte_tokenizer, "tiny"), config) as worker:
        running = worker.submit(make_prompt(5), SamplingParams(max_tokens=2, ignore_eos=True), adapters)
        assert running.result(120).finish_reason == "length"
        del running
        assert live_bytes() > before + (16 << 20)
    assert live_bytes() < before + (1 << 20), "without a collection"
    assert worker.stats().num_running == 0


def test_a_model_that_lies_elsewhere_cannot_have_the_triton_backend(byte_tokenizer: Any) -> None:
    """Asked for by name on an offloaded model, it is refused; "auto" would serve."""
    from accelerate import cpu_offload

    model = cpu_offload(make_tiny_model("llama"), execution_device=torch.device("cpu"))
    config = EngineConfig(attention_backend="triton", **SMALL)
    with pytest.raises(EngineError, match="without offloading"):
        EngineWorker(BaseModel(model, byte_tokenizer, "tiny"), config)


@pytest.fixture(params=[True, False], ids=["async", "sync"])
def config(request: pytest.FixtureRequest) -> EngineConfig:
    """Both ways to schedule, with PyTorch's attention."""
    return EngineConfig(attention_backend="torch", enable_async_scheduling=request.param, **SMALL)


@pytest.mark.parametrize("num_blocks", [8, 64], ids=["preempting", "roomy"])
def test_asynchronous_scheduling_changes_no_token(config: EngineConfig, num_blocks: int, byte_tokenizer: Any) -> None:
    """More requests than may run, short and long, in a cache with and without room for them."""
    import dataclasses

    model = make_tiny_model("llama")
    cases = make_cases(model, 20, 21, 1, 22, 33, 24, 25, 16, 30, 2)
    expected = [generate(model, *case, 10 + 3 * i) for i, case in enumerate(cases)]
    config = dataclasses.replace(config, kv_cache_bytes=num_blocks * 16 * 2 * 2 * 16 * 2 * 4)
    with EngineWorker(BaseModel(model.to(DEVICE), byte_tokenizer, "tiny"), config) as worker:
        running = [
            worker.submit(prompt, SamplingParams(max_tokens=10 + 3 * i, ignore_eos=True), adapters)
            for i, (prompt, adapters) in enumerate(cases)
        ]
        assert [list(g.result(120).token_ids) for g in running] == expected
        assert (worker.stats().num_preemptions > 0) == (num_blocks == 8)
        worker.check_integrity()


def test_every_step_is_launched_before_the_last_one_is_read(byte_tokenizer: Any) -> None:
    """No step is lost to waiting: as many launches as tokens, and one request in flight all the while."""
    config = EngineConfig(enable_async_scheduling=True, **SMALL)
    engine = Engine(BaseModel(make_tiny_model("llama").to(DEVICE), byte_tokenizer, "tiny"), config)
    request = engine.make_request(make_prompt(5), SamplingParams(max_tokens=6, ignore_eos=True))
    engine.add(request)
    known = []
    while engine.has_unfinished_requests:
        engine.step()
        known.append(len(request.output_token_ids))
    assert known == [0, 1, 2, 3, 4, 5, 6]
    engine.check_integrity()
    engine.close()


def test_a_surplus_token_is_dropped(config: EngineConfig, byte_tokenizer: Any) -> None:
    """A stop string ends a request while its next token is computed already; nobody sees that one."""
    model = make_tiny_model("llama")
    prompt = make_prompt(9)
    with EngineWorker(BaseModel(model.to(DEVICE), byte_tokenizer, "tiny"), config) as worker:
        full = worker.submit(prompt, SamplingParams(max_tokens=12, ignore_eos=True)).result(60)
        stop = byte_tokenizer.decode(full.token_ids[4:6])
        beside = worker.submit(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
        stopped = worker.submit(prompt, SamplingParams(max_tokens=12, ignore_eos=True, stop=(stop,))).result(60)
        assert stopped.finish_reason == "stop"
        assert stopped.token_ids == full.token_ids[: len(stopped.token_ids)]
        assert len(stopped.token_ids) < 12
        assert beside.result(60).token_ids == full.token_ids
        worker.check_integrity()


def test_draws_and_logprobs_are_the_same_in_both_ways(byte_tokenizer: Any) -> None:
    """A seeded draw depends on the token's place, which a pending token counts into."""
    model = make_tiny_model("llama")
    sampling = SamplingParams(max_tokens=12, temperature=1.5, top_p=0.9, seed=5, logprobs=2, ignore_eos=True)
    results = []
    for is_async in (True, False):
        config = EngineConfig(enable_async_scheduling=is_async, **SMALL)
        with EngineWorker(BaseModel(copy.deepcopy(model).to(DEVICE), byte_tokenizer, "tiny"), config) as worker:
            results.append(worker.submit(make_prompt(7), sampling).result(60))
    assert results[0].token_ids == results[1].token_ids
    assert results[0].logprobs is not None
    assert [item.token_id for item in results[0].logprobs] == list(results[0].token_ids)


class OnlyEven:
    """Allows even token ids, and counts on having seen every token before the next one is masked."""

    is_shortened = False

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.asked_at: list[int] = []
        self.is_finished = False

    def fill_bitmask(self, row: torch.Tensor) -> None:
        """Every second bit."""
        self.asked_at.append(len(self.seen))
        row.fill_(0x55555555)

    def accept(self, token_id: int) -> None:
        """Remember."""
        self.seen.append(token_id)

    def forced_tokens(self) -> tuple[int, ...]:
        """None."""
        return ()


def test_a_grammar_is_asked_with_every_token_known(config: EngineConfig, byte_tokenizer: Any) -> None:
    """Beside free requests, which are answered as if they were alone."""
    model = make_tiny_model("llama")
    expected = generate(model, make_prompt(9), [], 10)
    sampling = SamplingParams(max_tokens=10, ignore_eos=True)
    with EngineWorker(BaseModel(model.to(DEVICE), byte_tokenizer, "tiny"), config, compiler=SCRIPTS) as worker:
        grammar = OnlyEven()
        free = worker.submit(make_prompt(9), sampling)
        ruled = worker.submit(make_prompt(5), sampling, grammar=SCRIPTS.add(lambda: grammar)).result(60)
        assert grammar.asked_at == list(range(10))
        assert all(token % 2 == 0 for token in ruled.token_ids)
        assert list(free.result(60).token_ids) == expected
        worker.check_integrity()
