"""Linear modules that share an input, wrapped so that adapters' outputs are added to theirs.

Modules are changed in place: their `forward` is replaced, their names and accelerate hooks stay, so any Linear-like
module works, quantised or offloaded, and so do routers of experts, which compute a product by a function. Plain
`nn.Linear` modules that share an input are computed as one product, see `joint_linears`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from langchain_lora_retriever.engine.model.base_module import BaseModule
from langchain_lora_retriever.engine.model.joint_linears import is_plain, join_linears
from langchain_lora_retriever.engine.model.linear_calls import OwnProduct
from lora_retriever_kernels.lora import LoraBatch, LoraRows, LoraStack

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.model.lora_layers import LoraLayers
    from langchain_lora_retriever.engine.model.probe import LinearGroup

__all__ = ["GroupProduct", "LoraGroup", "Product", "SeparateProducts", "split_group"]


class LoraGroup:
    """Linear modules that share an input: computed together when the first of them is called.

    Attributes:
        names: Their paths.
        stack: The adapters' tensors.
        product: Computes the modules at once; None where each is called for itself.
    """

    def __init__(
        self,
        layers: LoraLayers,
        modules: Sequence[nn.Module],
        group: LinearGroup,
        num_rows: int,
        rows: LoraRows,
        uses: Mapping[int, int],
    ) -> None:
        self.names = group.names
        self._layers = layers
        self._bases = [BaseModule(module, group.dtype, group.device) for module in modules]
        self._out_features = group.out_features
        self.stack = LoraStack(rows, num_rows, group.in_features, group.out_features, group.dtype)
        self.product = join_linears(modules, uses) if all(is_plain(module) for module in modules) else None
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    @property
    def _batch(self) -> LoraBatch:
        return self._layers.batch_on(self.stack.b.device)

    @property
    def modules(self) -> dict[str, BaseModule]:
        """The modules as the base model has them, by name."""
        return dict(zip(self.names, self._bases, strict=True))

    def attach(self) -> None:
        """Wrap the modules."""
        for index, base in enumerate(self._bases):
            if self.product is not None:
                base.wrap(partial(self._forward_slice, index))
            elif hasattr(base.module, "in_features"):
                base.wrap(partial(self._forward_single, base))
            else:
                base.wrap(partial(self._forward_around, base))

    def detach(self) -> None:
        """Give the modules their own forwards back."""
        for base in self._bases:
            base.unwrap()

    def release(self) -> None:
        """Give the modules weights of their own again, and the adapters' memory back."""
        if self.product is not None:
            self.product.release()
        self.product = None
        self.stack.release()

    def _forward_single(self, base: BaseModule, x: torch.Tensor) -> torch.Tensor:
        y = base.forward(x)
        self._add_to(x, y)
        return y

    def _forward_around(self, base: BaseModule, *args: Any, **kwargs: Any) -> Any:
        """A module that computes a product and goes on from there: a router of experts."""
        if not self._layers.is_active:
            return base.forward(*args, **kwargs)
        weight = base.tensor("weight")
        assert weight is not None  # by it the module was found
        with OwnProduct(weight, self._add_to):
            return base.forward(*args, **kwargs)

    def _add_to(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the adapters' outputs to the one module's own, in place."""
        flat, batch = y.view(-1, y.shape[-1]), self._batch
        bias = self._bases[0].bias if batch.has_gains else None
        self._layers.add(flat, x.to(y.device).reshape(flat.shape[0], -1), self.stack, batch, bias)

    def _forward_slice(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self._input is not x:
            self._outputs = self._forward_joint(x)
            self._input = x
        output = self._outputs[index]
        if index == len(self._bases) - 1:
            self._input, self._outputs = None, ()
        return output

    def _forward_joint(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.compute(x.reshape(-1, x.shape[-1]))
        parts: tuple[torch.Tensor, ...] = y.view(*x.shape[:-1], -1).split(self._out_features, -1)
        return parts

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """The modules' outputs for packed inputs, side by side, adapters included."""
        if self.product is None:
            (base,) = self._bases
            y: torch.Tensor = base.module(x)
            return y
        return self._layers.add_to_product(x, self.product, self.stack, self._batch)

    def compute_apart(self, x: torch.Tensor, *, in_parts: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The product, and what is to be added to it for the adapters; see `LoraLayers.product_and_delta`."""
        if self.product is None:
            return self.compute(x), None
        return self._layers.product_and_delta(x, self.product, self.stack, self._batch, in_parts=in_parts)

    def compute_gated(self, x: torch.Tensor, activation: str) -> torch.Tensor | None:
        """The activation of the first half of the outputs times the second; see `Product.gated`."""
        if self.product is None:
            return None
        return self._layers.gated_product(x, self.product, self.stack, self._batch, activation)


class Product(Protocol):
    """The product of packed inputs `[num_tokens, in_features]` with some modules, adapters included."""

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The modules' outputs side by side, and what is to be added to them; see `LoraLayers.product_and_delta`."""

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor | None:
        """The activation of the first half of the outputs times the second, where one launch has it sooner; or None."""


class GroupProduct:
    """A group's.

    Args:
        group: The group.
        in_parts: Whether the product may come in parts, see `JointLinears.in_parts`.
    """

    def __init__(self, group: LoraGroup, *, in_parts: bool) -> None:
        self._group = group
        self._in_parts = in_parts

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in `Product`."""
        return self._group.compute_apart(x, in_parts=self._in_parts)

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor | None:
        """As in `Product`."""
        return self._group.compute_gated(x, activation)


class SeparateProducts:
    """Those of groups that share an input and are computed one after the other: quantised modules.

    Args:
        groups: The groups.
    """

    def __init__(self, groups: Sequence[LoraGroup]) -> None:
        self._groups = groups

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in `Product`."""
        return torch.cat([group.compute(x) for group in self._groups], 1), None

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor | None:  # noqa: ARG002 - the protocol's
        """As in `Product`."""
        return None


def split_group(model: PreTrainedModel, group: LinearGroup) -> Iterator[tuple[LinearGroup, list[nn.Module]]]:
    """The group as it is if its modules can be computed as one; else a group for each of them."""
    modules = [model.get_submodule(name) for name in group.names]
    is_biased = {getattr(module, "bias", None) is not None for module in modules}
    if len(is_biased) == 1 and all(is_plain(module) for module in modules):
        yield group, modules
    else:
        for name, out_features, module in zip(group.names, group.out_features, modules, strict=True):
            yield group._replace(names=(name,), out_features=(out_features,)), [module]
