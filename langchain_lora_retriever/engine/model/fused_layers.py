"""Decoder layers of the usual shape, with everything between their matrix products fused.

transformers computes norms, rotations, residual additions and activations operation by operation. A layer that is built
as Llama, Mistral, Qwen or Gemma build theirs is recognised by its modules, and only its `forward` is replaced. Nothing
is taken on trust: each norm is read by what it computes, and `fused_check` compares each layer with its own forward,
with a rotation of queries and keys and without. Layers that it does not find equal stay as they are, beside fused ones.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lora_retriever_kernels.attention import QueryKeyNorm, Rotary
from lora_retriever_kernels.decoder import ACTIVATIONS, RmsNorm, add_rms_norm, gated_activation, rms_norm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.model.lora_layers import LoraLayers, Product
    from langchain_lora_retriever.engine.model.paged_step import PagedStep
    from langchain_lora_retriever.engine.model.probe import AttentionGeometry

__all__ = ["FusedForward", "FusedLayers"]

_logger = logging.getLogger(__name__)

_PLAIN_NORMS = frozenset({"input_layernorm", "post_attention_layernorm"})
_SANDWICH_NORMS = _PLAIN_NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}


class _Layer(NamedTuple):
    """One decoder layer, read."""

    module: nn.Module
    layer_idx: int
    geometry: AttentionGeometry
    qkv: Product
    out: Product
    gate_up: Product
    down: Product
    activation: str
    head_norm: QueryKeyNorm | None
    norm_before_attention: RmsNorm
    norm_after_attention: RmsNorm | None
    norm_before_mlp: RmsNorm
    norm_after_mlp: RmsNorm | None
    is_rotated: bool = True


class FusedLayers:
    """The layers of a decoder and its last norm, with fused forwards from `attach` to `detach`.

    Args:
        layers: Each layer of the decoder; None for one that is not fused.
        final: The norm behind the last.
        final_norm: What it computes; None if it is not fused.
    """

    def __init__(self, layers: list[_Layer | None], final: nn.Module | None, final_norm: RmsNorm | None) -> None:
        self._layers = layers
        self._final = final
        self._final_norm = final_norm
        self._handed_on: tuple[torch.Tensor, torch.Tensor] | None = None  # a layer's output, and its norm for the next

    @classmethod
    def recognise(
        cls, model: PreTrainedModel, lora_layers: LoraLayers, geometry: Mapping[int, AttentionGeometry]
    ) -> FusedLayers:
        """Read `model`; a layer that is built in another way is left out."""
        decoder = model.get_decoder()
        modules, final = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
        if not isinstance(modules, nn.ModuleList) or len(modules) != len(geometry):
            return cls([], None, None)
        names = {id(module): name for name, module in model.named_modules()}
        config = model.config.get_text_config()
        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
        layers: list[_Layer | None] = []
        for module in modules:
            try:
                layers.append(_read_layer(module, names[id(module)], lora_layers, geometry, activation))
            except Exception as error:  # noqa: BLE001 - code of other people's, run by guess; the layer works as it is
                _logger.warning("%s stays unfused: it could not be read: %r", names[id(module)], error)
                layers.append(None)
        try:
            final_norm = None if final is None else _read_norm(final)
        except Exception as error:  # noqa: BLE001 - likewise
            _logger.warning("The last norm stays unfused: it could not be read: %r", error)
            final_norm = None
        return cls(layers, final, final_norm)

    @property
    def num_fused(self) -> int:
        """Layers that run fused."""
        return sum(layer is not None for layer in self._layers)

    def candidates(self) -> Iterator[tuple[int, nn.Module, list[FusedForward]]]:
        """Each layer that could be fused: its place, its module, and the forwards to be tried in its stead."""
        for index, layer in enumerate(self._layers):
            if layer is not None:
                ways = (layer, layer._replace(is_rotated=False))
                yield index, layer.module, [FusedForward(self, way, None) for way in ways]

    def decide(self, index: int, forward: FusedForward | None) -> None:
        """Say which of its forwards a layer runs; None leaves it unfused."""
        self._layers[index] = None if forward is None else forward.layer

    def attach(self) -> None:
        """Replace the forwards."""
        following = self._final_norm
        for layer in reversed(self._layers):
            if layer is not None:
                layer.module.forward = FusedForward(self, layer, following)
            following = None if layer is None else layer.norm_before_attention
        if self._final is not None and self._final_norm is not None and self._layers and self._layers[-1] is not None:
            self._final.forward = self._forward_final

    def detach(self) -> None:
        """Give the modules their own forwards back."""
        for module in (*(layer.module for layer in self._layers if layer is not None), self._final):
            if module is not None:
                vars(module).pop("forward", None)
        self._handed_on = None

    def hand_on(self, hidden: torch.Tensor, normed: torch.Tensor) -> None:
        """Remember what the next layer's first norm makes of `hidden`."""
        self._handed_on = (hidden, normed)

    def take(self, hidden: torch.Tensor, norm: RmsNorm) -> torch.Tensor:
        """The norm of `hidden`, computed unless the layer before has done it."""
        handed_on, self._handed_on = self._handed_on, None
        if handed_on is not None and handed_on[0] is hidden:
            return handed_on[1]
        return rms_norm(hidden.reshape(-1, hidden.shape[-1]), norm)

    def _forward_final(self, hidden_states: torch.Tensor) -> torch.Tensor:
        assert self._final_norm is not None
        return self.take(hidden_states, self._final_norm).view(hidden_states.shape)


