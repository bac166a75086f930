"""Turn a scheduled step into one forward pass over packed tokens, and its logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from langchain_lora_retriever.engine.attention import AttentionStep, PagedCache, QuerySpan
from langchain_lora_retriever.engine.lora_layers import LoraLayers
from langchain_lora_retriever.engine.memory import plan_memory
from langchain_lora_retriever.engine.probe import input_device, probe_model, use_attention

if TYPE_CHECKING:
    from collections.abc import Sequence

    from langchain_lora_retriever.engine.base_model import BaseModel
    from langchain_lora_retriever.engine.config import EngineConfig
    from langchain_lora_retriever.engine.scheduler import ScheduledRequest

__all__ = ["ModelRunner"]


class ModelRunner:
    """The model, its KV cache and its adapters' tensors: everything that lives on the device.

    Args:
        base: The loaded model. It belongs to the runner until `close`.
        config: Limits.

    Raises:
        EngineError: If the architecture or the memory does not allow serving.
    """

    def __init__(self, base: BaseModel, config: EngineConfig) -> None:
        self._model = base.model
        self._device = input_device(base.model)
        self.probe = probe_model(base.model)
        self.memory = plan_memory(base, self.probe, config)
        self.lora_layers = LoraLayers(
            base.model,
            self.probe.linear_groups,
            num_rows=self.memory.num_lora_rows,
            max_loras=config.max_loras,
            max_num_tokens=self.memory.max_num_batched_tokens,
            max_adapters_per_token=config.max_adapters_per_request,
        )
        # Zeros, not empty: attention multiplies masked values by 0, and 0 * NaN is NaN.
        self._caches = {
            layer: PagedCache(
                *(
                    torch.zeros(
                        (self.memory.num_blocks, config.block_size, geometry.num_kv_heads, width),
                        dtype=geometry.dtype,
                        device=geometry.device,
                    )
                    for width in (geometry.head_dim, geometry.value_dim)
                )
            )
            for layer, geometry in self.probe.attention.items()
        }
        self._own_attention = use_attention(base.model)
        self.lora_layers.attach()

    def execute(self, scheduled: Sequence[ScheduledRequest]) -> torch.Tensor:
        """Compute the step's tokens and write their KV. Call under `torch.inference_mode`.

        Returns:
            Logits `[num_sampled, vocab_size]` of the last token of every request that `is_sampled`, in order.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        sampled: list[int] = []
        spans: list[QuerySpan] = []
        for item in scheduled:
            request, start = item.request, item.request.num_computed_tokens
            end = start + item.num_new_tokens
            token_ids += request.tokens_between(start, end)
            positions += range(start, end)
            spans.append(QuerySpan(item.num_new_tokens, end, request.block_ids))
            if item.is_sampled:
                sampled.append(len(token_ids) - 1)
        self.lora_layers.set_batch(
            [
                (item.num_new_tokens, item.request.lora_slots or (), [w for _, w in item.request.adapters])
                for item in scheduled
            ]
        )
        output = self._model(
            input_ids=torch.tensor([token_ids], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            use_cache=False,
            logits_to_keep=torch.tensor(sampled, dtype=torch.int64, device=self._device),
            attention_step=AttentionStep(spans, self._caches),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def close(self) -> None:
        """Give the model back as it was and drop the device memory."""
        self.lora_layers.detach()
        use_attention(self._model, self._own_attention)
        self._caches = {}
