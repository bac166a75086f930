"""Every kind of LoRA that PEFT writes: its own tokens and probabilities, alone and in company."""

from __future__ import annotations

import copy
import logging
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from langchain_lora_retriever.engine import BaseModel, Engine, EngineConfig, EngineWorker
from langchain_lora_retriever.errors import InvalidAdapterError, InvalidRequestError, UnsupportedAdapterError
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.pool.checkpoint_files import WEIGHTS_FILE
from langchain_lora_retriever.pool.pool import AdapterPool
from langchain_lora_retriever.registry import SharedEngine
from langchain_lora_retriever.remote import EngineRecipe
from langchain_lora_retriever.retrieval.fusion import fuse
from langchain_lora_retriever.types import Adapter, LoraWeights, SamplingParams
from makers import VOCAB_SIZE, make_adapter, make_checkpoint, make_tiny_model, make_tokenizer, merge_adapters

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1; test_interpreter.py runs it so",
)
KINDS: tuple[Any, ...] = ("vocabulary", "dora")
SMALL: dict[str, Any] = {"max_num_seqs": 8, "kv_cache_bytes": 2 << 20, "lora_cache_bytes": 16 << 20}
INVOCATION = [17, 99]
PROMPT = [5, 17, 99, 4, 250, 31, 8, 77, 9, 9, 17, 99, 13, 42, 6, 111, 3]  # invoked twice: the last one counts
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_TOKENS = 6
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR, "std": 0.2},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "patterns": {
        "target_modules": r"model\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)",
        "rank_pattern": {"down_proj": 7, r"layers\.1\..*q_proj": 2},
        "alpha_pattern": {"down_proj": 21},
        "std": 0.2,
    },
    "all-linear": {"target_modules": "all-linear", "layers_to_transform": None},
    "one layer": {"target_modules": LINEAR, "layers_to_transform": [1], "std": 0.2},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "dora of some": {"target_modules": ["k_proj", "down_proj"], "use_dora": True, "rank_pattern": {"down_proj": 9}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "saves_base": "auto", "std": 0.2},
    "output": {"target_modules": ["lm_head", "v_proj"], "std": 0.2},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "std": 0.3},
    "dora of both": {"target_modules": ["embed_tokens", "lm_head", "up_proj"], "use_dora": True, "std": 0.2},
    "activated": {"target_modules": LINEAR, "alora_invocation_tokens": INVOCATION, "std": 0.2},
    "never activated": {"target_modules": LINEAR, "alora_invocation_tokens": [200, 201], "std": 0.2},
}
TIED = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True, "saves_base": "auto", "std": 0.2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biased": ("qwen2", {}),  # of queries, keys and values
    "scaled": ("gemma3_text", {"tie_word_embeddings": True}),  # the embedding, by itself
}
Answer = tuple[list[int], list[float]]