class FusedForward:
    """A decoder layer's forward: four products, attention, and one launch between each two of them.

    Args:
        stack: The layers it is one of.
        layer: What it computes.
        following: The norm that comes next; None if whoever comes next computes its own.
    """

    def __init__(self, stack: FusedLayers, layer: _Layer, following: RmsNorm | None) -> None:
        self._stack = stack
        self.layer = layer
        self._following = following

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *,
        attention_step: PagedStep,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """The layer's output, of the input's shape; other keywords than these are the attention's and not read."""
        layer = self.layer
        residual = hidden_states.reshape(-1, hidden_states.shape[-1])
        rotary = None
        if layer.is_rotated:
            assert position_embeddings is not None
            rotary = Rotary(position_embeddings[0][0], position_embeddings[1][0])
        x = self._stack.take(hidden_states, layer.norm_before_attention)
        x, delta = layer.qkv(x)
        x = attention_step.attend_projected(layer.layer_idx, x, delta, layer.geometry, rotary, layer.head_norm)
        x, delta = layer.out(x)
        residual, x = add_rms_norm(x, residual, layer.norm_before_mlp, layer.norm_after_attention, delta)
        x, delta = layer.gate_up(x)
        x, delta = layer.down(gated_activation(x, layer.activation, delta))
        if self._following is None:
            if layer.norm_after_mlp is not None:
                x, delta = rms_norm(x, layer.norm_after_mlp, delta), None
            residual = residual + x if delta is None else residual + (x + delta)
            return residual.view(hidden_states.shape)
        residual, x = add_rms_norm(x, residual, self._following, layer.norm_after_mlp, delta)
        out = residual.view(hidden_states.shape)
        self._stack.hand_on(out, x)
        return out


def _read_layer(
    module: nn.Module,
    name: str,
    lora_layers: LoraLayers,
    geometry: Mapping[int, AttentionGeometry],
    activation: object,
) -> _Layer | None:
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    if attention is None or mlp is None or not isinstance(activation, str) or activation not in ACTIVATIONS:
        return None
    norm_names = _trained(module) - {"self_attn", "mlp"}
    if norm_names not in (_PLAIN_NORMS, _SANDWICH_NORMS):
        return None
    norms = {key: _read_norm(getattr(module, key)) for key in norm_names}
    products = [
        lora_layers.find_product(tuple(f"{name}.{part}" for part in parts))
        for parts in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        )
    ]
    has_head_norm, head_norm = _read_head_norm(attention, geometry[attention.layer_idx].head_dim)
    extra = _trained(attention) - {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
    extra |= _trained(mlp) - {"gate_proj", "up_proj", "down_proj"}
    if extra or None in norms.values() or None in products or (has_head_norm and head_norm is None):
        return None
    is_sandwich = norm_names == _SANDWICH_NORMS
    before_mlp = norms["pre_feedforward_layernorm" if is_sandwich else "post_attention_layernorm"]
    before_attention = norms["input_layernorm"]
    qkv, out, gate_up, down = products
    assert qkv is not None
    assert out is not None
    assert gate_up is not None
    assert down is not None
    assert before_attention is not None
    assert before_mlp is not None
    return _Layer(
        module,
        attention.layer_idx,
        geometry[attention.layer_idx],
        qkv,
        out,
        gate_up,
        down,
        activation,
        head_norm,
        before_attention,
        norms["post_attention_layernorm"] if is_sandwich else None,
        before_mlp,
        norms["post_feedforward_layernorm"] if is_sandwich else None,
    )


def _trained(module: nn.Module) -> set[str]:
    """Names of the children that have parameters."""
    return {name for name, child in module.named_children() if next(child.parameters(), None) is not None}


def _read_head_norm(attention: nn.Module, head_dim: int) -> tuple[bool, QueryKeyNorm | None]:
    """Whether there are norms of queries and keys, and what they are if they go over single heads."""
    modules = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if modules == [None, None]:
        return False, None
    query, key = (None if module is None else _read_norm(module) for module in modules)
    if query is None or key is None or query[1:] != key[1:]:
        return True, None
    if query.weight.shape[0] != head_dim or key.weight.shape[0] != head_dim:
        return True, None
    return True, QueryKeyNorm(query.weight, key.weight, query.eps, query.offset)


def _read_norm(module: nn.Module) -> RmsNorm | None:
    """What an RMS norm computes, found out by trying it; None if it is another norm."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    x = torch.randn(4, weight.shape[0], device=weight.device).to(weight.dtype)
    with torch.inference_mode():
        expected = module(x).float()
        plain = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        for offset in (0.0, 1.0):
            error = (plain * (weight.float() + offset) - expected).norm()
            if error <= 0.02 * expected.norm() and expected.norm() > 0:
                return RmsNorm(weight, eps, offset)
    return None
