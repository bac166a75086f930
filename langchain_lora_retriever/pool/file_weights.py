"""The tensors of a safetensors file: its numbers stay on disk until they are wanted.

Nothing is mapped: a file that others may write to would be a mapping that ends the process (SIGBUS), or other numbers
under an old name. Whoever asks for a module gets what was in the file when it was read first, or an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from langchain_lora_retriever.errors import InvalidAdapterError
from langchain_lora_retriever.pool.checkpoint_files import MAX_WEIGHTS_BYTES
from langchain_lora_retriever.pool.regular_files import RegularFile
from langchain_lora_retriever.types import LoraWeights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from langchain_lora_retriever.pool.checkpoint_files import TensorSpec
    from langchain_lora_retriever.pool.peft_config import AdapterConfig

__all__ = ["CHUNK_BYTES", "DTYPES", "FileWeights", "Layout", "ModuleLayout", "hash_of"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK_BYTES = 4 << 20
"""Bytes of a file that are read, checked and hashed at once: what a core's cache holds."""


class ModuleLayout(NamedTuple):
    """Where a module's tensors lie, and its scaling; `magnitude` is DoRA's."""

    lora_A: TensorSpec
    lora_B: TensorSpec
    scaling: float
    magnitude: TensorSpec | None = None

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Its tensors by what they are."""
        tensors = {"lora_A": self.lora_A, "lora_B": self.lora_B, "lora_magnitude_vector": self.magnitude}
        return {name: spec for name, spec in tensors.items() if spec is not None}

    def view(self, look: Callable[[TensorSpec], torch.Tensor]) -> LoraWeights:
        """The module's weights, each tensor as `look` sees it."""
        magnitude = None if self.magnitude is None else look(self.magnitude)
        return LoraWeights(look(self.lora_A), look(self.lora_B), self.scaling, magnitude)


class Layout(dict[str, ModuleLayout]):
    """Where each module's tensors lie; can be weakly referenced.

    Args:
        num_bytes: Size of the data section.
        config: The configuration that it was checked against.

    Attributes:
        base_weights: Where weights of the base model's own lie, by module.
    """

    def __init__(self, num_bytes: int, config: AdapterConfig) -> None:
        super().__init__()
        self.num_bytes = num_bytes
        self.config = config
        self.base_weights: dict[str, TensorSpec] = {}