def by_peft(model: Any, folder: Path, prompt: list[int]) -> Answer:
    """PEFT's greedy tokens and their log-probabilities."""
    from peft import PeftModel

    peft = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    ids = torch.tensor([prompt])
    out = peft.generate(
        input_ids=ids, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    tokens = out.sequences[0, len(prompt) :].tolist()
    return tokens, [float(x[0].log_softmax(-1)[t]) for x, t in zip(out.logits, tokens, strict=True)]


def answer_of(generation: Any) -> Answer:
    """The engine's."""
    completion = generation.result(300)
    return list(completion.token_ids), [item.logprob for item in completion.logprobs]


def assert_same(got: Answer, expected: Answer, name: str) -> None:
    """Equal tokens, and probabilities equal to float32's rounding."""
    assert got[0] == expected[0], name
    assert got[1] == pytest.approx(expected[1], abs=2e-4), name


def sampling(**settings: Any) -> SamplingParams:
    """A few tokens, whatever they are."""
    return SamplingParams(**{"max_tokens": NUM_TOKENS, "ignore_eos": True, "logprobs": 0, **settings})


def write_all(root: Path, model: Any) -> dict[str, Path]:
    """A checkpoint of each recipe, written by PEFT."""
    recipes = {**RECIPES, "tied": TIED} if model.config.tie_word_embeddings else RECIPES
    return {
        name: make_checkpoint(root / name, seed=i, model=copy.deepcopy(model), **recipe)
        for i, (name, recipe) in enumerate(recipes.items())
    }


@pytest.mark.parametrize("which", MODELS)
def test_each_kind_is_pefts_alone_and_in_company(which: str, tmp_path: Path, byte_tokenizer: Any) -> None:
    """Prompts in chunks, one adapter after the other and then all in the same steps, with the base model among them."""
    architecture, overrides = MODELS[which]
    model = make_tiny_model(architecture, **overrides)
    folders = write_all(tmp_path, model)
    expected = {name: by_peft(model, folder, PROMPT) for name, folder in folders.items()}
    adapters = {name: read_adapter(folder) for name, folder in folders.items()}
    config = EngineConfig(max_num_batched_tokens=12, block_size=4, **SMALL)
    with EngineWorker(BaseModel(model, byte_tokenizer, "tiny"), config, expected=list(adapters.values())) as worker:
        assert [r.error for r in worker.register(list(adapters.values()))] == [None] * len(adapters)
        base = answer_of(worker.submit(PROMPT, sampling()))
        for name, adapter in adapters.items():
            assert_same(answer_of(worker.submit(PROMPT, sampling(), [(adapter, 1.0)])), expected[name], name)
        assert_same(base, expected.pop("never activated"), "never activated")
        for name, (_, logprobs) in expected.items():
            assert logprobs != pytest.approx(base[1], abs=1e-2), name  # it does change answers
        del adapters["never activated"]
        running = {name: worker.submit(PROMPT, sampling(), [(a, 1.0)]) for name, a in adapters.items()}
        beside = worker.submit(PROMPT, sampling())
        for name, generation in running.items():
            assert_same(answer_of(generation), expected[name], name)
        assert_same(answer_of(beside), base, "base")
        worker.check_integrity()


def by_merging(model: Any, adapters: list[tuple[Adapter, float]], prompt: list[int]) -> list[int]:
    """What transformers answers with the weighted sum of what each adapter changes added to its weights."""
    merged = copy.deepcopy(model)
    merge_adapters(merged, adapters)
    ids = torch.tensor([prompt], device=DEVICE)
    out = merged.to(DEVICE).generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    return list(out[0, len(prompt) :].tolist())


def make_mixtures(model: Any) -> list[list[tuple[Adapter, float]]]:
    """Mixtures of one kind and of several."""
    dora = [make_adapter(model, f"dora {i}", r=2 + i, is_dora=True) for i in range(3)]
    both = make_adapter(model, "both", r=3, targets=("embed_tokens", "lm_head", "q_proj"))
    all_of = make_adapter(model, "all", r=4, targets=("embed_tokens", "lm_head", "down_proj"), is_dora=True)
    plain = make_adapter(model, "plain", r=5)
    return [
        [(dora[0], 0.5), (dora[1], 0.3), (dora[2], 0.2)],
        [(dora[0], 1.0)],
        [(all_of, 0.5), (both, 0.25), (plain, 0.25)],
        [(both, 1.0)],
        [],
        [(both, 0.6), (dora[1], 0.4)],
        [(plain, 1.0)],
    ]


@pytest.mark.parametrize("which", MODELS)
def test_a_mixture_adds_what_each_adapter_changes(which: str, byte_tokenizer: Any) -> None:
    """Of any kinds, all mixtures in the same steps, with rows for adapters that some have to be loaded again into."""
    architecture, overrides = MODELS[which]
    model = make_tiny_model(architecture, **overrides)
    mixtures = make_mixtures(model)
    expected = [by_merging(model, mixture, PROMPT) for mixture in mixtures]
    config = EngineConfig(max_num_batched_tokens=20, block_size=4, adapter_kinds=KINDS, **SMALL)
    with EngineWorker(BaseModel(model.to(DEVICE), byte_tokenizer, "tiny"), config) as worker:
        for _ in range(2):
            running = [worker.submit(PROMPT, sampling(), mixture) for mixture in mixtures]
            assert [answer_of(generation)[0] for generation in running] == expected
        worker.check_integrity()


@needs_triton
@pytest.mark.parametrize("which", ["tied", "biased", "scaled"])
@pytest.mark.parametrize("has_graphs", [True, False], ids=["graphs", "no-graphs"])
def test_the_triton_backend_serves_every_kind(
    which: str, has_graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtures and activated adapters in the same steps, through graphs that were captured for their kinds."""
    if DEVICE == "cpu":
        from langchain_lora_retriever.engine.model import paged_step

        monkeypatch.setattr(paged_step, "choose_num_splits", lambda *_: 2)
        if which == "tied" or not has_graphs:
            pytest.skip("the interpreter is slow, and the others have tied layers and graphs too; a GPU runs it")
    num_tokens = NUM_TOKENS if DEVICE == "cuda" else 2
    architecture, overrides = MODELS[which]
    model = make_tiny_model(architecture, **overrides)
    mixtures = make_mixtures(model)[:: 1 if DEVICE == "cuda" else 2]
    expected = [by_merging(model, mixture, PROMPT) for mixture in mixtures]
    folder = make_checkpoint(tmp_path / "activated", seed=3, model=copy.deepcopy(model), **RECIPES["activated"])
    mixtures.append([(read_adapter(folder), 1.0)])
    expected.append(by_peft(model, folder, PROMPT)[0])
    config = EngineConfig(
        attention_backend="triton", enable_cuda_graphs=has_graphs, max_num_batched_tokens=32,
        enable_async_scheduling=True, adapter_kinds=KINDS, **SMALL,
    )  # fmt: skip
    with EngineWorker(BaseModel(model.to(DEVICE), make_tokenizer(), "tiny"), config) as worker:
        executor = worker.core.runner.executor
        assert executor.name == "triton"
        kinds = {key[-1] for key in executor.graphs}
        assert kinds == ({(False, False), (True, True)} if has_graphs else set())
        few = sampling(logprobs=None, max_tokens=num_tokens)
        running = [worker.submit(PROMPT, few, mixture) for mixture in mixtures]
        assert [list(g.result(600).token_ids) for g in running] == [tokens[:num_tokens] for tokens in expected]
        worker.check_integrity()


@pytest.fixture
def worker(byte_tokenizer: Any) -> Iterator[EngineWorker]:
    """An engine over a small Llama, ready for every kind."""
    config = EngineConfig(max_num_batched_tokens=128, block_size=8, adapter_kinds=KINDS, **SMALL)
    with EngineWorker(BaseModel(make_tiny_model(), byte_tokenizer, "tiny"), config) as worker:
        yield worker
        worker.check_integrity()


def activated(name: str, first: int, *, r: int = 3) -> Adapter:
    """An activated LoRA of two invocation tokens."""
    return make_adapter(make_tiny_model(), name, r=r, invocation_tokens=(first, first + 1))


def test_a_document_before_activated_adapters_is_computed_once(worker: EngineWorker) -> None:
    """Ten of them over one document find its pages, as the base's; so does the base find what they computed."""
    document = torch.randint(3, 200, (160,), generator=torch.Generator().manual_seed(0)).tolist()
    adapters = [activated(f"activated {i}", 210 + 2 * i) for i in range(10)]
    prompts = [[*document, *adapter.invocation_tokens, 7, 8] for adapter in adapters]
    first = worker.submit(prompts[0], sampling(), [(adapters[0], 1.0)]).result(60)
    assert first.usage.num_cached_tokens == 0
    others = [worker.submit(p, sampling(), [(a, 1.0)]) for p, a in zip(prompts[1:], adapters[1:], strict=True)]
    assert [generation.result(60).usage.num_cached_tokens for generation in others] == [160] * 9
    assert worker.submit([*document, 9], sampling()).result(60).usage.num_cached_tokens == 160
    again = worker.submit([*prompts[0], 4, 4, 4, 4, 4], sampling(), [(adapters[0], 1.0)]).result(60)
    assert again.usage.num_cached_tokens == 160  # its own page behind the invocation was not full
    plain = make_adapter(make_tiny_model(), "plain")
    assert worker.submit(prompts[0], sampling(), [(plain, 1.0)]).result(60).usage.num_cached_tokens == 0


def test_a_document_is_computed_once_also_for_those_who_come_together(byte_tokenizer: Any) -> None:
    """Ten activated adapters in one step: the pages that the first is about to fill are everybody's, and right."""
    document = torch.randint(3, 200, (160,), generator=torch.Generator().manual_seed(0)).tolist()
    adapters = [activated(f"activated {i}", 210 + 2 * i) for i in range(10)]
    prompts = [[*document, *adapter.invocation_tokens, 7, 8] for adapter in adapters]
    config = EngineConfig(max_num_batched_tokens=96, block_size=8, **{**SMALL, "max_num_seqs": 10})
    engine = Engine(BaseModel(make_tiny_model(), byte_tokenizer, "tiny"), config)
    try:
        requests = [engine.make_request(p, sampling(), [(a, 1.0)]) for p, a in zip(prompts, adapters, strict=True)]
        for request in requests:
            engine.add(request)
        while engine.has_unfinished_requests:
            assert [output.error for output in engine.step() if output.error is not None] == []
        engine.check_integrity()
        num_computed = sum(len(r.prompt_token_ids) - (r.num_cached_tokens or 0) for r in requests)
        assert num_computed == len(document) + 10 * 4
        for request, adapter in zip(requests, adapters, strict=True):
            alone = engine.make_request(request.prompt_token_ids, sampling(), [(adapter, 1.0)])
            alone.salts = {first: salt + adapter.name.encode() for first, salt in alone.salts.items()}
            engine.add(alone)
            while engine.has_unfinished_requests:
                engine.step()
            assert alone.num_cached_tokens == 0
            assert alone.output_token_ids == request.output_token_ids
    finally:
        engine.close()


def test_pages_with_an_invocation_are_their_adapter_s(worker: EngineWorker) -> None:
    """The page in which an adapter becomes active, and those behind it, serve that adapter alone, at that place."""
    prompt = [*range(3, 20), 210, 211, *range(30, 60)]
    adapter, other = activated("one", 210), activated("other", 210, r=2)
    expected = answer_of(worker.submit(prompt, sampling(), [(adapter, 1.0)]))
    before = worker.submit(prompt, sampling(), [(other, 1.0)])
    assert before.result(60).usage.num_cached_tokens == 16
    assert worker.submit(prompt, sampling()).result(60).usage.num_cached_tokens == 16
    again = worker.submit(prompt, sampling(), [(adapter, 1.0)])
    assert_same(answer_of(again), expected, "again")
    assert again.result(60).usage.num_cached_tokens == 48
    twice = [*prompt[:40], 210, 211, *prompt[40:]]  # now invoked later: what came before is the base's
    fresh = worker.submit(twice, sampling(), [(adapter, 1.0)])
    assert fresh.result(60).usage.num_cached_tokens == 40


def test_an_invocation_that_does_not_occur_is_told(worker: EngineWorker, caplog: pytest.LogCaptureFixture) -> None:
    """The base model answers, as with PEFT, and the log says so once."""
    adapter = activated("asleep", 210)
    base = answer_of(worker.submit([5, 6, 7], sampling()))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert answer_of(worker.submit([5, 6, 7], sampling(), [(adapter, 1.0)])) == base
    told = [record.getMessage() for record in caplog.records if "'asleep'" in record.getMessage()]
    assert len(told) == 1
    assert "[210, 211] do not occur" in told[0]


def test_what_is_generated_invokes_nothing(worker: EngineWorker) -> None:
    """Only the prompt is looked at, as with PEFT: a chain is no invocation."""
    base = worker.submit([5, 6, 7], sampling()).result(60).token_ids
    adapter = make_adapter(make_tiny_model(), "late", invocation_tokens=tuple(base[1:3]))
    assert worker.submit([5, 6, 7], sampling(), [(adapter, 1.0)]).result(60).token_ids == base


def test_kinds_that_have_no_average_are_refused_by_name(worker: EngineWorker) -> None:
    """DoRA, and activated adapters of different invocations; those of one invocation are averaged."""
    model = make_tiny_model()
    dora, plain = make_adapter(model, "dora", is_dora=True), make_adapter(model, "plain")
    with pytest.raises(InvalidRequestError, match=r"'dora' is DoRA.*mixture"):
        fuse([(dora, 0.5), (plain, 0.5)])
    assert fuse([(dora, 1.0)]) is dora
    one, same, other = activated("one", 210), activated("same", 210), activated("other", 220)
    with pytest.raises(InvalidRequestError, match=r"'one', 'other'.*\[210, 211\], \[220, 221\]"):
        fuse([(one, 0.5), (other, 0.5)])
    with pytest.raises(InvalidRequestError, match="active from the beginning"):
        fuse([(one, 0.5), (plain, 0.5)])
    average = fuse([(one, 0.5), (same, 0.5)])
    assert average.invocation_tokens == (210, 211)
    prompt = [*range(3, 20), 210, 211, 5]
    assert (
        answer_of(worker.submit(prompt, sampling(), [(average, 1.0)]))[0]
        != answer_of(worker.submit(prompt, sampling()))[0]
    )


def test_an_average_of_embeddings_is_one(worker: EngineWorker) -> None:
    """Fused adapters of the vocabulary's layers are an adapter of them."""
    model = make_tiny_model()
    members = [(make_adapter(model, f"v{i}", r=2 + i, targets=("embed_tokens", "lm_head")), 0.5) for i in range(2)]
    average = fuse(members)
    expected = by_merging(model, [(average, 1.0)], PROMPT)
    assert answer_of(worker.submit(PROMPT, sampling(), [(average, 1.0)]))[0] == expected


def test_a_vocabulary_of_another_size_is_named(worker: EngineWorker) -> None:
    """Of the embedding and of the output layer; and a model of another width is told apart from it."""
    for name in ("embed_tokens", "lm_head"):
        larger = make_adapter(make_tiny_model(vocab_size=VOCAB_SIZE + 8), "larger", targets=(name,))
        (error,) = (r.error for r in worker.register([larger]))
        assert isinstance(error, InvalidAdapterError)
        assert f"vocabulary of {VOCAB_SIZE + 8} tokens, the base model has {VOCAB_SIZE}" in str(error)
        wider = make_adapter(make_tiny_model(hidden_size=128), "wider", targets=(name,))
        (error,) = (r.error for r in worker.register([wider]))
        assert "it is 128 wide, the base model 64" in str(error)


def test_a_base_weight_that_is_not_the_base_s_is_refused(worker: EngineWorker, tmp_path: Path) -> None:
    """PEFT saves a targeted embedding's own weight along with the adapter; one of another base would be lost here."""
    folder = make_checkpoint(tmp_path / "own", model=make_tiny_model(), **RECIPES["embedding"])
    tensors = load_file(folder / WEIGHTS_FILE)
    (key,) = (key for key in tensors if "base_layer" in key)
    assert [r.error for r in worker.register([read_adapter(folder)])] == [None]
    save_file(tensors | {key: tensors[key].to(torch.bfloat16)}, folder / WEIGHTS_FILE)
    assert [r.error for r in worker.register([read_adapter(folder)])] == [None]  # rounded, and the same
    save_file(tensors | {key: tensors[key] + 0.1}, folder / WEIGHTS_FILE)
    (error,) = (r.error for r in worker.register([read_adapter(folder)]))
    assert isinstance(error, UnsupportedAdapterError)
    assert "not the base model's" in str(error)


def test_every_kind_over_an_offloaded_base(byte_tokenizer: Any) -> None:
    """Weights that accelerate keeps elsewhere are read where they lie, the embedding's and biases among them."""
    from accelerate import cpu_offload

    model = make_tiny_model("qwen2")
    mixtures = make_mixtures(model)
    expected = [by_merging(model, mixture, PROMPT) for mixture in mixtures]
    config = EngineConfig(adapter_kinds=KINDS, **SMALL)
    offloaded = cpu_offload(model.cpu(), execution_device=torch.device(DEVICE))
    with EngineWorker(BaseModel(offloaded, byte_tokenizer, "tiny"), config) as worker:
        running = [worker.submit(PROMPT, sampling(), mixture) for mixture in mixtures]
        assert [answer_of(generation)[0] for generation in running] == expected
        worker.check_integrity()
    assert torch.is_tensor(offloaded(torch.tensor([PROMPT])).logits)  # the model was given back as it was


def test_the_output_layer_is_adapted_where_a_prompt_is_scored_too(worker: EngineWorker) -> None:
    """The logits of a prompt's places are those of the adapted layer, beside requests whose prompts are not scored."""
    model = make_tiny_model()
    both = make_adapter(model, "both", r=3, targets=("embed_tokens", "lm_head"))
    merged = copy.deepcopy(model)
    merge_adapters(merged, [(both, 1.0)])
    logprobs = merged(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    expected = [float(logprobs[i, token]) for i, token in enumerate(PROMPT[1:])]
    running = [
        worker.submit(PROMPT, sampling(prompt_logprobs_from=start), [(both, 1.0)] if start != 3 else [])
        for start in (1, None, 3, 7)
    ]
    scores = [generation.result(60).prompt_logprobs for generation in running]
    assert scores[0] == pytest.approx(expected, abs=1e-4)
    assert scores[1] is None
    assert scores[2] != pytest.approx(expected[2:], abs=1e-2)
    assert scores[3] == pytest.approx(expected[6:], abs=1e-4)


def test_an_engine_is_started_for_the_kinds_of_its_pool(byte_tokenizer: Any, tmp_path: Path) -> None:
    """Unless its settings say for which: a pool of plain adapters takes no memory for others."""
    model = make_tiny_model()
    pool = AdapterPool()
    for name in ("plain", "both"):
        folder = make_checkpoint(tmp_path / name, model=copy.deepcopy(model), **RECIPES[name])
        pool.add(name, folder, samples=["any"])
    both, source = pool["both"], (model, byte_tokenizer)
    for settings, is_ready in (({}, True), ({"adapter_kinds": ("dora",)}, False)):
        shared = SharedEngine(source, {}, EngineConfig(**SMALL, **settings), pool)
        assert (shared.get().register([both])[0].error is None) == is_ready
        shared.close()
    pool.remove("both")
    shared = SharedEngine(source, {}, EngineConfig(**SMALL), pool)
    assert isinstance(shared.get().register([both])[0].error, UnsupportedAdapterError)
    shared.close()


def test_an_engine_elsewhere_is_made_for_the_kinds_of_its_pool(
    byte_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its process looks at the pool's folder; where that is not to be seen it says so, and serves plain adapters."""
    model = make_tiny_model()
    for part in (model, byte_tokenizer):
        part.save_pretrained(tmp_path / "model")
    make_checkpoint(tmp_path / "pool" / "both", model=copy.deepcopy(model), **RECIPES["both"])
    both = read_adapter(tmp_path / "pool" / "both")
    for pool, is_ready in ((tmp_path / "pool", True), (tmp_path / "nowhere", False), (None, False)):
        recipe = EngineRecipe(
            base_model=str(tmp_path / "model"), config=EngineConfig(**SMALL), pool=None if pool is None else str(pool)
        )
        with recipe() as worker:
            assert (worker.register([both])[0].error is None) == is_ready
    assert caplog.text.count("the pool cannot be read here") == 1


def test_dora_over_rows_of_zeros_is_refused_by_name(byte_tokenizer: Any) -> None:
    """A padded vocabulary has them: there is no direction, and PEFT would answer NaN. Others go on."""
    model = make_tiny_model()
    model.lm_head.weight.data[-3:] = 0
    good = make_adapter(model, "good", targets=("q_proj", "lm_head"), is_dora=True)
    weights = dict(good.weights)
    head = weights["lm_head"]
    lora_b = head.lora_B.clone()
    lora_b[-3:] = 0
    weights["lm_head"] = LoraWeights(head.lora_A, lora_b, head.scaling, head.magnitude)
    padded = Adapter("padded", "padded", weights)
    expected = by_merging(model, [(good, 1.0)], PROMPT)
    config = EngineConfig(adapter_kinds=KINDS, **SMALL)
    with EngineWorker(BaseModel(model.to(DEVICE), byte_tokenizer, "tiny"), config) as worker:
        beside = worker.submit(PROMPT, sampling(), [(good, 1.0)])
        with pytest.raises(InvalidAdapterError, match=r"'padded'.*output 317 of 'lm_head' they are 0 and 0.*Train it"):
            worker.submit(PROMPT, sampling(), [(padded, 1.0)]).result(60)
        assert answer_of(beside)[0] == expected
        worker.check_integrity()


def test_an_engine_without_room_for_the_vocabulary_says_how_to_have_it(byte_tokenizer: Any) -> None:
    """It is refused by name; DoRA is served in any case."""
    model = make_tiny_model()
    both = make_adapter(model, "both", targets=("embed_tokens", "lm_head"))
    dora = make_adapter(model, "dora", is_dora=True)
    expected = by_merging(model, [(dora, 1.0)], PROMPT)
    with EngineWorker(BaseModel(model.to(DEVICE), byte_tokenizer, "tiny"), EngineConfig(**SMALL)) as worker:
        (error,) = (r.error for r in worker.register([both]))
        assert isinstance(error, UnsupportedAdapterError)
        assert 'adapter_kinds=("vocabulary",)' in str(error)
        assert answer_of(worker.submit(PROMPT, sampling(), [(dora, 1.0)]))[0] == expected
