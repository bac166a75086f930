"""Names of models: of the hub, or of a folder."""

from __future__ import annotations

from pathlib import Path

__all__ = ["is_missing_folder"]


def is_missing_folder(name: str) -> bool:
    """Whether a model is named by a path, as no name of the hub is spelled, and nothing is there."""
    is_path = name.startswith(".") or Path(name).is_absolute() or name.count("/") > 1
    return is_path and not Path(name).exists()
