"""Read one PEFT LoRA checkpoint, and refuse by name what is not supported.

The weights are read once, piece by piece, to be checked and hashed, and stay in the file until they are wanted, so a
pool of ten thousand adapters costs neither memory for weights nor an open file per adapter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import torch

from langchain_lora_retriever.errors import InvalidAdapterError, UnsupportedAdapterError
from langchain_lora_retriever.pool.checkpoint_files import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    MAX_WEIGHTS_BYTES,
    PICKLE_FILE,
    WEIGHTS_FILE,
    parse_header,
    read_header,
)
from langchain_lora_retriever.pool.file_weights import (
    CHUNK_BYTES,
    DTYPES,
    FileWeights,
    Layout,
    ModuleLayout,
    hash_of,
)
from langchain_lora_retriever.pool.peft_config import AdapterConfig
from langchain_lora_retriever.pool.regular_files import parse_json, read_one_version, said
from langchain_lora_retriever.support.base_names import is_same_base_model
from langchain_lora_retriever.support.shown import shown
from langchain_lora_retriever.types import Adapter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from langchain_lora_retriever.pool.checkpoint_files import TensorSpec
    from langchain_lora_retriever.pool.regular_files import AdapterFolder, RegularFile

__all__ = ["adapter_of", "read_adapter", "renamed"]

_PREFIX = "base_model.model."
_COMPILED = re.compile(r"(?:(?<=\.)|^)_orig_mod\.")
_KEY = re.compile(
    r"base_model\.model\.([^\x00-\x1f\x7f\ud800-\udfff]{1,512})\."
    r"(?:(lora_[AB])(?:\.default)?\.weight|(lora_embedding_[AB])(?:\.default)?"
    r"|(lora_magnitude_vector)(?:\.default)?(?:\.weight)?|(base_layer)\.weight)"
)
_BASE_WEIGHT = "base_layer"
_MAGNITUDE = "lora_magnitude_vector"
_ADVICE = "An adapter is a folder that PEFT's save_pretrained() writes."
_MAX_CONTAINERS = 10_000

# Adapters of one recipe have the same layout; they share one object.
_LAYOUTS: WeakValueDictionary[bytes, Layout] = WeakValueDictionary()


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
        The adapter, its weights in the file.

    Raises:
        UnsupportedAdapterError: If it needs what is not supported here (modules_to_save, bias, pickle).
        InvalidAdapterError: If files are missing or corrupt, tensors disagree, or the base model is another.
    """
    path = Path(path)
    name = path.name if name is None else name
    return read_one_version(
        path,
        f"adapter {name!r} ({path})",
        lambda folder: adapter_of(folder, name, base_model=base_model, fingerprint=fingerprint),
        guard=contextlib.nullcontext,
    )


def adapter_of(
    folder: AdapterFolder, name: str, *, base_model: str | None = None, fingerprint: str | None = None
) -> Adapter:
    """`read_adapter` of an open folder.

    Raises:
        AdapterError: If it cannot be used.
        OSError: If a file cannot be read.
    """
    where = f"adapter {name!r} ({folder.path})"
    config = AdapterConfig(_read_config(folder, where), where)
    made_for = config.base_model
    if base_model and made_for and not is_same_base_model(base_model, made_for):
        raise InvalidAdapterError(
            f"{where} was trained for the base model {shown(made_for)}, but the base model here is "
            f"{base_model!r}. Use an adapter trained for {base_model!r}."
        )
    file = _open_weights(folder, where)
    layout = _layout_of(file, config, where)
    fingerprint = fingerprint or _checked_hash(file, layout, where)
    return Adapter(
        name=name,
        fingerprint=fingerprint,
        weights=FileWeights(folder.path / WEIGHTS_FILE, name, file, layout, fingerprint),
        base_model=made_for,
        path=folder.path,
        is_target=partial(layout.config.is_target, where=where),
        invocation_tokens=layout.config.invocation_tokens,
    )


