"""Turn a scheduled step into one forward pass over packed tokens, and their next ones."""

from __future__ import annotations

import importlib.util
import logging
import threading
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal
from weakref import WeakSet

import torch

from langchain_lora_retriever.engine.adapter_transfer import StagedStore
from langchain_lora_retriever.engine.logits_rules import PendingTokens
from langchain_lora_retriever.engine.model.attention import PagedCache
from langchain_lora_retriever.engine.model.joint_linears import speed_up_output_layer
from langchain_lora_retriever.engine.model.lora_layers import LoraLayers
from langchain_lora_retriever.engine.model.memory import longest_sequence, num_state_slots, plan_memory
from langchain_lora_retriever.engine.model.packed_adapter import AdapterPacking
from langchain_lora_retriever.engine.model.packed_batch import PackedBatch
from langchain_lora_retriever.engine.model.probe import input_device, num_embeddings, probe_model, use_attention
from langchain_lora_retriever.engine.model.recurrent import RecurrentLayers
from langchain_lora_retriever.engine.model.selfcheck import check_model
from langchain_lora_retriever.engine.model.torch_executor import TorchExecutor
from langchain_lora_retriever.engine.pending_step import PendingStep
from langchain_lora_retriever.engine.pinned_copy import on_device
from langchain_lora_retriever.engine.sampler import Choice, choose, is_plain_greedy, score
from langchain_lora_retriever.errors import EngineError
from lora_retriever_kernels.host_memory import lazy_zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.config import EngineConfig
    from langchain_lora_retriever.engine.model.load import BaseModel
    from langchain_lora_retriever.engine.model.probe import AttentionGeometry, Vocabulary
    from langchain_lora_retriever.engine.model.triton_executor import TritonExecutor
    from langchain_lora_retriever.engine.request import Request
    from langchain_lora_retriever.engine.scheduler import ScheduledRequest
    from langchain_lora_retriever.types import Adapter

__all__ = ["ModelRunner"]

_logger = logging.getLogger(__name__)
_SHORT = 64  # tokens of a sequence that any model takes
_claimed: WeakSet[PreTrainedModel] = WeakSet()
_claims = threading.Lock()


