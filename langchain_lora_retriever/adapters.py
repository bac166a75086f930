"""Read one PEFT LoRA checkpoint, and refuse by name what cannot be honoured.

The configuration is read by PEFT's own `LoraConfig`, with PEFT's own pattern matching. The weights stay in
the file: `MappedWeights` maps it once and makes a tensor only when it is asked for, so a pool of ten thousand
adapters costs neither memory for weights nor an open file per adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open

from langchain_lora_retriever.adapter_config import CONFIG_FILE, AdapterConfig
from langchain_lora_retriever.base_names import is_same_base_model
from langchain_lora_retriever.errors import InvalidAdapterError, UnsupportedAdapterError
from langchain_lora_retriever.types import Adapter, LoraWeights

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "MappedWeights", "read_adapter"]

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Module path -> (lora_A, lora_B, scaling); a tensor is (offset in the data section, shape, dtype).
_TensorSpec = tuple[int, tuple[int, int], torch.dtype]


class _Layout(dict[str, tuple[_TensorSpec, _TensorSpec, float]]):
    """Where each module's tensors lie, and the configuration they were checked against; can be weakly referenced."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config


# Adapters of one recipe have the same layout; they share one object.
_LAYOUTS: WeakValueDictionary[bytes, _Layout] = WeakValueDictionary()


class MappedWeights(Mapping[str, LoraWeights]):
    """The weights of one safetensors file, mapped and not copied.

    The map outlives the file's name: an adapter whose folder is removed stays usable for whoever holds it.

    Args:
        data: The file's tensor section, `[num_bytes]` uint8, usually mapped.
        layout: Where each module's `lora_A` and `lora_B` lie, and its scaling.
    """

    __slots__ = ("_data", "_layout")

    def __init__(self, data: torch.Tensor, layout: _Layout) -> None:
        self._data = data
        self._layout = layout

    def __getitem__(self, module: str) -> LoraWeights:
        lora_A, lora_B, scaling = self._layout[module]
        return LoraWeights(self._view(lora_A), self._view(lora_B), scaling)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)

    def _view(self, spec: _TensorSpec) -> torch.Tensor:
        offset, shape, dtype = spec
        raw = self._data[offset : offset + math.prod(shape) * dtype.itemsize]
        if raw.storage_offset() % dtype.itemsize:  # an unaligned file, legal but rare
            raw = raw.clone()
        return raw.view(dtype).view(shape)

    def content_hash(self) -> str:
        """Sha256 of layout, scalings and every tensor byte."""
        digest = hashlib.sha256(repr(sorted(self._layout.items())).encode())
        digest.update(self._data.numpy().data)
        return digest.hexdigest()


def read_adapter(
    path: str | Path,
    *,
    name: str | None = None,
    base_model: str | None = None,
    fingerprint: str | None = None,
) -> Adapter:
    """Read and validate the PEFT checkpoint in a folder.

    Args:
        path: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: The adapter's name; the folder's name by default.
        base_model: Refuse an adapter made for another base model, as `is_same_base_model` tells them apart.
        fingerprint: What an earlier read of exactly these files returned. Spares hashing and the NaN check.

    Returns:
        The adapter, its weights mapped from the file.

    Raises:
        UnsupportedAdapterError: If it needs what is not honoured here (DoRA, modules_to_save, bias, pickle).
        InvalidAdapterError: If files are missing or corrupt, tensors disagree, or the base model is another.
    """
    path = Path(path)
    name = path.name if name is None else name
    where = f"adapter {name!r} ({path})"
    config = AdapterConfig(_read_json(path / CONFIG_FILE, where), where)
    made_for = config.base_model
    if base_model and made_for and not is_same_base_model(base_model, made_for):
        raise InvalidAdapterError(
            f"{where} was trained for the base model {made_for!r}, but the base model here is "
            f"{base_model!r}. Use an adapter trained for {base_model!r}."
        )
    header, data = _map_file(path, where)
    layout = _shared_layout(header, config, where)
    weights = MappedWeights(data, layout)
    if fingerprint is None:
        _check_finite(weights, where)
        fingerprint = weights.content_hash()
    return Adapter(
        name=name,
        fingerprint=fingerprint,
        weights=weights,
        base_model=made_for,
        path=path,
        is_target=partial(layout.config.is_target, where=where),
    )


def _read_json(file: Path, where: str) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidAdapterError(
            f"{where}: cannot read {CONFIG_FILE}: {error}. An adapter is a folder that PEFT's save_pretrained() writes."
        ) from error


def _map_file(path: Path, where: str) -> tuple[bytes, torch.Tensor]:
    """The header, JSON, and the tensor section `[num_bytes]` uint8, mapped."""
    file = path / WEIGHTS_FILE
    if not file.is_file():
        if (path / _PICKLE_FILE).is_file():
            raise UnsupportedAdapterError(
                f"{where} has its weights in {_PICKLE_FILE}, a pickle, which can run code when it is read. "
                "Load it where you trust it and save it again with save_pretrained(safe_serialization=True)."
            )
        raise InvalidAdapterError(f"{where} has no {WEIGHTS_FILE}.")
    try:
        with safe_open(file, framework="pt"):  # safetensors checks the header, the offsets and the length
            pass
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = stream.read(start - 8)
        mapped = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InvalidAdapterError(
            f"{where}: {WEIGHTS_FILE} is corrupt or truncated: {error}. Copy the adapter again."
        ) from error
    return header, mapped[start:]


