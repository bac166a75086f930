"""Forward passes of a model on one device, with Triton attention, fused layers and captured steps."""

from __future__ import annotations

import logging
import time
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from langchain_lora_retriever.engine.model.attention import attending
from langchain_lora_retriever.engine.model.block_tables import BlockTables
from langchain_lora_retriever.engine.model.fused_check import check_fused
from langchain_lora_retriever.engine.model.fused_layers import FusedLayers
from langchain_lora_retriever.engine.model.lora_layers import StepKinds
from langchain_lora_retriever.engine.model.memory import num_state_slots
from langchain_lora_retriever.engine.model.paged_step import PagedStep, QueryTiles
from langchain_lora_retriever.engine.model.recurrent import StatePiece
from langchain_lora_retriever.engine.model.rotary_tables import RotaryTables
from langchain_lora_retriever.engine.model.step_graph import CaptureError, StepGraph, StepShapes
from langchain_lora_retriever.engine.pinned_copy import upload
from lora_retriever_kernels.attention import Pages, queries_per_tile
from lora_retriever_kernels.chosen_tokens import choose_greedily, fill_in_pending
from lora_retriever_kernels.lora.plan import power_of_2

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.config import EngineConfig
    from langchain_lora_retriever.engine.model.attention import PagedCache
    from langchain_lora_retriever.engine.model.lora_layers import LoraLayers
    from langchain_lora_retriever.engine.model.memory import MemoryPlan
    from langchain_lora_retriever.engine.model.packed_batch import PackedBatch
    from langchain_lora_retriever.engine.model.probe import ModelProbe
    from langchain_lora_retriever.engine.model.recurrent import RecurrentLayers
    from langchain_lora_retriever.engine.model.step_graph import StaticInputs, StepShape

    _GraphKey = tuple[StepShape, tuple[int, int, bool] | None, StepKinds]
    Adapters = list[tuple[int, Sequence[int], Sequence[float]]]  # for each sequence its tokens, slots and weights

__all__ = ["TritonExecutor"]

_logger = logging.getLogger(__name__)

_MAX_TOKENS_OF_HIGH_RANKS = 512  # of captured steps whose adapters' ranks are beyond the lowest of the bounds
_USUAL_NUM_STREAMS = 16  # beside prompts; decides how the streams' keys are split, as their number is data there


