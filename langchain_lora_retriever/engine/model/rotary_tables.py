"""Cosines and sines of positions, looked up where a model would compute them anew in every step.

transformers' rotary modules take nine launches a step, one after the other, from positions to cosines and sines. Where
their frequencies never change, a table of all positions, computed by the module itself, gives the same bits in one.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from torch import nn
    from transformers import PreTrainedModel


__all__ = ["RotaryTables"]

_STATIC = frozenset({"default", "linear", "llama3", "yarn"})
"""Kinds of rotary embeddings, by their names in configurations, whose frequencies are the same for any length."""
_MAX_BYTES = 64 << 20  # of a table: 131,072 positions of heads of 128 in bfloat16
_NUM_AT_ONCE = 4096  # positions
_NUM_COMPARED = 256


class RotaryTables:
    """The rotary modules of a model's decoder, with forwards that look up, until `detach`.

    A call of another kind than `forward(x, position_ids)` for one row of positions, with the name of a layer type or
    without, goes to the module's own forward; so does one whose results are not as its own were.

    Args:
        model: The model.
        num_positions: Positions that it may be called with.
    """

    def __init__(self, model: PreTrainedModel, num_positions: int) -> None:
        self._lookups = [_Lookup(module, num_positions) for module in _static_modules(model.get_decoder())]
        for lookup in self._lookups:
            lookup.module.forward = lookup

    @property
    def num_tables(self) -> int:
        """How many tables were made: one for each module, dtype and layer type that it was called with."""
        return sum(table is not None for lookup in self._lookups for table in lookup.tables.values())

    def detach(self) -> None:
        """Give the modules their own forwards back, and drop the tables."""
        for lookup in self._lookups:
            vars(lookup.module).pop("forward", None)
        self._lookups = []


class _Lookup:
    """A rotary module's forward.

    Attributes:
        module: The module.
        tables: Cosines and sines `[2, num_positions, width]` by dtype and layer type; None where its own forward runs.
    """

    def __init__(self, module: nn.Module, num_positions: int) -> None:
        self.module = module
        self._own = module.forward
        self._num_positions = num_positions
        self.tables: dict[Hashable, torch.Tensor | None] = {}

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        named = {} if layer_type is None else {"layer_type": layer_type}
        if position_ids.dim() != 2 or position_ids.shape[0] != 1:
            return self._own(x, position_ids, **named)
        key = (x.dtype, x.device, layer_type)
        if key not in self.tables:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():  # a table would lie in the graph's memory
                return self._own(x, position_ids, **named)
            self.tables[key] = self._make(x, named)
        table = self.tables[key]
        if table is None:
            return self._own(x, position_ids, **named)
        cos, sin = table.index_select(1, position_ids[0])
        return cos[None], sin[None]

    def _make(self, x: torch.Tensor, named: dict[str, str]) -> torch.Tensor | None:
        """The table, in the module's own numbers; None if it is too large, or is not what a call elsewhere gives."""
        # Without the first: a module that reckons from the lowest position of a call gives other numbers here.
        some = torch.arange(1, self._num_positions, -(-self._num_positions // _NUM_COMPARED), device=x.device).flip(0)
        if not len(some):
            return None
        sample = self._compute(x, some, named)
        if sample is None or sample.nbytes // len(some) * self._num_positions > _MAX_BYTES:
            return None
        table = sample.new_empty(2, self._num_positions, sample.shape[-1])
        for start in range(0, self._num_positions, _NUM_AT_ONCE):
            end = min(start + _NUM_AT_ONCE, self._num_positions)
            part = self._compute(x, torch.arange(start, end, device=x.device), named)
            if part is None:
                return None
            table[:, start:end] = part
        return table if x.is_meta or torch.equal(table[:, some], sample) else None

    def _compute(self, x: torch.Tensor, positions: torch.Tensor, named: dict[str, str]) -> torch.Tensor | None:
        """Cosines and sines `[2, n, width]` of positions `[n]`; None if the module returns something else."""
        found = self._own(x, positions[None], **named)
        if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(part, torch.Tensor) for part in found):
            return None
        cos, sin = found
        if cos.dim() != 3 or cos.shape[:2] != (1, len(positions)) or (sin.shape, sin.dtype) != (cos.shape, cos.dtype):
            return None
        return torch.cat([cos, sin])


def _static_modules(decoder: nn.Module) -> Iterator[nn.Module]:
    """Rotary modules whose frequencies never change, one for all layer types or one for each."""
    for module in decoder.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if kinds <= _STATIC and "forward" not in vars(module):
            names = list(inspect.signature(module.forward).parameters)
            if names in (["x", "position_ids"], ["x", "position_ids", "layer_type"]):
                yield module
