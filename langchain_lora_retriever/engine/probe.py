"""Run a model once over two tokens, to learn what no configuration file says reliably.

Which modules are linear and see every token, which of them share an input, and what each attention layer keeps in its
cache: this holds for any architecture, quantisation and placement, because it is read off the model at work.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from langchain_lora_retriever.engine.attention import ATTENTION_IMPLEMENTATION
from langchain_lora_retriever.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

__all__ = ["AttentionGeometry", "LinearGroup", "ModelProbe", "input_device", "probe_model", "use_attention"]

_NUM_PROBE_TOKENS = 2


class AttentionGeometry(NamedTuple):
    """What one attention layer keeps per token, where, and how it attends."""

    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    num_heads: int
    scaling: float
    sliding_window: int | None
    softcap: float | None

    @property
    def token_bytes(self) -> int:
        """Cache bytes per token."""
        return self.num_kv_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize


class LinearGroup(NamedTuple):
    """Linear modules that were called in a row with the very same input tensor (q, k, v; gate, up)."""

    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class ModelProbe(NamedTuple):
    """What the probe saw."""

    attention: dict[int, AttentionGeometry]
    linear_groups: tuple[LinearGroup, ...]

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """`(in_features, out_features)` of every module that an adapter may target, by module path."""
        return {
            name: (group.in_features, out_features)
            for group in self.linear_groups
            for name, out_features in zip(group.names, group.out_features, strict=True)
        }


class _LinearCall(NamedTuple):
    name: str
    input: torch.Tensor  # kept alive, so that its identity cannot be taken by a later tensor
    output: torch.Tensor


class _ProbeStep:
    """An `AttentionStep` that attends to nothing and writes down the layers' geometry."""

    def __init__(self) -> None:
        self.geometry: dict[int, AttentionGeometry] = {}

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        self.geometry[layer_idx] = AttentionGeometry(
            key.shape[1], key.shape[2], value.shape[2], key.dtype, key.device, query.shape[1],
            scaling, sliding_window, softcap,
        )  # fmt: skip
        return query.new_zeros((*query.shape[:2], value.shape[2]))


def probe_model(model: PreTrainedModel) -> ModelProbe:
    """Run `model` over two tokens and report its linear groups and attention layers.

    Raises:
        EngineError: If the model keeps state between tokens that is not attention.
    """
    calls: list[_LinearCall] = []
    step = _ProbeStep()
    tokens = torch.arange(_NUM_PROBE_TOKENS, device=input_device(model))[None]
    before = use_attention(model)
    try:
        with _recording(model, calls), torch.inference_mode():
            model(input_ids=tokens, position_ids=tokens, use_cache=False, logits_to_keep=1, attention_step=step)
    finally:
        use_attention(model, before)
    num_layers = model.config.get_text_config().num_hidden_layers
    if len(step.geometry) != num_layers:
        raise EngineError(
            f"{type(model).__name__} has {num_layers} layers of which {len(step.geometry)} attend through "
            "transformers' AttentionInterface: recurrent and hybrid models are not supported."
        )
    return ModelProbe(step.geometry, tuple(_group(calls)))


def use_attention(model: PreTrainedModel, implementation: str = ATTENTION_IMPLEMENTATION) -> str:
    """Switch `model` to an attention implementation, by default the paged one; returns the one it had."""
    before: str = model.config._attn_implementation  # noqa: SLF001 - transformers has a public setter but no getter
    model.set_attn_implementation(implementation)
    return before


@contextmanager
def _recording(model: PreTrainedModel, calls: list[_LinearCall]) -> Iterator[None]:
    def record(name: str) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(output, torch.Tensor) and output.shape[:-1].numel() == _NUM_PROBE_TOKENS:
                calls.append(_LinearCall(name, args[0], output))

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _group(calls: list[_LinearCall]) -> Iterator[LinearGroup]:
    start = 0
    for end in range(1, len(calls) + 1):
        if end == len(calls) or calls[end].input is not calls[start].input:
            members = calls[start:end]
            output = members[0].output  # under offloading, the input may still be elsewhere
            yield LinearGroup(
                tuple(call.name for call in members),
                members[0].input.shape[-1],
                tuple(call.output.shape[-1] for call in members),
                output.dtype,
                output.device,
            )
            start = end


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go; offloaded embeddings have no device of their own, and accelerate moves the ids."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return torch.device("cpu") if weight.is_meta else weight.device
