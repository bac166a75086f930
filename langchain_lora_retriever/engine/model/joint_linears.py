"""Linear modules that share an input, computed as one product: their weights side by side, in the fastest layout.

Both kinds change the modules' parameters in place until `release`.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from langchain_lora_retriever.engine.model.base_module import BaseModule
from langchain_lora_retriever.engine.model.packed_weight import PackedWeight
from lora_retriever_kernels.packed_matrix import can_pack, multiply, pack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel

__all__ = ["JointLinears", "count_uses", "is_plain", "join_linears", "speed_up_output_layer"]


class JointLinears(Protocol):
    """The modules' outputs side by side."""

    bias: torch.Tensor | None
    """`[sum(out_features)]`, if they have one."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., sum(out_features)]`, bias included."""

    def in_parts(self, x: torch.Tensor) -> torch.Tensor:
        """The same of `[num_tokens, in_features]`, or float32 parts of it `[num_parts, num_tokens, sum(out_features)]`.

        Parts come where they come sooner. Their sum is the product.
        """

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor | None:
        """The activation of the first half of the outputs times the second, `[num_tokens, sum(out_features) / 2]`.

        None where that is not sooner there than by another launch.
        """

    def release(self) -> None:
        """Give the modules weights of their own again."""


def is_plain(module: nn.Module) -> bool:
    """Whether its weight is simply there: not quantised, not moved around by accelerate.

    A quantised weight may be a tensor of a class of its own within a plain `nn.Linear` (torchao).
    """
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not hasattr(module, "_hf_hook")


def join_linears(modules: Sequence[nn.Module], uses: Mapping[int, int]) -> JointLinears:
    """Join plain modules, in the layout for where they are.

    Args:
        modules: `nn.Linear` modules of one dtype and device, with a bias or all without.
        uses: In how many places a parameter is used, by identity. One that others use too (tied embeddings) is left to
            them, and the module gets another.
    """
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    return (_Packed if can_pack(linears[0].weight) else _SideBySide)(linears, uses)


def speed_up_output_layer(model: PreTrainedModel) -> Callable[[], None]:
    """Compute a model's output layer faster than by its own forward, where that can be; returns what undoes it.

    On a CPU that is over a packed weight; one that is the embedding's too stays there beside. On a GPU the weight stays
    as it is, and products of few tokens are ours where `multiply_few` has them.
    """
    module: Any = model.get_output_embeddings()
    if module is None or not is_plain(module):
        return lambda: None
    base = BaseModule(module, module.weight.dtype, module.weight.device)
    if module.weight.is_cuda:
        few_tokens = _few_tokens()
        if few_tokens is None:
            return lambda: None
        base.wrap(lambda x: _multiply(few_tokens, x, module.weight, module.bias))
        return base.unwrap
    if not can_pack(module.weight):
        return lambda: None
    product = _Packed([module], count_uses(model))
    base.wrap(product)

    def undo() -> None:
        base.unwrap()
        product.release()

    return undo


def _multiply(
    few_tokens: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, takes_parts: bool = False
) -> torch.Tensor:
    """The product `x @ weight.T + bias` of `[..., in_features]`, by `few_tokens` where that has it sooner."""
    if few_tokens is not None:
        flat = x.reshape(-1, x.shape[-1])
        product: torch.Tensor | None = few_tokens.multiply_few(flat, weight, bias, takes_parts=takes_parts)
        if product is not None:
            return product if x.dim() == 2 else product.view(*x.shape[:-1], -1)
    return nn.functional.linear(x, weight, bias)


def count_uses(model: nn.Module) -> Counter[int]:
    """In how many places each parameter is used, by identity: `parameters()` names a shared one once."""
    return Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())  # noqa: SLF001


class _SideBySide:
    """One weight `[sum(out_features), in_features]`, of which each module's is a view.

    On a CPU it lies transposed: a product of few rows runs up to twice as fast over that layout, one of many as fast.

    Args:
        linears: The modules.
        uses: See `join_linears`.

    Attributes:
        weight: What they are views of.
    """

    def __init__(self, linears: Sequence[nn.Linear], uses: Mapping[int, int]) -> None:
        self._linears = linears
        self._originals = [module.weight for module in linears]
        self.weight = torch.cat([parameter.detach() for parameter in self._originals])
        if self.weight.device.type == "cpu":
            self.weight = self.weight.t().contiguous().t()
        self.bias = _joint_bias(linears)
        self._few_tokens = _few_tokens() if self.weight.is_cuda else None
        for module, part in zip(linears, self.weight.split([m.out_features for m in linears]), strict=True):
            if uses[id(module.weight)] > 1:
                module.weight = nn.Parameter(part, requires_grad=False)
            else:
                module.weight.data = part

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _multiply(self._few_tokens, x, self.weight, self.bias)

    def in_parts(self, x: torch.Tensor) -> torch.Tensor:
        return _multiply(self._few_tokens, x, self.weight, self.bias, takes_parts=True)

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor | None:
        if self._few_tokens is None:
            return None
        found: torch.Tensor | None = self._few_tokens.multiply_gated(x, self.weight, self.bias, activation)
        return found

    def release(self) -> None:
        """Give the modules weights of their own again."""
        for module, original in zip(self._linears, self._originals, strict=True):
            if module.weight is original:
                original.data = original.data.clone(memory_format=torch.contiguous_format)
            else:  # others use it too, and it was left as it was
                module.weight = original


class _Packed:
    """One weight, packed, see `packed_matrix`; the modules' own are dropped meanwhile.

    Args:
        linears: The modules.
        uses: See `join_linears`.
    """

    def __init__(self, linears: Sequence[nn.Linear], uses: Mapping[int, int]) -> None:
        self._linears = linears
        self._originals = [module.weight for module in linears]
        joint = torch.cat([parameter.detach() for parameter in self._originals])
        self._weight = pack(joint)
        self.bias = _joint_bias(linears)
        self._ends = list(accumulate((module.out_features for module in linears), initial=0))
        for module, original, (begin, end) in zip(linears, self._originals, pairwise(self._ends), strict=True):
            module.weight = PackedWeight.of(original, partial(self._part, begin, end))
            if uses[id(original)] <= 1:
                original.data = original.data.new_empty(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(x, self._weight, self.bias)

    in_parts = __call__

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor | None:  # noqa: ARG002 - the protocol's
        return None

    def release(self) -> None:
        """Give the modules weights of their own again."""
        joint: Any = self._weight.to_dense()
        for module, original, (begin, end) in zip(self._linears, self._originals, pairwise(self._ends), strict=True):
            if not original.numel():
                original.data = joint[begin:end].clone()
            module.weight = original

    def _part(self, begin: int, end: int) -> torch.Tensor:
        dense: torch.Tensor = self._weight.to_dense()
        return dense[begin:end]


def _few_tokens() -> Any:
    """The products of few tokens in Triton, if that is installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from lora_retriever_kernels import few_tokens  # noqa: PLC0415 - needs Triton

    return few_tokens


def _joint_bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    return None if linears[0].bias is None else torch.cat([module.bias.detach() for module in linears])
