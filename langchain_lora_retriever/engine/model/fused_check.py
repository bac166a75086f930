"""Decide layer by layer whether a fused forward may stand in for the model's own.

Fused or not, a layer rounds. So both are held against the layer in float32, over the input that it gets in the model:
a fused forward is taken if it is not noticeably farther away than the layer's own forward in the model's own dtype. A
part that it does not know (a multiplier, another norm, a layer without rotation) takes it away by far more than
rounding does.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

from langchain_lora_retriever.engine.model.attention import GatheringStep, PagedCache, QuerySpan, attending
from langchain_lora_retriever.engine.model.base_module import columns_of_weight
from langchain_lora_retriever.engine.model.packed_weight import PackedWeight
from langchain_lora_retriever.engine.model.paged_step import PagedStep, QueryTiles
from langchain_lora_retriever.engine.model.probe import input_device, num_embeddings
from langchain_lora_retriever.engine.pinned_copy import upload
from lora_retriever_kernels.attention import Pages

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.model.fused_layers import FusedForward, FusedLayers
    from langchain_lora_retriever.engine.model.probe import AttentionGeometry, ModelProbe

__all__ = ["check_fused", "is_as_exact"]

_logger = logging.getLogger(__name__)

_NUM_TOKENS = 24
_BLOCK_SIZE = 8
_FACTOR = 2.0  # how much farther from float32 than the layer's own forward a fused one may be
_QUANTILE = 7 / 8  # of the tokens by which that is judged: the first, with its huge values, may be rounded by luck
_FLOOR = {torch.float32: 1e-4, torch.float16: 5e-4}  # what is never too much, relative to what the layer adds
_FLOOR_BFLOAT16 = 4e-3
_MODEL_TOLERANCE = {torch.float32: 1e-3}  # between the logits of all layers together, of the median token
_MODEL_TOLERANCE_16_BIT = 0.25
_MAX_UNITS = 1024  # columns that are read at a time of a weight in a form of its own


class _Call(NamedTuple):
    """A layer's input and output in the model's pass."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


def is_as_exact(got: torch.Tensor, own: torch.Tensor, exact: torch.Tensor, hidden: torch.Tensor) -> bool:
    """Whether one output of a layer is as near to the exact one as its own is.

    Args:
        got: The output to be judged `[num_tokens, hidden_size]`.
        own: What the layer gives by itself, in the same dtype.
        exact: What it gives in float32.
        hidden: Its input.
    """
    added = (exact - hidden.float()).norm(dim=-1)
    allowed = _FACTOR * (own.float() - exact).norm(dim=-1) + _FLOOR.get(got.dtype, _FLOOR_BFLOAT16) * added
    is_near = ((got.float() - exact).norm(dim=-1) <= allowed).float()  # NaN is not
    return bool(is_near.mean() >= _QUANTILE)


@torch.inference_mode()
def check_fused(model: PreTrainedModel, fused: FusedLayers, probe: ModelProbe, tile_size: int) -> None:
    """Attach the fused forwards that are as exact as the layers' own; log, by name, which layers stay unfused and why.

    Args:
        model: The model, on one device, its attention the paged one.
        fused: Its layers; those that are not found equal are taken out.
        probe: What is known of the model.
        tile_size: Most queries of one tile.
    """
    if not any(fused.candidates()):
        return
    caches = {layer: _small_cache(geometry, geometry.dtype) for layer, geometry in probe.attention.items()}
    with attending(_make_step(caches, tile_size, input_device(model))):
        _check(model, fused, probe)


def _check(model: PreTrainedModel, fused: FusedLayers, probe: ModelProbe) -> None:
    calls: dict[int, _Call] = {}
    expected = _run(model, fused, calls)
    names = {id(module): name for name, module in model.named_modules()}
    for index, module, forwards in list(fused.candidates()):
        chosen, reason = _choose(module, forwards, calls[index], probe.attention)
        if chosen is None:
            _logger.warning("%s stays unfused: %s", names[id(module)], reason)
        fused.decide(index, chosen)
    fault = _try_together(model, fused, expected) if fused.num_fused else None
    if fault is not None:
        fused.detach()
        for index, _, _ in list(fused.candidates()):
            fused.decide(index, None)
        _logger.warning("%s stays unfused: its fused layers together %s", type(model).__name__, fault)


