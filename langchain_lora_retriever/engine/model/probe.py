"""Run a model a few times over a few tokens, to learn what no configuration file says reliably.

Which modules are linear and see every token, which of them share an input, what each attention layer keeps in its cache
and which tokens it sees: this holds for any architecture, quantisation and placement, because it is read off the model
at work. So is what a packed step relies on: that a token's queries, keys and values depend on its own position and on
nothing else in the step.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AttentionInterface, DynamicCache

from langchain_lora_retriever.engine.model.attention import (
    ATTENTION_IMPLEMENTATION,
    MaskPattern,
    attending,
    current_step,
    refuse_extras,
)
from langchain_lora_retriever.engine.model.linear_calls import (
    LinearCall,
    LinearGroup,
    Vocabulary,
    find_vocabulary,
    group_calls,
    is_inner,
    recorded_products,
)
from langchain_lora_retriever.engine.model.mask_pattern import MaskSource, mask_source, read_pattern, register_masks
from langchain_lora_retriever.engine.model.recurrent import RecurrentGeometry, find_recurrent, probed_recurrent
from langchain_lora_retriever.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "HALF_TOKENS",
    "AttentionCall",
    "AttentionGeometry",
    "AttentionRecorder",
    "LinearGroup",
    "ModelProbe",
    "Vocabulary",
    "input_device",
    "layer_name",
    "num_embeddings",
    "probe_model",
    "read_geometries",
    "require_all_layers",
    "require_groups",
    "run_pass",
    "use_attention",
]

_PROBE_IMPLEMENTATION = f"{ATTENTION_IMPLEMENTATION}_probe"
HALF_TOKENS = 8  # tokens of either sequence of a probing pass
_TOLERANCE = 0.02  # between queries, keys and values that must not differ: two passes may round otherwise


class AttentionGeometry(NamedTuple):
    """What one attention layer keeps per token, where, and how it attends."""

    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    num_heads: int
    scaling: float
    pattern: MaskPattern
    softcap: float | None
    has_sinks: bool = False

    @property
    def projected_widths(self) -> tuple[int, int, int]:
        """Features of a token's queries, keys and values."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.value_dim

    @property
    def kind(self) -> str:
        """What the layer attends to, in words."""
        words = [
            f"window of {self.pattern.sliding_window}" if self.pattern.sliding_window is not None
            else f"chunks of {self.pattern.chunk_size}" if self.pattern.chunk_size is not None
            else "full"
        ]  # fmt: skip
        more = {"sinks": self.has_sinks, "soft cap": self.softcap is not None}
        return ", ".join([*words, *(word for word, holds in more.items() if holds)])

    @property
    def token_bytes(self) -> int:
        """Cache bytes per token."""
        return self.num_kv_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize


class AttentionCall(NamedTuple):
    """How a layer called its attention.

    Attributes:
        module: Who called.
        source: What its mask was made from; None if it had none.
        query: `[num_tokens, num_heads, head_dim]`.
        key: `[num_tokens, num_kv_heads, head_dim]`.
        value: `[num_tokens, num_kv_heads, value_dim]`.
        kwargs: Everything else it passed.
    """

    module: torch.nn.Module
    source: MaskSource | None
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kwargs: Mapping[str, Any]


class ModelProbe(NamedTuple):
    """What the probe saw.

    Attributes:
        attention: What each attention layer keeps, by layer.
        calls: How it attends.
        linear_groups: The linear modules that see every token.
        recurrent: What layers keep beside: a state of each sequence.
    """

    attention: dict[int, AttentionGeometry]
    calls: dict[int, AttentionCall]
    linear_groups: tuple[LinearGroup, ...]
    vocabulary: Vocabulary = Vocabulary(None, None)
    recurrent: tuple[RecurrentGeometry, ...] = ()

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """`(in_features, out_features)` of every linear module that sees every token, by module path."""
        return {
            name: (group.in_features, out_features)
            for group in self.linear_groups
            for name, out_features in zip(group.names, group.out_features, strict=True)
        }


