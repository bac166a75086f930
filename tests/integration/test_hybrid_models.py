"""Models whose layers keep states beside keys and values: every request's state is its own, whoever runs beside it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from model_families import FAMILIES

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker
from langchain_lora_retriever.engine.model.recurrent import StatePiece, find_recurrent
from langchain_lora_retriever.types import SamplingParams
from makers import make_adapter, make_tiny_model, make_tokenizer, merge_adapters

SETTINGS = {family.model_type: family.settings for family in FAMILIES}
ARCHITECTURES = ["qwen3_next", "granitemoehybrid", "lfm2"]  # a delta rule, a state space, convolutions alone
LINEAR = ("in_proj_qkvz", "in_proj_ba", "in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj")
NUM_TOKENS = 8
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
PROMPTS = [list(range(5, 5 + length)) for length in (40, 3, 25, 1, 17)]


def make_model(architecture: str) -> Any:
    """A tiny one."""
    return make_tiny_model(architecture, **SETTINGS[architecture])


def make_worker(model: Any, **settings: Any) -> EngineWorker:
    """A small engine."""
    defaults = {"max_num_seqs": 4, "kv_cache_bytes": 4 << 20, "lora_cache_bytes": 4 << 20, "max_num_batched_tokens": 24}
    return EngineWorker(BaseModel(model, make_tokenizer(), "tiny"), EngineConfig(**{**defaults, **settings}))


def generate(model: Any, prompt: list[int]) -> list[int]:
    """What transformers answers."""
    out = model.generate(
        input_ids=torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return list(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mixtures_run_beside_the_base_in_chunks_and_streams(architecture: str) -> None:
    """Adapters of the projections within such layers, each token its own, whatever part of a step a layer is given."""
    model = make_model(architecture)
    a, b = (make_adapter(model, name, targets=LINEAR, scaling=1.0) for name in "ab")
    assert any("mamba" in name or "linear_attn" in name or "conv" in name for name in a.weights)
    kinds = [[(a, 1.0)], [], [(a, 0.5), (b, 0.5)], [(b, 1.0)], []]
    expected = []
    for prompt, kind in zip(PROMPTS, kinds, strict=True):
        merged = copy.deepcopy(model)
        merge_adapters(merged, kind)
        expected.append(generate(merged, prompt))
    with make_worker(model) as worker:
        running = [worker.submit(p, GREEDY, kind) for p, kind in zip(PROMPTS, kinds, strict=True)]
        assert [list(g.result(60).token_ids) for g in running] == expected
        worker.check_integrity()
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert generate(model, PROMPTS[0]) == generate(make_model(architecture), PROMPTS[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES[:2])
def test_a_request_that_was_sent_back_is_computed_again(architecture: str) -> None:
    """With too few pages for all, the youngest loses its state with its pages, and answers the same."""
    model = make_model(architecture)
    expected = [generate(model, prompt) for prompt in PROMPTS]
    with make_worker(model, kv_cache_bytes=5 * 16 * 2 * 2 * 16 * 4, max_model_len=64) as worker:
        running = [worker.submit(prompt, GREEDY) for prompt in PROMPTS]
        assert [list(g.result(60).token_ids) for g in running] == expected
        assert worker.stats().num_preemptions > 0


def test_prefixes_are_not_shared_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A page of keys without the state at its end is of no use."""
    caplog.set_level(logging.INFO)
    model = make_model("lfm2")
    with make_worker(model) as worker:
        first, second = (worker.submit(PROMPTS[0], GREEDY).result(60) for _ in range(2))
        assert first.token_ids == second.token_ids
        assert second.usage.num_cached_tokens == 0
    assert "prefixes are not shared" in caplog.text


def test_a_state_that_is_not_finite_harms_nobody_after() -> None:
    """A slot's next owner begins with zeros, not with what it finds."""
    model = make_model("granitemoehybrid")
    expected = generate(model, PROMPTS[2])
    with make_worker(model, max_num_seqs=1) as worker:
        layers = worker.core.runner._recurrent._layers
        worker.submit(PROMPTS[1], GREEDY).result(60)
        for layer in layers:
            for states in (*layer._conv.values(), *layer._recurrent.values()):
                states.fill_(torch.nan)
        assert list(worker.submit(PROMPTS[2], GREEDY).result(60).token_ids) == expected


def test_models_without_such_layers_are_left_alone() -> None:
    """No pass is run for them."""
    model = make_tiny_model("llama")
    assert find_recurrent(model, torch.device("cpu")) == ()


def test_a_step_is_shared_out_in_its_order() -> None:
    """Streams that stand side by side are one piece, each prompt is one, and so is the first token of a sequence."""
    sequences = [(3, 7, 1), (0, 9, 1), (1, 0, 5), (2, 4, 2), (4, 0, 1), (5, 1, 1)]
    pieces = StatePiece.of(sequences, torch.device("cpu"))
    found = [(p.start, p.num_tokens, p.slots.tolist(), p.is_fresh, p.is_decode) for p in pieces]
    assert found == [
        (0, 2, [3, 0], False, True),
        (2, 5, [1], True, False),
        (7, 2, [2], False, False),
        (9, 1, [4], True, False),
        (10, 1, [5], False, True),
    ]