def _choose(
    module: nn.Module, forwards: Sequence[FusedForward], call: _Call, geometry: Mapping[int, AttentionGeometry]
) -> tuple[FusedForward | None, str]:
    """The first forward that is as exact as the layer's own; or None, and why not each of them."""
    reasons = []
    for forward in forwards:
        try:
            if not forward.fits(call.kwargs.get("position_embeddings")):
                continue
            if _is_equal(module, forward, call, geometry):
                return forward, ""
            reasons.append("fused it computes something else")
        except Exception as error:  # noqa: BLE001 - whatever it is, the layer's own forward is there and works
            reasons.append(f"fused it fails: {error!r}")
    return None, "; rotated otherwise ".join(reasons)


def _try_together(model: PreTrainedModel, fused: FusedLayers, expected: torch.Tensor) -> str | None:
    """Attach the fused layers and run the model; what is wrong, if anything is."""
    try:
        fused.attach()
        got = _run(model, fused, None)
    except Exception as error:  # noqa: BLE001 - likewise
        return f"fail: {error!r}"
    difference = float(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).median())
    if difference <= _MODEL_TOLERANCE.get(model.dtype, _MODEL_TOLERANCE_16_BIT):
        return None
    return f"change the logits by {difference:.1e} (relative)"


def _run(model: PreTrainedModel, fused: FusedLayers, calls: dict[int, _Call] | None) -> torch.Tensor:
    """Logits of some tokens, in float32; what the layers are called with is put into `calls`."""

    def record(index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            assert calls is not None
            calls[index] = _Call(args, kwargs, output)

        return hook

    handles = []
    if calls is not None:
        handles = [m.register_forward_hook(record(i), with_kwargs=True) for i, m, _ in fused.candidates()]
    token_ids = torch.randint(num_embeddings(model), (1, _NUM_TOKENS), generator=torch.Generator().manual_seed(2))
    device = input_device(model)
    try:
        output = model(
            input_ids=token_ids.to(device),
            position_ids=torch.arange(_NUM_TOKENS, device=device)[None],
            use_cache=False,
        )
    finally:
        for handle in handles:
            handle.remove()
    logits: torch.Tensor = output.logits[0].float()
    return logits


def _is_equal(module: nn.Module, forward: FusedForward, call: _Call, geometry: Mapping[int, AttentionGeometry]) -> bool:
    if not isinstance(call.output, torch.Tensor):
        return False
    hidden = call.args[0] if call.args else call.kwargs["hidden_states"]
    if forward.layer.mlp is None:
        with _without_mlp(module, hidden):
            return _compare(module, forward, call._replace(output=module(*call.args, **call.kwargs)), geometry)
    return _compare(module, forward, call, geometry)


def _compare(module: nn.Module, forward: FusedForward, call: _Call, geometry: Mapping[int, AttentionGeometry]) -> bool:
    hidden = call.args[0] if call.args else call.kwargs["hidden_states"]
    got = forward(*call.args, **call.kwargs)
    layer_idx = forward.layer.layer_idx
    span = QuerySpan(_NUM_TOKENS, _NUM_TOKENS, _blocks())
    step = GatheringStep([span], {layer_idx: _small_cache(geometry[layer_idx], torch.float32)})
    weights = {name: _to_float32(tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    kwargs = {name: _to_float32(value) for name, value in call.kwargs.items()}
    with _own_forwards(module), _exact_products(module, hidden), attending(step):
        exact = functional_call(module, weights, _to_float32(call.args), kwargs)
    return is_as_exact(got[0], call.output[0], exact[0], hidden[0])


@contextmanager
def _without_mlp(layer: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    """Let a layer's MLP give what it gets: what both ways of computing the layer leave to it need no comparison."""
    mlp = layer.mlp
    is_tuple = isinstance(mlp(hidden), tuple)  # type: ignore[operator]
    layer.mlp = _Through(is_tuple=is_tuple)
    try:
        yield
    finally:
        layer.mlp = mlp


class _Through(nn.Module):
    """Gives what it gets, alone or first of two."""

    def __init__(self, *, is_tuple: bool) -> None:
        super().__init__()
        self._is_tuple = is_tuple

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return (hidden_states, None) if self._is_tuple else hidden_states


@contextmanager
def _own_forwards(layer: nn.Module) -> Iterator[None]:
    """Let the modules of a layer, which adapters have wrapped, compute with the weights that they are given."""
    wrapped = {module: vars(module).pop("forward") for module in layer.modules() if "forward" in vars(module)}
    try:
        yield
    finally:
        for module, forward in wrapped.items():
            module.forward = forward


@contextmanager
def _exact_products(layer: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    """Let linear modules whose weights do not give their numbers multiply in float32, which they may not know.

    These have none of the name (GPTQ's, AWQ's), or one of a class that cannot be turned into another (torchao's int4).

    Args:
        layer: Whose modules have their own forwards.
        hidden: An input of the layer: what its modules compute in, and where.
    """
    packed = [
        module
        for module in layer.modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
        and _is_opaque(module._parameters.get("weight"))  # noqa: SLF001 - some make one up when they are asked
    ]  # fmt: skip
    try:
        for module in packed:
            module.forward = partial(nn.functional.linear, **_read_weight(module, hidden))
        yield
    finally:
        for module in packed:
            vars(module).pop("forward", None)


def _read_weight(module: nn.Module, hidden: torch.Tensor) -> dict[str, Any]:
    in_features, bias = module.in_features, getattr(module, "bias", None)
    assert isinstance(in_features, int)
    parts = [slice(i, min(i + _MAX_UNITS, in_features)) for i in range(0, in_features, _MAX_UNITS)]
    columns = [columns_of_weight(module, part, hidden.dtype, hidden.device) for part in parts]
    return {"weight": torch.cat(columns, dim=1), "bias": None if bias is None else bias.float()}


def _is_opaque(weight: torch.Tensor | None) -> bool:
    """Whether a weight is none, or says that it has floating-point numbers and does not give them."""
    if weight is None:
        return True
    is_plain = type(weight) in {torch.Tensor, nn.Parameter, PackedWeight}
    return not is_plain and weight.dtype.is_floating_point and not _has_dequantize(weight)


def _has_dequantize(value: torch.Tensor) -> bool:
    """Whether it is of a class that says how: torch's own method is of another kind."""
    return type(value).dequantize is not torch.Tensor.dequantize


def _to_float32(value: Any) -> Any:
    """The same with every tensor of floating-point numbers in float32, quantised ones included.

    Those that do not give their numbers stay as they are: see `_exact_products`.
    """
    if isinstance(value, PackedWeight):
        return value.dense()
    if isinstance(value, torch.Tensor):
        if _is_opaque(value):
            return value
        if _has_dequantize(value):  # a class of torchao's, which may know no other way
            value = value.dequantize()
        return value.float() if value.is_floating_point() else value
    if type(value) in {tuple, list}:
        return type(value)(_to_float32(item) for item in value)
    return value


def _blocks() -> Sequence[int]:
    return range(_NUM_TOKENS // _BLOCK_SIZE - 1, -1, -1)


def _small_cache(geometry: AttentionGeometry, dtype: torch.dtype) -> PagedCache:
    keys, values = (
        torch.zeros(len(_blocks()), _BLOCK_SIZE, geometry.num_kv_heads, width, dtype=dtype, device=geometry.device)
        for width in (geometry.head_dim, geometry.value_dim)
    )
    return PagedCache(keys, values, geometry.pattern)


def _make_step(caches: Mapping[int, PagedCache], tile_size: int, device: torch.device) -> PagedStep:
    """A step of one sequence, the last token of which is computed as a stream's and the others as a prompt's."""
    last = _NUM_TOKENS - 1
    tiles = [(first, min(tile_size, last - first)) for first in range(0, last, tile_size)]
    pages = Pages(
        upload([list(_blocks())], torch.int32, device),
        torch.zeros(_NUM_TOKENS, dtype=torch.int64, device=device),
        torch.arange(_NUM_TOKENS, device=device),
    )
    return PagedStep(
        caches, pages, QueryTiles(upload([last], torch.int64, device), upload(tiles, torch.int64, device), 1)
    )
