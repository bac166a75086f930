"""A look at a pool's folder without torch and PEFT, which take seconds to import.

It knows plain LoRA checkpoints alone. Whatever else it meets is left to those who read pools in earnest, and to their
words.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_lora_retriever.pool.card import Card, read_card
from langchain_lora_retriever.pool.origin import read_origin
from langchain_lora_retriever.pool.regular_files import AdapterFolder, RegularFile
from langchain_lora_retriever.pool.samples import MAX_SAMPLES_BYTES, SAMPLES_FILE, hash_inputs, parse_samples

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from langchain_lora_retriever.pool.origin import Description
    from langchain_lora_retriever.pool.samples import Sample

__all__ = ["ListedAdapter", "list_plain_pool"]

_MAX_CONFIG_BYTES = 4 << 20
_MAX_HEADER_BYTES = 16 << 20
_MAX_WEIGHTS_BYTES = 4 << 30
_KEY = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")
# What a plain configuration says, beside the fields whose values are free.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian"),
    "inference_mode": (True, False),
}
_FREE = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


class ListedAdapter(NamedTuple):
    """What is known of an adapter by its files' beginnings.

    Attributes:
        name: Its folder's name.
        base_model: What its configuration says it was trained for, if anything.
        rank: The largest of its modules' ranks.
        num_modules: Linear modules that it changes.
        num_parameters: Numbers in them.
        num_samples: Lines of its `samples.jsonl`.
        has_embedding: Whether there is an `embedding.npy`.
        described_by: What prompts find it by; None if there is nothing.
        hub: Where on the hub it is from, if it is.
    """

    name: str
    base_model: str | None
    rank: int
    num_modules: int
    num_parameters: int
    num_samples: int
    has_embedding: bool
    described_by: Description | None
    hub: str | None

    @property
    def is_described(self) -> bool:
        """Whether there is anything to find it by."""
        return self.described_by is not None


def list_plain_pool(root: Path) -> list[ListedAdapter] | None:
    """List a pool whose every adapter is plain; None if one is not, or something is wrong with the pool.

    Weights are not looked at: whether their numbers are finite is found out when the pool is read.
    """
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if any(path.name.startswith((".incoming-", ".replaced-")) for path in root.iterdir()):
            return None  # somebody is writing
        listed = [_listed(folder) for folder in folders if any(folder.iterdir())]
    except (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None
    return listed or None


def _listed(folder: Path) -> ListedAdapter:
    """One plain adapter.

    Raises:
        ValueError: If it is none; or whatever odd contents make of the code below.
    """
    if not folder.name.isprintable():
        raise ValueError(folder)
    config = json.loads(_read(folder / "adapter_config.json", _MAX_CONFIG_BYTES))
    for name, value in config.items():
        if name not in _FREE and value and value not in _PLAIN.get(name, ()):
            raise ValueError(name)
    shapes = _shapes(folder / "adapter_model.safetensors")
    ranks: dict[str, dict[str, int]] = {}  # of each module, by both of its tensors
    for key, (rows, columns) in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(key)
        ranks.setdefault(match[1], {})[match[2]] = rows if match[2] == "lora_A" else columns
    allowed = None if config.get("rank_pattern") else config["r"]
    for sides in ranks.values():
        rank = sides["lora_A"]
        if rank < 1 or sides["lora_B"] != rank or allowed not in {None, rank}:
            raise ValueError(folder)
    if (folder / "embedding.npy").exists():
        raise ValueError(folder)
    samples, described_by, hub = _description(folder)
    return ListedAdapter(
        name=folder.name,
        base_model=config.get("base_model_name_or_path"),
        rank=max(sides["lora_A"] for sides in ranks.values()),
        num_modules=len(ranks),
        num_parameters=sum(map(math.prod, shapes.values())),
        num_samples=len(samples),
        has_embedding=False,
        described_by=described_by,
        hub=hub,
    )


def _description(folder: Path) -> tuple[Sequence[Sample], Description | None, str | None]:
    """An adapter's samples, what it is found by, and where on the hub it is from."""
    with AdapterFolder(folder) as opened:
        origin = read_origin(opened)
        data = opened.read(SAMPLES_FILE, MAX_SAMPLES_BYTES)
        card = Card() if data is not None else read_card(opened)
    hub = None if origin.hub is None else str(origin.hub)
    if data is not None:
        samples = parse_samples(data, file=str(folder / SAMPLES_FILE), where=folder.name)
        is_theirs = origin.samples_hash == hash_inputs(sample.input for sample in samples)
        return samples, origin.samples_from if is_theirs else "samples", hub
    if card.examples:
        return card.examples, "card examples", hub
    return (), "card text" if card.text else None, hub


def _shapes(path: Path) -> dict[str, list[int]]:
    """The tensors' shapes, from the header of a safetensors file."""
    with contextlib.closing(RegularFile(path, _MAX_WEIGHTS_BYTES)) as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        if not 0 < num_bytes <= min(_MAX_HEADER_BYTES, file.identity.num_bytes - 8):
            raise ValueError(path)
        header: dict[str, Any] = json.loads(file.read(num_bytes, 8))
        header.pop("__metadata__", None)
        if max(tensor["data_offsets"][1] for tensor in header.values()) != file.identity.num_bytes - 8 - num_bytes:
            raise ValueError(path)
    return {key: tensor["shape"] for key, tensor in header.items()}


def _read(path: Path, max_bytes: int) -> bytes:
    with contextlib.closing(RegularFile(path, max_bytes)) as file:
        return file.read()