class ModelRunner:
    """The model, its KV cache and its adapters' tensors: everything that lives on the device.

    Args:
        base: The loaded model. It belongs to the runner until `close`.
        config: Limits.
        expected: Adapters for whose kinds it prepares, where `config` does not say for which.

    Attributes:
        device: Where token ids go and chosen tokens come from.
        probe: What is known of the model.
        memory: Sizes of everything.
        vocab_size: Token ids there are: rows of the model's embedding.
        executor: Runs the model over packed tokens.

    Raises:
        EngineError: If the architecture or the memory does not allow serving.
    """

    def __init__(self, base: BaseModel, config: EngineConfig, expected: Sequence[Adapter] = ()) -> None:
        self._model = base.model
        self.device = input_device(base.model)
        self._give_back = ExitStack()  # what `close` undoes, in reverse order
        self._caches: dict[int, PagedCache] = {}
        try:
            with on_device(self.device):
                self._take(base, config, expected)
        except BaseException:
            self.close()
            raise
        is_on_gpu = self.device.type == "cuda"
        self._is_async = is_on_gpu if config.enable_async_scheduling is None else config.enable_async_scheduling

    def _take(self, base: BaseModel, config: EngineConfig, expected: Sequence[Adapter]) -> None:
        """Make everything, and note for each change of the model how it is undone."""
        self._give_back.callback(_claim(base.model))
        self._give_back.callback(_modes(base.model))
        base.model.eval().requires_grad_(requires_grad=False)
        try:
            longest = longest_sequence(base.model, config)
        except EngineError:
            probe_model(base.model, _SHORT)  # a model that cannot be served at all is told so first
            raise
        self.probe = probe_model(base.model, longest)
        check_model(base.model, self.probe, longest)
        self.probe = self.probe._replace(calls={})  # they hold tensors
        if config.adapter_kinds is None:
            config = replace(config, adapter_kinds=_kinds_of(expected, self.probe.vocabulary))
        self.memory = plan_memory(base, self.probe, config)
        self._give_back.callback(speed_up_output_layer(base.model))
        self._adapts_vocabulary = "vocabulary" in (config.adapter_kinds or ())
        try:
            self.lora_layers = LoraLayers(
                base.model,
                self.probe.linear_groups,
                num_rows=self.memory.num_lora_rows,
                max_loras=config.max_loras,
                max_num_tokens=self.memory.max_num_batched_tokens,
                max_adapters_per_token=config.max_adapters_per_request,
                vocabulary=self.probe.vocabulary if self._adapts_vocabulary else None,
            )
        except RuntimeError as error:  # whichever allocator it is
            raise EngineError(
                f"There is no memory for {self.memory.num_lora_rows:,} rank rows of adapters: lower lora_cache_bytes."
            ) from error
        self._give_back.callback(self.lora_layers.release)
        for layer, geometry in self.probe.attention.items():
            self._caches[layer] = self._make_cache(geometry, config.block_size)
        self._give_back.callback(use_attention, base.model, use_attention(base.model))
        self._give_back.callback(self.lora_layers.detach)
        self.lora_layers.attach()
        num_slots = num_state_slots(self.memory.max_num_seqs)
        self._recurrent = RecurrentLayers(base.model, self.probe.recurrent, num_slots, self.lora_layers)
        self._give_back.callback(self._recurrent.release)
        self._recurrent.attach()
        self.vocab_size = num_embeddings(base.model)
        # Grammars know the tokenizer's tokens, which may be more than the model's.
        self._num_known = max(base.tokenizer.get_vocab().values(), default=-1) + 1
        # The tokens that the last step chose, and the bits of their logits as float64, see `Choice.of_pairs`.
        self._chosen = torch.zeros(self.memory.max_num_seqs, 2, dtype=torch.int64, device=self.device)
        self._last_choice: dict[Request, int] = {}
        self.executor: TorchExecutor | TritonExecutor = self._make_executor(config)
        self._give_back.callback(self.executor.close)
        self._log_memory(config)

    @property
    def is_async(self) -> bool:
        """Whether a step should be launched before the last one's tokens are read."""
        return self._is_async

    @property
    def step_sizes(self) -> Sequence[int]:
        """Numbers of tokens to which steps with prompts in them are padded, ascending; () if they are not padded."""
        return self.executor.step_sizes

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """`(in_features, out_features)` of every module that an adapter may target, by module path."""
        vocabulary = self.probe.vocabulary.module_shapes if self._adapts_vocabulary else {}
        return {**self.probe.module_shapes, **vocabulary}

    def make_store(self) -> StagedStore:
        """Where adapters are loaded from; it must be closed before the runner is."""
        packing = None
        if self.memory.num_staging_rows:
            packing = AdapterPacking.of(self.lora_layers.stacks, self.lora_layers)
        return StagedStore(
            self.lora_layers,
            packing,
            num_rows=self.memory.num_staging_rows,
            pinned_bytes=self.memory.num_pinned_bytes,
        )

    def launch(self, scheduled: Sequence[ScheduledRequest]) -> PendingStep:
        """Compute the step's tokens, write their KV and choose the next ones. Call under `torch.inference_mode`.

        On a GPU this returns before the device is done. A pending token must have been chosen by the launch before.
        """
        batch = PackedBatch.pack(scheduled, self._last_choice)
        requests = batch.sampled_requests
        is_greedy = self.executor.chooses_greedily and all(map(is_plain_greedy, requests))
        pending = None
        if not is_greedy and any(request.rules is not None for request in requests):
            # A token that is chosen is embedded in the next step, before anybody could look at it. An executor that
            # chooses overwrites it, so that rules look at a copy.
            places = [batch.sources[token] for token in batch.sampled_tokens]
            pending = PendingTokens(self._chosen[:, 0].clone(), places)
        logits = self.executor.forward(batch)[:, : self.vocab_size]
        chosen_logits, scored_logits = logits.split([len(requests), len(batch.scored_tokens)])
        scores = None
        if batch.scored_tokens:
            scores = score(scored_logits, [request.prompt_token_ids[place] for request, place in batch.scored_requests])
        if is_greedy:
            choice = Choice.of_pairs(self._chosen[: len(requests)])
        else:
            choice = choose(chosen_logits, requests, num_known=self._num_known, pending=pending)
            self._chosen[: len(requests), 0] = choice.token_ids
        self._last_choice = {request: place for place, request in enumerate(requests)}
        return PendingStep(requests, choice, batch.scored_requests, scores)

    def forget_choices(self) -> None:
        """Let go of the last step's requests: no request has a token pending."""
        self._last_choice = {}

    def close(self) -> None:
        """Give the model back as it was and drop the device memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._caches.clear()  # the executor's too
        self._give_back.close()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for others: an allocator keeps what its own process may want again

    def _make_cache(self, geometry: AttentionGeometry, block_size: int) -> PagedCache:
        shape = (self.memory.num_blocks, block_size, geometry.num_kv_heads)
        try:
            keys, values = (
                lazy_zeros((*shape, width), dtype=geometry.dtype, device=geometry.device)
                for width in (geometry.head_dim, geometry.value_dim)
            )
        except RuntimeError as error:  # whichever allocator it is
            raise EngineError(
                f"The KV cache of {self.memory.num_blocks:,} blocks does not fit into the memory of {geometry.device}: "
                "lower kv_cache_bytes or gpu_memory_utilization."
            ) from error
        return PagedCache(keys, values, geometry.pattern)

    def _log_memory(self, config: EngineConfig) -> None:
        weights = sum(parameter.nbytes for parameter in self._model.parameters())
        cache = sum(tensor.nbytes for layer in self._caches.values() for tensor in (layer.keys, layer.values))
        rows = sum(tensor.nbytes for _, stack in self.lora_layers.stacks for tensor in (stack.a, stack.b))
        _logger.info(
            "%s on %s, %s attention: %d MB of weights; %d tokens of KV cache, %d MB; %d rank rows for adapters, %d MB",
            type(self._model).__name__, self.device, self.executor.name, weights >> 20,
            self.memory.num_blocks * config.block_size, cache >> 20, self.memory.num_lora_rows, rows >> 20,
        )  # fmt: skip

    def _make_executor(self, config: EngineConfig) -> TorchExecutor | TritonExecutor:
        """The Triton backend, where it is asked for or serves; else PyTorch's.

        Raises:
            EngineError: If Triton is asked for and cannot be used.
        """
        devices = {self.device, *(geometry.device for geometry in self.probe.attention.values())}
        devices |= {group.device for group in self.probe.linear_groups}
        is_whole = len(devices) == 1 and not any(hasattr(module, "_hf_hook") for module in self._model.modules())
        has_triton = importlib.util.find_spec("triton") is not None
        if config.attention_backend == "triton" and not (is_whole and has_triton):
            raise EngineError(
                'attention_backend="triton" needs Triton and a model that lies on one device without offloading; '
                f"Triton is {'' if has_triton else 'not '}installed and the model is on "
                f'{", ".join(sorted(map(str, devices)))}. Use "auto".'
            )
        serves = is_whole and has_triton and self.device.type == "cuda"
        if config.attention_backend == "torch" or (config.attention_backend == "auto" and not serves):
            if self.device.type == "cuda":
                _logger.warning("This placement of the model runs without CUDA graphs and fused kernels.")
            return TorchExecutor(self._model, self._caches, self.lora_layers, self._recurrent, self._chosen[:, 0])
        from langchain_lora_retriever.engine.model.triton_executor import TritonExecutor  # noqa: PLC0415 - needs Triton

        state = (self._caches, self.lora_layers, self._recurrent, self.memory, config, self._chosen)
        return TritonExecutor(self._model, self.probe, *state, vocab_size=self.vocab_size)


def _claim(model: PreTrainedModel) -> Callable[[], None]:
    """Take a model for one runner, which changes its modules; returns what lets it go.

    Raises:
        EngineError: If another has it.
    """
    with _claims:
        if model in _claimed:
            raise EngineError(
                f"This {type(model).__name__} is served by another engine, which has changed its modules. Close that "
                "one first (llm.close()), share it (ChatLoraRetriever(engine=llm.runtime.engine, ...)), or give each a "
                "model of its own."
            )
        _claimed.add(model)
    return partial(_claimed.discard, model)


def _kinds_of(adapters: Sequence[Adapter], vocabulary: Vocabulary) -> tuple[Literal["vocabulary", "dora"], ...]:
    """The kinds among some adapters that an engine has to be ready for."""
    layers = vocabulary.module_shapes.keys()
    kinds: list[Literal["vocabulary", "dora"]] = []
    if any(not layers.isdisjoint(adapter.weights) for adapter in adapters):
        kinds.append("vocabulary")
    if any(adapter.is_dora for adapter in adapters):
        kinds.append("dora")
    return tuple(kinds)


def _modes(model: PreTrainedModel) -> Callable[[], None]:
    """Return what gives modules and parameters the modes back that they have now: training or not, trainable or not."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for module, is_training in training:
            module.training = is_training
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)

    return restore