class AttentionRecorder:
    """Takes the place of an `AttentionStep` in a probing pass: attends to nothing and writes down who called."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}

    def attend(
        self, _layer_idx: int, query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """As an `AttentionStep` attends, but to nothing."""
        return query.new_zeros((*query.shape[:2], value.shape[2]))

    def record(self, module: Any, call: AttentionCall) -> torch.Tensor:
        """Note a layer's call, and give zeros for what it attends to."""
        other = self.calls.get(module.layer_idx)
        if other is not None:
            raise EngineError(
                f"Layer {module.layer_idx} attends twice, in {type(other.module).__name__} and in "
                f"{type(module).__name__}: models whose layers keep more than one cache are not supported."
            )
        self.calls[module.layer_idx] = call
        return call.query.new_zeros((*call.query.shape[:2], call.value.shape[2]))


class _PastCache(DynamicCache):
    """A cache that claims to hold tokens already, and keeps none."""

    def __init__(self, num_past: int) -> None:
        super().__init__()
        self._num_past = num_past

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """The step's own."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers are alike
        """As claimed."""
        return self._num_past

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Where the step begins."""
        return self._num_past

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """Keys of the step alone."""
        return query_length, self._num_past


def probe_model(model: PreTrainedModel, max_model_len: int) -> ModelProbe:
    """Run `model` over some tokens and report its linear groups and attention layers.

    Args:
        model: The model; it is left as it was.
        max_model_len: Maximum number of tokens of a sequence; what is reported holds up to it.

    Raises:
        EngineError: If the model keeps state between tokens otherwise than in attention or in transformers' caches,
            attends in a way that is not known here, has no linear module for adapters, or computes a token otherwise
            beside others than alone.
    """
    recurrent = find_recurrent(model, input_device(model))
    with probed_recurrent(model, recurrent):
        return _probe(model, max_model_len, recurrent)


