"""Run packed steps with PyTorch's attention over gathered pages, wherever the model's layers lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from langchain_lora_retriever.engine.model.attention import GatheringStep, QuerySpan, attending
from langchain_lora_retriever.engine.pinned_copy import upload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.model.attention import PagedCache
    from langchain_lora_retriever.engine.model.lora_layers import LoraLayers
    from langchain_lora_retriever.engine.model.packed_batch import PackedBatch
    from langchain_lora_retriever.engine.model.recurrent import RecurrentLayers

__all__ = ["TorchExecutor"]


class TorchExecutor:
    """The model as it is, on any placement that accelerate knows.

    Args:
        model: The model.
        caches: Keys and values of each attention layer.
        lora_layers: The adapters.
        recurrent: The layers that keep states.
        chosen: The tokens that the last step chose, `[max_num_seqs]`, where token ids go.
    """

    name = "torch"
    step_sizes: Sequence[int] = ()
    """Steps are not padded."""
    graphs: AbstractSet[Any] = frozenset()
    """None is captured."""
    chooses_greedily = False
    """Whether a step writes to `chosen` itself."""
    is_fused = False
    num_fused_layers = 0

    def __init__(
        self,
        model: PreTrainedModel,
        caches: Mapping[int, PagedCache],
        lora_layers: LoraLayers,
        recurrent: RecurrentLayers,
        chosen: torch.Tensor,
    ) -> None:
        self._model = model
        self._caches = caches
        self._lora_layers = lora_layers
        self._recurrent = recurrent
        self._chosen = chosen
        self._is_on_one_device = len(set(map(str, getattr(model, "hf_device_map", {}).values()))) <= 1

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Logits `[n, vocab_size]` of a step, in order of `batch.tokens_with_logits`."""
        device = self._chosen.device
        pieces = batch.state_pieces(device) if self._recurrent else []
        self._recurrent.set_step(pieces)
        wanted = batch.tokens_with_logits
        self._lora_layers.set_batch(batch.lora, wanted, pieces=[(piece.start, piece.num_tokens) for piece in pieces])
        token_ids = upload(batch.token_ids, torch.int64, device)
        if max(batch.sources) >= 0:
            sources = upload(batch.sources, torch.int64, device)
            token_ids = torch.where(sources >= 0, self._chosen[sources.clamp_min(0)], token_ids)
        spans = [
            QuerySpan(num, request.num_computed_tokens + num, request.block_ids) for request, num in batch.scheduled
        ]
        with attending(GatheringStep(spans, self._caches)):
            output = self._model(
                input_ids=token_ids[None],
                position_ids=upload([batch.positions], torch.int64, device),
                use_cache=False,
                # The last hidden states may lie on another device than the inputs, where accelerate moves every tensor:
                # a list of places serves on any.
                logits_to_keep=upload(wanted, torch.int64, device) if self._is_on_one_device else wanted,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def close(self) -> None:
        """Nothing of the model was changed."""
