"""Attention over the paged KV cache, plugged into transformers through its `AttentionInterface`.

The model's own code computes queries, keys and values of the packed tokens; this module writes keys and values to the
cache pages of each sequence and attends over them. What a step reads and writes is an `AttentionStep`: that of the
thread that runs the model, whatever its layers hand on to each other.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from langchain_lora_retriever.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = [
    "ATTENTION_IMPLEMENTATION",
    "AttentionStep",
    "GatheringStep",
    "MaskPattern",
    "PagedCache",
    "QuerySpan",
    "attending",
    "current_step",
    "refuse_extras",
]

ATTENTION_IMPLEMENTATION = "langchain_lora_retriever_paged"

_current = threading.local()  # its `step` is that of the thread

_EXTRAS = {  # keywords of attention that change its result
    "position_bias": "position biases",
    "attention_bias": "attention biases",
    "alibi": "position biases",
    "head_mask": "head masks",
    "attention_mask": "a mask",
}


class MaskPattern(NamedTuple):
    """Which tokens, up to itself, a query of a layer sees: all of them where both are None; never are both set.

    Attributes:
        sliding_window: The latest so many, itself included.
        chunk_size: Those of its own chunk: the chunks are so many tokens each, and the first begins the sequence.
    """

    sliding_window: int | None = None
    chunk_size: int | None = None

    def sees(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Bool, `queries` and `keys` broadcast: whether the query at a position sees the key at another."""
        seen = keys <= queries
        if self.sliding_window is not None:
            seen &= keys > queries - self.sliding_window
        if self.chunk_size is not None:
            seen &= keys >= queries // self.chunk_size * self.chunk_size
        return seen

    def is_causal(self, context_len: int) -> bool:
        """Whether in a context of so many tokens every query sees all tokens up to itself."""
        limits = (limit for limit in self if limit is not None)
        return all(context_len <= limit for limit in limits)


class PagedCache(NamedTuple):
    """Keys and values of one layer, each `[num_blocks, block_size, num_kv_heads, head_dim]`, and who sees them."""

    keys: torch.Tensor
    values: torch.Tensor
    pattern: MaskPattern = MaskPattern()

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.keys.shape[1]


class QuerySpan(NamedTuple):
    """The tokens of one sequence in a packed step.

    Attributes:
        num_queries: Tokens computed in this step, the sequence's last.
        context_len: Tokens in the cache once the step has written its own.
        block_ids: The sequence's pages, in order.
    """

    num_queries: int
    context_len: int
    block_ids: Sequence[int]


class _DecodeGroup(NamedTuple):
    """Sequences with one query each and about as many pages, attended together."""

    tokens: torch.Tensor  # [n] positions in the packed step
    slots: torch.Tensor  # [n, length] places in the cache, see `_Plan._decode_group`
    context_lens: torch.Tensor  # [n]


class _Prefill(NamedTuple):
    """A sequence with several queries, attended alone."""

    start: int
    span: QuerySpan
    pages: torch.Tensor  # [p] block ids