class _Shapes(Mapping[str, LoraWeights]):
    """A layout without its numbers: tensors on the meta device."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def __getitem__(self, module: str) -> LoraWeights:
        return self._layout[module].view(_meta)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


def _max_held() -> int:
    """How many adapters keep their file open: an eighth of what the process may open, and no more than 128."""
    if sys.platform == "win32":  # an open file cannot be renamed there, nor its folder
        return 0
    import resource  # noqa: PLC0415 - not on Windows

    max_open, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 128 if max_open == resource.RLIM_INFINITY else min(128, max_open // 8)


_HELD: weakref.WeakSet[RegularFile] = weakref.WeakSet()


def _is_held(file: RegularFile) -> bool:
    """Whether a file may stay open, so far as there is room for it among those that do."""
    if len(_HELD) < _max_held():
        _HELD.add(file)
    return file in _HELD


class FileWeights(Mapping[str, LoraWeights]):
    """The weights of one adapter's file, read when a module is asked for.

    The whole file is read for the first module, and kept for as long as anybody holds a tensor of it: `dict(weights)`
    reads it once. Any thread may ask.

    A hundred of them or so keep their file open, so that a version that another process replaces stays whole for those
    who have it; the others open it anew.

    Args:
        path: The file's path.
        name: The adapter's name.
        file: The file as it was checked and hashed. It is kept or closed.
        layout: Where the tensors lie in it.
        fingerprint: `hash_of` layout and data.
    """

    def __init__(self, path: Path, name: str, file: RegularFile, layout: Layout, fingerprint: str) -> None:
        self._path = path
        self._name = name
        identity = file.identity
        # One that was written a moment ago may be written again without another time: not to be recognised by it.
        self._identity = identity if identity.is_settled() else None
        self._start = identity.num_bytes - layout.num_bytes
        self._layout = layout
        self._fingerprint = fingerprint
        self._file = file if _is_held(file) else None
        self._data: weakref.ref[NDArray[np.uint8]] | None = None

    @property
    def shapes(self) -> Mapping[str, LoraWeights]:
        """Shapes, dtypes and scalings, without reading anything: the tensors are on the meta device."""
        return _Shapes(self._layout)

    def __getitem__(self, module: str) -> LoraWeights:
        """The weights of a module.

        Raises:
            KeyError: If the adapter does not adapt it.
            InvalidAdapterError: If the file is not the one that was read any more.
        """
        layout = self._layout[module]
        return layout.view(partial(_view, torch.from_numpy(self._read())))

    @property
    def is_dora(self) -> bool:
        """Whether each module has a magnitude."""
        return self._layout.config.is_dora

    @property
    def base_weights(self) -> Mapping[str, torch.Tensor]:
        """See `Adapter.base_weights`.

        Raises:
            InvalidAdapterError: If the file is not the one that was read any more.
        """
        if not self._layout.base_weights:
            return {}
        data = torch.from_numpy(self._read())
        return {module: _view(data, spec) for module, spec in self._layout.base_weights.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)

    def __contains__(self, module: object) -> bool:
        return module in self._layout

    def __deepcopy__(self, memo: object) -> FileWeights:
        """These weights themselves: nobody changes them, and a file is not copied."""
        return self

    def rename(self, path: Path) -> None:
        """Say that the file was renamed."""
        self._path = path

    def hold(self) -> None:
        """Keep the file open in any case, because it is about to be removed."""
        if self._file is None:
            with contextlib.suppress(OSError):
                self._file = RegularFile(self._path, MAX_WEIGHTS_BYTES)

    def _read(self) -> NDArray[np.uint8]:
        """The data section, `[num_bytes]`."""
        data = self._data() if self._data is not None else None
        if data is None:
            try:
                file = self._file or RegularFile(self._path, MAX_WEIGHTS_BYTES)
                before = file.current_identity()
                data = np.empty(self._layout.num_bytes, np.uint8)
                file.read_into(data.data, self._start)
                after = file.current_identity()
            except (OSError, MemoryError) as error:
                raise self._changed(error) from error
            if not before == after == self._identity:
                if hash_of(self._layout, [data]) != self._fingerprint:
                    raise self._changed("its numbers are others")
                self._identity = before if before == after and before.is_settled() else None
            self._data = weakref.ref(data)
        return data

    def _changed(self, why: object) -> InvalidAdapterError:
        return InvalidAdapterError(
            f"adapter {self._name!r}: {self._path} is not the file any more that was read: {why}. Call "
            f"pool.update({self._name!r}) to read the adapter again. To change one that is served, call "
            f"pool.update({self._name!r}, new_folder); writing into its files changes it half."
        )


def hash_of(layout: Layout, pieces: Any) -> str:
    """Sha256 of layout, scalings, invocation and every byte of the data section, which comes in pieces."""
    plain: list[Any] = sorted((module, _plain(of_module)) for module, of_module in layout.items())
    if layout.config.invocation_tokens:
        plain.append(layout.config.invocation_tokens)
    digest = hashlib.sha256(repr(plain).encode())
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _plain(module: ModuleLayout) -> tuple[Any, ...]:
    magnitude = () if module.magnitude is None else (tuple(module.magnitude),)
    return (tuple(module.lora_A), tuple(module.lora_B), module.scaling, *magnitude)


def _view(data: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    dtype = DTYPES[spec.dtype]
    raw = data[spec.offset : spec.offset + math.prod(spec.shape) * dtype.itemsize]
    if raw.storage_offset() % dtype.itemsize:  # an unaligned file, legal but rare
        raw = raw.clone()
    return raw.view(dtype).view(spec.shape)


def _meta(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta")
