"""Compositions against PEFT on a random Llama: the same logits within 1e-4 in float32."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import PeftModel

from langchain_lora_retriever.pool.pool import AdapterPool
from langchain_lora_retriever.retrieval.composer import compose, materialize, pin
from langchain_lora_retriever.types import RetrievedAdapter

PROMPTS = torch.tensor([[5, 17, 99, 4, 250, 31, 8, 77], [9, 9, 200, 13, 42, 6, 111, 3]])
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# PEFT combines only adapters whose target_modules are all lists. Ranks, scalings and target modules all differ.
RECIPES = {
    "narrow": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "wide": {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": LINEAR},
    "mixed": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 6},
        "alpha_pattern": {r"layers\.1\..*q_proj": 12},
    },
}


@pytest.fixture(scope="module")
def make_base():
    """The same random Llama, made anew for each use: PEFT changes it in place."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval().requires_grad_(requires_grad=False)

    return make


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, make_checkpoint, make_base):
    """One checkpoint per recipe, written by PEFT."""
    root = tmp_path_factory.mktemp("peft")
    return {
        name: make_checkpoint(root / name, seed=seed, model=make_base(), **recipe)
        for seed, (name, recipe) in enumerate(RECIPES.items())
    }


@pytest.fixture(scope="module")
def pool(checkpoints):
    """The same checkpoints as a pool."""
    pool = AdapterPool()
    for name, path in checkpoints.items():
        pool.add(name, path, samples=["any"])
    return pool


@pytest.fixture(scope="module")
def peft_model(checkpoints, make_base):
    """The same checkpoints loaded by PEFT."""
    names = list(RECIPES)
    model = PeftModel.from_pretrained(make_base(), checkpoints[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(checkpoints[name], adapter_name=name)
    return model.eval()


@contextlib.contextmanager
def applied(model, members):
    """Add `sum_j w_j s_j B_j A_j x` to every adapted module's output while the block runs."""

    def hook_for(module):
        def hook(_, inputs, output):
            for adapter, weight in members:
                if module in adapter.weights:
                    lora = adapter.weights[module]
                    output = output + weight * lora.scaling * (inputs[0] @ lora.lora_A.T) @ lora.lora_B.T
            return output

        return hook

    modules = {module for adapter, _ in members for module in adapter.weights}
    handles = [model.get_submodule(module).register_forward_hook(hook_for(module)) for module in modules]
    yield model
    for handle in handles:
        handle.remove()


def logits_of(make_base, composition, pool):
    """The base model's logits `[2, 8, vocab]` under a composition."""
    with applied(make_base(), materialize(composition, pool)) as model, torch.no_grad():
        return model(PROMPTS).logits


def peft_logits(model):
    """The PEFT model's logits `[2, 8, vocab]` with its active adapter."""
    with torch.no_grad():
        return model(PROMPTS).logits


@pytest.mark.parametrize("name", RECIPES)
def test_selection_is_the_active_adapter(make_base, pool, peft_model, name):
    """Selection equals PEFT with that adapter active, and differs from the base model."""
    peft_model.set_adapter(name)
    ours = logits_of(make_base, compose([RetrievedAdapter(name, 0.9)], mode="selection"), pool)
    assert torch.allclose(ours, peft_logits(peft_model), atol=1e-4, rtol=0)
    with torch.no_grad():
        assert (ours - make_base()(PROMPTS).logits).abs().max() > 1e-2


@pytest.mark.parametrize("weights", [None, [0.6, 0.3, 0.1]], ids=["uniform", "weighted"])
def test_mixture_is_pefts_cat(make_base, pool, peft_model, weights):
    """Mixture equals `add_weighted_adapter(combination_type="cat")`, for mixed ranks and target modules."""
    names = list(RECIPES)
    peft_model.add_weighted_adapter(names, weights or [1 / 3] * 3, adapter_name="cat", combination_type="cat")
    peft_model.set_adapter("cat")
    expected = peft_logits(peft_model)
    peft_model.set_adapter(names[0])
    peft_model.delete_adapter("cat")
    ours = logits_of(make_base, pin(names, mode="mixture", weights=weights), pool)
    assert torch.allclose(ours, expected, atol=1e-4, rtol=0)


def test_fusion_is_the_averaged_parameters(make_base, pool, peft_model):
    """Fusion equals the model with `(mean_j s_j B_j)(mean_j A_j)`, from PEFT's own tensors, merged into it."""
    base = make_base()
    for module_name, module in list(peft_model.base_model.model.named_modules()):
        if not hasattr(module, "lora_A"):
            continue
        r = max(module.r[name] for name in RECIPES if name in module.lora_A)
        A, B = torch.zeros(r, module.in_features), torch.zeros(module.out_features, r)
        for name in RECIPES:
            if name in module.lora_A:
                rank = module.r[name]
                A[:rank] += module.lora_A[name].weight.data / 3
                B[:, :rank] += module.scaling[name] * module.lora_B[name].weight.data / 3
        base.get_submodule(module_name).weight.data += B @ A
    with torch.no_grad():
        expected = base(PROMPTS).logits
    ours = logits_of(make_base, pin(list(RECIPES), mode="fusion"), pool)
    assert torch.allclose(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["mixture", "fusion"])
def test_one_member_is_selection(make_base, pool, mode):
    """Mixture and fusion of a single adapter equal its selection."""
    one = logits_of(make_base, pin(["mixed"], mode=mode), pool)
    assert torch.allclose(one, logits_of(make_base, pin(["mixed"], mode="selection"), pool), atol=1e-5, rtol=0)


def test_nothing_is_the_base_model(make_base, pool):
    """An empty composition changes nothing."""
    with torch.no_grad():
        assert torch.equal(logits_of(make_base, pin([], mode="mixture"), pool), make_base()(PROMPTS).logits)
