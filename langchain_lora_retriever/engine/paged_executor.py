"""Forward passes of a model on one device, with Triton attention, fused layers and captured decode steps."""

from __future__ import annotations

import bisect
import logging
from functools import partial
from typing import TYPE_CHECKING

import torch

from langchain_lora_retriever.engine.block_tables import BlockTables
from langchain_lora_retriever.engine.decode_graph import CaptureError, DecodeGraph, bucket_sizes
from langchain_lora_retriever.engine.fused_layers import FusedLayers
from langchain_lora_retriever.engine.paged_step import PagedStep, QueryTiles
from langchain_lora_retriever.engine.upload import upload
from paged_attention import Pages, queries_per_tile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.attention import PagedCache
    from langchain_lora_retriever.engine.config import EngineConfig
    from langchain_lora_retriever.engine.decode_graph import StaticInputs
    from langchain_lora_retriever.engine.lora_layers import LoraLayers
    from langchain_lora_retriever.engine.memory import MemoryPlan
    from langchain_lora_retriever.engine.packed_batch import PackedBatch
    from langchain_lora_retriever.engine.probe import ModelProbe

__all__ = ["PagedExecutor"]

_logger = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-3}  # of the fused layers' logits, by relative norm
_TOLERANCE_16_BIT = 5e-2