def _shared_layout(header: bytes, config: AdapterConfig, where: str) -> _Layout:
    """The layout of a file; one object for all files of equal header and configuration."""
    key = hashlib.sha256(header + config.recipe.encode()).digest()
    layout = _LAYOUTS.get(key)
    if layout is None:
        layout = _LAYOUTS[key] = _make_layout(json.loads(header), config, where)
    return layout


def _make_layout(header: Mapping[str, Any], config: AdapterConfig, where: str) -> _Layout:
    """Pair the tensors of the file, and check them against the configuration and against each other."""
    pairs: dict[str, dict[str, _TensorSpec]] = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        module, side = _split_key(key, where)
        pairs.setdefault(module, {})[side] = _tensor_spec(key, entry, where)
    if not pairs:
        raise InvalidAdapterError(f"{where}: {WEIGHTS_FILE} holds no tensors.")
    layout = _Layout(config)
    for module, sides in pairs.items():
        if len(sides) != 2:
            met, missing = ("lora_A", "lora_B") if "lora_A" in sides else ("lora_B", "lora_A")
            raise InvalidAdapterError(f"{where}: {module!r} has a {met} but no {missing}.")
        lora_A, lora_B = sides["lora_A"], sides["lora_B"]
        r, scaling = config.rank_and_scaling(module, where)
        if lora_A[1][0] != r or lora_B[1][1] != r:
            raise InvalidAdapterError(
                f"{where}: {module!r} has lora_A {list(lora_A[1])} and lora_B {list(lora_B[1])}, but the "
                f"configuration gives it rank {r}: allowed are [{r}, in_features] and [out_features, {r}]."
            )
        if lora_A[2] != lora_B[2]:
            raise InvalidAdapterError(f"{where}: {module!r} has lora_A in {lora_A[2]} but lora_B in {lora_B[2]}.")
        layout[module] = (lora_A, lora_B, scaling)
    return layout


def _split_key(key: str, where: str) -> tuple[str, str]:
    """`base_model.model.<module>.lora_A.weight` -> (`<module>`, `lora_A`)."""
    if key.startswith(_PREFIX):
        for side in ("lora_A", "lora_B"):
            module = key.removeprefix(_PREFIX).removesuffix(f".{side}.weight")
            if len(module) < len(key) - len(_PREFIX):
                return module, side
        if ".lora_embedding_" in key:
            raise UnsupportedAdapterError(f"{where} adapts an embedding ({key}); only linear modules can be.")
        if ".lora_magnitude_vector" in key:
            raise UnsupportedAdapterError(f"{where} is a DoRA adapter ({key}), which is not honoured here.")
        if ".lora_" not in key:
            raise UnsupportedAdapterError(
                f"{where} brings whole weights of the base model ({key}), which is not honoured here. "
                "Train without modules_to_save, bias and resized embeddings."
            )
    raise InvalidAdapterError(
        f"{where}: {WEIGHTS_FILE} holds {key!r}; allowed are {_PREFIX}<module>.lora_A.weight and "
        f"{_PREFIX}<module>.lora_B.weight."
    )


def _tensor_spec(key: str, entry: Mapping[str, Any], where: str) -> _TensorSpec:
    shape = tuple(entry["shape"])
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise UnsupportedAdapterError(f"{where}: {key} is {entry['dtype']}; allowed are {', '.join(_DTYPES)}.")
    if len(shape) != 2:
        raise UnsupportedAdapterError(
            f"{where}: {key} has shape {list(shape)} (a convolution?); only linear modules can be adapted."
        )
    return entry["data_offsets"][0], shape, dtype


def _check_finite(weights: MappedWeights, where: str) -> None:
    """Refuse what is not finite, and what makes an input of 1 so large that a norm, which squares it, is not."""
    limit = math.sqrt(torch.finfo(torch.float32).max)
    for module, lora in weights.items():
        largest_A, largest_B = _largest(lora.lora_A), _largest(lora.lora_B)
        for side, largest in (("lora_A", largest_A), ("lora_B", largest_B)):
            if not math.isfinite(largest):
                raise InvalidAdapterError(f"{where}: {side} of {module!r} holds NaN or infinite values.")
        scaling = abs(lora.scaling)
        if scaling > limit or largest_A * largest_B * scaling > limit:
            raise InvalidAdapterError(
                f"{where}: {module!r} overflows: the largest of lora_A is {largest_A:.3g}, of lora_B {largest_B:.3g}, "
                f"and the scaling is {lora.scaling:.3g}. Neither it nor their product may exceed {limit:.3g}, whose "
                "square float32 holds. Train it anew, with a smaller lora_alpha or learning rate."
            )


def _largest(tensor: torch.Tensor) -> float:
    """The largest absolute value, NaN if there is one."""
    return max(abs(float(x)) for x in torch.aminmax(tensor)) if tensor.numel() else 0.0
