"""Every kind of layer is served as `generate` would answer, or refused in words when the engine starts."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from model_families import FAMILIES

from langchain_lora_retriever.engine import BaseModel, EngineConfig, EngineWorker
from langchain_lora_retriever.engine.model.attention import ATTENTION_IMPLEMENTATION
from langchain_lora_retriever.errors import EngineError, InvalidRequestError
from langchain_lora_retriever.types import Adapter, LoraWeights, SamplingParams
from makers import make_adapter, make_tiny_model, make_tokenizer, merge_adapters

if TYPE_CHECKING:
    from collections.abc import Callable

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4, "moe_intermediate_size": 32}
QWEN2_MOE = {**MOE, "use_sliding_window": True, "max_window_layers": 1, "shared_expert_intermediate_size": 32,
             "layer_types": ["full_attention", "sliding_attention"]}  # fmt: skip
LLAMA4 = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "no_rope_layers": [1, 0],
          "layer_types": ["chunked_attention", "full_attention"], "interleave_moe_layer_step": 2}  # fmt: skip
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "chunks of 8": ("llama4_text", {**LLAMA4, "attention_chunk_size": 8}),
    "chunks of 13": ("llama4_text", {**LLAMA4, "attention_chunk_size": 13}),
    "chunks wider than the prompt": ("llama4_text", {**LLAMA4, "attention_chunk_size": 500}),
    "windows in the mask": ("qwen2_moe", {**QWEN2_MOE, "sliding_window": 8}),
    "windows in the mask of all layers": ("phimoe", {**MOE, "sliding_window": 8}),
    "a window of two": ("mistral", {"sliding_window": 2}),
    "a window of a block": ("mistral", {"sliding_window": 16}),
    "windows and softcaps": ("gemma2", {}),
    "windows and two rotations": ("gemma3_text", {}),
    "windows and no rotation": (
        "cohere2",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "no rotation": ("smollm3", {"no_rope_layers": [1, 0], "use_sliding_window": False}),
    "multipliers": ("granite", {"residual_multiplier": 0.3, "attention_multiplier": 0.1, "logits_scaling": 2.0}),
    "parallel": ("gpt_neox", {"rotary_pct": 0.5}),
    "latent": ("deepseek_v2", {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                               "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
                               "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                               "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}),
}  # fmt: skip
SHARED = {"layer_types": ["full_attention"] * 3, "num_hidden_layers": 3, "num_kv_shared_layers": 1,
          "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 320}  # fmt: skip
SERVED["sinks and windows"] = ("gpt_oss", {**MOE, "sliding_window": 8,
                                           "layer_types": ["sliding_attention", "full_attention"]})  # fmt: skip
SERVED["a state space beside attention"] = (
    "falcon_h1",
    {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
)
SERVED["shared keys"] = ("gemma4_text", SHARED)
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no linear modules": ("gpt2", {"n_layer": 2, "n_embd": 64, "n_head": 4}, "Conv1D"),
    "positions by the cache": ("llama4_text", {**LLAMA4, "attention_chunk_size": 8, "floor_scale": 8}, "floor_scale"),
    "positions by the row": ("bart", {"decoder_layers": 2}, "position_ids"),
    "all tokens see each other": ("bert", {"is_decoder": False}, "neither causal"),
    "a mask of its own": ("doge", {}, "mask that was not made by"),
    "two attentions in a layer": ("diffllama", {}, "attends twice"),
    "no attention": ("mamba", {}, "recurrent"),
    "windows in the cache alone": ("moshi", {"sliding_window": 8}, "cache of the latest 8"),
}


def make_worker(model: Any, **settings: Any) -> EngineWorker:
    """A small engine on PyTorch's attention."""
    config = EngineConfig(**{"max_num_seqs": 4, "kv_cache_bytes": 4 << 20, "lora_cache_bytes": 4 << 20, **settings})
    return EngineWorker(BaseModel(model, make_tokenizer(), "tiny"), config)