def renamed(adapter: Adapter, path: Path) -> Adapter:
    """The adapter after its folder was renamed to `path`."""
    assert isinstance(adapter.weights, FileWeights), "only the folders of adapters that were read from one are renamed"
    adapter.weights.rename(path / WEIGHTS_FILE)
    return dataclasses.replace(adapter, path=path)


def _read_config(folder: AdapterFolder, where: str) -> object:
    try:
        data = folder.read(CONFIG_FILE, MAX_CONFIG_BYTES)
        if data is not None:
            return parse_json(data, _MAX_CONTAINERS)
    except Exception as error:
        raise InvalidAdapterError(f"{where}: cannot read {CONFIG_FILE}: {said(error)}. {_ADVICE}") from error
    raise InvalidAdapterError(f"{where}: cannot read {CONFIG_FILE}: there is no such file. {_ADVICE}")


def _open_weights(folder: AdapterFolder, where: str) -> RegularFile:
    file = folder.open(WEIGHTS_FILE, MAX_WEIGHTS_BYTES)
    if file is None and folder.has(PICKLE_FILE):
        raise UnsupportedAdapterError(
            f"{where} has its weights in {PICKLE_FILE}, a pickle, which can run code when it is read, and is not "
            "opened here. Convert it, in a process that may do nothing else: lora-retriever pool convert "
            f"{folder.path}, or pool.add(..., convert=True)."
        )
    if file is None:
        raise InvalidAdapterError(
            f"{where} has no {WEIGHTS_FILE}. Save it again with PEFT's save_pretrained(), or copy the file into it."
        )
    return file


def _layout_of(file: RegularFile, config: AdapterConfig, where: str) -> Layout:
    """The layout of a file; one object for all files of equal header and configuration."""
    try:
        header = read_header(file)
        num_bytes = file.identity.num_bytes - 8 - len(header)
        key = hashlib.sha256(b"%d\0%b\0%b" % (num_bytes, header, config.recipe.encode())).digest()
        layout = _LAYOUTS.get(key)
        if layout is not None:
            return layout
        tensors = parse_header(header, num_bytes)
    except Exception as error:
        raise InvalidAdapterError(
            f"{where}: {WEIGHTS_FILE} is corrupt or truncated: {said(error)}. Copy the adapter again."
        ) from error
    layout = _LAYOUTS[key] = _make_layout(tensors, Layout(num_bytes, config), where)
    return layout


def _make_layout(tensors: Mapping[str, TensorSpec], layout: Layout, where: str) -> Layout:
    """Gather the tensors of each module, and check them against the configuration and against each other."""
    modules: dict[str, dict[str, TensorSpec]] = {}
    for key, spec in tensors.items():
        module, part = _split_key(key, where)
        _check_tensor(key, spec, 1 if part == _MAGNITUDE else 2, where)
        if part in modules.setdefault(module, {}):
            raise InvalidAdapterError(f"{where}: {WEIGHTS_FILE} holds two {part} of {module!r}.")
        modules[module][part] = spec
    if not modules:
        raise InvalidAdapterError(f"{where}: {WEIGHTS_FILE} holds no tensors.")
    for module, parts in modules.items():
        base_weight = parts.pop(_BASE_WEIGHT, None)
        if base_weight is not None:
            layout.base_weights[module] = base_weight
        layout[module] = _module_layout(module, parts, layout.config, where)
    return layout


