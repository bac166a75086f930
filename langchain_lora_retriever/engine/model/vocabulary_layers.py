"""LoRA on the two layers that know the vocabulary: the embedding, and the output layer.

They differ from the linear modules between them. An embedding's input is the token itself, one-hot, so that A is looked
up and not multiplied; the output layer sees the tokens alone after which logits are wanted. A row of theirs is as wide
as the vocabulary, and so only an engine that is told to (`EngineConfig.adapter_kinds`) has rows for them.

Where the two share one weight, an adapter of one of them does not change the other, as in PEFT.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from langchain_lora_retriever.engine.model.base_module import BaseModule
from langchain_lora_retriever.engine.pinned_copy import copy_to_device, on_device
from lora_retriever_kernels.lora import LoraBatch, LoraStack, add_lora

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.model.probe import LinearGroup, Vocabulary
    from lora_retriever_kernels.lora import LoraRows

__all__ = ["VocabularyLayers"]

_NUM_COMPARED = 4096  # rows at once
_ROUNDING = 2**-7  # relative: bfloat16's twice
_SMALLEST = 1e-6  # absolute: float16 has nothing between its smallest numbers


class VocabularyLayers:
    """Adapters' tensors for the embedding and the output layer, and the wrapped forwards that apply them.

    Args:
        model: The model.
        vocabulary: The two, as the probe saw them; either may be missing.
        devices: Row map and batch of every device.
        num_rows: Rank rows of device memory.

    Attributes:
        is_active: Whether the next forward pass has adapters of these layers.
        output_scale: What a layer multiplies its outputs by itself, by name: an adapter's are multiplied by it too.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        devices: Mapping[torch.device, tuple[LoraRows, LoraBatch]],
        num_rows: int,
    ) -> None:
        self.is_active = False
        self.output_scale: dict[str, float] = {}
        self._embedding = self._output = None
        if vocabulary.embedding is not None:
            self._embedding = _Layer(model, vocabulary.embedding, *devices[vocabulary.embedding.device], num_rows)
            scale = getattr(self._embedding.base.module, "embed_scale", None)
            if scale is not None:  # as the layer rounds it
                self.output_scale[self._embedding.name] = float(torch.as_tensor(scale).to(vocabulary.embedding.dtype))
        if vocabulary.output is not None:
            rows, batch = devices[vocabulary.output.device]
            self._output = _Layer(model, vocabulary.output, rows, batch, num_rows)
            self._sampled = LoraBatch(rows, batch.max_num_tokens, batch.max_k)
            self._every = batch

    @property
    def stacks(self) -> list[tuple[tuple[str, ...], LoraStack]]:
        """The adapters' tensors, with the name of each layer."""
        return [((layer.name,), layer.stack) for layer in self._layers()]

    @property
    def modules(self) -> dict[str, BaseModule]:
        """The layers as the base model has them, by name."""
        return {layer.name: layer.base for layer in self._layers()}

    def is_base_weight(self, name: str, theirs: torch.Tensor) -> bool | None:
        """Whether a tensor is the base model's own weight of a layer, up to how it was rounded; None of another module.

        Args:
            name: Path of the module.
            theirs: `[vocabulary, hidden_size]`, on the CPU.
        """
        found = next((layer for layer in self._layers() if layer.name == name), None)
        ours = None if found is None else found.base.tensor("weight")
        if ours is None or ours.shape != theirs.shape:
            return None if found is None else False
        pairs = zip(ours.split(_NUM_COMPARED), theirs.split(_NUM_COMPARED), strict=True)
        return all(torch.allclose(a.float().cpu(), b.float(), rtol=_ROUNDING, atol=_SMALLEST) for a, b in pairs)

    def are_used_by(self, slots: Iterable[int]) -> bool:
        """Whether the adapter in any of these slots adapts one of the layers."""
        slots = tuple(slots)
        return any(layer.stack.is_used_by(slots) for layer in self._layers())

    def set_sampled(self, sampled: torch.Tensor | None, num_active: int | None, rank_bound: int | None) -> None:
        """Say after which tokens of the batch, which is set, logits are wanted: the output layer sees these alone.

        Args:
            sampled: Their indices `[n]`, int64; None if they are all tokens, in order.
            num_active: As in `LoraBatch.update`.
            rank_bound: Likewise.
        """
        if self._output is None:
            return
        self._output.batch = self._every
        if sampled is not None:
            mapping, weights = (x.index_select(0, sampled) for x in self._every.tensors()[:2])
            self._output.batch = self._sampled
            with on_device(mapping.device):
                self._sampled.update(mapping, weights, num_active, rank_bound, self._every.has_gains)

    def set_sampled_on_host(self, sampled: Sequence[int], num_active: int, rank_bound: int | None) -> None:
        """Say the same with indices that are on the host."""
        if self._output is not None:
            indices = torch.tensor(sampled, dtype=torch.int64)
            self.set_sampled(copy_to_device(indices, self._output.stack.b.device), num_active, rank_bound)

    def attach(self) -> None:
        """Wrap the layers."""
        if self._embedding is not None:
            self._embedding.base.wrap(partial(self._embed, self._embedding))
        if self._output is not None:
            self._output.base.wrap(partial(self._put_out, self._output))

    def detach(self) -> None:
        """Give the layers their own forwards back."""
        for layer in self._layers():
            layer.base.unwrap()

    def release(self) -> None:
        """Give the adapters' memory back."""
        for layer in self._layers():
            layer.stack.release()

    def _layers(self) -> Iterator[_Layer]:
        return (layer for layer in (self._embedding, self._output) if layer is not None)

    def _embed(self, layer: _Layer, input_ids: torch.Tensor) -> torch.Tensor:
        y = layer.base.forward(input_ids)
        if self.is_active:
            layer.add(y, input_ids.reshape(-1).to(y.device))
        return y

    def _put_out(self, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        y = layer.base.forward(x)
        if self.is_active:
            layer.add(y, x.reshape(-1, x.shape[-1]).to(y.device))
        return y


class _Layer:
    """The embedding or the output layer."""

    def __init__(
        self, model: PreTrainedModel, group: LinearGroup, rows: LoraRows, batch: LoraBatch, num_rows: int
    ) -> None:
        (self.name,) = group.names
        self.stack = LoraStack(rows, num_rows, group.in_features, group.out_features, group.dtype)
        self.batch = batch
        self.base = BaseModule(model.get_submodule(self.name), group.dtype, group.device)

    def add(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add the adapters' outputs for packed inputs."""
        flat = y.view(-1, y.shape[-1])
        with on_device(y.device):
            add_lora(flat, x, self.stack, self.batch, self.base.bias if self.batch.has_gains else None)