def generate(model: Any, prompt: list[int], num_tokens: int = 12) -> list[int]:
    """What transformers answers."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return list(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("name", SERVED)
def test_tokens_are_those_of_generate(name: str) -> None:
    """Prompts shorter and longer than any window or chunk, in pieces and side by side."""
    architecture, extra = SERVED[name]
    model = make_tiny_model(architecture, **extra)
    prompts = [list(range(5, 5 + length)) for length in (40, 3, 25)]
    expected = [generate(model, prompt) for prompt in prompts]
    with make_worker(model, max_num_batched_tokens=24) as worker:
        running = [worker.submit(prompt, SamplingParams(max_tokens=12, ignore_eos=True)) for prompt in prompts]
        assert [list(g.result(60).token_ids) for g in running] == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_in_words(name: str) -> None:
    """The engine does not start, and the model is as it was."""
    architecture, extra, words = REFUSED[name]
    model = make_tiny_model(architecture, **extra)
    before = model.config._attn_implementation
    with pytest.raises(EngineError, match=words):
        make_worker(model)
    assert model.config._attn_implementation == before


def test_parts_that_attend_by_different_ways_get_them_back() -> None:
    """A model of text and images: while the engine serves all parts attend by its cache, afterwards as before."""
    family = next(family for family in FAMILIES if family.model_type == "qwen3_vl")
    model = make_tiny_model(family.model_type, **family.settings)
    model.set_attn_implementation({"vision_config": "eager"})
    configs = (model.config, model.config.text_config, model.config.vision_config)
    with make_worker(model):
        assert {config._attn_implementation for config in configs} == {ATTENTION_IMPLEMENTATION}
    assert [config._attn_implementation for config in configs] == ["sdpa", "sdpa", "eager"]


def test_positions_that_scale_late_are_served_below() -> None:
    """Llama 4 takes positions from its cache's length, which matters from `floor_scale` on."""
    model = make_tiny_model("llama4_text", **LLAMA4, attention_chunk_size=8, floor_scale=64)
    with pytest.raises(EngineError, match="max_model_len"):
        make_worker(model)
    prompt = list(range(5, 45))
    expected = generate(model, prompt)
    with make_worker(model, max_model_len=60) as worker:
        assert (
            list(worker.submit(prompt, SamplingParams(max_tokens=12, ignore_eos=True)).result(60).token_ids) == expected
        )


def test_no_request_rescales_the_positions_of_another(caplog: pytest.LogCaptureFixture) -> None:
    """LongRoPE takes other factors for a whole step that has a long sequence in it: it is served below that length."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}  # fmt: skip
    model = make_tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    prompt = list(range(5, 45))
    expected = generate(model, prompt)
    with make_worker(model) as worker:
        assert worker.info.max_model_len == 64
        assert (
            list(worker.submit(prompt, SamplingParams(max_tokens=12, ignore_eos=True)).result(60).token_ids) == expected
        )
    assert "LongRoPE" in caplog.text


def test_a_module_that_is_called_twice_runs_its_adapter_twice() -> None:
    """And once for each call, as when it is merged."""
    model = make_tiny_model("gemma3n_text", **SHARED)
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    adapter = make_adapter(model, "a", targets=tuple({name.rsplit(".", 1)[-1] for name in names}), scaling=1.0)
    assert set(adapter.weights) == names
    merged = copy.deepcopy(model)
    merge_adapters(merged, [(adapter, 1.0)])
    prompt = list(range(5, 45))
    expected = generate(merged, prompt)
    assert expected != generate(model, prompt)
    with make_worker(model, lora_cache_bytes=16 << 20) as worker:
        assert set(worker.module_shapes) == names
        running = worker.submit(prompt, SamplingParams(max_tokens=12, ignore_eos=True), [(adapter, 1.0)])
        assert list(running.result(60).token_ids) == expected
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("max_model_len", [1, 2, 3, 17])
def test_short_contexts_are_probed_within(max_model_len: int) -> None:
    """Also where there is no room for the probe's sequences side by side."""
    model = make_tiny_model("gemma3_text")
    with make_worker(model, max_model_len=max_model_len) as worker:
        assert worker.info.max_model_len == max_model_len


