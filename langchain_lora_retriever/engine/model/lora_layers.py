"""The model's modules, with every token's own adapters added to their outputs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch

from langchain_lora_retriever.engine.model.dora import DoraGains
from langchain_lora_retriever.engine.model.joint_linears import count_uses
from langchain_lora_retriever.engine.model.linear_groups import GroupProduct, LoraGroup, SeparateProducts, split_group
from langchain_lora_retriever.engine.model.vocabulary_layers import VocabularyLayers
from langchain_lora_retriever.engine.pinned_copy import copy_to_device, on_device
from langchain_lora_retriever.errors import InvalidAdapterError
from lora_retriever_kernels.lora import (
    LoraBatch,
    LoraRows,
    LoraSlice,
    LoraStack,
    add_lora,
    can_expand_gated,
    lora_delta,
    lora_expand,
    lora_expand_gated,
    lora_mix,
    lora_shrink,
)
from lora_retriever_kernels.streams import run_beside

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.model.joint_linears import JointLinears
    from langchain_lora_retriever.engine.model.linear_groups import Product
    from langchain_lora_retriever.engine.model.packed_batch import LoraSpans
    from langchain_lora_retriever.engine.model.probe import LinearGroup, Vocabulary
    from langchain_lora_retriever.types import Adapter, LoraWeights

__all__ = ["MAX_RANK", "LoraLayers", "StepKinds"]

MAX_RANK = 256  # of one adapter, by the kernels


class StepKinds(NamedTuple):
    """What the adapters of a step need beside low-rank products; nothing of it is launched for others.

    Attributes:
        dora: Whether outputs are multiplied by gains.
        vocabulary: Whether the embedding or the output layer is adapted.
    """

    dora: bool = False
    vocabulary: bool = False


class LoraLayers:
    """Adapters' tensors for all linear groups of a model, and the wrapped forwards that apply them.

    Args:
        model: The model whose modules are wrapped from `attach` to `detach`.
        groups: Its linear modules, as the probe saw them.
        num_rows: Rank rows of device memory.
        max_loras: Adapter slots.
        max_num_tokens: Maximum number of tokens of a step.
        max_adapters_per_token: Longest composition.
        vocabulary: The embedding and the output layer, if adapters may target them.
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
        vocabulary: Vocabulary | None = None,
    ) -> None:
        max_rank = min(num_rows, MAX_RANK)
        self._max_num_tokens, self._max_adapters_per_token = max_num_tokens, max_adapters_per_token
        self._is_active = False
        self._pieces: list[dict[torch.device, LoraBatch]] = []  # as many as a step has had
        self._num_pieces = 0
        self._piece: dict[torch.device, LoraBatch] | None = None
        self._devices: dict[torch.device, tuple[LoraRows, LoraBatch]] = {}
        for device in {group.device for group in (*groups, *(vocabulary.groups if vocabulary is not None else ()))}:
            rows = LoraRows(max_loras, max_rank, device)
            self._devices[device] = (rows, LoraBatch(rows, max_num_tokens, max_adapters_per_token))
        is_on_one_gpu = [device.type for device in self._devices] == ["cuda"]
        self._side = torch.cuda.Stream(*self._devices) if is_on_one_gpu else None
        uses = count_uses(model)
        self._groups: list[LoraGroup] = []
        self._vocabulary: VocabularyLayers | None = None
        self._gains = DoraGains({})
        try:
            for shared in groups:
                for group, modules in split_group(model, shared):
                    self._groups.append(LoraGroup(self, modules, group, num_rows, self._devices[group.device][0], uses))
            if vocabulary is not None:
                self._vocabulary = VocabularyLayers(model, vocabulary, self._devices, num_rows)
            wrapped = self._wrapped()
            self._gains = DoraGains({name: base for group in wrapped for name, base in group.modules.items()})
        except BaseException:
            self.release()
            raise

    @property
    def stacks(self) -> list[tuple[tuple[str, ...], LoraStack]]:
        """The adapters' tensors, group by group, with the names of its modules; the vocabulary's layers come last."""
        vocabulary = self._vocabulary.stacks if self._vocabulary is not None else []
        return [*((group.names, group.stack) for group in self._groups), *vocabulary]

    def is_prepared(self, adapter: Adapter) -> bool:
        """Whether `slices` need not compute anything of an adapter first. Any thread may ask."""
        return self._gains.is_known(adapter)

    def prepare(self, adapter: Adapter) -> Mapping[str, torch.Tensor]:
        """Compute what `slices` would, so that whoever loads the adapter does not; see `DoraGains.of`."""
        return self._gains.of(adapter)

    def is_base_weight(self, name: str, theirs: torch.Tensor) -> bool | None:
        """Whether a tensor is the base model's own; see `VocabularyLayers.is_base_weight`."""
        return None if self._vocabulary is None else self._vocabulary.is_base_weight(name, theirs)

    def slices(self, adapter: Adapter) -> dict[str, LoraSlice]:
        """An adapter's weights as rows hold them, by module: gains worked out, and what a layer scales itself in.

        Raises:
            AdapterError: If its file is not the one that was read any more, or its gains cannot be had.
        """
        weights = dict(adapter.weights)  # its file is read once
        return self._slices(weights, self._gains.of(adapter, weights))

    def slice_shapes(self, adapter: Adapter) -> dict[str, LoraSlice]:
        """`slices` for shapes, dtypes and scalings alone, and where there are gains; nothing is read or computed."""
        shapes = dict(adapter.shapes)  # made anew whenever one is asked for
        return self._slices(shapes, {name: w.magnitude for name, w in shapes.items() if w.magnitude is not None})

    def _slices(self, weights: Mapping[str, LoraWeights], gains: Mapping[str, torch.Tensor]) -> dict[str, LoraSlice]:
        scales = self._vocabulary.output_scale if self._vocabulary is not None else {}
        return {
            name: LoraSlice(w.lora_A, w.lora_B, w.scaling * scales.get(name, 1.0), gains.get(name))
            for name, w in weights.items()
        }

    def load(self, slot: int, start: int, adapter: Adapter) -> None:
        """Copy an adapter into rows `start : start + adapter.num_rows` of every device and point `slot` at them.

        Args:
            slot: Where it is pinned.
            start: Its first row, which are its gains if it has any.
            adapter: One that `AdapterFit` has let pass.

        Raises:
            InvalidAdapterError: If its weights, scaled, are not finite in the model's dtype, or its file is not the one
                that was read any more.
        """
        slices = self.slices(adapter)
        gain, first = (start, start + 1) if adapter.is_dora else (-1, start)
        for rows, _ in self._devices.values():
            rows.assign(slot, first, adapter.rank, gain)
        for names, stack in self.stacks:
            try:
                with on_device(stack.b.device):
                    stack.load(slot, first, [slices.get(name) for name in names], gain)
            except ValueError as error:
                raise InvalidAdapterError(
                    f"Adapter {adapter.name!r} cannot be loaded into {', '.join(names)}: {error}. Train it anew with "
                    "smaller weights, or load the model in a dtype of wider range."
                ) from error

    def kinds_of(self, slots: Iterable[int]) -> StepKinds:
        """What the adapters in some slots need."""
        slots = tuple(slots)
        dora = next(iter(self._devices.values()))[0].have_gains(slots)
        return StepKinds(dora, self._vocabulary is not None and self._vocabulary.are_used_by(slots))

    def rank_bound(self, rank: int) -> int:
        """What launches for adapters of a rank, and of lower ones, are made for."""
        return next(iter(self._devices.values()))[0].bound(rank)

    def highest_rank(self, slots: Iterable[int]) -> int:
        """The highest rank of the adapters in some slots."""
        return next(iter(self._devices.values()))[0].highest_rank(slots)

    @property
    def is_active(self) -> bool:
        """Whether any token of the step has an adapter."""
        return self._is_active

    def set_batch(
        self,
        spans: LoraSpans,
        sampled: Sequence[int],
        rank_bound: int | None = None,
        pieces: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Say which adapters the next forward pass runs for its tokens.

        Args:
            spans: The packed sequences' adapters.
            sampled: The tokens after which logits are wanted.
            rank_bound: For which ranks launches are made; None takes the resident adapters'.
            pieces: First token and number of tokens of the parts that modules are called with `on_piece`.
        """
        self._is_active = spans.num_adapters > 0
        self._num_pieces = len(pieces) if len(pieces) > 1 else 0
        kinds = self._set_kinds(self.kinds_of(spans.active) if self._is_active else StepKinds())
        if not self._is_active:
            return
        slots, weights = spans.per_token()
        num_active = len(spans.active)
        for device, (_, batch) in self._devices.items():
            with on_device(device):
                on_host = (copy_to_device(slots, device), copy_to_device(weights, device))
                batch.update(*on_host, num_active, rank_bound, kinds.dora)
                for index in range(self._num_pieces):
                    start, num = pieces[index]
                    mapping, shares = (x[start : start + num] for x in on_host)
                    piece = self._piece_batches(index)[device]
                    piece.update(mapping, shares, num_active, rank_bound, kinds.dora)
        if kinds.vocabulary and self._vocabulary is not None:
            self._vocabulary.set_sampled_on_host(sampled, num_active, rank_bound)

    def _piece_batches(self, index: int) -> dict[torch.device, LoraBatch]:
        """The batches of a step's piece, one for every device; made when a step first has so many."""
        while len(self._pieces) <= index:
            sizes = (self._max_num_tokens, self._max_adapters_per_token)
            self._pieces.append({device: LoraBatch(rows, *sizes) for device, (rows, _) in self._devices.items()})
        return self._pieces[index]

    @contextmanager
    def on_piece(self, index: int) -> Iterator[None]:
        """Let modules be called with one piece of the step's tokens alone, of those that `set_batch` was told of."""
        if self._is_active and self._num_pieces:
            self._piece = self._pieces[index]
        try:
            yield
        finally:
            self._piece = None

    def batch_on(self, device: torch.device) -> LoraBatch:
        """Which tokens run which adapters: those of the step, or of its piece that a module is called with."""
        return self._devices[device][1] if self._piece is None else self._piece[device]

    def _set_kinds(self, kinds: StepKinds) -> StepKinds:
        if self._vocabulary is not None:
            self._vocabulary.is_active = kinds.vocabulary
        return kinds

    def launch_shape(self, num_tokens: int, k: int, num_active: int, rank_bound: int) -> tuple[int, int, bool] | None:
        """What a captured step is made for besides its number of tokens and of adapters per token, see `LoraBatch`."""
        _, batch = next(iter(self._devices.values()))
        return batch.launch_shape(num_tokens, k, num_active, rank_bound) if k else None

    def set_device_batch(
        self,
        mapping: torch.Tensor | None,
        weights: torch.Tensor | None,
        num_active: int | None = None,
        rank_bound: int | None = None,
        kinds: StepKinds = StepKinds(),  # noqa: B008 - immutable
        sampled: torch.Tensor | None = None,
    ) -> None:
        """Say the same with tensors that are on the model's one device already; nothing is read from them here.

        Args:
            mapping: Slot per token `[num_tokens, k]`, int32; None if no token has adapters.
            weights: Weight per slot, fp32.
            num_active: How many adapters the step names, if that is known.
            rank_bound: As in `set_batch`.
            kinds: What the step's adapters may need; what is not named here, none of them may.
            sampled: The tokens after which logits are wanted; None for all of them, in order.
        """
        self._is_active, self._num_pieces = mapping is not None, 0
        self._set_kinds(kinds if self._is_active else StepKinds())
        if mapping is not None and weights is not None:
            for _, batch in self._devices.values():
                batch.update(mapping, weights, num_active, rank_bound, kinds.dora)
            if kinds.vocabulary and self._vocabulary is not None:
                self._vocabulary.set_sampled(sampled, num_active, rank_bound)

    def find_product(self, names: tuple[str, ...], *, in_parts: bool = False) -> Product | None:
        """The product of packed inputs `[num_tokens, in_features]` with the modules `names`, adapters included.

        Modules whose weights are quantised are called one after the other.

        Args:
            names: The modules.
            in_parts: Whether the product may come in parts, see `JointLinears.in_parts`.

        Returns:
            None if these modules do not share an input.
        """
        groups = [group for group in self._groups if set(group.names) <= set(names)]
        if [name for group in groups for name in group.names] != list(names):
            return None
        if len(groups) == 1:
            return GroupProduct(groups[0], in_parts=in_parts)
        return SeparateProducts(groups)

    def attach(self) -> None:
        """Wrap the modules."""
        for group in self._wrapped():
            group.attach()

    def detach(self) -> None:
        """Give the modules their own forwards back."""
        for group in self._wrapped():
            group.detach()

    def release(self) -> None:
        """Give the modules their own weights back, each in memory of its own, and the adapters' memory back."""
        for group in self._wrapped():
            group.release()
        self._groups, self._pieces = [], []
        self._vocabulary = None
        self._gains.forget()

    def _wrapped(self) -> list[LoraGroup | VocabularyLayers]:
        """Everything whose forwards are replaced."""
        return [*self._groups, *([] if self._vocabulary is None else [self._vocabulary])]

    def add(
        self, y: torch.Tensor, x: torch.Tensor, stack: LoraStack, batch: LoraBatch, bias: torch.Tensor | None = None
    ) -> None:
        """Add the adapters' outputs for packed inputs `x` to `y` in place; nothing if no token has one.

        Args:
            y: Outputs of the base.
            x: Inputs.
            stack: The adapters' tensors.
            batch: Which tokens run which.
            bias: What `y` holds beside the base product; asked for by gains alone.
        """
        if self._is_active and len(self._devices) == 1:
            add_lora(y, x, stack, batch, bias)
        elif self._is_active:
            with on_device(y.device):  # Triton launches on the current device
                add_lora(y, x, stack, batch, bias)

    def _side_to_capture(self) -> torch.cuda.Stream | None:
        """The second stream, where a step with adapters is being captured; None elsewhere."""
        is_captured = self._is_active and self._side is not None and torch.cuda.is_current_stream_capturing()
        return self._side if is_captured else None

    def product_and_delta(
        self, x: torch.Tensor, product: JointLinears, stack: LoraStack, batch: LoraBatch, *, in_parts: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A product of packed inputs `x`, and what is still to be added to it for the adapters.

        In a captured step they are computed side by side: the base's product of few tokens mostly waits for memory, and
        of many it leaves memory alone.

        Args:
            x: Packed inputs.
            product: The base's.
            stack: The adapters' tensors.
            batch: Which tokens run which.
            in_parts: Whether the product may come in parts, see `JointLinears.in_parts`.

        Returns:
            Both `[num_tokens, sum(out_features)]`, what is added possibly in parts (`lora_delta`); None where the
            adapters' outputs are in the product already.
        """
        multiply = product.in_parts if in_parts else product
        if not self._is_active:
            return multiply(x), None
        side = self._side_to_capture()
        if side is None or batch.has_gains:  # gains multiply the base's outputs
            return self.add_to_product(x, product, stack, batch), None

        def apart() -> torch.Tensor:
            v = lora_shrink(x, stack, batch)
            return lora_delta(v, stack, batch, lora_mix(v, stack, batch), takes_parts=True)

        return run_beside(side, apart, lambda: multiply(x))

    def gated_product(
        self, x: torch.Tensor, product: JointLinears, stack: LoraStack, batch: LoraBatch, activation: str
    ) -> torch.Tensor | None:
        """The activation of the first half of a product's outputs times the second; None if others have it sooner.

        For many tokens with adapters, one launch reads the product, adds the adapters' outputs and activates.

        Args:
            x: Packed inputs.
            product: The base's.
            stack: The adapters' tensors.
            batch: Which tokens run which.
            activation: One of `decoder.ACTIVATIONS`.
        """
        if not self._is_active:
            return product.gated(x, activation)
        if len(self._devices) > 1 or not can_expand_gated(stack, batch):
            return None
        y, (_, mixed) = _mix_beside(self._side_to_capture(), x, product, stack, batch)
        return lora_expand_gated(y, stack, batch, mixed, activation)

    def add_to_product(
        self, x: torch.Tensor, product: JointLinears, stack: LoraStack, batch: LoraBatch
    ) -> torch.Tensor:
        """A product and the adapters' outputs for packed inputs `x`.

        In a captured decode step the adapters' first product runs beside the base's, which mostly waits for memory.
        """
        side = self._side_to_capture()
        if side is None:
            y = product(x)
            self.add(y, x, stack, batch, product.bias)
            return y
        y, (v, mixed) = _mix_beside(side, x, product, stack, batch)
        lora_expand(y, v, stack, batch, mixed, product.bias)
        return y


def _mix_beside(
    side: torch.cuda.Stream | None, x: torch.Tensor, product: JointLinears, stack: LoraStack, batch: LoraBatch
) -> tuple[torch.Tensor, tuple[torch.Tensor, list[torch.Tensor]]]:
    """A product, and beside it what of the adapters' part does not wait for it: as `lora_shrink` and `lora_mix` do."""

    def begin() -> tuple[torch.Tensor, list[torch.Tensor]]:
        v = lora_shrink(x, stack, batch)
        return v, lora_mix(v, stack, batch)

    return run_beside(side, begin, lambda: product(x))
