"""The files of a checkpoint: their names, how large they may be, and which tensors a safetensors file has. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_lora_retriever.pool.regular_files import parse_json
from langchain_lora_retriever.support.shown import shown

if TYPE_CHECKING:
    from langchain_lora_retriever.pool.regular_files import RegularFile

__all__ = [
    "CONFIG_FILE",
    "MAX_BASE_MODEL_LENGTH",
    "MAX_CONFIG_BYTES",
    "MAX_WEIGHTS_BYTES",
    "PICKLE_FILE",
    "WEIGHTS_FILE",
    "TensorSpec",
    "parse_header",
    "read_header",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MAX_CONFIG_BYTES = 4 << 20
MAX_WEIGHTS_BYTES = 4 << 30
MAX_BASE_MODEL_LENGTH = 4096
"""Characters of the base model's name."""
_MAX_HEADER_BYTES = 16 << 20
_MAX_TENSORS = 1 << 16
_LARGEST_SIZE = 1 << 40  # of a dimension


class TensorSpec(NamedTuple):
    """Where a tensor lies: offset in the data section, shape, dtype as safetensors names it."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


def read_header(file: RegularFile) -> bytes:
    """The header of a safetensors file, JSON.

    Raises:
        ValueError: If its length is none.
        OSError: If the file cannot be read.
    """
    num_bytes = int.from_bytes(file.read(8), "little") if file.identity.num_bytes >= 8 else -1
    if not 0 < num_bytes <= min(_MAX_HEADER_BYTES, file.identity.num_bytes - 8):
        raise ValueError(f"the header's length is {num_bytes}; allowed are {_MAX_HEADER_BYTES:,} bytes within the file")
    return file.read(num_bytes, 8)


def parse_header(header: bytes, num_bytes: int) -> dict[str, TensorSpec]:
    """The tensors of a safetensors file by name, in the order in which they lie.

    Args:
        header: JSON.
        num_bytes: Size of the data section.

    Raises:
        ValueError: If it is not what safetensors writes, or the tensors do not fill the data section.
    """
    entries = parse_json(header, 3 * _MAX_TENSORS + 2)
    if not isinstance(entries, dict):
        raise ValueError(f"the header is a {type(entries).__name__}, not an object")  # noqa: TRY004 - a value of a file
    entries.pop("__metadata__", None)
    if len(entries) > _MAX_TENSORS:
        raise ValueError(f"the header names {len(entries):,} tensors; allowed are {_MAX_TENSORS:,}")
    tensors = [(*_tensor_spec(name, entry), name) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor[0].offset, tensor[1]))
    end = 0
    for spec, stop, name in tensors:
        if spec.offset != end:
            raise ValueError(f"{shown(name)} begins at {spec.offset}, but the tensor before it ends at {end}")
        end = stop
    if end != num_bytes:
        raise ValueError(f"the tensors have {end} bytes together, the file {num_bytes}")
    return {name: spec for spec, _, name in tensors}


_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


def _tensor_spec(name: str, entry: Any) -> tuple[TensorSpec, int]:
    """Where a tensor lies, and where it ends."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    sizes = [begin, end, *shape]
    if not all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= _LARGEST_SIZE for size in sizes):
        raise ValueError(f"{shown(name)} has a shape or offsets that are none: {shown(entry)}")
    if dtype not in _ITEM_BYTES or math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
        raise ValueError(f"{shown(name)} of {shown(dtype)} {shown(shape)} cannot be in {end - begin} bytes")
    return TensorSpec(begin, tuple(shape), dtype), end
