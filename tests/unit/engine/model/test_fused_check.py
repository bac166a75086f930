"""A layer in another order of operations is as exact as its own forward; one that computes something else is not."""

from __future__ import annotations

from typing import Any, Self

import pytest
import torch
from torch import nn

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


class HalfLinear(nn.Module):
    """A linear module as GPTQ's and AWQ's are: no `weight`, integers and scales, and no kernel for float32."""

    qweight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scales = linear.weight.float().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (linear.weight.float() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales.half())
        self.register_buffer("bias", torch.linspace(-99, 99, self.out_features).half())

    def matrix(self) -> torch.Tensor:
        """What it multiplies by `[out_features, in_features]`."""
        return self.qweight.half() * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scales that became float32 would show here."""
        assert x.dtype == torch.float16
        out = nn.functional.linear(x, self.matrix())
        return out if self.bias is None else out + self.bias


def test_weights_that_only_their_kernel_reads_multiply_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read through the module's own forward, some columns at a time; afterwards it is the module's again."""
    from langchain_lora_retriever.engine.model import fused_check

    monkeypatch.setattr(fused_check, "_MAX_UNITS", 24)
    plain = nn.Linear(64, 48)
    module = HalfLinear(plain)
    layer = nn.Sequential(module, nn.Linear(48, 8))
    x = torch.randn(3, 64)
    with fused_check._exact_products(layer, x.half()):
        got = module(x)
        assert set(vars(layer[1])) == set(vars(plain)), "plain modules are left as they are"
    assert module.bias is not None
    torch.testing.assert_close(got, nn.functional.linear(x, module.matrix().float(), module.bias.float()))
    assert "forward" not in vars(module)
    with torch.inference_mode(), fused_check._exact_products(layer, x.half()):
        assert module(x).dtype == torch.float32


class Opaque(Quantised):
    """A weight as torchao's int4 is: it multiplies, and neither gives its numbers nor turns into another."""

    dequantize = torch.Tensor.dequantize

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Multiply, and nothing else with numbers."""
        if func is nn.functional.linear:
            assert args[0].dtype == torch.bfloat16
            return nn.functional.linear(args[0], args[1].numbers, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Only what makes a parameter of it."""
        if func in {torch.ops.aten.detach.default, torch.ops.aten.alias.default}:
            return args[0]
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_weights_that_give_no_numbers_are_read_through_their_products() -> None:
    """They are not turned into float32, and their modules compute in it all the same."""
    from langchain_lora_retriever.engine.model import fused_check

    module = nn.Linear(64, 48).bfloat16()
    numbers = module.weight.detach().clone()
    module.weight = nn.Parameter(Opaque(numbers), requires_grad=False)
    x = torch.randn(3, 64)
    with torch.inference_mode(), fused_check._exact_products(nn.Sequential(module), x.bfloat16()):
        assert fused_check._to_float32(module.weight) is module.weight
        got = module(x)
    torch.testing.assert_close(got, nn.functional.linear(x, numbers.float(), module.bias.float()))
    assert "forward" not in vars(module)
