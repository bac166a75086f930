"""Any configuration that PEFT takes, alone and beside any others: its own probabilities at every token, in float32."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora.variants import calculate_alora_offsets

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker
from langchain_lora_retriever.engine.request import first_active
from langchain_lora_retriever.pool.checkpoint import read_adapter
from langchain_lora_retriever.types import Adapter, SamplingParams
from makers import make_checkpoint, make_tiny_model, make_tokenizer, mixture_logits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVOCATIONS = [[17], [17, 99], [5, 5], [200, 8, 17]]
VOCABULARY = [(), (), ("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")]
MODELS: dict[str, dict[str, Any]] = {"untied": {}, "tied": {"tie_word_embeddings": True}}
TOLERANCE = 1e-3

# Few tokens, so that prompts have invocations at their start and their end, twice, within each other, and not at all.
prompts = st.lists(st.sampled_from([5, 8, 17, 99, 120, 200]), min_size=2, max_size=22)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a `LoraConfig`."""
    kind = draw(st.sampled_from(["plain", "dora", "activated"]))
    names = draw(st.lists(st.sampled_from(LINEAR), min_size=1, max_size=4, unique=True))
    vocabulary = [n for n in draw(st.sampled_from(VOCABULARY)) if kind != "activated" or n == "lm_head"]
    recipe: dict[str, Any] = {
        "r": draw(st.integers(1, 9)), "lora_alpha": draw(st.integers(1, 16)), "use_rslora": draw(st.booleans()),
        "use_dora": kind == "dora", "alora_invocation_tokens": None,
    }  # fmt: skip
    if kind == "activated":
        recipe["alora_invocation_tokens"] = draw(st.sampled_from(INVOCATIONS))
    style = draw(st.sampled_from(["names", "expression", "all-linear"]))
    if style == "names":
        recipe["target_modules"] = [*names, *vocabulary]
        if not vocabulary:
            recipe["layers_to_transform"] = draw(st.sampled_from([None, 0, [1], [0, 1]]))
            recipe["layers_pattern"] = (
                draw(st.sampled_from([None, "layers"])) if recipe["layers_to_transform"] else None
            )
        if recipe.get("layers_to_transform") is None and len(names) > 1:
            recipe["exclude_modules"] = draw(st.sampled_from([None, [names[0]], rf".*layers\.1\..*{names[0]}"]))
    elif style == "expression":
        layers = draw(st.sampled_from([r"\d+", "0", "[01]"]))
        inner = rf"layers\.{layers}\.(self_attn|mlp)\.({'|'.join(names)})"
        outer = [r"model\.embed_tokens"] * ("embed_tokens" in vocabulary) + ["lm_head"] * ("lm_head" in vocabulary)
        recipe["target_modules"] = "|".join([rf"model\.{inner}", *outer])
    else:
        recipe["target_modules"] = "all-linear"
    keys = st.sampled_from([names[0], r"layers\.1\..*", f"layers.0.self_attn.{names[0]}", "lm_head", "embed_tokens"])
    # PEFT sorts the keys as it saves: of two that match a module another counts when it reads, and it cannot read that.
    recipe["rank_pattern"] = draw(st.dictionaries(keys, st.integers(1, 11), max_size=1))
    recipe["alpha_pattern"] = draw(st.dictionaries(keys, st.integers(1, 16), max_size=2))
    return recipe


def by_peft(model: Any, folder: Path, prompt: list[int]) -> torch.Tensor:
    """PEFT's log-probabilities `[num_tokens, vocab_size]`."""
    peft = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    with torch.no_grad():
        return peft(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)


@pytest.fixture(scope="module", params=MODELS)
def home(request: pytest.FixtureRequest) -> Iterator[tuple[Any, EngineWorker]]:
    """A model, and an engine over it: prompts come in chunks, and there is not room for all that run."""
    model = make_tiny_model(**MODELS[request.param])
    config = EngineConfig(
        max_num_seqs=8, max_num_batched_tokens=12, block_size=4, kv_cache_bytes=24 * 4 * 512, lora_cache_bytes=16 << 20,
        max_model_len=40, adapter_kinds=("vocabulary", "dora"),
    )  # fmt: skip
    with EngineWorker(BaseModel(copy.deepcopy(model), make_tokenizer(), "tiny"), config) as worker:
        yield model, worker


