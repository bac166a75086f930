"""How much device memory goes to the KV cache and to adapters: decided once, before anything is served."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from langchain_lora_retriever.engine.model.step_graph import MAX_CAPTURED_TOKENS
from langchain_lora_retriever.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.config import EngineConfig
    from langchain_lora_retriever.engine.model.load import BaseModel
    from langchain_lora_retriever.engine.model.probe import ModelProbe

__all__ = [
    "MemoryPlan",
    "activation_bytes",
    "default_lora_bytes",
    "longest_sequence",
    "num_state_slots",
    "plan_memory",
    "step_limits",
]

_logger = logging.getLogger(__name__)

_CPU_CACHE_TOKENS_PER_SEQ = 2048  # what the CPU default sets aside for each running request
_CPU_MEMORY_SHARE = 0.25  # of what is available, at most
_CPU_LORA_BYTES = 512 << 20
# What finished requests may keep, of the cache and of the adapters' rows each: this share of the weights' bytes, and at
# least so many tokens and rows. Running requests may have all that there is.
_CPU_WARM_SHARE = 1 / 8
_CPU_WARM_TOKENS = 2048
_CPU_WARM_ROWS = 128
_GPU_LORA_SHARE = 0.1
_LEAST_BLOCKS = 2
_MAX_REST_TOKENS = 128  # of prompts, which a GPU does in less time with a step of 2,048 than by themselves
_STAGING_SHARE = 1 / 16  # of the adapters' memory: where they arrive
_PINNED_LORA_FACTOR = 4  # times the adapters' device memory
_PINNED_SHARE = 0.25  # of the host's available memory, at most
_GPU_ACTIVATION_BYTES_PER_TOKEN = 64  # times hidden size: activations of one packed step, generously


class MemoryPlan(NamedTuple):
    """Sizes of everything that is allocated up front.

    Attributes:
        num_blocks: Blocks of the KV cache.
        num_warm_blocks: Of these, how many finished requests may keep before their own are used again.
        num_warm_rows: The same of `num_lora_rows`.
        num_lora_rows: Rank rows for adapters.
        num_staging_rows: Rank rows for adapters on their way to the device; none without a GPU.
        num_pinned_bytes: Page-locked host memory for adapters, at most.
        max_model_len: Maximum number of tokens of one request.
        max_num_seqs: Maximum number of running requests.
        max_num_batched_tokens: Maximum number of tokens of one step.
        num_usual_tokens: Up to how many of these prompts fill a step, see `Scheduler`.
        max_num_prefill_tokens: Maximum number of tokens of one prompt in a step that serves more streams than
            prompts; None: no limit.
    """

    num_blocks: int
    num_warm_blocks: int
    num_warm_rows: int
    num_lora_rows: int
    num_staging_rows: int
    num_pinned_bytes: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_usual_tokens: int
    max_num_prefill_tokens: int | None


class StepLimits(NamedTuple):
    """How large steps may be: the fields of `MemoryPlan` of these names."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_usual_tokens: int


def step_limits(config: EngineConfig, *, on_gpu: bool) -> StepLimits:
    """Limits of steps, where a configuration leaves them open for a GPU or a CPU."""
    max_num_seqs = config.max_num_seqs or (128 if on_gpu else 16)
    num_usual = max(config.max_num_batched_tokens or (MAX_CAPTURED_TOKENS if on_gpu else 512), max_num_seqs)
    has_rest = on_gpu and config.max_num_batched_tokens is None
    return StepLimits(max_num_seqs, num_usual + (_MAX_REST_TOKENS if has_rest else 0), num_usual)


def activation_bytes(max_num_batched_tokens: int, hidden_size: int) -> int:
    """What a step's activations take on a GPU, and those of captured steps, generously."""
    num_tokens = max_num_batched_tokens + min(max_num_batched_tokens, MAX_CAPTURED_TOKENS)
    return num_tokens * hidden_size * _GPU_ACTIVATION_BYTES_PER_TOKEN


def default_lora_bytes(gpu_bytes: int | None) -> int:
    """Memory for adapters where a configuration leaves it open: on a GPU of so many bytes, or on a CPU (None)."""
    return _CPU_LORA_BYTES if gpu_bytes is None else int(_GPU_LORA_SHARE * gpu_bytes)


def num_state_slots(max_num_seqs: int) -> int:
    """Sequences whose states a model's recurrent layers keep: the running requests', and one for padding."""
    return max_num_seqs + 1


def longest_sequence(model: PreTrainedModel, config: EngineConfig) -> int:
    """Most tokens of one request, by the model's positions and by what the caller allows.

    LongRoPE rotates every token of a step otherwise as soon as one sequence is longer than the model was trained for at
    first, so that one request would change the answers of others: it is served up to that length.

    Raises:
        EngineError: If neither the model nor `config` says how long a sequence may be.
    """
    text = model.config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None), config.max_model_len]
    known = [int(limit) for limit in limits if limit is not None and limit > 0]
    if not known:
        raise EngineError(
            f"{type(model.config).__name__} does not say how long a sequence may be (max_position_embeddings): set "
            "EngineConfig(max_model_len=...)."
        )
    longest = min(known)
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        first = parameters.get("original_max_position_embeddings")
        if parameters.get("rope_type") == "longrope" and first is not None and first < longest:
            _logger.warning(
                "%s scales all positions of a step once a sequence is longer than %d tokens (LongRoPE): requests are "
                "served up to that length.", type(model).__name__, first,
            )  # fmt: skip
            longest = int(first)
    return longest


