"""vLLM's linear layers with adapters, computed by our kernels: weights of true ranks, and a step's tokens.

vLLM's layer classes stay: they run the base product, cut A and B for a tensor-parallel rank (`slice_lora_a`,
`slice_lora_b`), and gather or reduce afterwards as without adapters. A column-parallel layer holds its own rows of B, a
row-parallel one its own columns of A and all of B, whose partial sums its own all-reduce adds; an adapter's weight is a
factor of both, so a mixture needs no collective of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from lora_retriever_kernels.lora import (
    LoraBatch,
    LoraRows,
    LoraStack,
    add_lora,
    lora_delta,
    lora_expand,
    lora_mix,
    lora_shrink,
)
from lora_retriever_kernels.streams import run_beside

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["LoraLayer", "LoraStep", "StepAdapters"]

_MAX_DELTA_TOKENS = 256  # beyond, a second array of outputs costs more than what its computing apart hides
_MIN_HIDDEN_TOKENS = 2048  # of a step that is not captured; below, it waits for the host, not for the device

_layers: WeakValueDictionary[int, LoraLayer] = WeakValueDictionary()
"""By the address of their A: an operator in a compiled graph is handed tensors alone."""


class LoraStep:
    """Which adapters the tokens of a step run; one for all layers of a model.

    Args:
        max_loras: Adapters in device memory at once.
        max_rank: Largest rank, 1 to 256.
        max_num_tokens: Most tokens of a step.
        max_k: Most adapters per token, 1 to 8.
        device: Where the model is.
        max_captured_tokens: Most tokens of a step that vLLM captures in a CUDA graph; 0 if it captures none.
    """

    def __init__(
        self,
        *,
        max_loras: int,
        max_rank: int,
        max_num_tokens: int,
        max_k: int,
        device: torch.device,
        max_captured_tokens: int = 0,
    ) -> None:
        self.rows = LoraRows(max_loras, max_rank, device)
        self.batch = LoraBatch(self.rows, max_num_tokens, max_k)
        self._empty: set[int] = set()  # slots whose adapter has no layer here: another pipeline stage has them
        self._is_on_gpu = device.type == "cuda"
        self._max_captured_tokens = max_captured_tokens
        self._side = torch.cuda.Stream(device) if self._is_on_gpu else None
        self._num_active = 0
        self._k = 1
        self._is_current = False
        self._done: set[int] = set()  # layers that this pass has been through

    def assign(self, slot: int, rank: int) -> None:
        """Say which rank the adapter in a slot has; call it once its layers are loaded."""
        self.rows.assign(slot, slot * self.rows.max_rank, rank)
        self._is_current = False
        (self._empty.discard if rank else self._empty.add)(slot)

    def set_tokens(self, slots: np.ndarray, weights: np.ndarray) -> None:
        """Say what the next passes' tokens run. Tokens beyond, which pad a captured graph, run nothing.

        Args:
            slots: Slot per token `[num_tokens, k]`, int32; -1 contributes nothing.
            weights: Weight per slot, float32.
        """
        num_tokens, k = slots.shape
        if self._empty:
            slots = np.where(np.isin(slots, list(self._empty)), np.int32(-1), slots)
        used = set(slots[slots >= 0].tolist())
        self._num_active, self._k = len(used), k
        mapping, factors = self.batch.token_lora_mapping, self.batch.token_lora_weights
        mapping.fill_(-1)
        mapping[:num_tokens, :k].copy_(torch.from_numpy(slots), non_blocking=True)
        factors[:num_tokens, :k].copy_(torch.from_numpy(weights), non_blocking=True)
        self._is_current = False

    def begin(self, layer: LoraLayer, num_tokens: int) -> bool:
        """Have the step's tokens grouped for a layer that comes next; False if none of them runs an adapter."""
        if not self._num_active:
            return False
        key = id(layer)
        # On a GPU the first layer of every pass launches the grouping: it belongs into the graph that is captured.
        if not self._is_current or num_tokens != self.batch.num_tokens or (self._is_on_gpu and key in self._done):
            self._group(num_tokens)
        self._done.add(key)
        return True

    def side_stream(self, num_tokens: int) -> torch.cuda.Stream | None:
        """Where a layer's adapters run beside its base product; None if behind it."""
        is_worth_it = self._is_captured(num_tokens) or num_tokens >= _MIN_HIDDEN_TOKENS
        return self._side if is_worth_it else None

    def _is_captured(self, num_tokens: int) -> bool:
        return num_tokens <= self._max_captured_tokens

    def _group(self, num_tokens: int) -> None:
        mapping, weights = self.batch.token_lora_mapping[:num_tokens], self.batch.token_lora_weights[:num_tokens]
        if self._is_captured(num_tokens):
            # For whatever is replayed; also in the pass before the capture, which compiles the kernels.
            self.batch.update(mapping, weights, self.rows.max_loras, self.rows.bound(self.rows.max_rank))
        else:
            k = self._k
            self.batch.update(mapping[:, :k].contiguous(), weights[:, :k].contiguous(), self._num_active)
        self._is_current = True
        self._done.clear()


