"""Layers that keep a state of each sequence beside attention's pages: linear attention, state spaces, convolutions.

Their mathematics is the model's own. Such a module takes a batch of sequences and a cache that has each one's state;
what is done here is to call it that way from a packed step: the streams of a step together, each prompt by itself, with
their states taken from slots and put back there. A slot belongs to a running request, by its row.
"""

from __future__ import annotations

import contextlib
import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import DynamicCache, cache_utils

from langchain_lora_retriever.engine.model.base_module import give_forward_back
from langchain_lora_retriever.engine.pinned_copy import upload
from langchain_lora_retriever.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from langchain_lora_retriever.engine.model.lora_layers import LoraLayers

__all__ = ["RecurrentGeometry", "RecurrentLayers", "StatePiece", "find_recurrent", "probed_recurrent"]

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # what modules call their cache
_NUM_TOKENS = 8  # of the pass in which they are found


class _StateShape(NamedTuple):
    """One state tensor of a sequence."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class RecurrentGeometry(NamedTuple):
    """What one module keeps of a sequence between its tokens.

    Attributes:
        name: The module's path.
        layer_idx: By which it asks its cache.
        cache_name: What its forward calls the cache.
        device: Where its states lie.
        conv: Its last inputs, by index; None where it has none of an index.
        recurrent: Its recurrent states, likewise.
    """

    name: str
    layer_idx: int
    cache_name: str
    device: torch.device
    conv: tuple[_StateShape | None, ...]
    recurrent: tuple[_StateShape | None, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state, whatever its length."""
        return sum(state.num_bytes for state in (*self.conv, *self.recurrent) if state is not None)


class StatePiece(NamedTuple):
    """Adjacent tokens of a packed step that such a module computes in one call.

    Attributes:
        start: The first of them.
        num_tokens: How many.
        slots: Where the states lie, `[n]` int64: of each token's sequence if these are streams, else of the one.
        is_fresh: Whether a sequence begins here, so that what its slot holds is another's; of streams `[n]` bool.
        is_decode: Whether each token is a stream's; else all are of one sequence.
    """

    start: int
    num_tokens: int
    slots: torch.Tensor
    is_fresh: torch.Tensor | bool
    is_decode: bool

    @staticmethod
    def of(sequences: Sequence[tuple[int, int, int]], device: torch.device) -> list[StatePiece]:
        """The pieces of a step.

        Args:
            sequences: Each one's slot, its tokens before the step, and its tokens in the step.
            device: Where slots are to be looked up.
        """
        pieces: list[StatePiece] = []
        start = index = 0
        while index < len(sequences):
            end = index
            while end < len(sequences) and sequences[end][1] > 0 and sequences[end][2] == 1:
                end += 1
            is_decode = end > index
            end = max(end, index + 1)
            members = sequences[index:end]
            num_tokens = sum(num for _, _, num in members)
            slots = upload([slot for slot, _, _ in members], torch.int64, device)
            pieces.append(StatePiece(start, num_tokens, slots, members[0][1] == 0, is_decode))
            start, index = start + num_tokens, end
        return pieces


class _Finder(DynamicCache):
    """The cache that `generate` would make; notes which module asks for which layer's states."""

    def __init__(self, model: PreTrainedModel, stack: list[str]) -> None:
        super().__init__(config=model.config)
        self.callers: dict[str, int] = {}
        self._stack = stack

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ever."""
        self.callers[self._stack[-1]] = layer_idx
        result: torch.Tensor = super().update_conv_state(conv_states, layer_idx, *args, **kwargs)
        return result

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As ever."""
        self.callers[self._stack[-1]] = layer_idx
        result: torch.Tensor = super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        return result