class AttentionStep(Protocol):
    """One step's reads and writes of the cache, of all layers: what a backend of attention is to the model."""

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the step's keys and values, then attend.

        Args:
            layer_idx: Whose cache.
            query: `[num_tokens, num_heads, head_dim]`.
            key: `[num_tokens, num_kv_heads, head_dim]`.
            value: `[num_tokens, num_kv_heads, head_dim]`.
            scaling: Factor of the scores.
            softcap: Scores become `softcap * tanh(scores / softcap)`; None leaves them.
            sinks: A score for each head, `[num_heads]`, that takes part in the softmax and has no value; None: no such.

        Returns:
            `[num_tokens, num_heads, head_dim]`.
        """


class GatheringStep:
    """Gathers the keys and values of each sequence and calls SDPA, on any placement; planned once for each device.

    Nothing is gathered but what its own sequence has written: a masked weight is 0, but 0 times another's NaN is NaN.

    Args:
        spans: The packed sequences, in order.
        caches: Each layer's cache, by `layer_idx`.
    """

    def __init__(self, spans: Sequence[QuerySpan], caches: Mapping[int, PagedCache]) -> None:
        self._spans = spans
        self._caches = caches
        self._plans: dict[torch.device, _Plan] = {}

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the step's keys and values, then attend."""
        cache = self._caches[layer_idx]
        plan = self._plans.get(query.device)
        if plan is None:
            plan = self._plans[query.device] = _Plan(self._spans, cache.block_size, query.device)
        cache.keys.flatten(0, 1).index_copy_(0, plan.slot_mapping, key)
        cache.values.flatten(0, 1).index_copy_(0, plan.slot_mapping, value)
        out = query.new_empty((*query.shape[:2], value.shape[-1]))
        for group in plan.decode_groups:
            keys, values = (
                pages.flatten(0, 1).index_select(0, group.slots.flatten()).unflatten(0, group.slots.shape)
                for pages in (cache.keys, cache.values)
            )
            mask = plan.decode_mask(group, cache.pattern)
            out[group.tokens] = _decode(query[group.tokens], keys, values, mask, _Scores(scaling, softcap, sinks))
        for prefill in plan.prefills:
            tokens = slice(prefill.start, prefill.start + prefill.span.num_queries)
            keys, values = (
                pages.index_select(0, prefill.pages).flatten(0, 1)[: prefill.span.context_len]
                for pages in (cache.keys, cache.values)
            )
            mask = plan.prefill_mask(prefill, cache.pattern, is_plain=softcap is None and sinks is None)
            out[tokens] = _prefill(query[tokens], keys, values, mask, _Scores(scaling, softcap, sinks))
        return out


