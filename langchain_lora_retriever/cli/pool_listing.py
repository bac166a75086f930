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
from langchain_lora_retriever.pool.checkpoint_files import (
    CONFIG_FILE,
    MAX_BASE_MODEL_LENGTH,
    MAX_CONFIG_BYTES,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_FILE,
    parse_header,
    read_header,
)
from langchain_lora_retriever.pool.origin import read_origin
from langchain_lora_retriever.pool.regular_files import AdapterFolder
from langchain_lora_retriever.pool.samples import MAX_SAMPLES_BYTES, SAMPLES_FILE, hash_inputs, parse_samples

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from langchain_lora_retriever.pool.origin import Description
    from langchain_lora_retriever.pool.samples import Sample

__all__ = ["ListedAdapter", "list_plain_pool"]

_KEY = re.compile(r"base_model\.model\.([\w.-]{1,512})\.(lora_[AB])\.weight")
_DTYPES = {"F64", "F32", "F16", "BF16"}
_LARGEST_ALPHA = 1_000_000
# What a plain configuration says, beside the fields whose values are free.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian"),
    "inference_mode": (True, False),
}
_FREE = {
    "auto_mapping", "base_model_name_or_path", "lora_alpha", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora",
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
        paths = sorted(root.iterdir())
        if any(path.name.startswith((".incoming-", ".replaced-")) for path in paths):
            return None  # somebody is writing
        folders = [path for path in paths if path.is_dir() and not path.name.startswith(".")]
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
    with AdapterFolder(folder) as opened:
        config = json.loads(opened.read(CONFIG_FILE, MAX_CONFIG_BYTES) or b"")
        shapes = _shapes(opened)
        if opened.has("embedding.npy"):
            raise ValueError(folder)
        samples, described_by, hub = _description(opened)
    _check_plain(config)
    targets = set(config["target_modules"])
    ranks: dict[str, dict[str, int]] = {}  # of each module, by both of its tensors
    for key, (rows, columns) in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None or not _is_named(match[1], targets):
            raise ValueError(key)
        ranks.setdefault(match[1], {})[match[2]] = rows if match[2] == "lora_A" else columns
    if any(sides != {"lora_A": config["r"], "lora_B": config["r"]} for sides in ranks.values()):
        raise ValueError(folder)
    return ListedAdapter(
        name=folder.name,
        base_model=config.get("base_model_name_or_path"),
        rank=config["r"],
        num_modules=len(ranks),
        num_parameters=sum(map(math.prod, shapes.values())),
        num_samples=len(samples),
        has_embedding=False,
        described_by=described_by,
        hub=hub,
    )


def _check_plain(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a configuration that says more than which modules a plain LoRA adapts, or says it oddly."""
    if config["peft_type"] != "LORA":
        raise ValueError(config["peft_type"])
    for name, value in config.items():
        is_empty = value in (None, "", [], {}) or value is False
        if name not in _FREE and not is_empty and value not in _PLAIN.get(name, ()):
            raise ValueError(name)
    base_model, targets = config.get("base_model_name_or_path") or "", config["target_modules"]
    is_plain = (
        type(config["r"]) is int
        and config["r"] > 0
        and type(config["lora_alpha"]) in (int, float)
        and 0 <= config["lora_alpha"] <= _LARGEST_ALPHA
        and isinstance(config.get("use_rslora") or False, bool)
        and isinstance(targets, list)
        and all(isinstance(target, str) for target in targets)
        and isinstance(base_model, str)
        and len(base_model) <= MAX_BASE_MODEL_LENGTH
        and base_model.isprintable()
    )
    if not is_plain:
        raise ValueError(config)


def _is_named(module: str, targets: Collection[str]) -> bool:
    """Whether a module is among those that `target_modules` lists."""
    parts = module.split(".")
    return any(".".join(parts[i:]) in targets for i in range(len(parts)))


def _description(folder: AdapterFolder) -> tuple[Sequence[Sample], Description | None, str | None]:
    """An adapter's samples, what it is found by, and where on the hub it is from."""
    origin = read_origin(folder)
    data = folder.read(SAMPLES_FILE, MAX_SAMPLES_BYTES)
    card = Card() if data is not None else read_card(folder)
    hub = None if origin.hub is None else str(origin.hub)
    if data is not None:
        samples = parse_samples(data, file=str(folder.path / SAMPLES_FILE), where=folder.path.name)
        is_theirs = origin.samples_hash == hash_inputs(sample.input for sample in samples)
        return samples, origin.samples_from if is_theirs else "samples", hub
    if card.examples:
        return card.examples, "card examples", hub
    return (), "card text" if card.text else None, hub


def _shapes(folder: AdapterFolder) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes, from the header of the weights' file."""
    file = folder.open(WEIGHTS_FILE, MAX_WEIGHTS_BYTES)
    if file is None:
        raise ValueError(folder.path)
    with contextlib.closing(file):
        header = read_header(file)
    tensors = parse_header(header, file.identity.num_bytes - 8 - len(header))
    if not all(spec.dtype in _DTYPES and all(spec.shape) for spec in tensors.values()):
        raise ValueError(folder.path)
    return {key: spec.shape for key, spec in tensors.items()}