class _Cache:
    """What a module sees as its cache: transformers' own layer, with the states of the sequences that it computes."""

    def __init__(self, layer: Any) -> None:
        self.layers = _AnyIndex(layer)  # where modules of earlier versions of transformers look
        self._layer = layer

    def get_conv_state(self, _layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        state: torch.Tensor | None = self._layer.conv_states[state_idx]
        return state if self._layer.has_previous_state[state_idx] else None

    def get_recurrent_state(self, _layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        state: torch.Tensor | None = self._layer.recurrent_states[state_idx]
        return state if self._layer.has_previous_state[state_idx] else None

    def update_conv_state(self, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self._layer.update_conv_state(conv_states, *args[1:], **_without_layer(kwargs))
        return result

    def update_recurrent_state(self, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self._layer.update_recurrent_state(recurrent_states, *args[1:], **_without_layer(kwargs))
        return result

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return all(self._layer.has_previous_state.values())

    def is_recording_past(self, _layer_idx: int) -> bool:
        return False


def _without_layer(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "layer_idx"}


class _AnyIndex:
    """The same layer at every index."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getitem__(self, index: int) -> Any:
        return self._layer


@torch.inference_mode()
def find_recurrent(model: PreTrainedModel, device: torch.device) -> tuple[RecurrentGeometry, ...]:
    """Run `model` over some tokens with a cache, and report the modules that keep states in it; () if none does.

    Args:
        model: The model; it is left as it was.
        device: Where its token ids go.

    Raises:
        EngineError: If the model fails with the cache that transformers makes for it.
    """
    kind = getattr(cache_utils, "LinearAttentionCacheLayerMixin", None)
    stack: list[str] = []
    try:
        cache = _Finder(model, stack)
    except (AttributeError, KeyError, TypeError, ValueError):  # a cache of its own kind: probing will tell
        return ()
    if kind is None or not any(isinstance(layer, kind) for layer in cache.layers):
        return ()
    parameters = inspect.signature(model.forward).parameters
    name_of = "cache" if "cache" in parameters else "past_key_values"
    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)),
            module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True),
        ]
    token_ids = torch.arange(_NUM_TOKENS, device=device)[None] % 2
    try:
        model(input_ids=token_ids, position_ids=torch.arange(_NUM_TOKENS, device=device)[None], use_cache=True,
              **{name_of: cache})  # fmt: skip
    except Exception as error:
        raise EngineError(f"{type(model).__name__} could not be run with a cache of its states: {error!r}.") from error
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_read_states(model, name, index, cache.layers[index]) for name, index in cache.callers.items())


def _read_states(model: PreTrainedModel, name: str, layer_idx: int, layer: Any) -> RecurrentGeometry:
    parameters = inspect.signature(type(model.get_submodule(name)).forward).parameters
    cache_name = next((known for known in _CACHE_NAMES if known in parameters), None)
    if cache_name is None:
        raise EngineError(
            f"{name} of {type(model).__name__} keeps a state of each sequence, but its forward takes no cache: it is "
            "not supported."
        )
    conv, recurrent = (
        tuple(None if (s := states[i]) is None else _StateShape(tuple(s.shape[1:]), s.dtype) for i in sorted(states))
        for states in (layer.conv_states, layer.recurrent_states)
    )
    state = next(s for s in (*layer.conv_states.values(), *layer.recurrent_states.values()) if s is not None)
    return RecurrentGeometry(name, layer_idx, cache_name, state.device, conv, recurrent)


@contextlib.contextmanager
def probed_recurrent(model: PreTrainedModel, geometries: Sequence[RecurrentGeometry]) -> Iterator[None]:
    """Let the modules of a model take a row of two sequences of equal length, which both begin there."""
    modules = [model.get_submodule(geometry.name) for geometry in geometries]
    own = [(module, module.forward) for module in modules]
    for (module, forward), geometry in zip(own, geometries, strict=True):
        module.forward = partial(_forward_halves, forward, geometry.cache_name)
    try:
        yield
    finally:
        for module, forward in own:
            give_forward_back(module, forward)


def _forward_halves(forward: Callable[..., torch.Tensor], cache_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    hidden, kwargs = _arguments(args, kwargs)
    out = forward(hidden.reshape(2, -1, hidden.shape[-1]), **{**kwargs, cache_name: None})
    return out.reshape(1, -1, out.shape[-1])


class RecurrentLayers:
    """The modules' states, and their forwards that take them from there, from `attach` to `detach`.

    Args:
        model: The model.
        geometries: Its modules.
        num_slots: Sequences whose states there is room for.
        lora_layers: The adapters of the linear modules within, if there are any.

    Raises:
        EngineError: If there is no memory for the states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        geometries: Sequence[RecurrentGeometry],
        num_slots: int,
        lora_layers: LoraLayers | None = None,
    ) -> None:
        self._lora_layers = lora_layers
        self._pieces: Sequence[StatePiece] = ()
        try:
            self._layers = [_Layer(model.get_submodule(g.name), g, num_slots) for g in geometries]
        except RuntimeError as error:  # whichever allocator it is
            num_bytes = num_slots * sum(geometry.state_bytes for geometry in geometries)
            raise EngineError(
                f"There is no memory for the states of {num_slots:,} sequences ({num_bytes:,} bytes): lower "
                "max_num_seqs."
            ) from error

    def __bool__(self) -> bool:
        """Whether the model has such layers at all."""
        return bool(self._layers)

    def set_step(self, pieces: Sequence[StatePiece]) -> None:
        """Say how the next pass's tokens are shared out."""
        self._pieces = pieces

    def attach(self) -> None:
        """Wrap the modules."""
        for layer in self._layers:
            layer.module.forward = partial(self._forward, layer)

    def detach(self) -> None:
        """Give the modules their own forwards back."""
        for layer in self._layers:
            give_forward_back(layer.module, layer.forward)

    def release(self) -> None:
        """Detach, and drop the states."""
        self.detach()
        self._layers = []

    def _forward(self, layer: _Layer, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden, kwargs = _arguments(args, kwargs)
        outputs = []
        for index, piece in enumerate(self._pieces):
            part = hidden[:, piece.start : piece.start + piece.num_tokens]
            with self._lora_layers.on_piece(index) if self._lora_layers is not None else contextlib.nullcontext():
                outputs.append(layer.run(part, piece, kwargs))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


class _Layer:
    """One module and the states of all sequences."""

    def __init__(self, module: nn.Module, geometry: RecurrentGeometry, num_slots: int) -> None:
        self.module = module
        self.forward: Callable[..., torch.Tensor] = module.forward
        self._geometry = geometry
        self._conv, self._recurrent = (
            {
                index: torch.zeros((num_slots, *state.shape), dtype=state.dtype, device=geometry.device)
                for index, state in enumerate(states)
                if state is not None
            }
            for states in (geometry.conv, geometry.recurrent)
        )

    def run(self, hidden: torch.Tensor, piece: StatePiece, kwargs: dict[str, Any]) -> torch.Tensor:
        """The module's output for one piece `[1, num_tokens, hidden_size]`."""
        slots = piece.slots.to(self._geometry.device)
        layer = cache_utils.LinearAttentionLayer(number_of_states=len(self._geometry.conv))
        if piece.is_fresh is not True:
            self._load(layer, slots, piece.is_fresh)
        if piece.is_decode:
            hidden = hidden.transpose(0, 1)
        out = self.forward(hidden, **{**kwargs, self._geometry.cache_name: _Cache(layer)})
        for index, states in self._conv.items():
            _store(states, slots, layer.conv_states[index])
        for index, states in self._recurrent.items():
            _store(states, slots, layer.recurrent_states[index])
        return out.transpose(0, 1) if piece.is_decode else out

    def _load(self, layer: Any, slots: torch.Tensor, is_fresh: torch.Tensor | bool) -> None:
        """Give the cache's layer the sequences' states: zeros where a sequence begins, which is what it begins with."""

        def take(states: torch.Tensor) -> torch.Tensor:
            if not isinstance(is_fresh, torch.Tensor):
                return states[slots]
            fresh = is_fresh.to(states.device).view(-1, *[1] * (states.dim() - 1))
            return torch.where(fresh, torch.zeros((), dtype=states.dtype, device=states.device), states[slots])

        for index, states in self._conv.items():
            layer.conv_states[index] = take(states)
            layer.conv_kernel_size[index] = states.shape[-1]
            layer.is_conv_states_initialized[index] = True
            layer.dtype, layer.device = states.dtype, states.device
            layer.has_previous_state[index] = True
        for index, states in self._recurrent.items():
            layer.recurrent_states[index] = take(states)
            layer.is_recurrent_states_initialized[index] = True
            layer.has_previous_state[index] = True


def _store(states: torch.Tensor, slots: torch.Tensor, new: torch.Tensor | None) -> None:
    assert new is not None, "the module kept no state"
    states.index_copy_(0, slots, new)


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The hidden states `[1, num_tokens, hidden_size]`, and what else the module is called with."""
    assert len(args) <= 1
    if args:
        return args[0], kwargs
    return kwargs["hidden_states"], {name: value for name, value in kwargs.items() if name != "hidden_states"}
