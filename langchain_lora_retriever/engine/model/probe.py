"""Run a model a few times over a few tokens, to learn what no configuration file says reliably.

Which modules are linear and see every token, which of them share an input, what each attention layer keeps in its cache
and which tokens it sees: this holds for any architecture, quantisation and placement, because it is read off the model
at work. So is what a packed step relies on: that a token's queries, keys and values depend on its own position and on
nothing else in the step.
"""

from __future__ import annotations

import inspect
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AttentionInterface, DynamicCache

from langchain_lora_retriever.engine.model.attention import ATTENTION_IMPLEMENTATION, MaskPattern, refuse_extras
from langchain_lora_retriever.engine.model.mask_pattern import MaskSource, mask_source, read_pattern, register_masks
from langchain_lora_retriever.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

__all__ = [
    "AttentionCall",
    "AttentionGeometry",
    "LinearGroup",
    "ModelProbe",
    "Vocabulary",
    "input_device",
    "layer_name",
    "num_embeddings",
    "probe_model",
    "use_attention",
]

_PROBE_IMPLEMENTATION = f"{ATTENTION_IMPLEMENTATION}_probe"
_HALF = 8  # tokens of either sequence of a probing pass
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


class LinearGroup(NamedTuple):
    """Linear modules that were called in a row with the very same input tensor (q, k, v; gate, up)."""

    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Vocabulary(NamedTuple):
    """The layers that know the vocabulary; None where the model has none, or calls it in a way that is not known.

    Attributes:
        embedding: Its input is the token, one-hot: its `in_features` are the vocabulary.
        output: Sees the tokens alone after which one is chosen. One that sees all is a linear group, and None here.
    """

    embedding: LinearGroup | None
    output: LinearGroup | None

    @property
    def groups(self) -> list[LinearGroup]:
        """Those of the two that there are."""
        return [group for group in self if group is not None]

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """`(in_features, out_features)` by module path."""
        return {group.names[0]: (group.in_features, group.out_features[0]) for group in self.groups}

    @property
    def sides(self) -> dict[str, int]:
        """Which of the two is the vocabulary, by module path."""
        return {group.names[0]: side for side, group in enumerate(self) if group is not None}


class ModelProbe(NamedTuple):
    """What the probe saw."""

    attention: dict[int, AttentionGeometry]
    calls: dict[int, AttentionCall]
    linear_groups: tuple[LinearGroup, ...]
    vocabulary: Vocabulary = Vocabulary(None, None)

    @property
    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """`(in_features, out_features)` of every linear module that sees every token, by module path."""
        return {
            name: (group.in_features, out_features)
            for group in self.linear_groups
            for name, out_features in zip(group.names, group.out_features, strict=True)
        }


class _LinearCall(NamedTuple):
    name: str
    input: torch.Tensor  # kept alive, so that its identity cannot be taken by a later tensor
    output: torch.Tensor


class _Recorder:
    """Takes the place of an `AttentionStep` in a probing pass: attends to nothing and writes down who called."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}

    def record(self, module: Any, call: AttentionCall) -> torch.Tensor:
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
        max_model_len: Most tokens of a sequence; what is reported holds up to it.

    Raises:
        EngineError: If the model keeps state between tokens that is not attention, attends in a way that is not known
            here, has no linear module for adapters, or computes a token otherwise beside others than alone.
    """
    max_model_len = max(max_model_len, 2)
    half = min(_HALF, max_model_len // 2)
    first, second, third, fourth = _token_ids(model, half)
    start, end = range(half), range(max_model_len - half, max_model_len)
    passes = [_run(model, first + second, [*start, *end], None)]
    _require_all_layers(model, passes[0][0])
    passes += [
        _run(model, first + third, [*start, *start], None),
        _run(model, fourth + second, range(max_model_len - 2 * half, max_model_len), max_model_len - 2 * half),
    ]
    alone, beside, behind = (recorder for recorder, _ in passes)
    _require_all_layers(model, behind)
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
            "step cannot honour that. Where positions only matter from some length on (Llama 4: floor_scale), set "
            "max_model_len below it."
        )
    inner = [[call for call in calls if _is_inner(call, 2 * half)] for _, calls in passes]
    names = [{call.name for call in calls} for calls in inner]
    groups = tuple(_group([call for call in inner[0] if call.name in names[1] & names[2]]))
    if not groups:
        raise EngineError(
            f"{type(model).__name__} has no linear module that sees every token, so that no adapter could be run: its "
            f"layers are made of {_describe_modules(model)}."
        )
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
    return ModelProbe(geometry, behind.calls, groups, _vocabulary(model, [calls for _, calls in passes], 2 * half))


def _require_all_layers(model: PreTrainedModel, recorder: _Recorder) -> None:
    num_layers = model.config.get_text_config().num_hidden_layers
    if set(recorder.calls) != set(range(num_layers)):
        raise EngineError(
            f"{type(model).__name__} has {num_layers} layers of which {len(recorder.calls)} attend through "
            "transformers' AttentionInterface: recurrent and hybrid models are not supported."
        )