def _module_layout(module: str, parts: Mapping[str, TensorSpec], config: AdapterConfig, where: str) -> ModuleLayout:
    sides = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else ("lora_A", "lora_B")
    missing = [side for side in sides if side not in parts]
    strange = parts.keys() - {*sides, _MAGNITUDE}
    if missing or strange:
        met = min(strange) if strange else next(iter(parts), _BASE_WEIGHT)
        raise InvalidAdapterError(f"{where}: {module!r} has a {met} but no {(missing or ['lora_embedding_A'])[0]}.")
    lora_A, lora_B = (parts[side] for side in sides)
    magnitude = parts.get(_MAGNITUDE)
    r, scaling = config.rank_and_scaling(module, where)
    if lora_A.shape[0] != r or lora_B.shape[1] != r:
        raise InvalidAdapterError(
            f"{where}: {module!r} has lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)}, but the "
            f"configuration gives it rank {r}: allowed are [{r}, in_features] and [out_features, {r}]."
        )
    if lora_A.dtype != lora_B.dtype:
        raise InvalidAdapterError(f"{where}: {module!r} has lora_A in {lora_A.dtype} but lora_B in {lora_B.dtype}.")
    if config.is_dora and (magnitude is None or magnitude.shape != (lora_B.shape[0],)):
        met = "has none" if magnitude is None else f"has {list(magnitude.shape)}"
        raise InvalidAdapterError(
            f"{where} is a DoRA adapter (use_dora), so {module!r} needs a {_MAGNITUDE} [{lora_B.shape[0]}], but {met}. "
            "Save it again with save_pretrained()."
        )
    if magnitude is not None and not config.is_dora:
        raise InvalidAdapterError(
            f"{where}: {module!r} has a {_MAGNITUDE}, but the configuration does not say use_dora; PEFT would ignore "
            "it. Set use_dora to true if it was trained as DoRA."
        )
    return ModuleLayout(lora_A, lora_B, scaling, magnitude)


def _split_key(key: str, where: str) -> tuple[str, str]:
    """`base_model.model.<module>.lora_A.weight` -> (`<module>`, `lora_A`); of an embedding `.lora_embedding_A` too.

    A model that was compiled leaves `_orig_mod.` in its modules' names, a state dict saved by hand the adapter's name.
    """
    match = _KEY.fullmatch(_COMPILED.sub("", key))
    if match is not None:
        module, *parts = match.groups()
        return module, next(filter(None, parts))
    if key.startswith(_PREFIX) and ".lora_" not in key:
        raise UnsupportedAdapterError(
            f"{where} brings whole weights of the base model ({shown(key)}), which is not supported here. "
            "Train without modules_to_save, bias and resized embeddings, or merge it into the base model "
            "(merge_and_unload) and serve that."
        )
    raise InvalidAdapterError(
        f"{where}: {WEIGHTS_FILE} holds {shown(key)}; allowed are {_PREFIX}<module>.lora_A.weight and "
        f"{_PREFIX}<module>.lora_B.weight, <module> of up to 512 printable characters."
    )


def _check_tensor(key: str, spec: TensorSpec, num_dims: int, where: str) -> None:
    if spec.dtype not in DTYPES:
        raise UnsupportedAdapterError(f"{where}: {shown(key)} is {spec.dtype}; allowed are {', '.join(DTYPES)}.")
    if 0 in spec.shape:
        raise InvalidAdapterError(f"{where}: {shown(key)} has shape {shown(list(spec.shape))}, which holds no numbers.")
    if len(spec.shape) != num_dims:
        raise UnsupportedAdapterError(
            f"{where}: {shown(key)} has shape {shown(list(spec.shape))} (a convolution?); only linear modules and "
            "embeddings can be adapted."
        )


class _Block(NamedTuple):
    """Tensors of one dtype that lie one after the other, or a part of one.

    Attributes:
        dtype: Theirs.
        begin: Where they begin in the data section.
        firsts: The first element of each, and whose it is: module and what of it.
        num_bytes: Of all.
    """

    dtype: torch.dtype
    begin: int
    firsts: list[tuple[int, str, str]]
    num_bytes: int


