"""A layer in another order of operations is as exact as its own forward; one that computes something else is not."""

from __future__ import annotations

from typing import Any, Self

import pytest
import torch

from makers import make_tiny_model

pytest.importorskip("triton")

ROUNDINGS = [torch.bfloat16, torch.float16]
NUM_TOKENS = 24


def run(layer: Any, model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """A decoder layer by itself."""
    positions = torch.arange(NUM_TOKENS)[None]
    mask = torch.full((NUM_TOKENS, NUM_TOKENS), float("-inf"), dtype=hidden.dtype).triu(1)[None, None]
    rotary = model.model.rotary_emb(hidden, positions)
    out: torch.Tensor = layer(hidden, attention_mask=mask, position_embeddings=rotary)
    return out[0]


@pytest.mark.parametrize("scale", [1.0, 30.0, 200.0], ids=lambda scale: f"{scale:g}")
@pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
@pytest.mark.parametrize("fault", ["none", "no rotation", "multiplier", "norm", "activation", "nan"])
def test_rounding_is_told_from_another_computation(fault: str, dtype: torch.dtype, scale: float) -> None:
    """Also where the residual stream is much larger than what the layer adds."""
    from langchain_lora_retriever.engine.model.fused_check import is_as_exact

    model = make_tiny_model("smollm3", no_rope_layers=[1, 1], hidden_size=256, use_sliding_window=False)
    model = model.to(dtype)
    layer = model.model.layers[0]
    layer.self_attn.v_proj.weight.mul_(scale**0.25)
    hidden = (torch.randn(1, NUM_TOKENS, 256, generator=torch.Generator().manual_seed(0)) * scale**0.5).to(dtype)
    own = run(layer, model, hidden)
    exact = run(layer.float(), model, hidden.float())
    if fault == "no rotation":
        layer.self_attn.use_rope = 0
    elif fault == "multiplier":
        layer.mlp.down_proj.weight.mul_(1.1)
    elif fault == "norm":
        layer.post_attention_layernorm.weight.add_(0.3)
    elif fault == "activation":
        layer.mlp.act_fn = torch.nn.GELU()
    got = run(layer, model, hidden.float()).to(dtype)
    if fault == "nan":
        got[::4] = torch.nan
    assert is_as_exact(got, own, exact, hidden[0]) == (fault == "none")


class Quantised(torch.Tensor):
    """A weight as torchao keeps it: it gives its numbers by `dequantize`, and knows no conversion in inference mode."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> Self:
        """As wide as the numbers."""
        made = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype)
        made.numbers = numbers
        return made

    def dequantize(self) -> torch.Tensor:
        """The numbers."""
        return self.numbers

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Nothing."""
        raise NotImplementedError(f"{func} of quantised weights")


def test_quantised_weights_are_read_by_their_own_way() -> None:
    """In inference mode, in which layers are judged."""
    from langchain_lora_retriever.engine.model.fused_check import _to_float32

    numbers = torch.tensor([[0.5, -2.0]], dtype=torch.bfloat16)
    weight = Quantised(numbers)
    with torch.inference_mode():
        with pytest.raises(NotImplementedError):
            weight.float()
        got = _to_float32((weight, [numbers, torch.tensor([3])]))
    assert type(got[0]) is torch.Tensor
    assert got[0].dtype == got[1][0].dtype == torch.float32
    assert torch.equal(got[0], numbers.float())
    assert got[1][1].dtype == torch.int64