class TritonExecutor:
    """Computes packed steps. The model's attention must be the paged one, its linear modules wrapped.

    Args:
        model: The model, all of it on one device.
        probe: What is known of it.
        caches: Each layer's cache.
        lora_layers: Its adapters.
        recurrent: Its layers that keep states: with them, steps of streams alone are captured.
        memory: Sizes.
        config: What to use.
        chosen: The last step's tokens `[>= max_num_seqs, 2]` int64, see `lora_retriever_kernels.chosen_tokens`; read
            for pending tokens, then overwritten with the likeliest token after each of `PackedBatch.sampled_tokens`.
        vocab_size: Token ids there are; logits may be wider.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        probe: ModelProbe,
        caches: Mapping[int, PagedCache],
        lora_layers: LoraLayers,
        recurrent: RecurrentLayers,
        memory: MemoryPlan,
        config: EngineConfig,
        chosen: torch.Tensor,
        *,
        vocab_size: int,
    ) -> None:
        self._model = model
        self._caches = caches
        self._lora_layers = lora_layers
        self._recurrent = recurrent
        self._padding_slot = num_state_slots(memory.max_num_seqs) - 1
        self._device = chosen.device
        self._chosen = chosen
        self._vocab_size = vocab_size
        max_pages = -(-memory.max_model_len // config.block_size)
        self._tables = BlockTables(memory.max_num_seqs, max_pages, self._device)
        self._tile_size = min(queries_per_tile(g.num_heads, g.num_kv_heads) for g in probe.attention.values())
        self._num_layers = len(probe.attention)
        self._fused: FusedLayers | None = None
        self._rotary_tables: RotaryTables | None = None
        self._max_loras = config.max_loras
        self._rank_bounds = sorted({lora_layers.rank_bound(rank) for rank in config.captured_ranks})
        self._num_adapters = sorted(
            {0, *(num for num in config.captured_num_adapters if num <= config.max_adapters_per_request)}
        )
        kinds = config.adapter_kinds or ()
        self._kinds = StepKinds("dora" in kinds, "vocabulary" in kinds)
        self._shapes: StepShapes | None = None
        if config.enable_cuda_graphs:
            self._shapes = StepShapes(
                memory.max_num_seqs, memory.max_num_batched_tokens, self._tile_size, self._num_adapters,
                has_prompts=not recurrent,
            )  # fmt: skip
        self._graphs: dict[_GraphKey, StepGraph] = {}
        self._told: set[tuple[int, int, StepKinds]] = set()
        self._pool: Any = None
        try:
            self._fused = self._fuse(probe) if config.enable_fused_layers else None
            self._rotary_tables = RotaryTables(model, max_pages * config.block_size)
            if self._device.type == "cuda":
                self._warm_up(memory)
            if self._shapes is not None:
                self._capture_all(self._shapes)
        except BaseException:
            self.close()
            raise

    name = "triton"
    chooses_greedily = True
    """Whether a step writes to `chosen` itself."""

    @property
    def graphs(self) -> AbstractSet[Any]:
        """The steps that were captured."""
        return self._graphs.keys()

    @property
    def is_fused(self) -> bool:
        """Whether all of the model's layers run fused."""
        return self.num_fused_layers == self._num_layers

    @property
    def num_fused_layers(self) -> int:
        """How many of the model's layers run fused."""
        return self._fused.num_fused if self._fused is not None else 0

    @property
    def step_sizes(self) -> Sequence[int]:
        """Numbers of tokens of steps with prompts in them that run without padding; others are padded to the next."""
        return self._shapes.prompt_sizes if self._shapes is not None else ()

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Logits `[n, vocab_size]` of a step, in order of `batch.tokens_with_logits`."""
        self._tables.sync(item.request for item in batch.scheduled)
        decode_tokens, prefill_tiles = self._tiles(batch)
        rank_bound = self._rank_bound(batch.lora.active)
        graph = self._find_graph(batch, rank_bound)
        if graph is not None:
            return graph.replay(batch, decode_tokens, prefill_tiles)
        pieces = batch.state_pieces(self._device) if self._recurrent else []
        self._recurrent.set_step(pieces)
        wanted = batch.tokens_with_logits
        parts = [(piece.start, piece.num_tokens) for piece in pieces]
        self._lora_layers.set_batch(batch.lora, wanted, rank_bound, parts)
        tokens = upload([batch.token_ids, batch.positions, batch.rows, batch.sources], torch.int64, self._device)
        tiles = QueryTiles(
            upload(decode_tokens, torch.int64, self._device),
            upload(prefill_tiles, torch.int64, self._device).view(-1, 2),
            len(decode_tokens),
        )
        return self._run(tokens, tiles, upload(wanted, torch.int64, self._device), len(batch.sampled_tokens))

    def close(self) -> None:
        """Give the model's layers their own forwards back, and drop the graphs."""
        self._graphs.clear()
        if self._rotary_tables is not None:
            self._rotary_tables.detach()
        if self._fused is not None:
            self._fused.detach()

    def _rank_bound(self, slots: frozenset[int]) -> int:
        """For which ranks a step that names these adapters is launched: one that was foreseen, if there is one."""
        needed = self._lora_layers.rank_bound(self._lora_layers.highest_rank(slots))
        return next((bound for bound in self._rank_bounds if bound >= needed), needed)

    def _find_graph(self, batch: PackedBatch, rank_bound: int) -> StepGraph | None:
        """The graph that serves a step; None if the step runs without. Nothing is captured while serving."""
        if self._shapes is None or batch.scored_tokens:  # a graph has room for the sampled tokens' logits alone
            return None
        num_adapters = batch.lora.num_adapters
        kinds = self._captured_kinds(self._lora_layers.kinds_of(batch.lora.active))
        shape = self._shapes.find(len(batch.token_ids), num_adapters, is_decode=batch.is_decode)
        graph = None
        if shape is not None and kinds is not None:
            graph = self._graphs.get(self._key(shape, len(batch.lora.active), rank_bound, kinds))
        if (
            kinds is None
            or num_adapters > self._num_adapters[-1]
            or (num_adapters and rank_bound not in self._rank_bounds)
        ):
            self._tell(num_adapters, rank_bound, kinds)
        return graph

    def _captured_kinds(self, kinds: StepKinds) -> StepKinds | None:
        """Of which kinds the graphs that serve a step are: of none, or of all that were foreseen. None without any."""
        if kinds == StepKinds():
            return kinds
        is_foreseen = all(captured or not wanted for captured, wanted in zip(self._kinds, kinds, strict=True))
        return self._kinds if is_foreseen else None

    def _key(self, shape: StepShape, num_active: int, rank_bound: int, kinds: StepKinds) -> _GraphKey:
        """Which graph serves steps of a shape; few adapters and many are told apart for the lowest ranks alone."""
        if not shape.num_adapters:
            return shape, None, StepKinds()
        num_active = self._reckoned(num_active, rank_bound)
        launch = self._lora_layers.launch_shape(shape.num_tokens, shape.num_adapters, num_active, rank_bound)
        return shape, launch, kinds

    def _reckoned(self, num_active: int, rank_bound: int) -> int:
        """For how many adapters a step is launched: up to a power of two, so that few differ; of high ranks for one.

        What is launched for one reads an adapter's rows once for all of its tokens, however many adapters there are.
        """
        return min(power_of_2(num_active), self._max_loras) if rank_bound == self._rank_bounds[0] else 1

    def _tell(self, num_adapters: int, rank_bound: int, kinds: StepKinds | None) -> None:
        """Say once what runs without graphs."""
        key = (num_adapters, rank_bound, kinds or StepKinds())
        if key in self._told:
            return
        self._told.add(key)
        if kinds is None:
            _logger.warning(
                "Steps with DoRA adapters run without CUDA graphs: start the engine with "
                'EngineConfig(adapter_kinds=("dora",)), or with a pool that has such an adapter.'
            )
            return
        _logger.warning(
            "Steps with %d adapters of ranks up to %d run without CUDA graphs: name them in captured_num_adapters "
            "%s and captured_ranks %s.", num_adapters, rank_bound, self._num_adapters, self._rank_bounds,
        )  # fmt: skip

    @torch.inference_mode()
    def _warm_up(self, memory: MemoryPlan) -> None:
        """Take the memory and compile the kernels of the largest steps."""
        # A launch with a multiple of 16 tokens is compiled apart from others.
        for num_tokens in {memory.max_num_batched_tokens, max(1, memory.max_num_batched_tokens - 1)}:
            for num_adapters in self._num_adapters:
                for rank_bound in self._rank_bounds[: None if num_adapters else 1]:
                    for kinds in dict.fromkeys((StepKinds(), self._kinds if num_adapters else StepKinds())):
                        self._run_padding(num_tokens, num_adapters, memory.max_num_seqs, rank_bound, kinds)
        self._pool = torch.cuda.graph_pool_handle()

    @torch.inference_mode()
    def _capture_all(self, shapes: StepShapes) -> None:
        """Capture every foreseen step."""
        start = time.perf_counter()
        nums_active = {
            bound: sorted({self._reckoned(num, bound) for num in range(1, self._max_loras + 1)})
            for bound in self._rank_bounds
        }
        try:
            for shape in shapes.all():
                for rank_bound in self._rank_bounds[: None if shape.num_adapters else 1]:
                    is_lowest = rank_bound == self._rank_bounds[0]
                    if is_lowest or shape.num_tokens <= _MAX_TOKENS_OF_HIGH_RANKS:
                        kinds_of_step = dict.fromkeys((StepKinds(), self._kinds))
                        for num_active, kinds in product(nums_active[rank_bound], kinds_of_step):
                            self._capture(shape, num_active, rank_bound, kinds)
        except CaptureError as error:
            self._give_up_graphs(error)
            return
        _logger.info("%d graphs captured in %.1f s", len(self._graphs), time.perf_counter() - start)

    def _capture(self, shape: StepShape, num_active: int, rank_bound: int, kinds: StepKinds) -> None:
        key = self._key(shape, num_active, rank_bound, kinds)
        if key not in self._graphs:
            forward = partial(self._run_static, shape, num_active, rank_bound, key[2])
            self._graphs[key] = StepGraph(forward, shape, self._device, self._pool)

    def _run_padding(
        self, num_tokens: int, num_adapters: int, num_sampled: int, rank_bound: int, kinds: StepKinds
    ) -> torch.Tensor:
        """A step of padding alone, without a graph."""
        slots = weights = None
        if num_adapters:
            slots = torch.full((num_tokens, num_adapters), -1, dtype=torch.int32, device=self._device)
            weights = torch.zeros(num_tokens, num_adapters, device=self._device)
        tokens = torch.zeros(4, num_tokens, dtype=torch.int64, device=self._device)
        tokens[2:] = -1
        zeros = tokens[0]
        sampled = zeros[: min(num_sampled, num_tokens)]
        self._lora_layers.set_device_batch(slots, weights, rank_bound=rank_bound, kinds=kinds, sampled=sampled)
        tiles = QueryTiles(zeros[:1] - 1, zeros[:2].view(1, 2), 1)
        if self._recurrent:
            slot = zeros[:1] + self._padding_slot
            self._recurrent.set_step([StatePiece(0, num_tokens, slot, True, is_decode=False)])
        return self._run(tokens, tiles, sampled, len(sampled))

    def _give_up_graphs(self, error: CaptureError) -> None:
        _logger.warning("%s runs without CUDA graphs: %s", type(self._model).__name__, error.__cause__)
        self._shapes = None
        self._graphs.clear()

    def _run_static(
        self, shape: StepShape, num_active: int, rank_bound: int, kinds: StepKinds, inputs: StaticInputs
    ) -> torch.Tensor:
        """A step that reads nothing from the host."""
        sampled = None if shape.is_decode else inputs.sampled  # a decode step's are its tokens, in order
        adapters = (inputs.lora_slots, inputs.lora_weights)
        self._lora_layers.set_device_batch(*adapters, num_active, rank_bound, kinds, sampled)
        num_sequences = shape.num_decodes if shape.is_decode else min(shape.num_decodes, _USUAL_NUM_STREAMS)
        tiles = QueryTiles(inputs.decode_tokens, inputs.prefill_tiles, num_sequences)
        if self._recurrent:
            _, positions, rows, _ = inputs.tokens
            slots = torch.where(rows >= 0, rows, self._padding_slot)
            self._recurrent.set_step([StatePiece(0, shape.num_tokens, slots, positions == 0, is_decode=True)])
        return self._run(inputs.tokens, tiles, inputs.sampled, shape.num_sampled)

    def _run(self, tokens: torch.Tensor, tiles: QueryTiles, wanted: torch.Tensor, num_sampled: int) -> torch.Tensor:
        """Logits after the wanted tokens; the likeliest next ones of the first `num_sampled` go to `chosen`."""
        token_ids, positions, rows, sources = tokens
        token_ids = fill_in_pending(token_ids, sources, self._chosen)
        with attending(PagedStep(self._caches, Pages(self._tables.tables, rows, positions), tiles)):
            output = self._model(
                input_ids=token_ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=wanted
            )
        logits: torch.Tensor = output.logits[0]
        choose_greedily(self._chosen, logits[:num_sampled], self._vocab_size)
        return logits

    def _tiles(self, batch: PackedBatch) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens that are their sequence's only one, and first token and length of pieces of the others."""
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
        return decode_tokens, prefill_tiles

    def _fuse(self, probe: ModelProbe) -> FusedLayers | None:
        """The model's layers, those of them that are of a known shape and as exact as their own forwards attached."""
        self._lora_layers.set_device_batch(None, None)
        fused = FusedLayers.recognise(self._model, self._lora_layers, probe.attention)
        check_fused(self._model, fused, probe, self._tile_size)
        _logger.info("%s: %d of %d layers run fused", type(self._model).__name__, fused.num_fused, len(probe.attention))
        return fused if fused.num_fused else None
