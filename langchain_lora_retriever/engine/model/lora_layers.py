"""The model's linear modules, with every token's own adapters added to their outputs.

Modules are changed in place: their `forward` is replaced, their names and accelerate hooks stay, so any Linear-like
module works, quantised or offloaded. Plain `nn.Linear` modules that share an input are computed as one product: until
`release` gives them memory of their own again, their weights are views of one tensor.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

from langchain_lora_retriever.engine.pinned_copy import copy_to_device, on_device
from langchain_lora_retriever.errors import InvalidAdapterError
from lora_retriever_kernels.lora import LoraBatch, LoraRows, LoraStack, add_lora, lora_expand, lora_mix, lora_shrink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.model.packed_batch import LoraSpans
    from langchain_lora_retriever.engine.model.probe import LinearGroup
    from langchain_lora_retriever.types import Adapter, LoraWeights

__all__ = ["MAX_RANK", "LoraLayers"]

MAX_RANK = 256  # of one adapter, by the kernels


class LoraLayers:
    """Adapters' tensors for all linear groups of a model, and the wrapped forwards that apply them.

    Args:
        model: The model whose modules are wrapped from `attach` to `detach`.
        groups: Its linear modules, as the probe saw them.
        num_rows: Rank rows of device memory.
        max_loras: Adapter slots.
        max_num_tokens: Most tokens of a step.
        max_adapters_per_token: Longest composition.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        groups: Sequence[LinearGroup],
        *,
        num_rows: int,
        max_loras: int,
        max_num_tokens: int,
        max_adapters_per_token: int,
    ) -> None:
        max_rank = min(num_rows, MAX_RANK)
        self._max_adapters_per_token = max_adapters_per_token
        self._is_active = False
        self._devices: dict[torch.device, tuple[LoraRows, LoraBatch]] = {}
        for device in {group.device for group in groups}:
            rows = LoraRows(max_loras, max_rank, device)
            self._devices[device] = (rows, LoraBatch(rows, max_num_tokens, max_adapters_per_token))
        is_on_one_gpu = [device.type for device in self._devices] == ["cuda"]
        self._side = torch.cuda.Stream(*self._devices) if is_on_one_gpu else None
        uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())  # noqa: SLF001 - parameters() names a shared one once
        self._groups: list[_Group] = []
        try:
            for shared in groups:
                for group, modules in _split(model, shared):
                    self._groups.append(_Group(self, modules, group, num_rows, *self._devices[group.device], uses))
        except BaseException:
            self.release()
            raise

    @property
    def stacks(self) -> list[tuple[tuple[str, ...], LoraStack]]:
        """The adapters' tensors, group by group, with the names of its modules."""
        return [(group.names, group.stack) for group in self._groups]

    def load(self, slot: int, start: int, adapter: Adapter) -> None:
        """Copy an adapter into rows `start : start + adapter.rank` of every device and point `slot` at them.

        Args:
            slot: Where it is pinned.
            start: Its first row.
            adapter: One that `AdapterFit` has let pass.

        Raises:
            InvalidAdapterError: If its weights, scaled, are not finite in the model's dtype, or its file is not the one
                that was read any more.
        """
        weights = dict(adapter.weights)  # its file is read once
        for rows, _ in self._devices.values():
            rows.assign(slot, start, adapter.rank)
        for group in self._groups:
            with on_device(group.stack.b.device):
                group.load(slot, start, adapter.name, weights)

    def rank_bound(self, rank: int) -> int:
        """What launches for adapters of a rank, and of lower ones, are made for."""
        return next(iter(self._devices.values()))[0].bound(rank)

    def highest_rank(self, slots: Iterable[int]) -> int:
        """The highest rank of the adapters in some slots."""
        return next(iter(self._devices.values()))[0].highest_rank(slots)

    def set_batch(self, spans: LoraSpans, rank_bound: int | None = None) -> None:
        """Say which adapters the next forward pass runs for its tokens.

        Args:
            spans: The packed sequences' adapters.
            rank_bound: For which ranks launches are made; None takes the resident adapters'.
        """
        self._is_active = spans.num_adapters > 0
        if not self._is_active:
            return
        slots, weights = spans.per_token()
        num_active = len(spans.active)
        for device, (_, batch) in self._devices.items():
            with on_device(device):
                batch.update(copy_to_device(slots, device), copy_to_device(weights, device), num_active, rank_bound)

    def launch_shape(self, num_tokens: int, k: int, num_active: int, rank_bound: int) -> tuple[int, int] | None:
        """What a captured step is made for besides its number of tokens and of adapters per token, see `LoraBatch`."""
        _, batch = next(iter(self._devices.values()))
        return batch.launch_shape(num_tokens, k, num_active, rank_bound) if k else None

    def set_device_batch(
        self,
        mapping: torch.Tensor | None,
        weights: torch.Tensor | None,
        num_active: int | None = None,
        rank_bound: int | None = None,
    ) -> None:
        """Say the same with tensors that are on the model's one device already; nothing is read from them here.

        Args:
            mapping: Slot per token `[num_tokens, k]`, int32; None if no token has adapters.
            weights: Weight per slot, fp32.
            num_active: How many adapters the step names, if that is known.
            rank_bound: As in `set_batch`.
        """
        self._is_active = mapping is not None
        if mapping is not None and weights is not None:
            for _, batch in self._devices.values():
                batch.update(mapping, weights, num_active, rank_bound)

    def find_product(self, names: tuple[str, ...]) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The product of packed inputs `[num_tokens, in_features]` with the modules `names`, adapters included.

        Returns:
            A function that gives the modules' outputs side by side; None if they are not computed as one.
        """
        return next((g.compute for g in self._groups if g.names == names and g.is_fused), None)

    def attach(self) -> None:
        """Wrap the modules."""
        for group in self._groups:
            group.attach()

    def detach(self) -> None:
        """Give the modules their own forwards back."""
        for group in self._groups:
            group.detach()

    def release(self) -> None:
        """Give the modules their own weights back, each in memory of its own, and drop the adapters'."""
        for group in self._groups:
            group.release()
        self._groups = []

    def add(self, y: torch.Tensor, x: torch.Tensor, stack: LoraStack, batch: LoraBatch) -> None:
        """Add the adapters' outputs for packed inputs `x` to `y` in place; nothing if no token has one."""
        if self._is_active and len(self._devices) == 1:
            add_lora(y, x, stack, batch)
        elif self._is_active:
            with on_device(y.device):  # Triton launches on the current device
                add_lora(y, x, stack, batch)

    def add_to_product(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stack: LoraStack, batch: LoraBatch
    ) -> torch.Tensor:
        """`linear(x, weight, bias)` and the adapters' outputs for packed inputs `x`.

        In a captured decode step the adapters' first product runs beside the base's, which mostly waits for memory.
        """
        if not self._is_active or self._side is None or not torch.cuda.is_current_stream_capturing():
            y = linear(x, weight, bias)
            self.add(y, x, stack, batch)
            return y
        main = torch.cuda.current_stream()
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            v = lora_shrink(x, stack, batch)
            mixed = lora_mix(v, stack, batch)
        y = linear(x, weight, bias)
        main.wait_stream(self._side)
        lora_expand(y, v, stack, batch, mixed)
        return y