def assert_scored(worker: EngineWorker, prompt: list[int], runs: list[tuple[list[Any], torch.Tensor]]) -> None:
    """All of these run at once, and each prompt's tokens are as likely as they should be, and so is the next one."""
    sampling = SamplingParams(max_tokens=1, ignore_eos=True, logprobs=0, prompt_logprobs_from=1)
    running = [worker.submit(prompt, sampling, pairs) for pairs, _ in runs]
    for generation, (pairs, expected) in zip(running, runs, strict=True):
        done = generation.result(120)
        got = [*(done.prompt_logprobs or ()), done.logprobs[0].logprob]
        tokens = [*prompt[1:], done.token_ids[0]]
        assert got == pytest.approx([float(row[t]) for row, t in zip(expected, tokens, strict=True)], abs=TOLERANCE), (
            pairs
        )
        assert got[-1] == pytest.approx(float(expected[-1].max()), abs=TOLERANCE)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(chosen=st.lists(recipes(), min_size=3, max_size=3), prompt=prompts, seed=st.integers(0, 99))
def test_any_configurations_are_pefts_alone_and_together(
    home: tuple[Any, EngineWorker],
    tmp_path_factory: pytest.TempPathFactory,
    chosen: list[dict[str, Any]],
    prompt: list[int],
    seed: int,
) -> None:
    """One after the other, then all of them in the same steps with the base model and a mixture of all three.

    Then again with what the prefix cache has by now.
    """
    model, worker = home
    root = tmp_path_factory.mktemp("kinds")
    folders = [
        make_checkpoint(root / str(i), seed=seed + i, model=copy.deepcopy(model), **r) for i, r in enumerate(chosen)
    ]
    adapters = [read_adapter(folder) for folder in folders]
    assert [r.error for r in worker.register(adapters)] == [None] * len(adapters)
    runs: list[tuple[list[tuple[Adapter, float]], torch.Tensor]] = [
        ([(adapter, 1.0)], by_peft(model, folder, prompt)) for adapter, folder in zip(adapters, folders, strict=True)
    ]
    for run in runs:
        assert_scored(worker, prompt, [run])
    mixture = list(zip(adapters, (0.5, 0.3125, 0.1875), strict=True))
    runs += [(pairs, mixture_logits(model, pairs, prompt).log_softmax(-1)) for pairs in ([], mixture)]
    assert_scored(worker, prompt, runs)
    sampling = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=0)
    running = [worker.submit(prompt, sampling, pairs) for pairs, _ in runs]
    for generation, (pairs, _) in zip(running, runs, strict=True):
        done = generation.result(120)
        logprobs = mixture_logits(model, pairs, prompt, list(done.token_ids)).log_softmax(-1)[len(prompt) - 1 :]
        expected = [float(row[token]) for row, token in zip(logprobs, done.token_ids, strict=False)]
        assert [item.logprob for item in done.logprobs] == pytest.approx(expected, abs=TOLERANCE)
        assert expected == pytest.approx(logprobs[:-1].amax(-1).tolist(), abs=TOLERANCE)
    worker.check_integrity()


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=14),
    invocation=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    factor=st.sampled_from([1, 256, 1 << 24]),
)
def test_an_invocation_is_found_where_peft_finds_it(tokens: list[int], invocation: list[int], factor: int) -> None:
    """The last one, also where two overlap; whatever bytes the tokens are made of."""
    tokens, invocation = ([factor * token for token in ids] for ids in (tokens, invocation))
    config: Any = {"a": SimpleNamespace(alora_invocation_tokens=invocation)}
    (offset,) = calculate_alora_offsets(config, "a", torch.tensor([tokens]))
    assert first_active(invocation, tokens) == (None if offset is None else len(tokens) - offset)