def layer_name(model: PreTrainedModel, calls: Mapping[int, AttentionCall], layer_idx: int) -> str:
    """What an error calls a layer: its number, its class, and its kind if the configuration has kinds."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    kind = f", {kinds[layer_idx]}" if kinds and layer_idx < len(kinds) else ""
    return f"Layer {layer_idx} of {type(model).__name__} ({type(calls[layer_idx].module).__name__}{kind})"


def use_attention(model: PreTrainedModel, implementation: str = ATTENTION_IMPLEMENTATION) -> str:
    """Switch `model` to an attention implementation, by default the paged one; returns the one it had."""
    before: str = model.config._attn_implementation  # noqa: SLF001 - transformers has a public setter but no getter
    model.set_attn_implementation(implementation)
    return before


def _token_ids(model: PreTrainedModel, half: int) -> list[list[int]]:
    """Four sequences of tokens, all different where the vocabulary allows."""
    vocab_size = num_embeddings(model)
    ids = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))
    ids = ids[torch.arange(4 * half) % vocab_size]
    return [part.tolist() for part in ids.split(half)]


@torch.inference_mode()
def _run(
    model: PreTrainedModel, token_ids: Sequence[int], positions: Sequence[int], num_past: int | None
) -> tuple[_Recorder, list[_LinearCall]]:
    """A pass over one row of tokens, behind a cache that claims to hold `num_past` more."""
    calls: list[_LinearCall] = []
    recorder = _Recorder()
    device = input_device(model)
    kwargs: dict[str, Any] = {"use_cache": False}
    if num_past is not None:
        parameters = inspect.signature(model.forward).parameters
        kwargs = {"use_cache": True, "cache" if "cache" in parameters else "past_key_values": _PastCache(num_past)}
    before = use_attention(model, _PROBE_IMPLEMENTATION)
    try:
        with _recording(model, calls):
            model(
                input_ids=torch.tensor([token_ids], device=device),
                position_ids=torch.tensor([list(positions)], device=device),
                logits_to_keep=[len(token_ids) - 1],  # a list serves on any device that the last layer lies on
                attention_step=recorder,
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


def _find_difference(one: _Recorder, other: _Recorder, tokens: slice) -> int | None:
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
    )


@contextmanager
def _recording(model: PreTrainedModel, calls: list[_LinearCall]) -> Iterator[None]:
    def record(name: str) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                calls.append(_LinearCall(name, args[0], output))

        return hook

    embedding = model.get_input_embeddings()
    handles = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if module is embedding or (hasattr(module, "in_features") and hasattr(module, "out_features"))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_inner(call: _LinearCall, num_tokens: int) -> bool:
    """Whether a module is linear and saw every token."""
    return call.input.is_floating_point() and call.output.shape[:-1].numel() == num_tokens


def _vocabulary(model: PreTrainedModel, passes: Sequence[Sequence[_LinearCall]], num_tokens: int) -> Vocabulary:
    """The embedding and the output layer, if they are called once: with all tokens, and with the chosen ones."""
    names = {id(module): name for name, module in model.named_modules()}

    def find(module: torch.nn.Module | None, num: int) -> LinearGroup | None:
        name = names.get(id(module))
        found = [[call for call in calls if call.name == name] for calls in passes]
        call = found[0][0] if found[0] else None
        if name is None or call is None or any(len(calls) != 1 for calls in found):
            return None
        if any(calls[0].output.shape[:-1].numel() != num for calls in found):
            return None
        in_features = num_embeddings(model) if num == num_tokens else call.input.shape[-1]
        output = call.output
        return LinearGroup((name,), in_features, (output.shape[-1],), output.dtype, output.device)

    return Vocabulary(find(model.get_input_embeddings(), num_tokens), find(model.get_output_embeddings(), 1))


def _group(calls: list[_LinearCall]) -> Iterator[LinearGroup]:
    """Groups by input; a module that is called more than once in a pass is a group by itself."""
    counts = Counter(call.name for call in calls)
    calls = list({call.name: call for call in reversed(calls)}.values())[::-1]  # each module's first
    start = 0
    for end in range(1, len(calls) + 1):
        is_repeated = end == len(calls) or max(counts[calls[start].name], counts[calls[end].name]) > 1
        if is_repeated or calls[end].input is not calls[start].input:
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
    *,
    attention_step: _Recorder | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention signature; `query` is `[1, num_heads, num_tokens, head_dim]`."""
    if attention_step is None:
        raise EngineError(
            f"{type(module).__name__} does not pass keywords on to its attention, which is how a layer learns where "
            "its cache lies: it is not supported."
        )
    refuse_extras(module, kwargs)
    source = mask_source(attention_mask) if attention_mask is not None else None
    if attention_mask is not None and source is None:
        raise EngineError(
            f"Layer {module.layer_idx} ({type(module).__name__}) attends by a mask that was not made by transformers' "
            "mask functions, so that the paged cache cannot tell what it says: it is not supported."
        )
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return attention_step.record(module, AttentionCall(module, source, query, key, value, kwargs))[None], None


AttentionInterface.register(_PROBE_IMPLEMENTATION, _probe_attention_forward)
register_masks(_PROBE_IMPLEMENTATION)
