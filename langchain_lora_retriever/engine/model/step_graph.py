"""A step whose launches are captured once and replayed with other data."""

from __future__ import annotations

import bisect
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch

from langchain_lora_retriever.engine.model.packed_batch import LoraSpans, PackedBatch
from langchain_lora_retriever.engine.pinned_copy import copy_into

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Forward: TypeAlias = "Callable[[StaticInputs], torch.Tensor]"

__all__ = ["MAX_CAPTURED_TOKENS", "CaptureError", "StaticInputs", "StepGraph", "StepShape", "StepShapes"]

MAX_CAPTURED_TOKENS = 2048  # larger steps keep the device busy for longer than their launches take


class CaptureError(Exception):
    """The step does something that cannot be captured; its cause says what."""


class StepShape(NamedTuple):
    """The sizes of a captured step; it serves every step that needs no more of anything.

    Attributes:
        num_tokens: Tokens.
        num_decodes: Sequences with one token.
        num_tiles: Pieces of the sequences with several.
        tile_size: Maximum number of tokens of such a piece.
        num_sampled: Tokens after which one is chosen.
        num_adapters: Adapters per token; 0 leaves adapters out.
    """

    num_tokens: int
    num_decodes: int
    num_tiles: int
    tile_size: int
    num_sampled: int
    num_adapters: int

    @property
    def is_decode(self) -> bool:
        """Whether it has room for decoding sequences only."""
        return not self.num_tiles


class StepShapes:
    """For which sizes there are graphs: a step takes the smallest it fits.

    Decode steps and steps with prompts in them come in sizes of their own. A step with prompts has room for as many
    decoding sequences, and for as many prompts, as may run.

    Args:
        max_num_seqs: Most running requests.
        max_num_tokens: Maximum number of tokens of a step.
        tile_size: Maximum number of tokens of a tile.
        num_adapters: Numbers of adapters per token to have graphs for.
        has_prompts: Whether there are graphs for steps with prompts in them.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_tokens: int,
        tile_size: int,
        num_adapters: Sequence[int],
        *,
        has_prompts: bool = True,
    ) -> None:
        self._max_num_seqs = max_num_seqs
        self._tile_size = tile_size
        self._num_adapters = sorted(num_adapters)
        decodes = {1, 2, 4, *range(8, min(max_num_seqs, 64) + 1, 8), *range(80, max_num_seqs + 1, 16), max_num_seqs}
        self._decodes = sorted(n for n in decodes if n <= max_num_seqs)
        limit = min(max_num_tokens, MAX_CAPTURED_TOKENS)
        # Products of more tokens than some 512 take time by the 128, which is the height of their tiles.
        prompts = {16, 32, *range(64, 513, 64), *range(640, limit, 128), limit}
        self._prompts = sorted(n for n in prompts if n <= limit) if has_prompts else []

    @property
    def prompt_sizes(self) -> Sequence[int]:
        """Tokens of the steps with prompts in them, ascending; others are padded to the next."""
        return self._prompts

    def all(self) -> list[StepShape]:
        """Every shape, the largest first."""
        shapes = [
            shape
            for num_adapters in self._num_adapters
            for shape in (
                *(self._decode(n, num_adapters) for n in self._decodes),
                *(self._prompt(n, num_adapters) for n in self._prompts),
            )
        ]
        return sorted(shapes, reverse=True)

    def find(self, num_tokens: int, num_adapters: int, *, is_decode: bool) -> StepShape | None:
        """The shape that serves a step; None if the step is too large for any, or names too many adapters."""
        index = bisect.bisect_left(self._num_adapters, num_adapters)
        if index == len(self._num_adapters):
            return None
        num_adapters = self._num_adapters[index]
        sizes = self._decodes if is_decode else self._prompts
        index = bisect.bisect_left(sizes, num_tokens)
        if index == len(sizes):
            return None
        return (self._decode if is_decode else self._prompt)(sizes[index], num_adapters)

    def _decode(self, num_tokens: int, num_adapters: int) -> StepShape:
        return StepShape(num_tokens, num_tokens, 0, self._tile_size, num_tokens, num_adapters)

    def _prompt(self, num_tokens: int, num_adapters: int) -> StepShape:
        num_seqs = min(num_tokens, self._max_num_seqs)
        num_tiles = num_tokens // self._tile_size + num_seqs + 1  # every sequence, and padding, may have an odd one
        return StepShape(num_tokens, num_seqs, num_tiles, self._tile_size, num_seqs, num_adapters)


class StaticInputs(NamedTuple):
    """What a captured step reads, at addresses that never change; the first four lie one after the other.

    Attributes:
        tokens: `[4, num_tokens]` int64: token ids, positions, rows and sources, see `PackedBatch`; padding has row -1.
        decode_tokens: `[num_decodes]` int64: tokens that are their sequence's only one; -1 where there are fewer.
        prefill_tiles: `[num_tiles, 2]` int64: first token and number of tokens, 0 where there are fewer.
        sampled: `[num_sampled]` int64: tokens whose logits are wanted; padding is 0.
        lora_slots: `[num_tokens, num_adapters]` int32, -1 for none; None if no token of the step has adapters.
        lora_weights: `[num_tokens, num_adapters]` fp32.
    """

    tokens: torch.Tensor
    decode_tokens: torch.Tensor
    prefill_tiles: torch.Tensor
    sampled: torch.Tensor
    lora_slots: torch.Tensor | None
    lora_weights: torch.Tensor | None


class StepGraph:
    """A step of a fixed shape.

    Args:
        forward: Computes the step from its inputs and returns logits `[num_sampled, vocab_size]`; it must only launch.
            Nothing else may keep the tensor: a graph's logits would stay allocated, beside those of all others.
        shape: The step's sizes.
        device: Where it runs. On a CPU nothing is captured, and a replay calls `forward`.
        pool: Memory that the graphs of one model share; they must not run at the same time.

    Raises:
        CaptureError: If `forward` waits for the device, or does something else that a graph cannot hold.
    """

    def __init__(self, forward: Forward, shape: StepShape, device: torch.device, pool: Any) -> None:
        num_tokens, num_decodes, num_tiles, _, num_sampled, k = self._shape = shape
        sizes = [4 * num_tokens, num_decodes, 2 * num_tiles, num_sampled]
        self._data = _padded(shape, PackedBatch.pack([], {}), [], []).to(device)
        tokens, decode_tokens, tiles, sampled = self._data.split(sizes)
        slots = torch.full((num_tokens, k), -1, dtype=torch.int32, device=device) if k else None
        weights = torch.zeros(num_tokens, k, dtype=torch.float32, device=device) if k else None
        self._inputs = StaticInputs(tokens.view(4, -1), decode_tokens, tiles.view(-1, 2), sampled, slots, weights)
        self._forward = forward
        self._lora: LoraSpans | None = None  # whose slots and weights are in the inputs
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)
        if device.type == "cuda":
            self._capture(pool)

    def replay(
        self,
        batch: PackedBatch,
        decode_tokens: Sequence[int],
        prefill_tiles: Sequence[tuple[int, int]],
    ) -> torch.Tensor:
        """Run the step for `batch`.

        Args:
            batch: The tokens.
            decode_tokens: Which of them are their sequence's only one.
            prefill_tiles: First token and number of tokens of pieces of the other sequences.

        Returns:
            Logits `[len(batch.sampled_tokens), vocab_size]`, valid until the next replay of any graph of the pool.
        """
        copy_into(self._data, _padded(self._shape, batch, decode_tokens, chain.from_iterable(prefill_tiles)))
        static = self._inputs
        if static.lora_slots is not None and static.lora_weights is not None and batch.lora != self._lora:
            slots, weights = batch.lora.per_token(self._shape.num_adapters)
            self._lora = None  # of neither, if only one of the copies succeeds
            _fill(static.lora_slots, slots, -1)
            _fill(static.lora_weights, weights, 0)
            self._lora = batch.lora
        if self._graph is None:
            self._logits = self._forward(static)
        else:
            self._graph.replay()
        return self._logits[: len(batch.sampled_tokens)]

    def _capture(self, pool: Any) -> None:
        """Run once, so that whatever is made at first is made, with padding alone; then record."""
        self._forward(self._inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            stream = _capture_stream(self._data.device)
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                logits = self._forward(self._inputs)
        except RuntimeError as error:
            raise CaptureError from error
        # The logits stay where the graph writes them, in memory that is free for the graphs captured after it, like all
        # that a graph computes on its way. That is safe: the pool serves captures alone and is not given back while one
        # of its graphs lives, and a graph that writes there is replayed in the order of the stream on which the logits
        # are read, after whoever reads them.
        self._logits = _unowned(logits)
        self._graph = graph


class _DeviceArray:
    """What `torch.as_tensor` makes a tensor of without a copy, see Numba's CUDA Array Interface, version 3."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.itemsize
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),  # in bytes
            "typestr": f"<i{size}",  # integers stand for every dtype, the interface does not know all of them
            "data": (tensor.data_ptr(), False),
        }


