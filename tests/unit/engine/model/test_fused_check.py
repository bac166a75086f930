"""Weights as the float32 reference of a layer sees them."""

from __future__ import annotations

from typing import Any, Self

import pytest
import torch

from langchain_lora_retriever.engine.model.fused_check import _to_float32


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
