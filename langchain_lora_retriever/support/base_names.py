"""Whether two names of a base model mean the same one.

PEFT writes into an adapter's configuration whatever the base model was loaded by: a hub name, a quantised edition of
it, a folder, a snapshot in a cache.
"""

from __future__ import annotations

import re

__all__ = ["is_same_base_model"]

_MAX_LENGTH = 4096
_SNAPSHOT = re.compile(r"(?:^|/)models--(?:[^/]+--)?([^/]+?)(?:/|$)")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# One word at the end of a name that says how the weights are stored, not which they are.
_EDITION = re.compile(
    r"[-_. ](?:hf|unsloth|bnb|hqq|aqlm|awq|gptq|exl[23]|mlx|gguf|marlin|nf4|fp4|fp8|fp16|fp32|f16|f32|bf16|int[248]"
    r"|[248]-?bits?|w\d+a\d+|i?q\d(?:_[0-9a-z]+)*|dynamic|quantized|g\d+|safetensors)$"
)


def is_same_base_model(first: str, second: str) -> bool:
    """Whether two names, folders or snapshots are of one base model, as far as names can tell.

    The last path component counts, without case and without what says how the weights are stored. So these are one:
    `meta-llama/Llama-3.2-1B`, `/models/llama-3.2-1b/`, `unsloth/Llama-3.2-1B-unsloth-bnb-4bit`,
    `~/.cache/huggingface/hub/models--meta-llama--Llama-3.2-1B/snapshots/4e20de3`, `Llama-3.2-1B/checkpoint-500`.

    Args:
        first: A hub name or a path.
        second: Another.
    """
    return _key(first) == _key(second)


def _key(name: str) -> str:
    path = name[-_MAX_LENGTH:].replace("\\", "/").strip().rstrip("/")
    snapshot = _SNAPSHOT.search(path)
    if snapshot is not None:
        last = snapshot[1]
    else:
        parts = [part for part in path.split("/") if part not in {"", "."}] or [path]
        while len(parts) > 1 and _CHECKPOINT.fullmatch(parts[-1]):
            parts.pop()
        last = parts[-1]
    key = last.casefold().replace("___", ".")  # ModelScope's folders spell a dot so
    if key.startswith("meta-llama-"):  # Llama 3's repositories were renamed
        key = key.removeprefix("meta-")
    while (shorter := _EDITION.sub("", key)) not in {"", key}:
        key = shorter
    return key