def _probe(model: PreTrainedModel, max_model_len: int, recurrent: Sequence[RecurrentGeometry]) -> ModelProbe:
    max_model_len = max(max_model_len, 2)
    half = min(HALF_TOKENS, max_model_len // 2)
    first, second, third, fourth = _token_ids(model, half)
    start, end = range(half), range(max_model_len - half, max_model_len)
    passes = [run_pass(model, first + second, [*start, *end], None)]
    require_all_layers(model, passes[0][0], recurrent)
    passes += [
        run_pass(model, first + third, [*start, *start], None),
        run_pass(model, fourth + second, range(max_model_len - 2 * half, max_model_len), max_model_len - 2 * half),
    ]
    alone, beside, behind = (recorder for recorder, _ in passes)
    require_all_layers(model, behind, recurrent)
    layer = _find_difference(alone, beside, slice(half))
    if layer is not None:
        raise EngineError(
            f"{layer_name(model, alone.calls, layer)} rotates or scales a token otherwise where another sequence of "
            f"the step is {max_model_len:,} tokens long, so that one request would change the answer of another: set "
            "max_model_len to the length from which the model's positions are scaled."
        )
    layer = _find_difference(alone, behind, slice(half, None))
    if layer is not None:
        raise EngineError(
            f"{layer_name(model, alone.calls, layer)} takes a token's position from the length of its cache or from "
            f"its place in the row, not from `position_ids` alone, in sequences of {max_model_len:,} tokens: a packed "
            "step does not support that. Where positions only matter from some length on (Llama 4: floor_scale), set "
            "max_model_len below it."
        )
    inner = [[call for call in calls if is_inner(call, 2 * half)] for _, calls in passes]
    names = [{call.name for call in calls} for calls in inner]
    groups = tuple(group_calls([call for call in inner[0] if call.name in names[1] & names[2]]))
    require_groups(model, groups)
    geometries = read_geometries(model, behind, max_model_len)
    vocabulary = find_vocabulary(model, [calls for _, calls in passes], 2 * half, num_embeddings(model))
    return ModelProbe(geometries, behind.calls, groups, vocabulary, tuple(recurrent))


def require_groups(model: PreTrainedModel, groups: Sequence[LinearGroup]) -> None:
    """Refuse a model without modules that adapters could target."""
    if not groups:
        raise EngineError(
            f"{type(model).__name__} has no linear module that sees every token, so that no adapter could be run: its "
            f"layers are made of {_describe_modules(model)}."
        )


def read_geometries(
    model: PreTrainedModel, behind: AttentionRecorder, max_model_len: int
) -> dict[int, AttentionGeometry]:
    """What each layer keeps, read off how it called its attention."""
    patterns: dict[MaskSource | int | None, MaskPattern | None] = {}
    geometry = {}
    for layer_idx, call in sorted(behind.calls.items()):
        key = call.source if call.source is not None else call.kwargs.get("sliding_window")
        if key not in patterns:
            patterns[key] = _read_pattern(call, max_model_len)
        pattern = patterns[key]
        if pattern is None:
            raise EngineError(
                f"{layer_name(model, behind.calls, layer_idx)} has a mask that is neither causal, nor a sliding "
                "window, nor made of chunks: it is not supported."
            )
        geometry[layer_idx] = _geometry(call, pattern)
    return geometry


def require_all_layers(
    model: PreTrainedModel, recorder: AttentionRecorder, recurrent: Sequence[RecurrentGeometry]
) -> None:
    """Beside layers that keep states there may be some that keep nothing; the check of the whole model finds others."""
    num_layers = model.config.get_text_config().num_hidden_layers
    if not recorder.calls:
        raise EngineError(
            f"{type(model).__name__} has no layer that attends through transformers' AttentionInterface: recurrent "
            "models without attention, and models that attend by code of their own, are not supported."
        )
    if not recurrent and set(recorder.calls) != set(range(num_layers)):
        raise EngineError(
            f"{type(model).__name__} has {num_layers} layers of which {len(recorder.calls)} attend through "
            "transformers' AttentionInterface, and the others keep no state that is known: it is not supported."
        )


def layer_name(model: PreTrainedModel, calls: Mapping[int, AttentionCall], layer_idx: int) -> str:
    """What an error calls a layer: its number, its class, and its kind if the configuration has kinds."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    kind = f", {kinds[layer_idx]}" if kinds and layer_idx < len(kinds) else ""
    return f"Layer {layer_idx} of {type(model).__name__} ({type(calls[layer_idx].module).__name__}{kind})"


def use_attention(
    model: PreTrainedModel, implementation: str | dict[str, Any] = ATTENTION_IMPLEMENTATION
) -> str | dict[str, Any]:
    """Switch `model` to an attention implementation, by default the paged one; returns those that its parts had."""
    before = _implementations(model.config)
    model.set_attn_implementation(implementation)
    return before


def _implementations(config: PreTrainedConfig) -> str | dict[str, Any]:
    """What a model's parts attend by, as `set_attn_implementation` takes it; "" is the model itself.

    One word stands for parts that all attend alike: transformers 5.17 takes a dict for the model, none for a part.
    """
    parts = {
        key: _implementations(part)
        for key in config.sub_configs
        if (part := getattr(config, key, None)) is not None and part._attn_implementation is not None  # noqa: SLF001
    }
    own: str = config._attn_implementation  # noqa: SLF001 - transformers has a public setter but no getter
    return own if all(part == own for part in parts.values()) else {"": own, **parts}


def _token_ids(model: PreTrainedModel, half: int) -> list[list[int]]:
    """Four sequences of tokens, all different where the vocabulary allows."""
    vocab_size = num_embeddings(model)
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))
    ids = ids[torch.arange(4 * half) % vocab_size]
    return [part.tolist() for part in ids.split(half)]


@torch.inference_mode()
def run_pass(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    positions: Sequence[int],
    num_past: int | None,
    device: torch.device | None = None,
) -> tuple[AttentionRecorder, list[LinearCall]]:
    """A pass over one row of tokens, behind a cache that claims to hold `num_past` more."""
    calls: list[LinearCall] = []
    recorder = AttentionRecorder()
    device = input_device(model) if device is None else device
    kwargs: dict[str, Any] = {"use_cache": False}
    if num_past is not None:
        parameters = inspect.signature(model.forward).parameters
        kwargs = {"use_cache": True, "cache" if "cache" in parameters else "past_key_values": _PastCache(num_past)}
    before = use_attention(model, _PROBE_IMPLEMENTATION)
    try:
        with recorded_products(model, calls), attending(recorder):
            model(
                input_ids=torch.tensor([token_ids], device=device),
                position_ids=torch.tensor([list(positions)], device=device),
                logits_to_keep=[len(token_ids) - 1],  # a list serves on any device that the last layer lies on
                **kwargs,
            )
    except EngineError:
        raise
    except Exception as error:
        where = "over packed tokens" if num_past is None else "behind a cache of keys and values alone"
        raise EngineError(
            f"{type(model).__name__} could not be run {where}: {error!r}. Use an architecture that takes position_ids, "
            "attends through transformers' AttentionInterface and keeps no other state (Llama, Qwen, Gemma, ...)."
        ) from error
    finally:
        use_attention(model, before)
    return recorder, calls


def _find_difference(one: AttentionRecorder, other: AttentionRecorder, tokens: slice) -> int | None:
    """The first layer whose queries, keys or values for the same tokens differ between two passes."""
    for layer_idx in one.calls:
        for name in ("query", "key", "value"):
            a, b = (getattr(calls.calls[layer_idx], name)[tokens].float() for calls in (one, other))
            if a.shape != b.shape or (a - b).norm() > _TOLERANCE * a.norm():
                return layer_idx
    return None


def _read_pattern(call: AttentionCall, max_model_len: int) -> MaskPattern | None:
    if call.source is None:  # the model makes no mask by transformers' functions: the keyword is all there is
        return MaskPattern(sliding_window=call.kwargs.get("sliding_window"))
    try:
        return read_pattern(call.source, max_model_len)
    except (IndexError, TypeError, ValueError, RuntimeError):  # it reads more than two positions
        return None


def _geometry(call: AttentionCall, pattern: MaskPattern) -> AttentionGeometry:
    scaling = call.kwargs.get("scaling")
    return AttentionGeometry(
        num_kv_heads=call.key.shape[1],
        head_dim=call.key.shape[2],
        value_dim=call.value.shape[2],
        dtype=call.key.dtype,
        device=call.key.device,
        num_heads=call.query.shape[1],
        scaling=scaling if scaling is not None else call.query.shape[-1] ** -0.5,
        pattern=pattern,
        softcap=call.kwargs.get("softcap"),
        has_sinks=call.kwargs.get("s_aux") is not None,
    )


def _describe_modules(model: PreTrainedModel) -> str:
    """The classes of the modules with matrices of their own."""
    kinds = {
        type(module).__name__
        for module in model.modules()
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        and not isinstance(module, torch.nn.Embedding)
    }
    return ", ".join(sorted(kinds)) or "nothing with weights"


def num_embeddings(model: PreTrainedModel) -> int:
    """How many token ids the model knows; a configuration's `vocab_size` may be another number."""
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", model.config.get_text_config().vocab_size))


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go; offloaded embeddings have no device of their own, and accelerate moves the ids."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return torch.device("cpu") if weight.is_meta else weight.device


def _probe_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention signature; `query` is `[1, num_heads, num_tokens, head_dim]`."""
    refuse_extras(module, kwargs)
    source = mask_source(attention_mask) if attention_mask is not None else None
    if attention_mask is not None and source is None:
        raise EngineError(
            f"Layer {module.layer_idx} ({type(module).__name__}) attends by a mask that was not made by transformers' "
            "mask functions, so that the paged cache cannot tell what it says: it is not supported."
        )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    recorder: AttentionRecorder = current_step()
    return recorder.record(module, AttentionCall(module, source, query, key, value, kwargs))[None], None


AttentionInterface.register(_PROBE_IMPLEMENTATION, _probe_attention_forward)
register_masks(_PROBE_IMPLEMENTATION)
