"""DoRA's gains: by what it multiplies each output of a module, worked out once per adapter from the base's weights.

With a base weight `W`, low-rank factors and a magnitude `m` per output, DoRA is the module
`g * (W x + s B A x)` with `g = m / norm(W + s B A)` over each output's row. The norm takes the whole base weight, so it
is computed when an adapter is first wanted, on any thread, and the vectors of gains are kept on the host: they are as
large as the adapter's outputs, and what is loaded from then on is an ordinary pair of factors and one more row.

Source: Liu et al., DoRA, arXiv:2402.09353; `peft.tuners.lora.dora.DoraLinearLayer`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from langchain_lora_retriever.engine.model.base_module import columns_of_weight
from langchain_lora_retriever.errors import InvalidAdapterError, UnsupportedAdapterError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from langchain_lora_retriever.engine.model.base_module import BaseModule
    from langchain_lora_retriever.types import Adapter, LoraWeights

    Columns = Callable[[slice], torch.Tensor]

__all__ = ["DoraGains"]

_MAX_BYTES = 256 << 20  # of gains that are kept
_MAX_ELEMENTS = 1 << 24  # of a base weight that are unpacked to float32 at once
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class DoraGains:
    """The gains of DoRA adapters on one base model, the least recently used dropped. Any thread may call.

    Args:
        modules: The modules that adapters may target, by path.
    """

    def __init__(self, modules: Mapping[str, BaseModule]) -> None:
        self._modules = modules
        self._lock = threading.Lock()  # held for a look into the dictionary
        self._known: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()

    def forget(self) -> None:
        """Let go of all of them."""
        with self._lock:
            self._known.clear()

    def is_known(self, adapter: Adapter) -> bool:
        """Whether an adapter has no gains, or they need not be computed."""
        return not adapter.is_dora or adapter.fingerprint in self._known

    def of(self, adapter: Adapter, weights: Mapping[str, LoraWeights] | None = None) -> Mapping[str, torch.Tensor]:
        """What an adapter multiplies each module's outputs by.

        Args:
            adapter: One that `AdapterFit` has let pass.
            weights: Its weights, where they have been read.

        Returns:
            For each module with a magnitude `[out_features]`, fp32, on the CPU; nothing for plain LoRA.

        Raises:
            UnsupportedAdapterError: If the base model's weights cannot be read, as they lie elsewhere in a packed form.
            InvalidAdapterError: If the adapter's file is not the one that was read any more, or there is no direction
                to give a magnitude to.
        """
        if not adapter.is_dora:
            return {}
        with self._lock:
            known = self._known.get(adapter.fingerprint)
            if known is not None:
                self._known.move_to_end(adapter.fingerprint)
                return known
        weights = dict(adapter.weights) if weights is None else weights
        with torch.inference_mode():
            gains = {
                name: self._gain(adapter, name, w, w.magnitude)
                for name, w in weights.items()
                if w.magnitude is not None
            }
        with self._lock:
            self._known[adapter.fingerprint] = gains
            while len(self._known) > 1 and sum(map(_num_bytes, self._known.values())) > _MAX_BYTES:
                self._known.popitem(last=False)
        return gains

    def _gain(self, adapter: Adapter, name: str, weights: LoraWeights, magnitude: torch.Tensor) -> torch.Tensor:
        columns, device = self._columns(adapter, name)
        lora_a = weights.lora_A.to(device, torch.float32)
        lora_b = weights.lora_B.to(device, torch.float32) * weights.scaling
        out_features, in_features = lora_b.shape[0], lora_a.shape[1]
        squares = torch.zeros(out_features, dtype=torch.float64, device=device)
        step = max(1, _MAX_ELEMENTS // out_features)
        for begin in range(0, in_features, step):
            part = slice(begin, min(begin + step, in_features))
            updated = torch.addmm(columns(part), lora_b, lora_a[:, part])
            squares += updated.square_().sum(1, dtype=torch.float64)
        gain = (magnitude.to(device, torch.float64) / squares.sqrt()).float().cpu()
        if not gain.isfinite().all():
            place = int((~gain.isfinite()).nonzero()[0])
            raise InvalidAdapterError(
                f"adapter {adapter.name!r} ({adapter.path}) is DoRA, which divides its magnitudes by the norms of the "
                f"updated weights; of output {place} of {name!r} they are {float(magnitude[place]):.3g} and "
                f"{float(squares[place].sqrt()):.3g}, which gives no finite number (PEFT would answer NaN). Train it "
                "without this module, if the base's weight has rows of zeros there, as that of a padded vocabulary."
            )
        return gain

    def _columns(self, adapter: Adapter, name: str) -> tuple[Columns, torch.device]:
        """A function that gives columns of a module's weight `[out_features, n]`, fp32, and where they lie."""
        base = self._modules[name]
        weight = base.tensor("weight")
        if weight is not None and type(weight) in {torch.Tensor, nn.Parameter} and weight.dtype in _PLAIN_DTYPES:
            matrix = weight.t() if isinstance(base.module, nn.Embedding) else weight
            return lambda part: matrix[:, part].float(), weight.device
        if hasattr(base.module, "_hf_hook"):  # its forward moves weights about, and the engine's thread calls it too
            raise UnsupportedAdapterError(
                f"adapter {adapter.name!r} ({adapter.path}) is DoRA, which needs the base model's weights, and that of "
                f"{name!r} is both quantised and moved about by accelerate. Load the model without one of the two, or "
                "merge the adapter into it."
            )
        return partial(columns_of_weight, base.module, dtype=base.dtype, device=base.device), base.device


def _num_bytes(gains: Mapping[str, torch.Tensor]) -> int:
    return sum(gain.nbytes for gain in gains.values())