def _unowned(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements at the same place of a GPU, in a tensor that does not keep the memory allocated."""
    return torch.as_tensor(_DeviceArray(tensor), device=tensor.device).view(tensor.dtype)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device's captures, the same for all: for each stream cuBLAS keeps 32 MiB for ever.

    torch's own is one for the process, on the device that was the first to capture.
    """
    return torch.cuda.Stream(device)


def _padded(shape: StepShape, batch: PackedBatch, decode_tokens: Sequence[int], tiles: Iterable[int]) -> torch.Tensor:
    """The integers of a step on the host, one after the other, filled up to its shape.

    Padding that no sequence is there for is attended for as well, which writes zeros for it.
    """
    padding = range(len(batch.rows), shape.num_tokens)
    if shape.is_decode:
        decode_tokens = [*decode_tokens, *padding]
    else:
        size = shape.tile_size
        tiles = [*tiles, *(x for first in padding[::size] for x in (first, min(size, shape.num_tokens - first)))]
    parts: list[tuple[Sequence[int], int, int]] = [
        (batch.token_ids, shape.num_tokens, 0),
        (batch.positions, shape.num_tokens, 0),
        (batch.rows, shape.num_tokens, -1),
        (batch.sources, shape.num_tokens, -1),
        (decode_tokens, shape.num_decodes, -1),
        (list(tiles), 2 * shape.num_tiles, 0),
        (batch.sampled_tokens, shape.num_sampled, 0),
    ]
    integers = np.empty(sum(size for _, size, _ in parts), np.int64)
    start = 0
    for values, size, filling in parts:
        assert len(values) <= size, "the step is larger than its shape"
        integers[start : start + len(values)] = values
        integers[start + len(values) : start + size] = filling
        start += size
    return torch.from_numpy(integers)


def _fill(target: torch.Tensor, rows: torch.Tensor, padding: float) -> None:
    """Copy each token's row; `padding` behind them."""
    host = torch.full(target.shape, padding, dtype=target.dtype)
    host[: len(rows)] = rows
    copy_into(target, host)
