"""Decoder layers of the usual shape, with everything between their matrix products fused.

transformers computes norms, rotations, residual additions and activations operation by operation. A layer that is
built as Llama, Mistral, Qwen, Gemma, Phi or OLMo build theirs is recognised by its modules, and only its `forward` is
replaced; experts compute by their own. Nothing is taken on trust: each norm is read by what it computes, and
`fused_check` compares each layer with its own forward, with a rotation of queries and keys, read in two ways, and
without. Layers that it does not find equal stay as they are, beside fused ones.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import nn

from langchain_lora_retriever.engine.model.attention import current_step
from lora_retriever_kernels.attention import QueryKeyNorm, Rotary
from lora_retriever_kernels.decoder import ACTIVATIONS, RmsNorm, add_rms_norm, gated_activation, rms_norm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.model.linear_groups import Product
    from langchain_lora_retriever.engine.model.lora_layers import LoraLayers
    from langchain_lora_retriever.engine.model.paged_step import PagedStep
    from langchain_lora_retriever.engine.model.probe import AttentionGeometry, ModelProbe

__all__ = ["FusedForward", "FusedLayers", "num_fusable_layers"]

_logger = logging.getLogger(__name__)

# Where a layer's norms stand, by their names: before attention, after it, before the MLP, after it.
_NormPlaces: TypeAlias = "tuple[str | None, str | None, str | None, str | None]"
_NORM_PLACES: tuple[_NormPlaces, ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)
_QKV = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))  # modules, or the one, that give queries, keys and values
_GATE_UP = (("gate_proj", "up_proj"), ("gate_up_proj",))


class _Layer(NamedTuple):
    """One decoder layer, read."""

    module: nn.Module
    layer_idx: int
    geometry: AttentionGeometry
    qkv: Product
    out: Product
    mlp: _Mlp | None  # None leaves it to the module: experts
    head_norm: QueryKeyNorm | None
    wide_norms: tuple[RmsNorm, RmsNorm] | None  # of queries and of keys, over all of their heads
    norm_before_attention: RmsNorm | None
    norm_after_attention: RmsNorm | None
    norm_before_mlp: RmsNorm | None
    norm_after_mlp: RmsNorm | None
    sinks: torch.Tensor | None
    is_rotated: bool = True
    has_half_tables: bool = False  # of cosines and sines: the second halves, which are alike, are left out


class _Mlp(NamedTuple):
    """A gated MLP."""

    gate_up: Product
    down: Product
    activation: str

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        gated = self.gate_up.gated(x, self.activation)
        if gated is None:
            x, delta = self.gate_up(x)
            gated = gated_activation(x, self.activation, delta)
        return self.down(gated)


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
                ways = (layer, layer._replace(is_rotated=False), layer._replace(has_half_tables=True))
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

    def take(self, hidden: torch.Tensor, norm: RmsNorm | None) -> torch.Tensor:
        """The norm of `hidden`, computed unless the layer before has done it; itself if there is no norm."""
        handed_on, self._handed_on = self._handed_on, None
        if handed_on is not None and handed_on[0] is hidden:
            return handed_on[1]
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if norm is None else rms_norm(flat, norm)

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

    def fits(self, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None) -> bool:
        """Whether what the layer is given to rotate by, read as this forward reads it, is no wider than a head."""
        if not self.layer.is_rotated:
            return True
        if position_embeddings is None:
            return False
        width = position_embeddings[0].shape[-1] * (2 if self.layer.has_half_tables else 1)
        return width <= self.layer.geometry.head_dim

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """The layer's output, of the input's shape; other keywords than these are the attention's and not read."""
        layer = self.layer
        residual = hidden_states.reshape(-1, hidden_states.shape[-1])
        rotary = None
        if layer.is_rotated:
            assert position_embeddings is not None
            cos, sin = position_embeddings[0][0], position_embeddings[1][0]
            if layer.has_half_tables:
                cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
            rotary = Rotary(cos, sin)
        x = self._stack.take(hidden_states, layer.norm_before_attention)
        x, delta = layer.qkv(x)
        if layer.wide_norms is not None and delta is not None:
            x, delta = x + _whole(delta, x), None
        query, key, value = x.split(layer.geometry.projected_widths, 1)
        if layer.wide_norms is not None:
            query, key = rms_norm(query, layer.wide_norms[0]), rms_norm(key, layer.wide_norms[1])
        step: PagedStep = current_step()
        x = step.attend_projected(
            layer.layer_idx, (query, key, value), delta, layer.geometry, rotary, layer.head_norm, layer.sinks
        )
        x, delta = layer.out(x)
        residual, x = _add(x, delta, residual, layer.norm_after_attention, layer.norm_before_mlp)
        delta = None
        if layer.mlp is not None:
            x, delta = layer.mlp(x)
        else:
            out = layer.module.mlp(x.view(hidden_states.shape))  # type: ignore[operator]
            x = (out[0] if isinstance(out, tuple) else out).reshape(x.shape)
        residual, x = _add(x, delta, residual, layer.norm_after_mlp, self._following)
        out = residual.view(hidden_states.shape)
        if self._following is not None:
            self._stack.hand_on(out, x)
        return out