def _blocks(parts: Iterable[tuple[TensorSpec, str, str]]) -> Iterator[_Block]:
    """The data section in pieces of up to `CHUNK_BYTES`, in the order in which tensors lie."""
    block: _Block | None = None
    for spec, module, name in sorted(parts, key=lambda item: item[0].offset):
        dtype = DTYPES[spec.dtype]
        stop = spec.offset + math.prod(spec.shape) * dtype.itemsize
        for begin in range(spec.offset, stop, CHUNK_BYTES):
            num_bytes = min(CHUNK_BYTES, stop - begin)
            if block is not None and block.dtype == dtype and block.num_bytes + num_bytes <= CHUNK_BYTES:
                block.firsts.append((block.num_bytes // dtype.itemsize, module, name))
                block = block._replace(num_bytes=block.num_bytes + num_bytes)
                continue
            if block is not None:
                yield block
            block = _Block(dtype, begin, [(0, module, name)], num_bytes)
    if block is not None:
        yield block


def _checked_hash(file: RegularFile, layout: Layout, where: str) -> str:
    """The fingerprint; refuses what is not finite, and what makes an input of 1 so large that its square is not.

    The file is read piece by piece, in few calls that leave the interpreter to others: an engine may be running.
    """
    parts = [(spec, module, name) for module, of_module in layout.items() for name, spec in of_module.tensors.items()]
    parts += [(spec, module, _BASE_WEIGHT) for module, spec in layout.base_weights.items()]
    largest: dict[str, dict[str, float]] = {module: {} for module in layout}
    start = file.identity.num_bytes - layout.num_bytes

    def pieces() -> Iterator[NDArray[np.uint8]]:
        for block in _blocks(parts):
            piece = np.empty(block.num_bytes, np.uint8)
            file.read_into(piece.data, start + block.begin)
            found = _largest(piece, block.dtype, [first for first, _, _ in block.firsts])
            for met, (_, module, name) in zip(found, block.firsts, strict=True):
                if not math.isfinite(met):
                    raise InvalidAdapterError(f"{where}: {name} of {module!r} holds NaN or infinite values.")
                largest[module][name] = max(largest[module].get(name, 0.0), met)
            yield piece

    fingerprint = hash_of(layout, pieces())
    limit = math.sqrt(torch.finfo(torch.float32).max)
    for module, met in largest.items():
        scaling = layout[module].scaling
        if abs(scaling) > limit or met["lora_A"] * met["lora_B"] * abs(scaling) > limit:
            raise InvalidAdapterError(
                f"{where}: {module!r} overflows: the largest of lora_A is {met['lora_A']:.3g}, of lora_B "
                f"{met['lora_B']:.3g}, and the scaling is {scaling:.3g}. Neither it nor their product may exceed "
                f"{limit:.3g}, whose square float32 holds. Train it anew, with a smaller lora_alpha or learning rate."
            )
        if met.get(_MAGNITUDE, 0.0) > limit:
            raise InvalidAdapterError(
                f"{where}: {module!r} overflows: the largest of {_MAGNITUDE} is {met[_MAGNITUDE]:.3g}; allowed is "
                f"{limit:.3g}, whose square float32 holds. Train it anew."
            )
    return fingerprint


def _largest(numbers: NDArray[np.uint8], dtype: torch.dtype, firsts: Sequence[int]) -> list[float]:
    """The largest absolute value from each of some elements up to the next; NaN or infinite if there is one that is.

    The bits of floating-point numbers of one sign are in the numbers' order, NaN behind infinity.
    """
    bits = numbers.view(f"u{dtype.itemsize}")
    sign = 1 << (8 * dtype.itemsize - 1)
    signed = np.maximum.reduceat(bits, firsts)  # a negative one, if there is any
    positive = np.maximum.reduceat(bits.view(f"i{dtype.itemsize}"), firsts).clip(0)
    largest = np.maximum(np.where(signed >= sign, signed & (sign - 1), 0), positive.astype(bits.dtype))
    found: list[float] = torch.from_numpy(largest.view(np.uint8)).view(dtype).double().tolist()
    return found
