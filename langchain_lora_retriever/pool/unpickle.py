"""The process that reads a pickle: `python -m langchain_lora_retriever.pool.unpickle TARGET MAX_BYTES < PICKLE`.

It is started by `conversion.py` and is of no use to anybody else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__: list[str] = []


def limit_memory(num_bytes: int) -> None:
    """Let this process take so much more memory than it has now, and start no other one."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return
    status = Path("/proc/self/statm")
    if status.exists():  # elsewhere address space is not counted in a way that could be limited
        taken = int(status.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + num_bytes, taken + num_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def check(loaded: Any) -> Mapping[str, torch.Tensor]:
    """The tensors of a state dict, contiguous and each in memory of its own.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(loaded, dict):
        raise TypeError(f"it holds a {type(loaded).__name__}, not a dictionary of tensors")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise TypeError(f"it maps a {type(key).__name__} to a {type(value).__name__}, not names to tensors")
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            raise TypeError(f"{key[:200]!r} is no plain tensor")
    return {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in loaded.items()}


def main(target: str, max_bytes: int) -> None:
    """Convert what comes through standard input, a file."""
    limit_memory(max_bytes)
    tensors = check(torch.load(sys.stdin.buffer, map_location="cpu", weights_only=True))
    save_file(dict(tensors), target)


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except MemoryError:
        sys.exit("it asks for more memory than it may have")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is wrong with this file
        words = " ".join(str(error).split())
        sys.exit(f"{type(error).__name__}: {words[:300]}")