def _add(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    residual: torch.Tensor,
    inner: RmsNorm | None,
    norm: RmsNorm | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual + inner(x + delta)`, and the norm of it; where there is no norm, both are the sum.

    `x` and `delta` may come in parts, see `JointLinears.in_parts` and `lora_delta`.
    """
    if norm is not None:
        return add_rms_norm(x, residual, norm, inner, delta)
    if inner is not None:
        x, delta = rms_norm(x, inner, delta, residual.dtype), None
    x = _whole(x, residual)
    total = residual + x if delta is None else residual + (x + _whole(delta, residual))
    return total, total


def _whole(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What may have come in parts, added up, in the dtype of another."""
    return x.sum(0).to(like.dtype) if x.dim() > like.dim() else x


def _read_layer(
    module: nn.Module,
    name: str,
    lora_layers: LoraLayers,
    geometry: Mapping[int, AttentionGeometry],
    activation: object,
) -> _Layer | None:
    places = _norm_places(module)
    if places is None:
        return None
    attention: Any = module.self_attn
    mlp: Any = module.mlp
    layer_geometry = geometry[attention.layer_idx]
    qkv = _find_product(lora_layers, f"{name}.self_attn", _QKV)
    out = _find_product(lora_layers, f"{name}.self_attn", (("o_proj",),), in_parts=True)
    norms = _read_query_key_norms(attention, layer_geometry)
    if qkv is None or out is None or norms is None:
        return None
    fused_mlp = None
    if _trained(mlp) in ({*gate_up, "down_proj"} for gate_up in _GATE_UP):
        gate_up = _find_product(lora_layers, f"{name}.mlp", _GATE_UP)
        down = _find_product(lora_layers, f"{name}.mlp", (("down_proj",),), in_parts=True)
        if gate_up is None or down is None or not isinstance(activation, str) or activation not in ACTIVATIONS:
            return None
        fused_mlp = _Mlp(gate_up, down, activation)
    read = [None if place is None else _read_norm(getattr(module, place)) for place in places]
    if any(norm is None and place is not None for norm, place in zip(read, places, strict=True)):
        return None
    sinks = attention.sinks if layer_geometry.has_sinks else None
    before_attention, after_attention, before_mlp, after_mlp = read
    return _Layer(
        module, attention.layer_idx, layer_geometry, qkv, out, fused_mlp, *norms, before_attention, after_attention,
        before_mlp, after_mlp, sinks,
    )  # fmt: skip


def _norm_places(module: nn.Module) -> _NormPlaces | None:
    """Which of its norms stand where, if a layer is built in a way that is known; judged by its children's names."""
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    if attention is None or mlp is None:
        return None
    known = {part for way in _QKV for part in way} | {"o_proj", "q_norm", "k_norm"}
    norm_names = _trained(module) - {"self_attn", "mlp"}
    if _trained(attention) - known or not any(_trained(attention) >= {*way} for way in _QKV):
        return None
    return next((names for names in _NORM_PLACES if {*names} - {None} == norm_names), None)


def num_fusable_layers(model: PreTrainedModel, probe: ModelProbe) -> int:
    """Layers that are built in a way that is known; whether they compute what is expected, only their numbers tell."""
    modules = getattr(model.get_decoder(), "layers", None)
    config = model.config.get_text_config()
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if not isinstance(modules, nn.ModuleList) or len(modules) != len(probe.attention) or activation not in ACTIVATIONS:
        return 0
    return sum(_norm_places(layer) is not None for layer in modules)


def _find_product(
    lora_layers: LoraLayers, name: str, ways: Sequence[tuple[str, ...]], *, in_parts: bool = False
) -> Product | None:
    """The product of some children of a module, by the first of several sets of names that there is."""
    names = (tuple(f"{name}.{part}" for part in way) for way in ways)
    products = (lora_layers.find_product(way, in_parts=in_parts) for way in names)
    return next((product for product in products if product is not None), None)


def _trained(module: nn.Module) -> set[str]:
    """Names of the children that have parameters, or products whose weights are none (GPTQ's are buffers)."""
    return {
        name for name, child in module.named_children()
        if next(child.parameters(), None) is not None or any(hasattr(part, "in_features") for part in child.modules())
    }  # fmt: skip


def _read_query_key_norms(
    attention: nn.Module, geometry: AttentionGeometry
) -> tuple[QueryKeyNorm | None, tuple[RmsNorm, RmsNorm] | None] | None:
    """The norms of queries and keys: over single heads, or over all of them; None if they are of another kind."""
    modules = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if modules == [None, None]:
        return None, None
    query, key = (None if module is None else _read_norm(module) for module in modules)
    if query is None or key is None:
        return None
    widths = (query.weight.shape[0], key.weight.shape[0])
    if widths == (geometry.head_dim, geometry.head_dim) and query[1:] == key[1:]:
        return QueryKeyNorm(query.weight, key.weight, query.eps, query.offset), None
    return (None, (query, key)) if widths == geometry.projected_widths[:2] else None


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