def plan_memory(base: BaseModel, probe: ModelProbe, config: EngineConfig) -> MemoryPlan:
    """Choose the sizes that `config` leaves open from what is free after loading.

    A rank row goes through the embedding and the output layer as well where `config` names that kind of adapters.

    Raises:
        EngineError: If not even one request of reasonable length would fit.
    """
    adapted = [*probe.linear_groups]
    if "vocabulary" in (config.adapter_kinds or ()):
        adapted += probe.vocabulary.groups
    devices = {g.device for g in probe.attention.values()} | {g.device for g in adapted}
    gpus = {device for device in devices if device.type == "cuda"}
    on_gpu = bool(gpus)
    limits = step_limits(config, on_gpu=on_gpu)
    max_model_len = longest_sequence(base.model, config)

    row_bytes = _bytes_by_device(
        (g.device, (len(g.names) * g.in_features + sum(g.out_features)) * g.dtype.itemsize) for g in adapted
    )
    num_lora_rows = _num_lora_rows(config, row_bytes)
    lora_bytes = num_lora_rows * sum(row_bytes.values())
    num_staging_rows = int(_STAGING_SHARE * num_lora_rows) if on_gpu else 0
    pinned_bytes = config.pinned_lora_bytes
    if pinned_bytes is None:
        available = int(_PINNED_SHARE * psutil.virtual_memory().available)
        pinned_bytes = min(_PINNED_LORA_FACTOR * lora_bytes, available) if on_gpu else 0

    block_bytes = _bytes_by_device((g.device, config.block_size * g.token_bytes) for g in probe.attention.values())
    num_warm_blocks = num_warm_rows = 0  # all of them
    if config.kv_cache_bytes is not None:
        num_blocks = config.kv_cache_bytes // sum(block_bytes.values())
    elif on_gpu:
        torch.cuda.empty_cache()  # what this process let go of counts as free
        state_bytes = _bytes_by_device(
            (g.device, num_state_slots(limits.max_num_seqs) * g.state_bytes) for g in probe.recurrent
        )
        activations = activation_bytes(limits.max_num_batched_tokens, base.model.config.get_text_config().hidden_size)
        taken = {
            device: num_lora_rows * row_bytes.get(device, 0) + state_bytes.get(device, 0) + activations
            for device in gpus
        }
        num_blocks = _num_blocks_on_gpus(config, block_bytes, taken)
    else:
        num_tokens = limits.max_num_seqs * min(max_model_len, _CPU_CACHE_TOKENS_PER_SEQ)
        num_blocks = min(
            num_tokens // config.block_size,
            int(_CPU_MEMORY_SHARE * psutil.virtual_memory().available) // sum(block_bytes.values()),
        )
    if not on_gpu:
        warm_bytes = int(_CPU_WARM_SHARE * sum(parameter.nbytes for parameter in base.model.parameters()))
        if config.kv_cache_bytes is None:
            num_warm_blocks = max(warm_bytes // sum(block_bytes.values()), _CPU_WARM_TOKENS // config.block_size)
        if config.lora_cache_bytes is None:
            num_warm_rows = max(warm_bytes // sum(row_bytes.values()), _CPU_WARM_ROWS)
    if num_blocks < _LEAST_BLOCKS:
        raise EngineError(
            f"There is room for {num_blocks} blocks of the KV cache, and {_LEAST_BLOCKS} are the least; one of "
            f"{config.block_size} tokens takes {sum(block_bytes.values()):,} bytes: free memory, lower "
            f"lora_cache_bytes ({lora_bytes:,}), or raise kv_cache_bytes or gpu_memory_utilization."
        )
    return MemoryPlan(
        num_blocks, num_warm_blocks or num_blocks, num_warm_rows or num_lora_rows,
        num_lora_rows - num_staging_rows, num_staging_rows, pinned_bytes,
        min(max_model_len, num_blocks * config.block_size), *limits,
        config.max_num_prefill_tokens or (256 if on_gpu else None),
    )  # fmt: skip


def _num_lora_rows(config: EngineConfig, row_bytes: Mapping[torch.device, int]) -> int:
    """Rank rows, staging ones among them; each takes its part on every device that linear modules are on.

    Raises:
        EngineError: If there is not even room for one.
    """
    all_bytes = sum(row_bytes.values())
    lora_bytes, num_rows = config.lora_cache_bytes, 0
    if lora_bytes is None:
        num_rows = min(
            default_lora_bytes(torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None) // num_bytes
            for device, num_bytes in row_bytes.items()
        )
        lora_bytes = num_rows * all_bytes
    num_rows = lora_bytes // all_bytes
    if num_rows < 1:
        raise EngineError(
            f"lora_cache_bytes={lora_bytes:,} is less than the {all_bytes:,} bytes that one rank of an adapter takes "
            "over all of this model's linear modules: raise it."
        )
    return num_rows


def _num_blocks_on_gpus(
    config: EngineConfig, block_bytes: Mapping[torch.device, int], taken: Mapping[torch.device, int]
) -> int:
    """Blocks of the KV cache that fit on every GPU beside what will be taken there."""
    num_blocks = []
    for device, num_bytes in block_bytes.items():
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            left = int(config.gpu_memory_utilization * total) - (total - free) - taken[device]
            num_blocks.append(max(left, 0) // num_bytes)
    return min(num_blocks, default=0)


def _bytes_by_device(parts: Iterable[tuple[torch.device, int]]) -> dict[torch.device, int]:
    """The sum of the parts that lie on each device."""
    total: dict[torch.device, int] = {}
    for device, num_bytes in parts:
        total[device] = total.get(device, 0) + num_bytes
    return total
