"""Hold what the engine computes against what the model computes by itself, before anything is served.

Two comparisons. Each kind of attention layer is compared in float32 with the eager attention of its own modelling code,
over random states that are long enough for its window or chunk: it takes no weights, so it is as cheap for offloaded
and quantised models. Then the whole model is run over some tokens, once by its own attention and once by the paged one.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface, DynamicCache

from langchain_lora_retriever.engine.model.attention import GatheringStep, MaskPattern, PagedCache, QuerySpan, attending
from langchain_lora_retriever.engine.model.probe import input_device, layer_name, num_embeddings, use_attention
from langchain_lora_retriever.engine.model.recurrent import RecurrentLayers, StatePiece
from langchain_lora_retriever.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.model.probe import AttentionCall, AttentionGeometry, ModelProbe

__all__ = ["check_model"]

_BLOCK_SIZE = 16
_NUM_QUERIES = 24  # the last of a sequence, over both edges of what they see
_MAX_STATES = 1 << 22  # elements of a layer's keys; a window that takes more is known from its mask alone
_TOLERANCE = 1e-3  # of float32, by relative norm
_NUM_TOKENS = 24  # of the whole model's run, more where a window or chunk ends within
_MAX_NUM_TOKENS = 256
_ROUNDED_TOLERANCE = 0.25  # of the median token's logits, where the model computes in less than float32


def check_model(model: PreTrainedModel, probe: ModelProbe, max_model_len: int) -> None:
    """Compare the paged path with the model's own. Call it while the model is as it was loaded.

    Raises:
        EngineError: If they differ; the message names the first layer of the kind that does.
    """
    _check_caches(model, probe, max_model_len)
    seen = set()
    for layer_idx, geometry in probe.attention.items():
        call = probe.calls[layer_idx]
        kind = (type(call.module), geometry, getattr(call.module, "is_causal", None))
        if kind not in seen:
            seen.add(kind)
            _check_attention(model, probe, layer_idx, max_model_len)
    try:
        _check_whole(model, probe, max_model_len)
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(
            f"{type(model).__name__} could not be run by its own attention and by the paged one, to compare them: "
            f"{error!r}."
        ) from error


def _check_caches(model: PreTrainedModel, probe: ModelProbe, max_model_len: int) -> None:
    """`generate` forgets keys beyond the window of the cache it makes, whatever the mask says."""
    caches = DynamicCache(config=model.config).layers
    for layer_idx, cache in enumerate(caches):
        if layer_idx not in probe.attention:
            continue
        limit = getattr(cache, "sliding_window", None) if getattr(cache, "is_sliding", False) else None
        if limit is not None and limit < max_model_len and limit not in probe.attention[layer_idx].pattern:
            raise EngineError(
                f"{layer_name(model, probe.calls, layer_idx)} has a cache of the latest {limit} tokens, but its mask "
                f"shows more: it is not supported beyond that. Set max_model_len to {limit} or less."
            )


@torch.inference_mode()
def _check_attention(model: PreTrainedModel, probe: ModelProbe, layer_idx: int, max_model_len: int) -> None:
    call, geometry = probe.calls[layer_idx], probe.attention[layer_idx]
    length = min(_check_length(geometry), max_model_len)
    device = geometry.device
    generator = torch.Generator().manual_seed(layer_idx)
    query, key, value = (
        torch.randn(length, heads, width, generator=generator).to(device)
        for heads, width in (
            (geometry.num_heads, geometry.head_dim),
            (geometry.num_kv_heads, geometry.head_dim),
            (geometry.num_kv_heads, geometry.value_dim),
        )
    )
    num_queries = length if geometry.pattern.is_causal(length) else min(_NUM_QUERIES, length)
    implementation = getattr(call.module, "config", model.config)._attn_implementation  # noqa: SLF001 - transformers has no public getter
    try:
        expected = _own_attention(implementation, call, query[-num_queries:], key, value)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise EngineError(
            f"{layer_name(model, probe.calls, layer_idx)}: its own attention could not be run for comparison with the "
            f"paged one: {error!r}. It is not supported."
        ) from error
    got = _paged_attention(geometry, query, key, value, call.kwargs.get("s_aux"))[-num_queries:]
    difference = float((got - expected).norm() / expected.norm())
    if not difference <= _TOLERANCE:
        raise EngineError(
            f"{layer_name(model, probe.calls, layer_idx)} attends otherwise than the paged cache does (by "
            f"{difference:.1e}, relative, over {length} tokens): it is not supported."
        )


def _check_length(geometry: AttentionGeometry) -> int:
    """Tokens of a check of one layer: past its window or chunk, unless that takes too much."""
    limit = geometry.pattern.sliding_window or geometry.pattern.chunk_size or 0
    length = limit + 2 * _NUM_QUERIES // 3  # a chunk ends among the queries
    is_too_long = length * geometry.num_heads * max(geometry.head_dim, geometry.value_dim) > _MAX_STATES
    return 2 * _NUM_QUERIES if is_too_long else max(length, 2 * _NUM_QUERIES)


def _own_attention(
    implementation: str, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """The last queries' attention over all keys: PyTorch's if the model uses that, or its own eager function."""
    length, num_queries = len(key), len(query)
    queries, keys = torch.arange(length - num_queries, length)[:, None], torch.arange(length)[None]
    if call.source is not None:
        mask = call.source(queries, keys)
    else:
        mask = MaskPattern(sliding_window=call.kwargs.get("sliding_window")).sees(queries, keys)
    is_implied = False  # PyTorch's attention is causal where there is no mask, and never asked otherwise by the model
    attend = getattr(sys.modules[type(call.module).__module__], "eager_attention_forward", None)
    if attend is None or (implementation == "sdpa" and call.kwargs.get("softcap") is None):
        attend = AttentionInterface()["sdpa"]
        is_implied = num_queries == length and mask.equal(MaskPattern().sees(queries, keys))
    bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None].to(query.device)
    kwargs = {"scaling": query.shape[-1] ** -0.5, **call.kwargs, "dropout": 0.0}
    out = attend(
        call.module, *(x.transpose(0, 1)[None] for x in (query, key, value)), None if is_implied else bias, **kwargs
    )[0][0]
    assert isinstance(out, torch.Tensor)
    return out


def _paged_attention(
    geometry: AttentionGeometry,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The same over a small cache of its own: as a prompt in two chunks, and one token after the other."""
    cache = _small_cache(geometry, len(key), torch.float32)
    outputs = []
    for start, span in _spans(len(key)):
        tokens = slice(start, span.context_len)
        step = GatheringStep([span], {0: cache})
        states = (x[tokens] for x in (query, key, value))
        outputs.append(step.attend(0, *states, scaling=geometry.scaling, softcap=geometry.softcap, sinks=sinks))
    return torch.cat(outputs)


