"""A decode step whose launches are captured once and replayed with other data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

from langchain_lora_retriever.engine.upload import copy_to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from langchain_lora_retriever.engine.packed_batch import PackedBatch

    Forward: TypeAlias = "Callable[[StaticInputs], torch.Tensor]"

__all__ = ["CaptureError", "DecodeGraph", "StaticInputs", "bucket_sizes"]

Adapters = tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]  # for each token its slots and weights


class CaptureError(Exception):
    """The step does something that cannot be captured; its cause says what."""


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of tokens for which there is a graph: a step takes the next larger one."""
    return sorted({n for n in (1, 2, 4, *range(8, max_num_seqs + 1, 8), max_num_seqs) if n <= max_num_seqs})


class StaticInputs(NamedTuple):
    """What a captured step reads, at addresses that never change.

    Attributes:
        tokens: `[4, num_tokens]` int64: token ids, positions, rows and sources, see `PackedBatch`; padding has row -1.
        lora_slots: `[num_tokens, k]` int32, -1 for none; None if no token of the step has adapters.
        lora_weights: `[num_tokens, k]` fp32.
    """

    tokens: torch.Tensor
    lora_slots: torch.Tensor | None
    lora_weights: torch.Tensor | None


class DecodeGraph:
    """A decode step of a fixed number of tokens and adapters per token.

    Args:
        forward: Computes the step from its inputs and returns logits `[num_tokens, vocab_size]`; it must only launch.
        num_tokens: Tokens, padding included.
        k: Adapters per token; 0 leaves adapters out.
        device: Where it runs. On a CPU nothing is captured, and a replay calls `forward`.
        pool: Memory that the graphs of one model share; they must not run at the same time.

    Raises:
        CaptureError: If `forward` waits for the device, or does something else that a graph cannot hold.
    """

    def __init__(self, forward: Forward, num_tokens: int, k: int, device: torch.device, pool: Any) -> None:
        tokens = torch.zeros(4, num_tokens, dtype=torch.int64, device=device)
        tokens[2:] = -1
        slots = torch.full((num_tokens, k), -1, dtype=torch.int32, device=device) if k else None
        weights = torch.zeros(num_tokens, k, dtype=torch.float32, device=device) if k else None
        self._inputs = StaticInputs(tokens, slots, weights)
        self._forward = forward
        self._adapters: Adapters | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)
        if device.type == "cuda":
            self._capture(pool)

    def replay(self, batch: PackedBatch, adapters: Adapters) -> torch.Tensor:
        """Run the step for `batch`.

        Returns:
            Logits `[len(batch.token_ids), vocab_size]`, valid until the next replay of any graph of the pool.
        """
        static, num = self._inputs, len(batch.token_ids)
        num_static = static.tokens.shape[1]
        padding = [0] * (num_static - num)
        none = [-1] * (num_static - num)
        host = torch.tensor(
            [batch.token_ids + padding, batch.positions + padding, batch.rows + none, batch.sources + none]
        )
        static.tokens.copy_(copy_to_device(host, static.tokens.device), non_blocking=True)
        if static.lora_slots is not None and static.lora_weights is not None and adapters != self._adapters:
            k = static.lora_slots.shape[1]
            _fill(static.lora_slots, [(*slots, *[-1] * (k - len(slots))) for slots, _ in adapters], -1)
            _fill(static.lora_weights, [(*w, *[0.0] * (k - len(w))) for _, w in adapters], 0)
            self._adapters = adapters
        if self._graph is None:
            self._logits = self._forward(static)
        else:
            self._graph.replay()
        return self._logits[:num]

    def _capture(self, pool: Any) -> None:
        """Warm up on a side stream, with padding alone, then record."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._logits = self._forward(self._inputs)
        except RuntimeError as error:
            raise CaptureError from error
        self._graph = graph


def _fill(target: torch.Tensor, rows: Sequence[Sequence[float]], padding: float) -> None:
    target[len(rows) :] = padding
    target[: len(rows)].copy_(copy_to_device(torch.tensor(rows, dtype=target.dtype), target.device), non_blocking=True)