class PagedExecutor:
    """Computes packed steps. The model's attention must be the paged one, its linear modules wrapped.

    Args:
        model: The model, all of it on one device.
        probe: What is known of it.
        caches: Each layer's cache; block 0 is written and cleared again.
        lora_layers: Its adapters.
        memory: Sizes.
        config: What to use.
        chosen: The last step's tokens `[>= max_num_seqs]`, int64, read for pending tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        probe: ModelProbe,
        caches: Mapping[int, PagedCache],
        lora_layers: LoraLayers,
        memory: MemoryPlan,
        config: EngineConfig,
        chosen: torch.Tensor,
    ) -> None:
        self._model = model
        self._caches = caches
        self._lora_layers = lora_layers
        self._device = chosen.device
        self._chosen = chosen
        self._tables = BlockTables(memory.max_num_seqs, -(-memory.max_model_len // config.block_size), self._device)
        geometry = next(iter(probe.attention.values()))
        self._tile_size = queries_per_tile(geometry.num_heads, geometry.num_kv_heads)
        self._fused = self._fuse(probe) if config.enable_fused_layers else None
        self._buckets = bucket_sizes(memory.max_num_seqs) if config.enable_cuda_graphs else []
        self._graphs: dict[tuple[int, int, tuple[int, int] | None], DecodeGraph] = {}
        is_captured = bool(self._buckets) and self._device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if is_captured else None

    @property
    def is_fused(self) -> bool:
        """Whether the model's layers run fused."""
        return self._fused is not None

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Logits `[num_sampled, vocab_size]` of a step, in order of `batch.sampled_requests`."""
        self._tables.sync(item.request for item in batch.scheduled)
        if batch.is_decode and self._buckets:
            try:
                return self._decode(batch)
            except CaptureError as error:
                _logger.warning("%s runs without CUDA graphs: %s", type(self._model).__name__, error.__cause__)
                self._buckets = []
        self._lora_layers.set_batch(
            [
                (item.num_new_tokens, item.request.lora_slots or (), [w for _, w in item.request.adapters])
                for item in batch.scheduled
            ]
        )
        tokens = upload([batch.token_ids, batch.positions, batch.rows, batch.sources], torch.int64, self._device)
        return self._run(tokens, self._tiles(batch), upload(batch.sampled_tokens, torch.int64, self._device))

    def close(self) -> None:
        """Give the model's layers their own forwards back, and drop the graphs."""
        self._graphs.clear()
        if self._fused is not None:
            self._fused.detach()

    def _decode(self, batch: PackedBatch) -> torch.Tensor:
        num_tokens = self._buckets[bisect.bisect_left(self._buckets, len(batch.token_ids))]
        adapters = tuple(
            (item.request.lora_slots or (), tuple(w for _, w in item.request.adapters)) for item in batch.scheduled
        )
        k = max(len(slots) for slots, _ in adapters)
        num_active = len({slot for slots, _ in adapters for slot in slots})
        key = (num_tokens, k, self._lora_layers.launch_shape(num_tokens, k, num_active))
        graph = self._graphs.get(key)
        if graph is None:
            forward = partial(self._run_static, num_active)
            graph = self._graphs[key] = DecodeGraph(forward, num_tokens, k, self._device, self._pool)
        return graph.replay(batch, adapters)

    def _run_static(self, num_active: int, inputs: StaticInputs) -> torch.Tensor:
        """A decode step that reads nothing from the host, every token with logits."""
        self._lora_layers.set_device_batch(inputs.lora_slots, inputs.lora_weights, num_active)
        num_tokens = inputs.tokens.shape[1]
        decode_tokens = torch.arange(num_tokens, device=self._device)
        return self._run(inputs.tokens, QueryTiles(decode_tokens, decode_tokens[:0].view(0, 2)), None)

    def _run(self, tokens: torch.Tensor, tiles: QueryTiles, sampled: torch.Tensor | None) -> torch.Tensor:
        token_ids, positions, rows, sources = tokens
        token_ids = torch.where(sources >= 0, self._chosen[sources.clamp_min(0)], token_ids)
        output = self._model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if sampled is None else sampled,
            attention_step=PagedStep(self._caches, Pages(self._tables.tables, rows, positions), tiles),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _tiles(self, batch: PackedBatch) -> QueryTiles:
        decode_tokens: list[int] = []
        prefill_tiles: list[tuple[int, int]] = []
        start = 0
        for item in batch.scheduled:
            num, size = item.num_new_tokens, self._tile_size
            if num == 1:
                decode_tokens.append(start)
            else:
                prefill_tiles += [(start + i, min(size, num - i)) for i in range(0, num, size)]
            start += num
        tiles = upload(prefill_tiles, torch.int64, self._device).view(-1, 2)
        return QueryTiles(upload(decode_tokens, torch.int64, self._device), tiles)

    def _fuse(self, probe: ModelProbe) -> FusedLayers | None:
        """The model's layers, fused and attached, if they are of a known shape and give the same logits."""
        fused = FusedLayers.recognise(self._model, self._lora_layers, probe.attention)
        if fused is None:
            _logger.info("%s: layers of another shape; they run unfused", type(self._model).__name__)
            return None
        expected = self._try_out()
        fused.attach()
        got = self._try_out()
        error = float((got - expected).norm() / expected.norm())
        if error <= _TOLERANCE.get(self._model.dtype, _TOLERANCE_16_BIT):
            return fused
        fused.detach()
        _logger.warning(
            "%s: fused layers change the logits by %.1e (relative), more than rounding does; they run unfused",
            type(self._model).__name__, error,
        )  # fmt: skip
        return None

    @torch.inference_mode()
    def _try_out(self) -> torch.Tensor:
        """Logits of a few tokens in block 0, as a prompt and one more token."""
        num = min(next(iter(self._caches.values())).block_size, 8)
        self._lora_layers.set_device_batch(None, None)
        empty = torch.zeros(0, dtype=torch.int64, device=self._device)
        logits = []
        for positions, tiles in (
            (list(range(num - 1)), QueryTiles(empty, upload([(0, num - 1)], torch.int64, self._device))),
            ([num - 1], QueryTiles(upload([0], torch.int64, self._device), empty.view(0, 2))),
        ):
            if positions:
                zeros, none = [0] * len(positions), [-1] * len(positions)
                tokens = upload([[p + 1 for p in positions], positions, zeros, none], torch.int64, self._device)
                logits.append(self._run(tokens, tiles, None).float())
        for cache in self._caches.values():
            cache.keys[0].zero_()
            cache.values[0].zero_()
        return torch.cat(logits)