class LoraLayer:
    """The adapters of one linear layer of vLLM's, in place of its padded tensors.

    Slot `s` owns the rank rows from `s * max_rank` on, of which an adapter takes its rank: the memory is vLLM's, what
    is read and computed is the true rank.

    Args:
        module: A `BaseLinearLayerWithLoRA` whose tensors were made.
        step: What its tokens run.
    """

    def __init__(self, module: Any, step: LoraStep) -> None:
        max_rank = step.rows.max_rank
        first = module.lora_a_stacked[0]
        widths = [b.shape[2] for b in module.lora_b_stacked]
        dtype, in_features = first.dtype, first.shape[3]
        module.lora_a_stacked = module.lora_b_stacked = ()  # given back before the others are made
        del first
        self._module = module
        self._ranks: dict[int, int] = {}
        self.step = step
        self.stack = LoraStack(step.rows, step.rows.max_loras * max_rank, in_features, widths, dtype)
        # What vLLM reads of them are shapes and dtype: `[rows, in_features]` and `[out_features, rows]` of each slice.
        module.lora_a_stacked = tuple(self.stack.a)
        module.lora_b_stacked = tuple(part.t() for part in self.stack.b.split(widths, 1))
        module.set_lora, module.reset_lora, module.apply = self.set_lora, self.reset_lora, self.apply
        _layers[self.stack.a.data_ptr()] = self

    def rank(self, slot: int) -> int:
        """The largest rank of the adapter in a slot here; 0 if it lacks the layer."""
        return self._ranks.get(slot, 0)

    def reset_lora(self, index: int) -> None:
        """Forget the adapter in slot `index`; vLLM calls it where an adapter lacks the layer."""
        self.stack.unload(index)
        self._ranks.pop(index, None)

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Put an adapter's weights into slot `index`; vLLM calls it, with a tensor or a list of them.

        Raises:
            ValueError: If a shape does not fit, or weights are not finite in the layer's dtype.
        """
        parts = zip(*self._own_part(lora_a, lora_b), self.stack.out_features, strict=True)
        # vLLM has multiplied B by the scaling.
        slices = [None if a is None or b is None else (*self._filled(a, b, width), 1.0) for a, b, width in parts]
        self.stack.load(index, index * self.step.rows.max_rank, slices)
        self._ranks[index] = max((entry[0].shape[0] for entry in slices if entry is not None), default=0)

    def _filled(self, a: torch.Tensor, b: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B with zeros where nothing is left of them.

        vLLM's warm-up adapters are as wide as the first tensor-parallel rank's part, and others cut theirs from behind
        it. They must run there all the same: CUDA graphs are captured with them, and serve the adapters that come.
        """
        rank = a.shape[0]
        filled_a = a if a.numel() else a.new_zeros(rank, self.stack.in_features)
        return filled_a, b if b.numel() else b.new_zeros(width, rank)

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The base product and the adapters' outputs for `x` `[..., in_features]`; vLLM calls it in `forward`."""
        if torch.compiler.is_compiling():
            module = self._module
            linear = torch.ops.lora_retriever_vllm.linear
            return linear(x, bias, module.lora_a_stacked[0], sum(self.stack.out_features))  # type: ignore[no-any-return]
        return self.run(x, bias)

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The same at once. On a GPU both are computed side by side where that is worth it."""
        inputs, step, stack = x.view(-1, x.shape[-1]), self.step, self.stack
        num_tokens, batch = inputs.shape[0], step.batch
        if not step.begin(self, num_tokens):
            return self._product(x, bias)
        side = step.side_stream(num_tokens)
        if side is None:
            y = self._product(x, bias)
            add_lora(y.view(-1, y.shape[-1]), inputs, stack, batch)
            return y

        def aside() -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None]:
            v = lora_shrink(inputs, stack, batch)
            mixed = lora_mix(v, stack, batch)
            return v, mixed, lora_delta(v, stack, batch, mixed) if num_tokens <= _MAX_DELTA_TOKENS else None

        y, (v, mixed, delta) = run_beside(side, aside, lambda: self._product(x, bias))
        flat = y.view(-1, y.shape[-1])
        if delta is not None:
            flat.add_(delta)
        else:
            lora_expand(flat, v, stack, batch, mixed)
        return y

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the adapters' outputs to `y` `[num_tokens, sum(out_features)]` in place."""
        if self.step.begin(self, x.shape[0]):
            add_lora(y, x, self.stack, self.step.batch)

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        base = self._module.base_layer
        y: torch.Tensor = self._module._get_quant_method().apply(base, x, bias)  # noqa: SLF001 - as its `apply` does
        return y

    def _own_part(self, lora_a: Any, lora_b: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        """A and B of each slice, as much of them as this tensor-parallel rank computes."""
        module, num_slices = self._module, self.stack.num_slices
        if num_slices > 1 and isinstance(lora_b, torch.Tensor):  # one module of the checkpoint for all slices
            lora_a, lora_b = [lora_a] * num_slices, list(lora_b.split(list(module.base_layer.output_sizes)))
        elif isinstance(lora_b, list) and len(lora_b) != num_slices:
            lora_a, lora_b = module.expand_packed_lora(lora_a, lora_b)
        if module.tp_size > 1:
            lora_a, lora_b = module.slice_lora_a(lora_a), module.slice_lora_b(lora_b)
        return ([lora_a], [lora_b]) if isinstance(lora_b, torch.Tensor) else (lora_a, lora_b)


@torch.library.custom_op("lora_retriever_vllm::linear", mutates_args=())
def _linear(x: torch.Tensor, bias: torch.Tensor | None, key: torch.Tensor, out_features: int) -> torch.Tensor:  # noqa: ARG001 - the schema's
    """Run a layer from a compiled graph, which knows neither the step's tokens' adapters nor their number."""
    return _layers[key.data_ptr()].run(x, bias)


@_linear.register_fake
def _(x: torch.Tensor, bias: torch.Tensor | None, key: torch.Tensor, out_features: int) -> torch.Tensor:  # noqa: ARG001 - the schema's
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("lora_retriever_vllm::add_lora", mutates_args=("y",))
def _add_lora(y: torch.Tensor, x: torch.Tensor, key: torch.Tensor) -> None:
    """Run a layer's adapters from a compiled graph; for layers whose base product is not made by `apply`."""
    _layers[key.data_ptr()].add(y, x)


@_add_lora.register_fake
def _(*args: object) -> None:
    """Nothing to shape: `y` is mutated."""


class StepAdapters:
    """What vLLM calls a Punica wrapper: it is told a step's adapters and adds their outputs, on our kernels.

    Args:
        step: What the layers look at.
        compositions: The members and weights of each composition of the step, by its number; whoever owns it keeps it
            current.
    """

    def __init__(self, step: LoraStep, compositions: Mapping[int, Sequence[tuple[int, float]]]) -> None:
        self._step = step
        self._compositions = compositions

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Sequence[int | None], max_loras: int, vocab_size: int, **kwargs: object
    ) -> None:
        """Take in which adapter or composition each token runs; vLLM calls it when that, or a slot, changes."""
        del max_loras, vocab_size, kwargs
        slot_of = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id is not None}
        ids, rows = np.unique(np.asarray(mapping.index_mapping, dtype=np.int64), return_inverse=True)
        members = [self._compositions.get(i, ((i, 1.0),)) if i > 0 else () for i in ids.tolist()]
        k = max((len(entry) for entry in members), default=0) or 1
        slots = np.full((len(ids), k), -1, dtype=np.int32)
        weights = np.zeros((len(ids), k), dtype=np.float32)
        for row, entry in enumerate(members):
            for place, (lora_id, weight) in enumerate(entry):
                slots[row, place], weights[row, place] = slot_of[lora_id], weight
        self._step.set_tokens(slots[rows], weights[rows])

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Sequence[torch.Tensor],
        lora_b_stacked: Sequence[torch.Tensor],
        scale: float,
        output_slices: Sequence[int],
        **kwargs: object,
    ) -> torch.Tensor:
        """Add the adapters' outputs of a linear layer to `y` in place; which layer, its first A says."""
        del lora_b_stacked, scale, output_slices, kwargs
        flat, inputs = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if torch.compiler.is_compiling():
            torch.ops.lora_retriever_vllm.add_lora(flat, inputs, lora_a_stacked[0])
        else:
            _layers[lora_a_stacked[0].data_ptr()].add(flat, inputs)
        return y