class _Group:
    """Linear modules that share an input: computed together when the first of them is called."""

    def __init__(
        self,
        layers: LoraLayers,
        modules: Sequence[nn.Module],
        group: LinearGroup,
        num_rows: int,
        rows: LoraRows,
        batch: LoraBatch,
        uses: Mapping[int, int],
    ) -> None:
        self.names = group.names
        self._layers = layers
        self._modules = modules
        self._out_features = group.out_features
        self._batch = batch
        self.stack = LoraStack(rows, num_rows, group.in_features, group.out_features, group.dtype)
        self._fused: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._originals: list[nn.Parameter] = []
        if all(_is_plain(module) for module in modules):
            self._fused, self._originals = _fuse(modules, uses)
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    @property
    def is_fused(self) -> bool:
        return self._fused is not None

    def load(self, slot: int, start: int, name: str, weights: Mapping[str, LoraWeights]) -> None:
        found = (weights.get(module) for module in self.names)
        try:
            self.stack.load(slot, start, [None if w is None else (w.lora_A, w.lora_B, w.scaling) for w in found])
        except ValueError as error:
            raise InvalidAdapterError(
                f"Adapter {name!r} cannot be loaded into {', '.join(self.names)}: {error}. Train it anew with "
                "smaller weights, or load the model in a dtype of wider range."
            ) from error

    def attach(self) -> None:
        for index, module in enumerate(self._modules):
            if self._fused is None:
                module.forward = partial(self._forward_single, module.forward)
            else:
                module.forward = partial(self._forward_slice, index)

    def detach(self) -> None:
        for module in self._modules:
            forward: Callable[..., torch.Tensor] = module.forward
            del module.forward
            if isinstance(forward, partial) and forward.func == self._forward_single:
                hooked = forward.args[0]
                if getattr(hooked, "__func__", None) is not type(module).forward:
                    module.forward = hooked  # accelerate's own wrapper, an attribute of the instance too

    def release(self) -> None:
        for module, original in zip(self._modules, self._originals, strict=False):
            if module.weight is original:
                original.data = original.data.clone(memory_format=torch.contiguous_format)
            else:  # others use it too, and it was left as it was
                module.weight = original
        self._originals, self._fused = [], None

    def _forward_single(self, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        y = forward(x)
        flat = y.view(-1, y.shape[-1])
        self._layers.add(flat, x.to(y.device).reshape(flat.shape[0], -1), self.stack, self._batch)
        return y

    def _forward_slice(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self._input is not x:
            self._outputs = self._forward_fused(x)
            self._input = x
        output = self._outputs[index]
        if index == len(self._modules) - 1:
            self._input, self._outputs = None, ()
        return output

    def _forward_fused(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.compute(x.reshape(-1, x.shape[-1]))
        parts: tuple[torch.Tensor, ...] = y.view(*x.shape[:-1], -1).split(self._out_features, -1)
        return parts

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        assert self._fused is not None
        return self._layers.add_to_product(x, *self._fused, self.stack, self._batch)


def _split(model: PreTrainedModel, group: LinearGroup) -> Iterator[tuple[LinearGroup, list[nn.Module]]]:
    """The group as it is if its modules can be computed as one; else a group for each of them."""
    modules = [model.get_submodule(name) for name in group.names]
    is_biased = {getattr(module, "bias", None) is not None for module in modules}
    if len(is_biased) == 1 and all(_is_plain(module) for module in modules):
        yield group, modules
    else:
        for name, out_features, module in zip(group.names, group.out_features, modules, strict=True):
            yield group._replace(names=(name,), out_features=(out_features,)), [module]


def _is_plain(module: nn.Module) -> bool:
    """Whether its weight is simply there: not quantised, not moved around by accelerate."""
    return type(module) is nn.Linear and not hasattr(module, "_hf_hook")


def _fuse(
    modules: Sequence[nn.Module], uses: Mapping[int, int]
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], list[nn.Parameter]]:
    """Lay the weights side by side and let each module's weight be a view of its part; biases likewise.

    On a CPU they lie transposed, `[in_features, sum(out_features)]`: a decode step's product of few rows runs up to
    twice as fast over that layout, a prefill's as fast.

    Args:
        modules: The linear modules.
        uses: In how many places a parameter is used, by identity. One that others use too (tied embeddings) is left to
            them, and the module gets another.

    Returns:
        The joint weight and bias, and the modules' own parameters.
    """
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    originals: list[Any] = [module.weight for module in linears]
    weight = torch.cat([parameter.detach() for parameter in originals])
    if weight.device.type == "cpu":
        weight = weight.t().contiguous().t()
    for module, part in zip(linears, weight.split([m.out_features for m in linears]), strict=True):
        if uses[id(module.weight)] > 1:
            module.weight = nn.Parameter(part, requires_grad=False)
        else:
            module.weight.data = part
    bias = None if linears[0].bias is None else torch.cat([module.bias.detach() for module in linears])
    return (weight, bias), originals
