"""Adapters as vLLM reads them: PEFT checkpoints in folders named by content, which nobody else changes."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from langchain_lora_retriever.vllm.compositions import Member

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from langchain_lora_retriever.types import Adapter

__all__ = ["AdapterFolders"]

_FIRST_ID = 1


class AdapterFolders:
    """Writes adapters out when they are first wanted. One thread at a time may call it.

    vLLM reads an adapter again whenever it has let go of it, so what it reads must stay as it was asked for: a pool's
    files may change meanwhile, and a fusion is in no file.

    Args:
        max_bytes: Of adapters that no request runs: beyond, the least recently used are removed.
    """

    def __init__(self, max_bytes: int) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="lora-retriever-vllm-"))
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # by fingerprint, least recently used first
        self._num_bytes = 0
        self._next_id = _FIRST_ID

    def hold(self, adapters: Sequence[tuple[Adapter, float]]) -> list[Member]:
        """Have adapters' folders, until `release`.

        Raises:
            AdapterError: If an adapter's file is not the one that was read any more.
            OSError: If a folder cannot be written; nothing is held then.
        """
        held: list[Adapter] = []
        members = []
        try:
            for adapter, weight in adapters:
                kept = self._kept.get(adapter.fingerprint) or self._write(adapter)
                self._kept.move_to_end(adapter.fingerprint)
                kept.num_holders += 1
                held.append(adapter)
                members.append(Member(kept.lora_int_id, adapter.fingerprint, str(kept.folder), float(weight)))
        except BaseException:
            self.release(held)
            raise
        return members

    def release(self, adapters: Sequence[Adapter]) -> None:
        """Let go of what `hold` gave."""
        for adapter in adapters:
            self._kept[adapter.fingerprint].num_holders -= 1
        for fingerprint, kept in list(self._kept.items()):
            if self._num_bytes <= self._max_bytes:
                break
            if not kept.num_holders:
                del self._kept[fingerprint]
                self._num_bytes -= kept.num_bytes
                shutil.rmtree(kept.folder)

    def close(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self._root, ignore_errors=True)

    def _write(self, adapter: Adapter) -> _Kept:
        tensors: dict[str, torch.Tensor] = {}
        for module, weights in dict(adapter.weights).items():
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = weights.lora_A.contiguous()
            # Scaled here, in float32: scalings may differ by module.
            tensors[f"{prefix}.lora_B.weight"] = (weights.lora_B.float() * weights.scaling).contiguous()
        rank = adapter.rank
        names = sorted({module.rpartition(".")[2] for module in adapter.shapes})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names, "bias": "none"}
        folder = self._root / f"{self._next_id}-{adapter.fingerprint}"
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        kept = self._kept[adapter.fingerprint] = _Kept(self._next_id, folder, num_bytes)
        self._next_id += 1  # never given twice: the worker may hold the last one of this number still
        self._num_bytes += num_bytes
        return kept


class _Kept:
    __slots__ = ("folder", "lora_int_id", "num_bytes", "num_holders")

    def __init__(self, lora_int_id: int, folder: Path, num_bytes: int) -> None:
        self.lora_int_id = lora_int_id
        self.folder = folder
        self.num_bytes = num_bytes
        self.num_holders = 0