@torch.inference_mode()
def _check_whole(model: PreTrainedModel, probe: ModelProbe, max_model_len: int) -> None:
    """Compare the logits of all tokens of one sequence."""
    limits = [limit for geometry in probe.attention.values() for limit in geometry.pattern if limit is not None]
    wanted = max([_NUM_TOKENS, *(2 * limit + _BLOCK_SIZE for limit in limits if 2 * limit < _MAX_NUM_TOKENS)])
    length = min(wanted, max_model_len)
    token_ids = torch.randint(num_embeddings(model), (1, length), generator=torch.Generator().manual_seed(1))
    token_ids = token_ids.to(input_device(model))
    positions = torch.arange(length, device=token_ids.device)[None]
    expected = model(input_ids=token_ids, position_ids=positions, use_cache=False).logits[0].float()
    caches = {layer: _small_cache(geometry, length, geometry.dtype) for layer, geometry in probe.attention.items()}
    recurrent = RecurrentLayers(model, probe.recurrent, num_slots=1)
    before = use_attention(model)
    recurrent.attach()
    outputs = []
    try:
        for start, span in _spans(length, is_stepwise=bool(probe.recurrent)):
            recurrent.set_step(StatePiece.of([(0, start, span.num_queries)], token_ids.device))
            with attending(GatheringStep([span], caches)):
                output = model(
                    input_ids=token_ids[:, start : span.context_len],
                    position_ids=positions[:, start : span.context_len],
                    use_cache=False,
                )
            outputs.append(output.logits[0])
    finally:
        recurrent.release()
        use_attention(model, before)
    got = torch.cat(outputs).float()
    errors = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    is_exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    error = float(errors.max() if is_exact else errors.median())
    if not error <= (10 * _TOLERANCE if is_exact else _ROUNDED_TOLERANCE):
        raise EngineError(
            f"{type(model).__name__} answers otherwise over a paged cache than by its own attention: the logits of "
            f"{length} tokens differ by {error:.1e} (relative), more than rounding does. It is not supported."
        )


def _small_cache(geometry: AttentionGeometry, length: int, dtype: torch.dtype) -> PagedCache:
    """Room for one sequence, whose pages `_spans` puts in descending order."""
    num_blocks = -(-length // _BLOCK_SIZE)
    keys, values = (
        torch.zeros(num_blocks, _BLOCK_SIZE, geometry.num_kv_heads, width, dtype=dtype, device=geometry.device)
        for width in (geometry.head_dim, geometry.value_dim)
    )
    return PagedCache(keys, values, geometry.pattern)


def _spans(length: int, *, is_stepwise: bool = True) -> Iterator[tuple[int, QuerySpan]]:
    """A sequence's steps, each with its first token: a chunk, the rest, and the last three tokens one by one."""
    blocks: Sequence[int] = range(-(-length // _BLOCK_SIZE) - 1, -1, -1)
    cuts = [length // 2, *(range(max(length // 2 + 1, length - 3), length) if is_stepwise else ()), length]
    start = 0
    for end in cuts:
        if end > start:
            yield start, QuerySpan(end - start, end, blocks)
            start = end
