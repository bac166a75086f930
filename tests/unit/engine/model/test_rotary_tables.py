"""Looked up cosines and sines are the bits that the model computes, and the model gets its forwards back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from langchain_lora_retriever.engine.model.probe import input_device
from langchain_lora_retriever.engine.model.rotary_tables import RotaryTables
from makers import make_tiny_model

LONG = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 8, "factor": 2.0,
                            "short_factor": [1.0] * 8, "original_max_position_embeddings": 64}}  # fmt: skip
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
LLAMA_3 = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}  # fmt: skip
YARN = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                            "original_max_position_embeddings": 64}}  # fmt: skip
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
NUM_POSITIONS = 5_000


def rotations(model: Any, positions: torch.Tensor, dtype: torch.dtype) -> list[Any]:
    """What each call of a rotary module within a forward pass of the decoder returns."""
    found: list[Any] = []
    decoder = model.to(dtype).get_decoder()
    modules = [module for module in decoder.modules() if hasattr(module, "rope_type")]
    assert modules
    hooks = [module.register_forward_hook(lambda _module, _args, output: found.append(output)) for module in modules]
    token_ids = torch.arange(positions.shape[-1])[None]
    with torch.no_grad():
        decoder(input_ids=token_ids, position_ids=positions[None].to(input_device(model)), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "settings", "num_tables"),
    [
        ("llama", {}, 1),
        ("llama", LLAMA_3, 1),
        ("llama", YARN, 1),
        ("llama", LINEAR, 1),
        ("llama", DYNAMIC, 0),
        ("llama", LONG, 0),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}, 2),
        ("gpt_oss", EXPERTS, 1),
        ("phi", {}, 1),
        ("qwen3", {}, 1),
        ("llama4_text", {**EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 96}, 0),
    ],
)
def test_the_same_bits_are_looked_up(
    architecture: str, settings: dict[str, Any], num_tables: int, dtype: torch.dtype
) -> None:
    """In any order, first and last position; frequencies that change with the length are left to the model."""
    model = make_tiny_model(architecture, **settings)
    places = [torch.tensor([0, 7, NUM_POSITIONS - 1, 4096, 7, 300]), torch.tensor([2])]
    expected = [rotations(model, positions, dtype) for positions in places]
    tables = RotaryTables(model, NUM_POSITIONS)
    for positions, wanted in zip(places, expected, strict=True):
        for one, other in zip(rotations(model, positions, dtype), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert tables.num_tables == num_tables
    tables.detach()
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_what_a_table_does_not_know_is_computed() -> None:
    """Several rows of positions, among them some that the table does not have."""
    model = make_tiny_model()
    rotary = model.model.rotary_emb
    positions = torch.tensor([[0, 3], [5, 6]])
    x = torch.zeros(2, 2, 8)
    expected = rotary(x, positions)
    tables = RotaryTables(model, 4)
    torch.testing.assert_close(rotary(x, positions), expected, rtol=0, atol=0)
    assert tables.num_tables == 0
    tables.detach()


def test_a_module_that_answers_otherwise_elsewhere_is_left_alone() -> None:
    """One whose numbers depend on what else is asked, and a table that would be too large."""
    model = make_tiny_model()
    rotary = model.model.rotary_emb

    class Strange(type(rotary)):  # type: ignore[misc]
        """Rotates by the place in the row."""

        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
            return super().forward(x, position_ids - position_ids.amin())

    x, positions = torch.zeros(1, 2, 8), torch.tensor([[3, 5]])
    large = RotaryTables(model, 1 << 21)
    rotary(x, positions)
    assert large.num_tables == 0
    large.detach()
    rotary.__class__ = Strange
    expected = rotary(x, positions)
    for num_positions in (NUM_POSITIONS, 1000, 1):
        tables = RotaryTables(model, num_positions)
        torch.testing.assert_close(rotary(x, positions), expected, rtol=0, atol=0)
        assert tables.num_tables == 0
        tables.detach()