def _eager(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
    """Eager attention that looks at keys in a way of its own: scores are doubled."""
    groups = query.shape[1] // key.shape[1]
    scores = 2 * scaling * query @ key.repeat_interleave(groups, 1).transpose(2, 3) + mask
    return (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


def _only_by_eager(module: Any, is_own: Callable[[], bool]) -> None:
    """Let a layer's attention do something only where it attends by an implementation of transformers."""
    forward = module.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out, weights = forward(*args, **kwargs)
        return (2 * out if is_own() else out), weights

    module.forward = wrapped


def test_an_attention_function_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer's own eager attention is the reference, and the error names the layer and its kind."""
    model = make_tiny_model("gemma3_text")
    model.set_attn_implementation("eager")
    monkeypatch.setattr(sys.modules[type(model).__module__], "eager_attention_forward", _eager)
    with pytest.raises(EngineError, match=r"Layer 0 of Gemma3ForCausalLM \(Gemma3Attention, sliding_attention\)"):
        make_worker(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_code_that_asks_for_the_implementation_by_name_is_found(dtype: torch.dtype) -> None:
    """A layer that does something else where the attention is not one of transformers' own."""
    model = make_tiny_model("llama").to(dtype)
    module = model.model.layers[1].self_attn
    _only_by_eager(module, lambda: model.config._attn_implementation == "sdpa")
    with pytest.raises(EngineError, match="answers otherwise over a paged cache"):
        make_worker(model)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_routers_take_adapters_and_experts_do_not(architecture: str) -> None:
    """A router's product is computed by a function; an adapter changes which experts a token goes to."""
    settings = next(family.settings for family in FAMILIES if family.model_type == architecture)
    model = make_tiny_model(architecture, **settings)
    router = "router" if architecture == "gpt_oss" else "gate"
    layers = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
    weights = dict(make_adapter(model, "a", targets=("q_proj", "o_proj"), scaling=1.0).weights)
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        name = f"model.layers.{layer}.mlp.{router}"
        num_experts, width = model.get_submodule(name).weight.shape
        weights[name] = LoraWeights(
            torch.randn(4, width, generator=generator), torch.randn(num_experts, 4, generator=generator), 1.0
        )
    adapter = Adapter(name="a", fingerprint=architecture, weights=weights)
    prompts = [list(range(5, 45)), [7, 8, 9]]
    merged = copy.deepcopy(model)
    merge_adapters(merged, [(adapter, 1.0)])
    expected = [generate(merged, prompts[0]), generate(model, prompts[1])]
    merge_adapters(merged, [(Adapter("b", "b", {n: w for n, w in weights.items() if router in n}), -1.0)])
    assert generate(merged, prompts[0]) != expected[0], "without the routers' part it would answer the same"
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    with make_worker(model, max_num_batched_tokens=24) as worker:
        running = [worker.submit(prompts[0], sampling, [(adapter, 1.0)]), worker.submit(prompts[1], sampling)]
        assert [list(g.result(60).token_ids) for g in running] == expected
        experts = f"model.layers.{layers[0]}.mlp.experts.gate_up_proj"
        wrong = Adapter(name="wrong", fingerprint="c", weights={experts: weights[name]})
        with pytest.raises(InvalidRequestError, match=r"experts\.gate_up_proj"):
            worker.submit(prompts[0], sampling, [(wrong, 1.0)])
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("seed", range(4))
def test_experts_do_not_pass_for_modules_that_see_every_token(seed: int) -> None:
    """Experts that are linear modules get some of the tokens: no adapter can target them, those beside them it can."""
    torch.manual_seed(seed)
    model = make_tiny_model("llama")
    experts = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(2))
    mlp = model.model.layers[0].mlp
    mlp.experts = experts
    mlp.router = torch.nn.Linear(64, 2, bias=False)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        chosen = mlp.router(hidden[0]).argmax(-1)
        out = hidden[0].clone()
        for index, expert in enumerate(experts):
            out[chosen == index] = expert(hidden[0][chosen == index])
        return out[None]

    mlp.forward = forward
    with make_worker(model.requires_grad_(requires_grad=False)) as worker:
        assert "model.layers.0.mlp.router" in worker.module_shapes
        assert not [name for name in worker.module_shapes if "experts" in name]