class _Plan:
    """Index tensors of a step on one device."""

    def __init__(self, spans: Sequence[QuerySpan], block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._masks: dict[tuple[int, MaskPattern], torch.Tensor | None] = {}
        self.prefills: list[_Prefill] = []
        slots: list[int] = []
        decodes: dict[int, list[tuple[int, QuerySpan]]] = {}
        start = 0
        for span in spans:
            positions = range(span.context_len - span.num_queries, span.context_len)
            slots += [span.block_ids[p // block_size] * block_size + p % block_size for p in positions]
            num_pages = -(-span.context_len // block_size)
            if span.num_queries == 1:
                # Groups of like length waste at most half of what they gather.
                decodes.setdefault(num_pages.bit_length(), []).append((start, span))
            else:
                self.prefills.append(_Prefill(start, span, self._tensor(list(span.block_ids[:num_pages]))))
            start += span.num_queries
        self.slot_mapping = self._tensor(slots)
        self.decode_groups = [self._decode_group(members) for members in decodes.values()]

    def decode_mask(self, group: _DecodeGroup, pattern: MaskPattern) -> torch.Tensor | None:
        """Bool `[n, 1, 1, length]`, True where a query sees."""
        key = (id(group), pattern)
        if key not in self._masks:
            positions = torch.arange(group.slots.shape[1], device=self._device)
            self._masks[key] = pattern.sees(group.context_lens[:, None] - 1, positions)[:, None, None]
        return self._masks[key]

    def prefill_mask(self, prefill: _Prefill, pattern: MaskPattern, *, is_plain: bool) -> torch.Tensor | None:
        """Bool `[num_queries, context_len]`; None where plain causal attention says the same."""
        num_queries, context_len = prefill.span.num_queries, prefill.span.context_len
        if num_queries == context_len and is_plain and pattern.is_causal(context_len):
            return None
        key = (id(prefill), pattern)
        if key not in self._masks:
            keys = torch.arange(context_len, device=self._device)
            self._masks[key] = pattern.sees(keys[context_len - num_queries :, None], keys)
        return self._masks[key]

    def _decode_group(self, members: list[tuple[int, QuerySpan]]) -> _DecodeGroup:
        """Past the end of a sequence its last token is repeated, which its query sees anyway."""
        context_lens = self._tensor([span.context_len for _, span in members])
        num_pages = max(-(-span.context_len // self._block_size) for _, span in members)
        pages = self._tensor(
            [(*span.block_ids[:num_pages], *[0] * (num_pages - len(span.block_ids))) for _, span in members]
        )
        positions = torch.arange(num_pages * self._block_size, device=self._device).minimum(context_lens[:, None] - 1)
        slots = pages.gather(1, positions // self._block_size) * self._block_size + positions % self._block_size
        return _DecodeGroup(self._tensor([start for start, _ in members]), slots, context_lens)

    def _tensor(self, values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)


class _Scores(NamedTuple):
    """How scores become shares, see `AttentionStep.attend`."""

    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None

    def of_heads(self, *shape: int) -> _Scores:
        """The same with the heads' sinks in another shape."""
        return self if self.sinks is None else self._replace(sinks=self.sinks.view(shape))


def _decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scores: _Scores,
) -> torch.Tensor:
    """`query` `[n, num_heads, head_dim]`, `keys` `[n, length, num_kv_heads, head_dim]`.

    The query heads that share a key head become the rows of one small matrix, so keys are read once for all of them.
    """
    num_sequences, num_heads, head_dim = query.shape
    grouped = query.reshape(num_sequences, keys.shape[2], -1, head_dim)
    out = _attention(grouped, keys.transpose(1, 2), values.transpose(1, 2), mask, scores.of_heads(keys.shape[2], -1, 1))
    return out.reshape(num_sequences, num_heads, values.shape[-1])


def _prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scores: _Scores,
) -> torch.Tensor:
    """`query` `[n, num_heads, head_dim]`, `keys` `[length, num_kv_heads, head_dim]`."""
    num_queries, num_heads, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    grouped = query.transpose(0, 1).reshape(num_kv_heads, -1, num_queries, head_dim)
    shape = (num_kv_heads, num_heads // num_kv_heads, -1, -1)
    keys, values = keys.transpose(0, 1)[:, None].expand(shape), values.transpose(0, 1)[:, None].expand(shape)
    out = _attention(grouped, keys, values, mask, scores.of_heads(num_kv_heads, -1, 1, 1))
    return out.flatten(0, 1).transpose(0, 1)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scores: _Scores,
) -> torch.Tensor:
    scaling, softcap, sinks = scores
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    assert mask is not None
    products = (query @ key.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    products = products.masked_fill(~mask, -torch.inf)
    if sinks is None:
        return products.softmax(-1).to(value.dtype) @ value
    sinks = sinks.float().expand(*products.shape[:-1], 1)
    shares = torch.cat([products, sinks], -1).softmax(-1)[..., :-1]
    return shares.to(value.dtype) @ value


@contextmanager
def attending(step: Any) -> Iterator[None]:
    """Let attention of models that this thread runs read and write what `step` says."""
    before = current_step()
    _current.step = step
    try:
        yield
    finally:
        _current.step = before


def current_step() -> Any:
    """The step that this thread runs; None if it runs none."""
    return getattr(_current, "step", None)


def refuse_extras(module: Any, kwargs: Mapping[str, Any]) -> None:
    """Refuse what the paged cache does not offer.

    Raises:
        EngineError: If attention is asked for biases or a mask.
    """
    asked = [name for name in _EXTRAS if kwargs.get(name) is not None]
    if asked:
        raise EngineError(
            f"{type(module).__name__} asks for {_EXTRAS[asked[0]]} ({asked[0]}), which the paged cache does not offer."
        )


def _paged_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention signature; `query` is `[1, num_heads, num_tokens, head_dim]`.

    A keyword `sliding_window` is not read: the layer's cache knows what the mask of the model's own attention says.
    """
    step = current_step()
    if step is None:
        raise EngineError(
            "This model belongs to a running engine and computes attention over the engine's cache: load a second "
            "copy to call it directly, or close the engine first."
        )
    if attention_mask is not None or not _EXTRAS.keys().isdisjoint(kwargs):
        refuse_extras(module, {**kwargs, "attention_mask": attention_mask})
    out = step.attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling=scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


AttentionInterface.register(ATTENTION_IMPLEMENTATION, _paged_attention_forward)
